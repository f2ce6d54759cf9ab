"""Queries, keys and values of the FFHQ-1024 model: a layer's two streams in training, one block in sampling."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.case import Case, random
from madformer.kernels.qk_norm_rope import (
    qk_norm_rope,
    qk_norm_rope_cached,
    qk_norm_rope_cached_ref,
    qk_norm_rope_ref,
)

HEADS, HEAD_DIM = 18, 64
STREAMS, STREAM_TOKENS = 2, 4096
BLOCK, CACHE_TOKENS = 256, 4096
PART_BYTES = HEADS * HEAD_DIM * 2  # queries, keys or values of one token
TABLE_BYTES = 2 * HEAD_DIM * 4
GEOMETRY: dict[str, int] = {"num_heads": HEADS, "axes": 2}


def parameters(device: torch.device, tokens: int, *, grad: bool) -> list[Tensor]:
    """Weights of queries and keys, cosines and sines."""
    weights = [random(device, HEAD_DIM, dtype=torch.float32, grad=grad) for _ in range(2)]
    return weights + [random(device, tokens, HEAD_DIM, dtype=torch.float32, grad=False) for _ in range(2)]


def training_inputs(device: torch.device, batch: int) -> tuple[list[Tensor], ...]:
    streams = [
        [random(device, batch, STREAM_TOKENS, 3 * HEADS * HEAD_DIM), *parameters(device, STREAM_TOKENS, grad=True)]
        for _ in range(STREAMS)
    ]
    return tuple(list(entries) for entries in zip(*streams, strict=True))


def sampling_inputs(device: torch.device, batch: int) -> tuple[Tensor, ...]:
    caches = [random(device, batch, HEADS, CACHE_TOKENS, HEAD_DIM, grad=False) for _ in range(2)]
    positions = BLOCK * (torch.arange(batch, device=device) % (CACHE_TOKENS // BLOCK))
    qkv = random(device, batch, BLOCK, 3 * HEADS * HEAD_DIM, grad=False)
    return qkv, *parameters(device, BLOCK, grad=False), *caches, positions


def in_flight_inputs(device: torch.device, batch: int) -> tuple[Tensor, ...]:
    """Samples that joined a cache of twice as many rows one by one."""
    qkv, *others, positions = sampling_inputs(device, 2 * batch)
    rows = torch.arange(1, 2 * batch, 2, device=device, dtype=torch.int32)
    return qkv[:batch], *others, positions[:batch], rows


def cached_in_rows(function: Any, *inputs: Any, **options: Any) -> Any:
    return function(*inputs[:-1], rows_B=inputs[-1], **GEOMETRY, **options)


def peers(reference: Any) -> dict[str, Any]:
    return {
        "eager": partial(reference, **GEOMETRY),
        "compile": torch.compile(lambda *inputs: reference(*inputs, **GEOMETRY)),
    }


def cases() -> list[Case]:
    training = [
        Case(
            op="qk_norm_rope",
            label=f"batch {batch}, {STREAMS} streams of {STREAM_TOKENS}, {HEADS} heads of {HEAD_DIM}, bf16",
            inputs=partial(training_inputs, batch=batch),
            run=partial(qk_norm_rope, **GEOMETRY),
            forward_bytes=STREAMS * STREAM_TOKENS * (batch * 6 * PART_BYTES + TABLE_BYTES),
            # Values are not read again, but their gradient moves into the packed one.
            backward_bytes=STREAMS * STREAM_TOKENS * (batch * 8 * PART_BYTES + TABLE_BYTES),
            peers=peers(qk_norm_rope_ref),
        )
        for batch in (1, 4)
    ]
    sampling = [
        Case(
            op="qk_norm_rope_cached",
            label=f"batch {batch}, a block of {BLOCK} into a cache of {CACHE_TOKENS}, bf16",
            inputs=partial(sampling_inputs, batch=batch),
            run=partial(qk_norm_rope_cached, **GEOMETRY),
            forward_bytes=BLOCK * (batch * 6 * PART_BYTES + TABLE_BYTES),
            peers=peers(qk_norm_rope_cached_ref),
        )
        for batch in (1, 16)
    ]
    in_flight = Case(
        op="qk_norm_rope_cached",
        label=f"batch 4 in rows of 8, a block of {BLOCK} into a cache of {CACHE_TOKENS}, bf16",
        inputs=partial(in_flight_inputs, batch=4),
        run=partial(cached_in_rows, qk_norm_rope_cached),
        forward_bytes=BLOCK * (4 * 6 * PART_BYTES + TABLE_BYTES),
        peers={"eager": partial(cached_in_rows, qk_norm_rope_cached_ref)},
    )
    return [*training, *sampling, in_flight]
