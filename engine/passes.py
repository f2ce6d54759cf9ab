"""The network's work on some of the slots: one denoising step, and the autoregressive pass between two blocks.

Each pass reads and writes the state of its slots (:mod:`.slots`, :mod:`.cache`) and nothing else. No value of it is
ever needed on the host, so a pass can be captured once as a CUDA graph and replayed at every block and step.

Shape legend: B samples of a pass, L latents of a block, C channels, S tokens of a block.
"""

from __future__ import annotations

from torch import Tensor

from madformer.engine.cache import CacheView, ConditioningCache
from madformer.engine.rows import put, take
from madformer.engine.slots import Slots
from madformer.kernels.block_causal_attention import BlockLayout, block_causal_attention
from madformer.kernels.denoise_step import denoise_step_op
from madformer.model.layer import Attention, Projections, Streams, TransformerLayer
from madformer.model.madformer import MADFormer


class Passes:
    """The passes of ``model`` over ``slots``.

    Every method takes ``rows_B``, int64: the slots that it works on, or None for all of them, in order.

    Args:
        clip: bound of the predicted clean sample, or None.
        backend: of the fused update; see :func:`madformer.kernels.denoise_step.denoise_step`.
    """

    def __init__(
        self, model: MADFormer, cache: ConditioningCache, slots: Slots, clip: float | None, backend: str
    ) -> None:
        self.model, self.config = model, model.config
        self.cache, self.slots = cache, slots
        self.clip, self.update = clip, denoise_step_op(backend, model.device)
        # rotation of each row's block at hand: looked up once a block
        shape = (len(slots.block_R), self.config.block_size, model.rope.cos.shape[-1])
        self.cos_RSD, self.sin_RSD = (table.new_zeros(shape) for table in (model.rope.cos, model.rope.sin))

    def reset(self) -> None:
        """Put every row before the first step of its first block."""
        self.cache.reset()
        self.slots.reset()

    def first_block(self, rows_B: Tensor | None) -> None:
        """Before the first block: its noise, and the condition that the BOI block gives."""
        self.cache.reset(rows_B)
        self.slots.start_block(rows_B)
        self._look_up_rotation(rows_B)
        if self.config.has_condition:
            batch = len(take(self.slots.block_R, rows_B))
            self._predict_condition(rows_B, self.model.boi.expand(batch, -1, -1))

    def next_block(self, rows_B: Tensor | None) -> None:
        """Between two blocks: pass the finished one into the cache and, shifted, on to the condition."""
        config, slots, clean_layers = self.config, self.slots, self.model.clean_layers
        finished_BLC = slots.finish_block(rows_B)
        if config.has_condition or clean_layers:
            shifted_BSC = self._embed_clean(rows_B, finished_BLC)
        if clean_layers:
            self._layers("clean", shifted_BSC, rows_B, range(clean_layers), needs_output=False)
        # without a clean stream the noise stream is its own context: what its layers saw last stays
        self.cache.advance(config.block_size, rows_B)
        slots.start_next_block(rows_B)
        self._look_up_rotation(rows_B)
        if config.has_condition:
            self._predict_condition(rows_B, shifted_BSC)

    def denoise(self, rows_B: Tensor | None) -> None:
        """One step of every sample, each at its own block and step."""
        down_BE, up_BE, coefficients = self.slots.schedule(rows_B)
        latents_BLC = take(self.slots.latents_RLC, rows_B)
        previous_BLC = take(self.slots.previous_RLC, rows_B)
        output = self.predict(rows_B, latents_BLC, down_BE, up_BE)
        self.update(latents_BLC, output, previous_BLC, coefficients, self.clip)
        self.slots.finish_step(rows_B, latents_BLC, previous_BLC)

    def predict(self, rows_B: Tensor | None, latents_BLC: Tensor, down_BE: Tensor, up_BE: Tensor) -> Tensor:
        """The network's prediction ``(B, L, C)`` for noisy latents, with the time embeddings of the U-Net's halves."""
        config, model = self.config, self.model
        tokens_BSC, skips = model.embed(latents_BLC[:, None].to(model.dtype), down_BE)
        if config.has_condition:
            tokens_BSC = take(self.cache.condition_RLC, rows_B) + tokens_BSC
        layers = range(config.ar_layers, config.num_layers)
        tokens_BSC = self._layers("noise", tokens_BSC, rows_B, layers)
        return model.decode(tokens_BSC, up_BE, skips)[:, 0]

    def _embed_clean(self, rows_B: Tensor | None, finished_BLC: Tensor) -> Tensor:
        temb_BE = self.slots.clean_embedding(rows_B)
        tokens_BSC, _ = self.model.embed(finished_BLC[:, None].to(self.model.dtype), temb_BE)
        return tokens_BSC

    def _predict_condition(self, rows_B: Tensor | None, shifted_BSC: Tensor) -> None:
        condition_BSC = self._layers("noise", shifted_BSC, rows_B, range(self.config.ar_layers))
        put(self.cache.condition_RLC, rows_B, condition_BSC)

    def _look_up_rotation(self, rows_B: Tensor | None) -> None:
        block_B = take(self.slots.block_R, rows_B)
        for table, rotation_RSD in ((self.model.rope.cos, self.cos_RSD), (self.model.rope.sin, self.sin_RSD)):
            by_block = table.unflatten(0, (-1, self.config.block_size))
            put(rotation_RSD, rows_B, by_block.index_select(0, block_B))

    def _layers(
        self,
        stream: str,
        tokens_BSC: Tensor,
        rows_B: Tensor | None,
        layers: range,
        *,
        needs_output: bool = True,
    ) -> Tensor:
        """One block of one stream through some layers, on the cached prefix of its slot."""
        tables = {stream: (take(self.cos_RSD, rows_B), take(self.sin_RSD, rows_B))}
        view = self.cache.view(rows_B, self.config.block_size)
        streams: Streams = {stream: tokens_BSC}
        for index in layers:
            outputs = [stream] if needs_output or index < layers[-1] else []
            layer = self.model.layers[index]
            assert isinstance(layer, TransformerLayer)
            streams = layer(streams, self.model.rope, tables, self._attention(view, index), outputs)
        return streams.get(stream, tokens_BSC)

    def _attention(self, view: CacheView, index: int) -> Attention:
        cross_block = self.config.cross_block_attention or index < self.config.ar_layers
        own_block = BlockLayout(self.config.block_size, noise_blocks=1)

        def attend(projections: Projections) -> Tensor | None:
            if cross_block:
                return view.attend(index, projections)
            return block_causal_attention(*projections.heads(), own_block, backend=self.model.attention_backend)

        return attend
