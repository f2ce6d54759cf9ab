"""Queries, keys and values ready for attention in one pass over the packed projection of each stream.

Per head: RMSNorm over the head dimension (arXiv:1910.07467, on queries and keys arXiv:2302.05442), then rotary position
embedding (arXiv:2104.09864), both in fp32, rounded once.

Shape legend: B batch, L tokens (of one stream, or of all packed), H heads, D head dim, R cache rows, S cache slots,
C packed channels: 3 * H * D (queries, keys, values) or 2 * H * D (keys, values).

Results are ``(B, H, L, D)`` views of ``(B, L, H, D)`` memory. That is the order of the packed projection, so this pass
reads and writes whole rows of tokens, where head-major memory would scatter one side of it. Attention reads rows of D
channels either way (128 bytes at D = 64, a whole cache line), and flash attention, cuDNN and the projection that
follows take this order too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from madformer.kernels import dispatch
from madformer.kernels.checks import check_device, check_floating, check_shape
from madformer.kernels.launch import DTYPES
from madformer.kernels.plans import once_a_kind, plain_kind
from madformer.kernels.qk_norm_rope import ops
from madformer.kernels.qk_norm_rope.reference import (
    Optionals,
    axes_of,
    head_dim_of,
    qk_norm_rope_cached_ref,
    qk_norm_rope_ref,
)

__all__ = ["qk_norm_rope", "qk_norm_rope_cached", "qk_norm_rope_cached_ref", "qk_norm_rope_ref"]

OP, CACHED_OP = "qk_norm_rope", "qk_norm_rope_cached"
for _op in (OP, CACHED_OP):
    dispatch.register(_op, "reference")
    dispatch.register(_op, "triton", auto=("cuda",))
    dispatch.register(_op, "cpp", ("cpu",))


def qk_norm_rope(
    qkv: Sequence[Tensor],
    q_weight: Optionals,
    k_weight: Optionals,
    cos: Optionals,
    sin: Optionals,
    *,
    num_heads: int,
    axes: int | Sequence[int],
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised and rotated queries and keys, and values, of streams packed one after the other; differentiable.

    Every argument but the scalars has one entry a stream.

    Args:
        qkv: (B, L_s, C), as one linear layer gives it: ``unflatten(-1, (3, H, D))``, or ``(2, H, D)`` for a stream
            that gives keys and values only. Any strides; rows of contiguous channels are not copied.
        q_weight, k_weight: (D,), of any floating dtype, or None for no norm. Without queries ``q_weight`` is ignored.
        cos, sin: (L_s, D), or (B, L_s, D) for positions of each sample, in float32; or None for no rotation. They are
            not differentiated.
        num_heads: H.
        axes: into how many parts the head dimension falls, each of which is paired half with half: 2 is axial RoPE on
            images; 1 is RoPE on text, and the released pairing on images. One number, or one a stream.
        eps: added to the mean square.
        backend: ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Returns:
        q (B, H, sum of L_s over streams with queries, D), k and v (B, H, sum of L_s, D), in the dtype of ``qkv``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend is unknown.
        RuntimeError: the backend that was asked for cannot run here.
    """
    lists: list[list[Any]] = [list(entries) for entries in (qkv, q_weight, k_weight, cos, sin)]
    pairing = axes if isinstance(axes, int) else tuple(axes)
    kind = plain_kind((*lists, num_heads, pairing, eps, backend))
    chosen, pairings, head_dim = _choose(kind, lists, num_heads, pairing, eps, backend)
    if chosen == "reference":
        return qk_norm_rope_ref(qkv, q_weight, k_weight, cos, sin, num_heads=num_heads, axes=axes, eps=eps)
    if chosen == "cpp":
        lists[1:] = [_in_float32(entries) for entries in lists[1:]]
    arguments = (*_op_arguments(lists, pairings, num_heads, head_dim), num_heads, head_dim, eps)
    if chosen == "cpp":
        return torch.ops.madformer.qk_norm_rope_cpp(*arguments)
    return ops.qk_norm_rope_triton(*arguments, kind=kind)


@once_a_kind
def _choose(
    lists: list[list[Any]], num_heads: int, axes: int | tuple[int, ...], eps: float, backend: str
) -> tuple[str, list[int], int]:
    """The backend that runs these, where they can be run, the pairing of each stream, and the head dimension."""
    qkv, *others = lists
    if not qkv:
        raise ValueError("qkv must have at least one stream, got none")
    chosen = dispatch.resolve(OP, backend, qkv[0].device, qkv[0].dtype)
    pairings = axes_of(axes, len(qkv))
    named: list[list[Any]] = [*others, list(pairings)]
    for name, entries in zip(("q_weight", "k_weight", "cos", "sin", "axes"), named, strict=True):
        if len(entries) != len(qkv):
            raise ValueError(f"{name} must have one entry a stream, {len(qkv)}, got {len(entries)}")
    _check_numbers(num_heads, eps)
    head_dim = head_dim_of(qkv, num_heads, *others[:3])
    for i, (x, *of_stream) in enumerate(zip(*lists, pairings, strict=True)):
        _check_stream(f"[{i}]", x, of_stream, qkv[0], num_heads, head_dim)
    if chosen != "reference":
        check_floating("qkv[0]", qkv[0])
    return chosen, pairings, head_dim


def qk_norm_rope_cached(
    qkv_BLC: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache_RHSD: Tensor,
    v_cache_RHSD: Tensor,
    positions_B: Tensor,
    *,
    rows_B: Tensor | None = None,
    num_heads: int,
    axes: int,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor | None:
    """:func:`qk_norm_rope` of one stream with keys and values written into a cache; not differentiable.

    Args:
        qkv_BLC, q_weight, k_weight, cos, sin, num_heads, axes, eps: one stream's, as there.
        k_cache_RHSD, v_cache_RHSD: of every sample written in one row, in the slots ``[positions_B[b],
            positions_B[b] + L)``, and nowhere else: tokens whose slot is not in ``[0, S)`` are dropped. Of one layout,
            with contiguous channels.
        positions_B: int32 or int64, on the device, where it stays.
        rows_B: int32 or int64, on the device, where it stays: the row of the caches that each sample writes. The tokens
            of a sample whose row is not in ``[0, R)`` are dropped. Samples may share a row where their slots do not
            meet; which one is written where they do is undefined. None: sample b writes row b, and R is B.
        backend: ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Returns:
        q (B, H, L, D), or None for a stream of keys and values only.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend is unknown.
        RuntimeError: the backend that was asked for cannot run here.
    """
    tensors = (qkv_BLC, q_weight, k_weight, cos, sin, k_cache_RHSD, v_cache_RHSD, positions_B, rows_B)
    kind = plain_kind((*tensors, num_heads, axes, eps, backend))
    chosen, head_dim, has_queries = _choose_cached(kind, tensors, num_heads, axes, eps, backend)
    parameters = q_weight if has_queries else None, k_weight, cos, sin
    caches = k_cache_RHSD, v_cache_RHSD, positions_B
    if chosen == "reference":
        return qk_norm_rope_cached_ref(
            qkv_BLC, *parameters, *caches, rows_B=rows_B, num_heads=num_heads, axes=axes, eps=eps
        )
    scalars = num_heads, head_dim, axes, eps
    if chosen == "cpp":
        q = torch.ops.madformer.qk_norm_rope_cached_cpp(qkv_BLC, *_in_float32(parameters), *caches, rows_B, *scalars)
    else:
        q = ops.qk_norm_rope_cached_triton(qkv_BLC, *parameters, *caches, rows_B, *scalars, kind=kind)
    return q if has_queries else None


@once_a_kind
def _choose_cached(
    tensors: tuple[Any, ...], num_heads: int, axes: int, eps: float, backend: str
) -> tuple[str, int, bool]:
    """The backend that runs these, where they can be run, the head dimension, and whether there are queries."""
    qkv_BLC, q_weight, k_weight, cos, sin, *cache = tensors
    chosen = dispatch.resolve(CACHED_OP, backend, qkv_BLC.device, qkv_BLC.dtype)
    _check_numbers(num_heads, eps)
    head_dim = head_dim_of([qkv_BLC], num_heads, [q_weight], [k_weight], [cos])
    _check_stream("", qkv_BLC, [q_weight, k_weight, cos, sin, axes], qkv_BLC, num_heads, head_dim)
    _check_cache(qkv_BLC, cache, num_heads, head_dim)
    if chosen != "reference":
        check_floating("qkv", qkv_BLC)
    return chosen, head_dim, _has_queries(qkv_BLC, num_heads, head_dim)


def _has_queries(qkv_BLC: Tensor, num_heads: int, head_dim: int) -> bool:
    return qkv_BLC.shape[2] == 3 * num_heads * head_dim


def _in_float32(parameters: Optionals) -> list[Tensor | None]:
    """Weights and tables as C++ takes them."""
    return [x if x is None or x.dtype == torch.float32 else x.float() for x in parameters]


def _op_arguments(
    lists: Sequence[Sequence[Any]], axes: Sequence[int], num_heads: int, head_dim: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[bool], list[int]]:
    """The lists that the ops take: without None, with a flag a stream for what is there."""
    qkv, q_weight, k_weight, cos, sin = lists
    weights = [
        weight
        for x, of_q, of_k in zip(qkv, q_weight, k_weight, strict=True)
        for weight in ((of_q, of_k) if _has_queries(x, num_heads, head_dim) else (of_k,))
        if weight is not None
    ]
    tables = [table for pair in zip(cos, sin, strict=True) for table in pair if table is not None]
    rotated = [pairing if table is not None else 0 for pairing, table in zip(axes, cos, strict=True)]
    return list(qkv), weights, tables, [weight is not None for weight in k_weight], rotated


def _check_numbers(num_heads: int, eps: float) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads must be positive, got {num_heads}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def _check_stream(
    at: str, qkv: Tensor, parameters: Sequence[Any], first: Tensor, num_heads: int, head_dim: int
) -> None:
    """One stream, whose arguments are called ``name + at``, against the head dimension and the first stream."""
    q_weight, k_weight, cos, sin, axes = parameters
    widths = [parts * num_heads * head_dim for parts in (2, 3)]
    if qkv.ndim != 3 or qkv.shape[0] != first.shape[0] or qkv.shape[2] not in widths:
        expected = f"({first.shape[0]}, L, {widths[1]} or {widths[0]})"
        raise ValueError(
            f"qkv{at} must have the shape {expected} for {num_heads} heads of {head_dim}, got {tuple(qkv.shape)}"
        )
    if qkv.dtype != first.dtype:
        raise ValueError(f"qkv{at} must have the dtype {first.dtype} of the first stream, got {qkv.dtype}")
    check_device(f"qkv{at}", qkv, first.device)
    if axes < 1 or head_dim % (2 * axes):
        raise ValueError(f"axes{at}={axes} must be positive, and twice it must divide the head dimension {head_dim}")
    if _has_queries(qkv, num_heads, head_dim) and (q_weight is None) != (k_weight is None):
        raise ValueError(f"q_weight{at} and k_weight{at} must both be given or both be None")
    if (cos is None) != (sin is None):
        raise ValueError(f"cos{at} and sin{at} must both be given or both be None")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_floating(name + at, weight, (*DTYPES, torch.float64))
            check_shape(name + at, weight, (head_dim,))
            check_device(name + at, weight, first.device)
    if cos is not None and sin is not None:
        for name, table in (("cos", cos), ("sin", sin)):
            check_floating(name + at, table, (torch.float32, torch.float64))
            check_shape(name + at, table, (*qkv.shape[0 if cos.ndim == 3 else 1 : 2], head_dim))
            check_device(name + at, table, first.device)


def _check_cache(qkv_BLC: Tensor, cache: Sequence[Any], num_heads: int, head_dim: int) -> None:
    k_cache, v_cache, positions_B, rows_B = cache
    batch, num_tokens, _ = qkv_BLC.shape
    if k_cache.ndim != 4 or k_cache.shape[2] < num_tokens:
        raise ValueError(f"k_cache must be (R, H, S, D) with S of at least {num_tokens}, got {tuple(k_cache.shape)}")
    if rows_B is not None and len(k_cache) == 0:
        raise ValueError(f"k_cache must have at least one row, got {tuple(k_cache.shape)}")
    num_rows = batch if rows_B is None else len(k_cache)
    for name, entry in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_shape(name, entry, (num_rows, num_heads, k_cache.shape[2], head_dim))
        check_floating(name, entry, (qkv_BLC.dtype,))
        check_device(name, entry, qkv_BLC.device)
        if entry.stride(-1) != 1 or entry.stride() != k_cache.stride():
            raise ValueError(f"{name} must have contiguous channels and k_cache's strides, got {entry.stride()}")
    for name, indices in (("positions", positions_B), ("rows", rows_B)):
        if indices is not None:
            check_shape(name, indices, (batch,))
            check_floating(name, indices, (torch.int32, torch.int64))
            check_device(name, indices, qkv_BLC.device)
