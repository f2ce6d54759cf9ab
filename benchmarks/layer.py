"""A whole Transformer layer of the FFHQ-1024 model in training: clean and noise streams under the block-causal mask."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.ops.case import Case, random
from madformer.config import MADFormerConfig, ffhq1024
from madformer.kernels.block_causal_attention import BlockLayout
from madformer.model.layer import TransformerLayer, masked_attention, set_backend
from madformer.model.rope import RotaryEmbedding

STREAMS = ("clean", "noise")


class Layer(nn.Module):
    """A layer with its mask and its rotary tables, as a function of the two streams."""

    def __init__(self, config: MADFormerConfig, backend: str, attention: str) -> None:
        super().__init__()
        layout = BlockLayout(config.block_size, noise_blocks=config.num_blocks, clean_blocks=config.num_blocks)
        self.layer = TransformerLayer(config, STREAMS)
        self.rope = RotaryEmbedding(config)
        self.attention = masked_attention(layout, attention)
        set_backend(self, backend)

    def forward(self, clean_BLC: Tensor, noise_BLC: Tensor) -> tuple[Tensor, Tensor]:
        tables = self.rope.tables()
        streams = {"clean": clean_BLC, "noise": noise_BLC}
        output = self.layer(streams, self.rope, dict.fromkeys(STREAMS, tables), self.attention, STREAMS)
        return output["clean"], output["noise"]


@functools.cache
def layer_of(backend: str, attention: str, device: torch.device) -> Layer:
    """One for each way to run it; what it computes with are the parameters that a case passes."""
    torch.manual_seed(0)
    return Layer(ffhq1024(), backend, attention).to(device, torch.bfloat16)


def way(backend: str, attention: str, *, compiled: bool) -> Callable[..., Any]:
    """The layer on its inputs: the two streams, and every parameter, of which gradients are asked too."""

    def call(layer: Layer, parameters: dict[str, Tensor], clean: Tensor, noise: Tensor) -> Any:
        return functional_call(layer, parameters, (clean, noise))

    call = torch.compile(call) if compiled else call

    def run(clean: Tensor, noise: Tensor, parameters: list[Tensor]) -> Any:
        layer = layer_of(backend, attention, clean.device)
        names = [name for name, _ in layer.named_parameters()]
        return call(layer, dict(zip(names, parameters, strict=True)), clean, noise)

    return run


def _inputs(batch: int, device: torch.device) -> tuple[Tensor, Tensor, list[Tensor]]:
    config = ffhq1024()
    tokens = config.num_blocks * config.block_size
    layer = layer_of("reference", "sdpa", device)
    parameters = [copy.deepcopy(parameter) for parameter in layer.parameters()]
    return (*(random(device, batch, tokens, config.hidden_size) for _ in STREAMS), parameters)


def _flops(batch: int) -> tuple[int, int]:
    """Forward and backward: products with weights go twice as far back, attention two and a half times."""
    config = ffhq1024()
    tokens = 2 * config.num_blocks * config.block_size
    weights = 2 * tokens * (4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size)
    live = config.num_blocks * (config.num_blocks + 1) * config.block_size**2
    attention = 4 * live * config.hidden_size
    return batch * (weights + attention), batch * (2 * weights + 5 * attention // 2)


def cases() -> list[Case]:
    ours = {backend: way(backend, backend, compiled=True) for backend in ("triton", "reference")}

    def run(*inputs: Any, backend: str) -> Any:
        return ours[backend](*inputs)

    peers = {
        "compile": way("reference", "flex", compiled=True),
        "compile, sdpa": way("reference", "sdpa", compiled=True),
        "eager": way("reference", "sdpa", compiled=False),
        "ours, eager": way("triton", "triton", compiled=False),
    }
    return [
        Case(
            op="layer",
            label=f"batch {batch}, 2 x 4096 tokens, bf16",
            inputs=lambda device, batch=batch: _inputs(batch, device),
            run=run,
            forward_flops=_flops(batch)[0],
            backward_flops=_flops(batch)[1],
            peers=peers,
        )
        for batch in (1, 4)
    ]
