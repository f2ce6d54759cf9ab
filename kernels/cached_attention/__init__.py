"""Attention of a block to a cached prefix and to itself, without a mask and without concatenating them.

Sampling reads the cache in every layer of every step. How much of it is filled is known on the device alone, for each
sample: one captured graph then serves every block, and samples at different blocks can share a step. So is which row
of the cache a sample reads: a small batch then works on some rows of a large cache, and these stay where they are.

Shape legend: B batch, H heads, L queries, N own keys, R rows of the cache, S their capacity, D head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from madformer.kernels import dispatch
from madformer.kernels.cached_attention.op import (
    MAX_HEAD_DIM,
    MAX_SPLITS,
    cached_attention_cpp,
    cached_attention_triton,
)
from madformer.kernels.cached_attention.reference import cached_attention_ref
from madformer.kernels.checks import check_device, check_floating, check_no_gradient, check_same, check_shape
from madformer.kernels.plans import once_a_kind, plain_kind

__all__ = ["cached_attention", "cached_attention_ref"]

OP = "cached_attention"
SHORT = 64
"""Queries of a sample up to which C++ is chosen where lengths are known on the host, which can call PyTorch's attention
on a slice of the cache. With AVX2 both compute as fast, there and beyond; that of other processors is not known."""
INDEX_DTYPES = (torch.int32, torch.int64)
NAMES = ("q", "k_cache", "v_cache", "lengths", "k", "v", "rows")

dispatch.register(OP, "reference")
dispatch.register(OP, "triton", auto=("cuda",))
dispatch.register(OP, "cpp", ("cpu",), kernel="cached_attention_cpp")


def cached_attention(
    q_BHLD: Tensor,
    k_cache_RHSD: Tensor,
    v_cache_RHSD: Tensor,
    lengths_B: Tensor,
    k_BHND: Tensor | None = None,
    v_BHND: Tensor | None = None,
    *,
    rows_B: Tensor | None = None,
    scale: float | None = None,
    num_splits: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of every query to the first ``lengths_B[b]`` keys of the cache and to all of the own block.

    For inference: there is no backward. Nothing waits for the device, and nothing depends on the values of
    ``lengths_B`` and ``rows_B`` but the result, so a captured CUDA graph serves all lengths and rows.

    Args:
        q_BHLD: (B, H, L, D) float32, bfloat16 or float16, D at most 128 for Triton. Any strides, as for
            all of these, but the last dimension contiguous.
        k_cache_RHSD, v_cache_RHSD: (R, H, S, D) in the dtype of ``q_BHLD``, R being B without ``rows_B``. What lies
            behind a sample's length is never used, and may be uninitialised.
        lengths_B: (B,) int32 or int64, on the device of the rest. Clamped to 0..S.
        k_BHND, v_BHND: (B, H, N, D), the own block, where it is not in the cache already; both or neither.
        rows_B: (B,) int32 or int64, on the device of the rest: the row of the caches that each sample reads. Samples
            may share one. A sample whose row is not in 0..R-1 has no cached keys. None: sample b reads row b.
        scale: of the scores, positive; None for ``1 / sqrt(D)``.
        num_splits: into how many shares the keys of a sample are cut, 1 to 32; None for a number that fits the GPU.
            C++ and the reference do without.
        backend: ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Returns:
        (B, H, L, D), from the kernel as a view of (B, L, H, D), which an output projection takes without a copy. A
        sample with nothing to attend to gets 0.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, layout or value, or the backend is unknown.
        RuntimeError: the backend that was asked for cannot run here.
    """
    tensors = (q_BHLD, k_cache_RHSD, v_cache_RHSD, lengths_B, k_BHND, v_BHND, rows_B)
    kind = plain_kind((*tensors, scale, num_splits, backend))
    chosen = _choose(kind, tensors, scale, num_splits, backend)
    if torch.is_grad_enabled():
        check_no_gradient(OP, dict(zip(NAMES, tensors, strict=True)))
    scale = q_BHLD.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "reference":
        return cached_attention_ref(*tensors[:6], rows_B=rows_B, scale=scale)
    if chosen == "cpp":
        return cached_attention_cpp(*tensors, scale, kind=kind).transpose(1, 2)
    return cached_attention_triton(*tensors, scale, num_splits, kind=kind).transpose(1, 2)


@once_a_kind
def _choose(tensors: tuple[Any, ...], scale: float | None, num_splits: int | None, backend: str) -> str:
    """The backend that runs these, where they can be run."""
    _validate(tensors)
    q_BHLD = tensors[0]
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale={scale} must be positive and finite")
    if num_splits is not None and not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits={num_splits} must be in 1..{MAX_SPLITS}")
    chosen = dispatch.resolve(OP, backend, q_BHLD.device, q_BHLD.dtype)
    too_wide = chosen == "triton" and q_BHLD.shape[-1] > MAX_HEAD_DIM
    if chosen == "reference" or (backend == dispatch.AUTO and too_wide):
        return "reference"
    check_floating("q", q_BHLD)
    if too_wide:
        raise ValueError(f"q must have a head dim of at most {MAX_HEAD_DIM} for Triton, got {q_BHLD.shape[-1]}")
    return chosen


def _validate(tensors: tuple[Any, ...]) -> None:
    q, k_cache, v_cache, lengths, k, v, rows = tensors
    if q.dim() != 4 or q.shape[-1] == 0:
        raise ValueError(f"q must have the shape (B, H, L, D), got {tuple(q.shape)}")
    if (k is None) != (v is None):
        raise ValueError(f"{'k' if k is None else 'v'} is missing: the own block needs both k and v")
    B, H, _, D = q.shape
    named = {"q": q, "k_cache": k_cache, "v_cache": v_cache} | ({} if k is None or v is None else {"k": k, "v": v})
    for name, tensor in named.items():
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have four dimensions, got {tuple(tensor.shape)}")
        indexed = rows is not None and name.endswith("_cache")
        check_shape(name, tensor, (len(tensor) if indexed else B, H, tensor.shape[2], D))
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
        check_device(name, tensor, q.device)
        if tensor.stride(-1) != 1 and D > 1:
            raise ValueError(f"{name} must have a contiguous last dimension, got strides {tensor.stride()}")
    check_same("v_cache", v_cache, "k_cache", k_cache)
    if rows is not None and len(k_cache) == 0:
        raise ValueError(f"k_cache must have at least one row, got {tuple(k_cache.shape)}")
    if k is not None and v is not None:
        check_same("v", v, "k", k)
    for name, index in ({"lengths": lengths} | ({} if rows is None else {"rows": rows})).items():
        check_shape(name, index, (B,))
        check_floating(name, index, INDEX_DTYPES)
        check_device(name, index, q.device)
