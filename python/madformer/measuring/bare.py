"""The network's arithmetic without an engine, and how much of it there is.

Shape legend: B batch, L latents of a block, C channels, S tokens of a block, E time embedding, H heads, D head dim,
M blocks, R rows of the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from madformer.config import MADFormerConfig
from madformer.engine.cache import ConditioningCache
from madformer.engine.plan import Plan
from madformer.engine.sharing import SharedPasses
from madformer.model import MADFormer
from madformer.model.layer import Attention, Projections, Streams, TransformerLayer


class BareModel:
    """Embedding, layers and decoding of a batch, called directly: what an engine cannot do without.

    Latents, time embeddings and the finished prefix are tensors that are there already. Keys and values go to a fixed
    place behind the prefix, by the kernel that norms and rotates them, and PyTorch attends to a slice: no length is
    kept or read, there are no slots and no schedule, the prediction is not used, and nothing is looked at. The numbers
    are arbitrary, the shapes those of sampling.

    Args:
        model: packed or not; what the engine to compare with computes with.
        cache: for B rows; its memory is used, and overwritten.
    """

    def __init__(self, model: MADFormer, cache: ConditioningCache) -> None:
        self.model, self.config, self.cache = model, model.config, cache
        batch, config = len(cache.condition_RLC), model.config
        self.batch = batch
        self.latents_B1LC = torch.randn(
            batch, 1, config.latents_per_block, config.latent_channels, device=model.device, dtype=model.dtype
        )
        # of the U-Net's halves, and of AdaLN
        self.down_BT, self.up_BT, vector_BC = (
            torch.randn(batch, width, device=model.device) for width in config.told_widths
        )
        self.modulation_BC = vector_BC if config.modulated else None
        starts_M = config.text_length + config.block_size * torch.arange(config.num_blocks, device=model.device)
        self.positions_MB = starts_M[:, None].expand(-1, batch)

    def ar(self, block: int) -> Tensor | None:
        """The pass before ``block``: the finished block through the layers that read it, and the condition if any.

        The text, which is read once for all blocks, is left out.
        """
        config, clean_layers = self.config, self.model.clean_layers if block else 0
        if not config.has_condition and not clean_layers:
            return None
        if block:
            shifted = self.model.embed(self.latents_B1LC, self.down_BT)[0]
        else:
            shifted = self.model.boi.expand(self.batch, -1, -1)
        if clean_layers:
            self._layers("clean", shifted, block - 1, range(clean_layers), needs_output=False)
        return self._layers("noise", shifted, block, range(config.ar_layers)) if config.has_condition else None

    def denoise(self, block: int) -> Tensor:
        """The prediction ``(B, 1, L, C)`` of one step of ``block``."""
        tokens_BSC, skips = self.model.embed(self.latents_B1LC, self.down_BT)
        if self.config.has_condition:
            tokens_BSC = self.cache.condition_RLC + tokens_BSC
        tokens_BSC = self._layers("noise", tokens_BSC, block, range(self.config.ar_layers, self.config.num_layers))
        return self.model.decode(tokens_BSC, self.up_BT, skips, self.modulation_BC)

    def unet(self) -> Tensor:
        """The part of a step that is not the Transformer's; the same for every block."""
        tokens_BSC, skips = self.model.embed(self.latents_B1LC, self.down_BT)
        return self.model.decode(tokens_BSC, self.up_BT, skips, self.modulation_BC)

    def steps(self, block: int, count: int) -> None:
        """So many steps, one after the other as a plan launches them; of shares they meet after the last."""
        for _ in range(count):
            self.denoise(block)

    def unets(self, count: int) -> None:
        """As :meth:`steps`, of the part of each that is not the Transformer's."""
        for _ in range(count):
            self.unet()

    def _layers(
        self, stream: str, tokens_BSC: Tensor, block: int, layers: range, *, needs_output: bool = True
    ) -> Tensor:
        rope, size = self.model.rope, self.config.block_size
        cos, sin = (table[block * size :][:size] for table in rope.tables())
        tables = {stream: (cos, sin)}
        streams: Streams = {stream: tokens_BSC}
        modulation_B1C = None if self.modulation_BC is None else self.modulation_BC[:, None]
        for index in layers:
            outputs = [stream] if needs_output or index < layers[-1] else []
            layer = self.model.layers[index]
            assert isinstance(layer, TransformerLayer)
            streams = layer(streams, rope, tables, self._attention(index, block), outputs, modulation_B1C)
        return streams.get(stream, tokens_BSC)

    def _attention(self, index: int, block: int) -> Attention:
        size, text = self.config.block_size, self.config.text_length
        cross_block = self.config.cross_block_attention or index < self.config.ar_layers
        # block-local ones read the text too: as much of the prefix as it has tokens
        end = text + (block + 1) * size
        span = slice(0 if cross_block else end - size - text, end)
        keys, values = self.cache.keys_RHSD[index], self.cache.values_RHSD[index]

        def attend(projections: Projections) -> Tensor | None:
            q_BHLD = projections.heads_into(keys, values, self.positions_MB[block], None)
            return (
                None if q_BHLD is None else F.scaled_dot_product_attention(q_BHLD, keys[:, :, span], values[:, :, span])
            )

        return attend


class SharedBareModel:
    """Bare models of the shares that a plan draws in (:mod:`madformer.engine.sharing`), each in its own thread."""

    def __init__(self, passes: SharedPasses) -> None:
        self.passes = passes
        self.parts = [BareModel(passes.model, part.cache) for part in passes.parts]

    def ar(self, block: int) -> None:
        self.passes.each("bare AR pass", lambda share: self.parts[share].ar(block))

    def denoise(self, block: int) -> None:
        self.steps(block, 1)

    def unet(self) -> None:
        self.unets(1)

    def steps(self, block: int, count: int) -> None:
        self.passes.each("bare steps", lambda share: self.parts[share].steps(block, count))

    def unets(self, count: int) -> None:
        self.passes.each("bare U-Net", lambda share: self.parts[share].unets(count))


def bare_model(plan: Plan) -> BareModel | SharedBareModel:
    """What a plan's passes are held against: on the same weights and cache, in the same shares."""
    if isinstance(plan.passes, SharedPasses):
        return SharedBareModel(plan.passes)
    return BareModel(plan.model, plan.cache)


@dataclass(frozen=True)
class Work:
    """What one image asks for.

    Attributes:
        ar_flops, step_flops: of the AR passes of all blocks, and of one denoising step at every block: products,
            convolutions and attention, two for a multiply-add; the rest is not counted.
        unet_flops: of ``step_flops``, the U-Net's.
        step_bytes: of the weights that one denoising step at one block reads, whatever the batch.
    """

    num_blocks: int
    ar_flops: int
    step_flops: int
    unet_flops: int
    step_bytes: int

    @classmethod
    def of(cls, model: MADFormer) -> Work:
        """Operations are counted on the ``meta`` device by PyTorch's own formulas, bytes of the weights as they are."""
        layers = [layer for layer in model.layers if isinstance(layer, TransformerLayer)]
        towers = [layer.tower("noise") for layer in layers[model.config.ar_layers :]]
        modules = [*towers, model.downsampler, model.upsampler]
        named = chain.from_iterable((*module.named_parameters(), *module.named_buffers()) for module in modules)
        # what the time becomes is tabulated: a step does not read those weights
        tensors = [tensor for name, tensor in named if not name.startswith("time_emb") and ".time_emb_" not in name]
        return cls(
            num_blocks=model.config.num_blocks,
            **_flops(model.config),
            step_bytes=sum(tensor.nbytes for tensor in tensors),
        )

    def flops(self, steps: int) -> int:
        """Of an image with that many denoising steps a block."""
        return self.ar_flops + steps * self.step_flops

    def weight_bytes(self, steps: int) -> int:
        """What the denoising steps of a batch read, whatever its size; AR passes, one a block, are left out."""
        return self.num_blocks * steps * self.step_bytes


@functools.lru_cache
def _flops(config: MADFormerConfig) -> dict[str, int]:
    meta = torch.device("meta")
    with meta:
        model = MADFormer(config).to(meta).requires_grad_(False)
    model.set_backend("reference")
    cache = ConditioningCache(config, 1, dtype=model.dtype, device=meta, backend="reference")
    bare, last = BareModel(model, cache), config.num_blocks - 1
    # every further block adds the same to the prefix: the sum over blocks is an arithmetic series
    between = last * (_count(bare.ar, 1) + _count(bare.ar, last)) // 2 if last else 0
    return {
        "ar_flops": _count(bare.ar, 0) + between,
        "step_flops": config.num_blocks * (_count(bare.denoise, 0) + _count(bare.denoise, last)) // 2,
        "unet_flops": config.num_blocks * _count(bare.unet),
    }


def _count(work: Callable[..., object], *block: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work(*block)
    return counter.get_total_flops()
