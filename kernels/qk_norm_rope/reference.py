"""``qk_norm_rope`` in plain PyTorch, numerically what the model computes without a kernel.

Shape legend: B batch, L tokens, C packed channels (parts * H * D), H heads, D head dim, S cache slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Optionals = Sequence[Tensor | None]
"""One entry a stream; None where the stream has no such tensor."""


def head_dim_of(qkv: Sequence[Tensor], num_heads: int, *tables: Optionals) -> int:
    """Any weight or table tells the head dimension; without one the widest stream has queries, keys and values."""
    known = (x.shape[-1] for entries in tables for x in entries if x is not None and x.ndim)
    return next(known, max(x.shape[-1] for x in qkv) // (3 * num_heads))


def axes_of(axes: int | Sequence[int], num_streams: int) -> list[int]:
    return [axes] * num_streams if isinstance(axes, int) else list(axes)


def qk_norm_rope_ref(
    qkv: Sequence[Tensor],
    q_weight: Optionals,
    k_weight: Optionals,
    cos: Optionals,
    sin: Optionals,
    *,
    num_heads: int,
    axes: int | Sequence[int],
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`~madformer.kernels.qk_norm_rope.qk_norm_rope`; with tensors in float64 it is the oracle."""
    head_dim = head_dim_of(qkv, num_heads, q_weight, k_weight, cos)
    queries, keys, values = [], [], []
    streams = zip(qkv, q_weight, k_weight, cos, sin, axes_of(axes, len(qkv)), strict=True)
    for packed_BLC, q_scale, k_scale, cosines, sines, pairing in streams:
        heads = packed_BLC.unflatten(-1, (-1, num_heads, head_dim)).permute(2, 0, 3, 1, 4)
        *q, k, v = heads.unbind(0)
        queries += [apply_rope(_normalise(x, q_scale, eps), cosines, sines, pairing) for x in q]
        keys.append(apply_rope(_normalise(k, k_scale, eps), cosines, sines, pairing))
        values.append(v)
    q, k, v = (_join(parts) for parts in (queries or [keys[0][:, :, :0]], keys, values))
    return q, k, v


def qk_norm_rope_cached_ref(
    qkv_BLC: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache_BHSD: Tensor,
    v_cache_BHSD: Tensor,
    positions_B: Tensor,
    *,
    num_heads: int,
    axes: int,
    eps: float = 1e-6,
) -> Tensor | None:
    """:func:`~madformer.kernels.qk_norm_rope.qk_norm_rope_cached`, without looking at the positions on the host."""
    streams = [qkv_BLC], [q_weight], [k_weight], [cos], [sin]
    q, k, v = qk_norm_rope_ref(*streams, num_heads=num_heads, axes=axes, eps=eps)
    num_slots = k_cache_BHSD.shape[2]
    slots_BL = positions_B.long()[:, None] + torch.arange(k.shape[2], device=k.device)
    inside = ((slots_BL >= 0) & (slots_BL < num_slots))[:, :, None, None]
    # A token with no slot of its own rewrites what stands in another's: taken modulo S they are distinct.
    slots_BL = slots_BL % num_slots
    samples = torch.arange(len(k), device=k.device)[:, None]
    for cache, new in ((k_cache_BHSD, k), (v_cache_BHSD, v)):
        cache[samples, :, slots_BL] = torch.where(inside, new.transpose(1, 2), cache[samples, :, slots_BL])
    return q if q.shape[2] == k.shape[2] else None


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)


def _normalise(x_BHLD: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x_BHLD
    working = torch.promote_types(x_BHLD.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x_BHLD, dim=-1, keepdim=True, dtype=working)
    scale = torch.rsqrt(norm.square() / x_BHLD.shape[-1] + eps)
    return (x_BHLD * scale * weight).to(x_BHLD.dtype)


def apply_rope(x_BHLD: Tensor, cos: Tensor | None, sin: Tensor | None, axes: int) -> Tensor:
    """Rotate pairs of channels by the tabulated angles, in fp32; the result has ``x``'s dtype.

    ``axes=2`` (axial) pairs channels within each axis' half. ``axes=1`` pairs channel ``j`` with ``j + D / 2``: RoPE
    as Llama has it on the table of one axis; on a table of two axes the released pairing, which joins row and column
    angles: not a rotation, but what its weights expect.
    """
    if cos is None or sin is None:
        return x_BHLD
    cos, sin = (table if table.ndim == 2 else table[:, None] for table in (cos, sin))
    first, second = x_BHLD.unflatten(-1, (axes, 2, -1)).unbind(-2)
    turned = torch.stack((-second, first), dim=-2).flatten(-3)
    return (x_BHLD * cos + turned * sin).to(x_BHLD.dtype)
