"""Attention of a noise block to the cached blocks and to itself, as the FFHQ-1024 model samples.

The engine has the block in the cache already, and in flight a batch is some rows of a larger cache. With the block
apart the kernel reads two tensors, which saves the cache a write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.ops.case import Case, random
from madformer.kernels.cached_attention import cached_attention

HEADS, HEAD_DIM = 18, 64
BLOCK_SIZE, NUM_BLOCKS = 256, 16
BATCHES = (1, 2, 4, 8, 16, 32, 64)
# Blocks done, for each batch: sixteen rows of the record, and every set has the mean of 0 to 15.
PREFIXES = {"cached": (0, 2, 4, 6, 9, 11, 13, 15), "in rows": (0, 5, 10, 15), "apart": (0, 5, 10, 15)}


def make_inputs(device: torch.device, batch: int, prefix: int, layout: str) -> tuple[Tensor, ...]:
    """One layer's cache at its full capacity, with the block behind the prefix in it, and what ``layout`` adds."""
    num_rows = 2 * batch if layout == "in rows" else batch
    k_cache, v_cache = (
        random(device, num_rows, HEADS, NUM_BLOCKS * BLOCK_SIZE, HEAD_DIM, grad=False) for _ in range(2)
    )
    q = random(device, batch, HEADS, BLOCK_SIZE, HEAD_DIM, grad=False)
    length = prefix if layout == "apart" else prefix + BLOCK_SIZE
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    if layout == "in rows":
        return q, k_cache, v_cache, lengths, torch.arange(num_rows - 1, 0, -2, dtype=torch.int32, device=device)
    if layout == "apart":
        own = (cache[:, :, prefix : prefix + BLOCK_SIZE].clone() for cache in (k_cache, v_cache))
        return q, k_cache, v_cache, lengths, *own
    return q, k_cache, v_cache, lengths


def attend_to_rows(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, rows: Tensor, backend: str) -> Tensor:
    return cached_attention(q, k_cache, v_cache, lengths, rows_B=rows, backend=backend)


def fused(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = SDPBackend.FLASH_ATTENTION) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def make_peers(batch: int, prefix: int, layout: str) -> dict[str, Callable[..., Tensor]]:
    """``sdpa`` and ``cudnn`` get what they need as a slice of the cache; the others pay for bringing it together."""
    total = prefix + BLOCK_SIZE

    def sliced(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> Tensor:
        return fused(q, k_cache[:batch, :, :total], v_cache[:batch, :, :total])

    def cudnn(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> Tensor:
        return fused(q, k_cache[:batch, :, :total], v_cache[:batch, :, :total], SDPBackend.CUDNN_ATTENTION)

    def concatenating(q: Tensor, k_cache: Tensor, v_cache: Tensor, _: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = ((k_cache, k), (v_cache, v))
        return fused(q, *(torch.cat((cache[:, :, :prefix], own), dim=2) for cache, own in parts))

    def gathering(q: Tensor, k_cache: Tensor, v_cache: Tensor, _: Tensor, rows: Tensor) -> Tensor:
        return fused(q, k_cache[:, :, :total][rows], v_cache[:, :, :total][rows])

    moving = {"apart": {"cat+sdpa": concatenating}, "in rows": {"gather+sdpa": gathering}}
    # Time is short: at one image, where latency is what matters, cuDNN's too.
    return {"sdpa": sliced} | moving.get(layout, {}) | ({"cudnn": cudnn} if batch == 1 else {})


def make_case(batch: int, prefix: int, layout: str) -> Case:
    total = prefix + BLOCK_SIZE
    return Case(
        op="cached_attention",
        label=f"batch {batch}, prefix {prefix}, own {BLOCK_SIZE} {layout}, bf16",
        inputs=lambda device: make_inputs(device, batch, prefix, layout),
        run=attend_to_rows if layout == "in rows" else cached_attention,
        forward_bytes=2 * batch * HEADS * HEAD_DIM * (2 * BLOCK_SIZE + 2 * total),
        forward_flops=4 * batch * HEADS * BLOCK_SIZE * total * HEAD_DIM,
        peers=make_peers(batch, prefix, layout),
    )


def cases() -> list[Case]:
    return [
        make_case(batch, block * BLOCK_SIZE, layout)
        for layout, blocks in PREFIXES.items()
        for batch in BATCHES
        for block in blocks
    ]
