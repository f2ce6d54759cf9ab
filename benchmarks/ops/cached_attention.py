"""Attention of a noise block to the cached blocks and to itself, as the FFHQ-1024 model samples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from madformer.kernels.cached_attention import cached_attention
from ops.case import Case, random

HEADS, HEAD_DIM = 18, 64
BLOCK_SIZE, NUM_BLOCKS = 256, 16
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def make_inputs(device: torch.device, batch: int, prefix: int) -> tuple[Tensor, ...]:
    """One layer's cache at its full capacity, and the block behind the prefix both in it and by itself.

    A slice of the cache is then what concatenating would give, for a peer that is not to pay for that.
    """
    capacity = NUM_BLOCKS * BLOCK_SIZE
    k_cache, v_cache = (random(device, batch, HEADS, capacity, HEAD_DIM, grad=False) for _ in range(2))
    q = random(device, batch, HEADS, BLOCK_SIZE, HEAD_DIM, grad=False)
    k, v = (cache[:, :, prefix : prefix + BLOCK_SIZE].clone() for cache in (k_cache, v_cache))
    return q, k_cache, v_cache, torch.full((batch,), prefix, dtype=torch.int32, device=device), k, v


def fused(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = SDPBackend.FLASH_ATTENTION) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def make_case(batch: int, prefix: int) -> Case:
    total = prefix + BLOCK_SIZE

    def concatenated(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> Tensor:
        return fused(q, k_cache[:, :, :total], v_cache[:, :, :total])

    def cudnn(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> Tensor:
        return fused(q, k_cache[:, :, :total], v_cache[:, :, :total], SDPBackend.CUDNN_ATTENTION)

    def concatenating(q: Tensor, k_cache: Tensor, v_cache: Tensor, _: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = ((k_cache, k), (v_cache, v))
        return fused(q, *(torch.cat((cache[:, :, :prefix], own), dim=2) for cache, own in parts))

    return Case(
        op="cached_attention",
        label=f"batch {batch}, prefix {prefix}, own {BLOCK_SIZE}, bf16",
        inputs=lambda device: make_inputs(device, batch, prefix),
        run=cached_attention,
        forward_bytes=2 * batch * HEADS * HEAD_DIM * (2 * BLOCK_SIZE + 2 * total),
        forward_flops=4 * batch * HEADS * BLOCK_SIZE * total * HEAD_DIM,
        # Time is short: at one image, where latency is what matters, cuDNN's too.
        peers={"sdpa": concatenated, "cat+sdpa": concatenating} | ({"cudnn": cudnn} if batch == 1 else {}),
    )


def cases() -> list[Case]:
    return [make_case(batch, block * BLOCK_SIZE) for batch in BATCHES for block in range(NUM_BLOCKS)]
