"""``qk_norm_rope`` in plain PyTorch, numerically what the model computes without a kernel.

Shape legend: B batch, L tokens, C packed channels (parts * H * D), H heads, D head dim, R cache rows, S cache slots.
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
    k_cache_RHSD: Tensor,
    v_cache_RHSD: Tensor,
    positions_B: Tensor,
    *,
    rows_B: Tensor | None = None,
    num_heads: int,
    axes: int,
    eps: float = 1e-6,
) -> Tensor | None:
    """:func:`~madformer.kernels.qk_norm_rope.qk_norm_rope_cached`, without looking at the indices on the host."""
    streams = [qkv_BLC], [q_weight], [k_weight], [cos], [sin]
    q, k, v = qk_norm_rope_ref(*streams, num_heads=num_heads, axes=axes, eps=eps)
    batch, _, num_tokens, _ = k.shape
    queries = q if q.shape[2] == num_tokens else None
    if k.numel() == 0:
        return queries
    num_rows, _, num_slots, _ = k_cache_RHSD.shape
    rows = torch.arange(batch, device=k.device) if rows_B is None else rows_B.long()
    rows = rows.repeat_interleave(num_tokens, output_size=batch * num_tokens)
    slots = (positions_B.long()[:, None] + torch.arange(num_tokens, device=k.device)).flatten()
    inside = (rows >= 0) & (rows < num_rows) & (slots >= 0) & (slots < num_slots)
    # A token without a place of its own does what another one does that has one, a second time; where none has, all
    # rewrite what stands in one place. So no two write different things to one place, and nothing is asked of the host.
    first = inside.int().argmax(0, keepdim=True)
    token = torch.where(inside, torch.arange(len(inside), device=k.device), first)
    rows, slots = rows[token] % num_rows, slots[token] % num_slots
    for cache, new in ((k_cache_RHSD, k), (v_cache_RHSD, v)):
        tokens = new.transpose(1, 2).flatten(0, 1)[token]
        cache[rows, :, slots] = torch.where(inside[first, None, None], tokens, cache[rows[first], :, slots[first]])
    return queries


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
