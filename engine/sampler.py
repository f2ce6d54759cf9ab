"""Block-by-block sampling with every key and value computed once.

A *plan* holds what depends on batch size, step count and scheduler: the cache and the tabulated noise schedule.
Running it costs, for each block, one pass of the clean predecessor through the layers that read it, one pass of the
condition through the autoregressive layers, and for each step the diffusion layers on the noisy tokens alone.

Shape legend: B batch, M blocks, L latents of a block, C channels, S tokens of a block, E time embedding.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from madformer.engine.cache import KeyValueCache
from madformer.engine.packing import Fingerprint, can_pack, fingerprint, packed
from madformer.engine.schedule import ScheduleTable, tabulate
from madformer.kernels.block_causal_attention import BlockLayout, block_causal_attention
from madformer.kernels.denoise_step import denoise_step
from madformer.model.layer import Attention, Projections, Streams, TransformerLayer
from madformer.model.madformer import MADFormer

NoiseSource = Callable[[int], Tensor]
"""Gives a block's standard normal noise, ``(B, L, C)``."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: ``block`` and ``step`` count from 0.

    ``latents_BLC`` is the block after that step, in the memory that the next step overwrites.
    """

    block: int
    step: int
    latents_BLC: Tensor


class Sampler:
    """Samples ``model`` under ``scheduler``.

    Args:
        model: in eval mode, on the device and in the dtype to compute in.
        scheduler: any diffusers scheduler; it is copied. DDIM and DPM-Solver++ (orders 1 and 2) are tabulated and
            applied by the fused kernel, every other runs through its own ``step``.
        backend: of the fused update; see :func:`madformer.kernels.denoise_step.denoise_step`.
        pack_weights: on a CPU, compute with a second copy of the weights in oneDNN's layout where that is possible
            (:mod:`madformer.engine.packing`).
    """

    def __init__(self, model: MADFormer, scheduler: Any, *, backend: str = "auto", pack_weights: bool = True) -> None:
        self.model = model
        self.pack_weights = pack_weights and can_pack(model)
        self.scheduler = copy.deepcopy(scheduler)
        self.backend = backend

    def plan(self, batch: int, num_inference_steps: int) -> Plan:
        """Allocate and tabulate for ``batch`` images of ``num_inference_steps`` steps a block.

        Raises:
            ValueError: a step count that the scheduler does not have, or an empty batch.
        """
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        return Plan(self.model, self.scheduler, batch, num_inference_steps, self.backend, self.pack_weights)


class Plan:
    """A batch size and a step count made ready; :meth:`run` may be called again and again."""

    def __init__(
        self,
        model: MADFormer,
        scheduler: Any,
        batch: int,
        num_inference_steps: int,
        backend: str,
        pack_weights: bool,
    ) -> None:
        self.source = self.model = model
        self.config, self.batch, self.backend = model.config, batch, backend
        self.pack_weights = pack_weights
        self.packed_from: Fingerprint | None = None
        self.num_inference_steps = num_inference_steps
        self.table: ScheduleTable | None = tabulate(scheduler, num_inference_steps, model.device)
        self.scheduler = scheduler
        if self.table is None:
            scheduler.set_timesteps(num_inference_steps, device=model.device)
        timesteps = scheduler.timesteps if self.table is None else self.table.timesteps
        self.timesteps = timesteps.to(model.device)
        self.cache = KeyValueCache(
            self.config.num_layers,
            batch,
            self.config.num_heads,
            self.config.num_blocks * self.config.block_size,
            self.config.head_dim,
            dtype=model.dtype,
            device=model.device,
            backend=model.backend,
        )
        # oneDNN and cuDNN convolve channels-last fastest, and blocks of latents arrive so
        model.downsampler.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.upsampler.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def run(
        self,
        noise: NoiseSource,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """Draw ``batch`` images.

        Args:
            noise: called once for each block, in order.
            generator: for the noise that a stochastic scheduler adds in its steps.
            callback: called after every step.

        Returns:
            Clean latents ``(B, M, L, C)`` in fp32, made in inference mode.
        """
        self.cache.reset()
        self._renew()
        blocks: list[Tensor] = []
        for block in range(self.config.num_blocks):
            condition = self._condition(block, blocks[-1] if blocks else None)
            latents = noise(block).to(self.model.device, torch.float32)
            blocks.append(self._denoise(block, latents, condition, generator, callback))
            if not self.config.has_clean_stream:
                # the noise stream is its own context: what its layers saw last stays
                self.cache.advance(self.config.block_size)
        return torch.stack(blocks, dim=1)

    def _renew(self) -> None:
        """What is made of the weights, which may have changed since the last run."""
        if self.pack_weights and (current := fingerprint(self.source)) != self.packed_from:
            self.model, self.packed_from = packed(self.source), current
        down, up = self.model.downsampler.time_embedding, self.model.upsampler.time_embedding
        self.down_temb_TE, self.up_temb_TE = down(self.timesteps), up(self.timesteps)
        # the released sampler embeds the clean block with the last timestep of the previous block's loop
        left_over = self.timesteps[-1:] if self.config.clean_timestep == "noisy" else self.timesteps.new_zeros(1)
        self.clean_temb_E = down(left_over)[0]

    def _condition(self, block: int, previous_BLC: Tensor | None) -> Tensor | None:
        """Pass the finished block into the cache and, shifted, through the autoregressive layers."""
        model, config = self.model, self.config
        if previous_BLC is None:
            shifted = model.boi.expand(self.batch, -1, -1) if config.has_condition else None
        elif config.context == "noise":
            shifted = None
        else:
            temb = self.clean_temb_E.expand(self.batch, -1)
            shifted, _ = model.embed(previous_BLC[:, None].to(model.dtype), temb)
            if config.has_clean_stream:
                self._layers("clean", shifted, block - 1, range(model.clean_layers), needs_output=False)
                self.cache.advance(config.block_size)
        if not config.has_condition or shifted is None:
            return None
        return self._layers("noise", shifted, block, range(config.ar_layers))

    def _layers(
        self, stream: str, tokens_BSC: Tensor, block: int, layers: range, *, needs_output: bool = True
    ) -> Tensor:
        """One block of one stream through some layers, on the cached prefix."""
        tables = {stream: self.model.rope.tables(block, 1)}
        streams: Streams = {stream: tokens_BSC}
        for index in layers:
            outputs = [stream] if needs_output or index < layers[-1] else []
            layer = self.model.layers[index]
            assert isinstance(layer, TransformerLayer)
            streams = layer(streams, self.model.rope, tables, self._attention(index), outputs)
        return streams.get(stream, tokens_BSC)

    def _attention(self, index: int) -> Attention:
        cross_block = self.config.cross_block_attention or index < self.config.ar_layers
        own_block = BlockLayout(self.config.block_size, noise_blocks=1)

        def attend(projections: Projections) -> Tensor | None:
            if cross_block:
                return self.cache.attend(index, projections)
            return block_causal_attention(*projections.heads(), own_block, backend=self.model.attention_backend)

        return attend

    def _denoise(
        self,
        block: int,
        latents_BLC: Tensor,
        condition_BSC: Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        callback: Callable[[Progress], None] | None,
    ) -> Tensor:
        """The step loop of one block."""
        update = self._tabulated_update() if self.table is not None else self._scheduler_update(generator)
        latents = latents_BLC * self._init_noise_sigma()
        for step in range(len(self.timesteps)):
            scaled = latents if self.table is not None else self._scale(latents, step)
            latents = update(step, latents, self._predict(block, step, scaled, condition_BSC))
            if callback is not None:
                callback(Progress(block, step, latents))
        return latents

    def _predict(self, block: int, step: int, latents_BLC: Tensor, condition_BSC: Tensor | None) -> Tensor:
        """The network's prediction ``(B, L, C)`` at one step."""
        model, diffusion_layers = self.model, range(self.config.ar_layers, self.config.num_layers)
        temb = self.down_temb_TE[step].expand(self.batch, -1)
        noisy, skips = model.embed(latents_BLC[:, None].to(model.dtype), temb)
        tokens = noisy if condition_BSC is None else condition_BSC + noisy
        tokens = self._layers("noise", tokens, block, diffusion_layers)
        return model.decode(tokens, self.up_temb_TE[step].expand(self.batch, -1), skips)[:, 0]

    def _init_noise_sigma(self) -> float:
        return self.table.init_noise_sigma if self.table is not None else float(self.scheduler.init_noise_sigma)

    def _tabulated_update(self) -> Callable[[int, Tensor, Tensor], Tensor]:
        table = self.table
        assert table is not None
        previous: Tensor | None = None

        def update(step: int, latents: Tensor, output: Tensor) -> Tensor:
            nonlocal previous
            if previous is None:
                previous = torch.zeros_like(latents)
            rows = table.coefficients[step].expand(self.batch, -1)
            denoise_step(latents, output, previous, rows, clip=table.clip, backend=self.backend)
            return latents

        return update

    def _scheduler_update(
        self, generator: torch.Generator | list[torch.Generator] | None
    ) -> Callable[[int, Tensor, Tensor], Tensor]:
        # a fresh state for every block: multistep schedulers remember the last one's predictions
        self.scheduler.set_timesteps(self.num_inference_steps, device=self.model.device)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        keywords = {"generator": generator} if takes_generator else {}

        def update(step: int, latents: Tensor, output: Tensor) -> Tensor:
            return self.scheduler.step(output.float(), self.timesteps[step], latents, **keywords).prev_sample

        return update

    def _scale(self, latents: Tensor, step: int) -> Tensor:
        return self.scheduler.scale_model_input(latents, self.timesteps[step])
