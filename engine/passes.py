"""The network's work on some of the slots: one denoising step, and the autoregressive pass between two blocks.

Each pass reads and writes the state of its slots (:mod:`.slots`, :mod:`.cache`) and nothing else. No value of it is
ever needed on the host, so a pass can be captured once as a CUDA graph and replayed at every block and step.

Under guidance every sample passes the Transformer twice, in one batch: conditional rows first, then their unconditional
twins. What both have in common, the U-Net's downward half, runs once.

What is cached: keys and values of the text and of finished blocks in every layer, and the condition of the block at
hand. They are written once an image, in :meth:`Passes.first_block` and :meth:`Passes.next_block`. A step writes the
keys and values of its own block behind them, where the next step overwrites them. There is no mask: what lies in the
cache is what may be seen. What is made of weights (:meth:`Passes.follow`, :mod:`.packing`) is compared anew when a run
begins and after whatever a run calls.

Shape legend: B samples of a pass, N rows of the cache that they have (B, or 2 B under guidance), L latents of a block,
C channels, S tokens of a block.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from madformer.engine.cache import CacheView, ConditioningCache
from madformer.engine.rows import put, take
from madformer.engine.schedulers import model_input
from madformer.engine.slots import Slots
from madformer.kernels import BlockLayout, block_causal_attention
from madformer.kernels.denoise_step import denoise_step_op
from madformer.model.layer import Attention, Projections, Streams, TransformerLayer
from madformer.model.madformer import MADFormer
from madformer.model.plain import cast


class Passes:
    """The passes of ``model`` over ``slots``.

    Every pass takes ``rows_B``, int64: the slots that it works on, or None for all of them, in order.

    A sampler that differs from the paper's is a subclass, given to :class:`~madformer.engine.sampler.Sampler` as
    ``passes``. It may override :meth:`first_block`, :meth:`next_block`, :meth:`read_text`, :meth:`diffuse` and
    :meth:`attention`; what it reads of the host must not change between replays, or it is run without capture.

    Args:
        clip: bound of the predicted clean sample, or None.
        backend: of the fused update; see :func:`madformer.kernels.denoise_step.denoise_step`.
        refresh_every: how many steps a round of them has; see :meth:`denoise_round`.
    """

    def __init__(
        self,
        model: MADFormer,
        cache: ConditioningCache,
        slots: Slots,
        clip: float | None,
        backend: str,
        refresh_every: int = 1,
    ) -> None:
        self.model, self.config = model, model.config
        self.cache, self.slots = cache, slots
        self.clip, self.update = clip, denoise_step_op(backend, model.device)
        # what the model computes in, which is not what it keeps its weights in where it casts them itself
        self.branches, self.dtype = slots.branches, cache.condition_RLC.dtype
        self.refresh_every = refresh_every
        # what the diffusion layers added to the tokens of each row when they ran last
        self.added_RLC = torch.zeros_like(cache.condition_RLC) if refresh_every > 1 else None
        # rotation of each row's block at hand: looked up once a block
        shape = (len(cache.lengths_R), self.config.block_size, model.rope.cos.shape[-1])
        self.cos_RSD, self.sin_RSD = (table.new_zeros(shape) for table in (model.rope.cos, model.rope.sin))

    def follow(self, model: MADFormer) -> None:
        """Compute with another model of the same kind from now on, and look up anew what was looked up in the last."""
        self.model = model
        self._look_up_rotation(None)

    def rest(self) -> None:
        """Let go of the model, until :meth:`follow`."""
        vars(self).pop("model", None)

    def at_work(self) -> AbstractContextManager[None]:
        """Within it passes are run, again and again: a subclass may keep ready what that takes."""
        return nullcontext()

    def reset(self) -> None:
        """Put every row before the first step of its first block."""
        self.cache.reset()
        self.slots.reset()

    def first_block(self, rows_B: Tensor | None) -> None:
        """Before the first block: the text, the block's noise, and the condition that the BOI block gives."""
        rows_N = self._cache_rows(rows_B)
        self.cache.reset(rows_N)
        if self.config.text is not None:
            self.read_text(rows_N)
        self.slots.start_block(rows_B)
        self._look_up_rotation(rows_B)
        if self.config.has_condition:
            batch = len(take(self.cache.lengths_R, rows_N))
            self._predict_condition(rows_N, self.model.boi.expand(batch, -1, -1).to(self.dtype))

    def next_block(self, rows_B: Tensor | None) -> None:
        """Between two blocks: pass the finished one into the cache and, shifted, on to the condition."""
        config, slots, clean_layers = self.config, self.slots, self.model.clean_layers
        rows_N = self._cache_rows(rows_B)
        finished_BLC = slots.finish_block(rows_B)
        if config.has_condition or clean_layers:
            temb_BE = slots.clean_embedding(rows_B)
            tokens_BSC, _ = self.model.embed(cast(finished_BLC[:, None], self.dtype), temb_BE)
            shifted_NSC = self._for_branches(tokens_BSC)
        if clean_layers:
            self.run_layers("clean", shifted_NSC, rows_N, range(clean_layers), needs_output=False)
        # without a clean stream the noise stream is its own context: what its layers saw last stays
        self.cache.advance(config.block_size, rows_N)
        slots.start_next_block(rows_B)
        self._look_up_rotation(rows_B)
        if config.has_condition:
            self._predict_condition(rows_N, shifted_NSC)

    def denoise_round(self, rows_B: Tensor | None) -> None:
        """``refresh_every`` steps, of which the first alone runs the diffusion layers."""
        for index in range(self.refresh_every):
            self.denoise(rows_B, refresh=index == 0)

    def denoise_steps(self, first: int, count: int) -> None:
        """Steps of all rows from this one of a block on, of which those that begin a round run the diffusion layers."""
        for index in range(first, first + count):
            self.denoise(None, refresh=index % self.refresh_every == 0)

    def denoise(self, rows_B: Tensor | None, *, refresh: bool = True) -> None:
        """One step of every sample, each at its own block and step.

        Args:
            refresh: run the diffusion layers. Else what they added when they ran last is added again.
        """
        *time, guidance_B1, coefficients = self.slots.schedule(rows_B)
        latents_BLC = take(self.slots.latents_RLC, rows_B)
        previous_BLC = take(self.slots.previous_RLC, rows_B)
        outputs = self.predict(rows_B, latents_BLC, *time, refresh=refresh)
        guided = (outputs[1], guidance_B1[:, 0]) if self.branches > 1 else ()
        self.update(latents_BLC, outputs[0], previous_BLC, coefficients, self.clip, *guided)
        self.slots.finish_step(rows_B, latents_BLC, previous_BLC)

    def denoise_by(
        self,
        scheduler: Any,
        timestep: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        *,
        refresh: bool = True,
    ) -> None:
        """:meth:`denoise` of all slots at one ``timestep``, ended by the ``step`` of a scheduler of diffusers."""
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        keywords = {"generator": generator} if takes_generator else {}
        # a copy: schedulers of several stages keep the sample that they were given
        latents = self.slots.latents_RLC.clone()
        *time, guidance_B1, _ = self.slots.schedule(None)
        outputs = self.predict(None, model_input(scheduler, latents, timestep), *time, refresh=refresh)
        output, *unconditional = (x.float() for x in outputs)
        for other in unconditional:
            output = other + guidance_B1[:, None] * (output - other)
        stepped = scheduler.step(output, timestep, latents, **keywords).prev_sample
        # not where a scheduler clamps what the network gave: infinity would be forgotten
        self.slots.finish_step(None, stepped + 0 * output, self.slots.previous_RLC)

    def predict(
        self,
        rows_B: Tensor | None,
        latents_BLC: Tensor,
        down_BE: Tensor,
        up_BE: Tensor,
        time_BC: Tensor,
        *,
        refresh: bool = True,
    ) -> tuple[Tensor, ...]:
        """The network's prediction ``(B, L, C)`` for noisy latents, and under guidance the unconditional one.

        Args:
            down_BE, up_BE, time_BC: what the U-Net's halves and AdaLN are told of the time.
            refresh: as :meth:`denoise`.
        """
        config, model, rows_N = self.config, self.model, self._cache_rows(rows_B)
        tokens_BSC, skips = model.embed(cast(latents_BLC[:, None], self.dtype), down_BE)
        tokens_NSC = self._for_branches(tokens_BSC)
        if config.has_condition:
            tokens_NSC = take(self.cache.condition_RLC, rows_N) + tokens_NSC
        modulation_NC = self._modulation(rows_N, time_BC)
        if refresh:
            output_NSC = self.diffuse(tokens_NSC, rows_N, modulation_NC)
            if self.added_RLC is not None:
                put(self.added_RLC, rows_N, output_NSC - tokens_NSC)
            tokens_NSC = output_NSC
        else:
            assert self.added_RLC is not None
            tokens_NSC = tokens_NSC + take(self.added_RLC, rows_N)
        skips = tuple(self._for_branches(skip) for skip in skips)
        output_NLC = model.decode(tokens_NSC, self._for_branches(up_BE), skips, modulation_NC)[:, 0]
        if output_NLC.dtype == torch.float64:
            output_NLC = output_NLC.float()  # the latents are fp32
        return output_NLC.chunk(self.branches)

    def read_text(self, rows_N: Tensor | None) -> None:
        """Fill the cache with the text of these rows of it, and move them on to their first block."""
        text_NP = take(self.slots.text_NP, rows_N)
        layers = range(self.config.num_layers)
        tokens_NPC = self.model.embed_tokens(text_NP).to(self.dtype)
        self.run_layers("text", tokens_NPC, rows_N, layers, needs_output=False)
        self.cache.advance(self.config.text_length, rows_N)

    def diffuse(self, tokens_NSC: Tensor, rows_N: Tensor | None, modulation_NC: Tensor | None) -> Tensor:
        """The diffusion layers of one step: tokens ``(N, S, C)`` of the noisy block of these rows, to their output."""
        layers = range(self.config.ar_layers, self.config.num_layers)
        return self.run_layers("noise", tokens_NSC, rows_N, layers, modulation_NC)

    def run_layers(
        self,
        stream: str,
        tokens_NSC: Tensor,
        rows_N: Tensor | None,
        layers: range,
        modulation_NC: Tensor | None = None,
        *,
        needs_output: bool = True,
    ) -> Tensor:
        """The text, or one block of one stream, through some layers, on the cached prefix of its row."""
        tables = {stream: self.rotation(stream, rows_N)}
        view = self.cache.view(rows_N, tokens_NSC.shape[1])
        streams: Streams = {stream: tokens_NSC}
        # the same for all tokens
        modulation_N1C = None if modulation_NC is None else modulation_NC[:, None]
        for index in layers:
            outputs = [stream] if needs_output or index < layers[-1] else []
            layer = self.model.layers[index]
            assert isinstance(layer, TransformerLayer)
            attention = self.attention(view, index, stream)
            streams = layer(streams, self.model.rope, tables, attention, outputs, modulation_N1C)
        return streams.get(stream, tokens_NSC)

    def attention(self, view: CacheView, index: int, stream: str) -> Attention:
        """How the tokens of a stream attend in the layer of that index; ``view`` is of the rows at hand."""
        if stream == "text":
            return partial(view.attend_causally, index)
        if self.config.cross_block_attention or index < self.config.ar_layers:
            return partial(view.attend, index)
        return partial(self._attend_apart, view, index)

    def rotation(self, stream: str, rows_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens of a stream, of these rows of the cache."""
        if stream == "text":
            return self.model.rope.text_tables()
        return take(self.cos_RSD, rows_N), take(self.sin_RSD, rows_N)

    def _cache_rows(self, rows_B: Tensor | None) -> Tensor | None:
        """Where the cache has these samples: each branch has as many rows as there are slots."""
        if rows_B is None or self.branches == 1:
            return rows_B
        num_slots = len(self.slots.block_R)
        return torch.cat([rows_B + branch * num_slots for branch in range(self.branches)])

    def _for_branches(self, tensor_B: Tensor) -> Tensor:
        return tensor_B if self.branches == 1 else torch.cat([tensor_B] * self.branches)

    def _modulation(self, rows_N: Tensor | None, time_BC: Tensor) -> Tensor | None:
        if not self.config.modulated:
            return None
        time_NC = self._for_branches(time_BC)
        if self.config.num_classes:
            time_NC = time_NC + take(self.slots.class_NC, rows_N)
        return F.silu(time_NC)

    def _predict_condition(self, rows_N: Tensor | None, shifted_NSC: Tensor) -> None:
        condition_NSC = self.run_layers("noise", shifted_NSC, rows_N, range(self.config.ar_layers))
        put(self.cache.condition_RLC, rows_N, condition_NSC)

    def _look_up_rotation(self, rows_B: Tensor | None) -> None:
        place_N, rows_N = self._for_branches(self.slots.place(rows_B)), self._cache_rows(rows_B)
        for table, rotation_RSD in ((self.model.rope.cos, self.cos_RSD), (self.model.rope.sin, self.sin_RSD)):
            by_block = table.unflatten(0, (-1, self.config.block_size))
            put(rotation_RSD, rows_N, by_block.index_select(0, place_N))

    def _attend_apart(self, view: CacheView, index: int, projections: Projections) -> Tensor:
        """A block to the text and to itself."""
        length = self.config.text_length
        q, k, v = projections.heads()
        if length:
            text_k, text_v = view.text(index, length)
            k, v = torch.cat((text_k, k), dim=2), torch.cat((text_v, v), dim=2)
        own_block = BlockLayout(self.config.block_size, noise_blocks=1, text_length=length, text_queries=False)
        return block_causal_attention(q, k, v, own_block, backend=self.model.attention_backend)
