"""``madformer::block_causal_attention`` and its backward as torch operators over the Triton kernels.

A layout crosses the operator's schema as a list of integers, in the order of its fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from madformer.kernels.block_causal_attention import backward as backward_kernels
from madformer.kernels.block_causal_attention import forward as forward_kernel
from madformer.kernels.block_causal_attention.forward import AttentionSettings, Tile, is_masked, packed_empty
from madformer.kernels.block_causal_attention.layout import BlockLayout
from madformer.kernels.launch import TRITON_VERSION, target
from madformer.kernels.plans import Kind, planned, taken_as
from madformer.kernels.registration import register, register_differentiable

MAX_HEAD_DIM = 128
_FIELDS = [field.name for field in fields(BlockLayout)]


def choose_settings(head_dim: int, dtype: torch.dtype, layout: BlockLayout, capability: int) -> AttentionSettings:
    """Tiles by registers, shared memory and what ptxas says of them; no spills, no serialised matrix products.

    Not timed yet: what ``benchmarks/static_model.py`` bounds least, on an H200 with heads of 64, in TFLOP/s:

    - forward: 128 x 64 with 4 warps 803 (186 registers, 518 issue slots), with 8 739 (107, 622); 64 x 64 with 4 804,
      but twice the traffic of K and V; 128 x 128 with 8 454: one program fits an SM. 128 x 128 with 4 warps fits, but
      its products are serialised, as they are where 128 x 64 with 4 is held to 168 registers.
    - dQ: 128 x 64 with 4 warps 925 (223), with 8 877 (122), 64 x 64 with 4 949 (122), at twice the traffic.
    - dK/dV: 64 x 64 with 4 warps, three programs on an SM 949 (168), two 816 (173); 128 x 64 with 8 474. 128 x 128
      spills.
    """
    if dtype == torch.float32:
        return AttentionSettings(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), tma=False)
    masked, tma = is_masked(layout, 64, 64), capability >= 90
    # Blocks of 64 or 192 are not cut by tiles of 64; where tiles must cut blocks, long ones cut fewer.
    rows = 128 if layout.block_size % 128 == 0 or (masked and layout.block_size > 128) else 64
    if capability < 90:
        if head_dim <= 64:
            return AttentionSettings(Tile(rows, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), tma)
        dq, dkdv = Tile(64, 32 if masked else 64, 8, 2), Tile(64, 32, 8, 1 if masked else 2)
        return AttentionSettings(Tile(rows, 64, 8, 2), dq, dkdv, tma)
    if head_dim <= 64:
        # Two programs on an SM: one takes exponentials, which cost as much as the products here, while the other
        # multiplies. A warp group of its own for 64 rows each would issue a fifth more for the same tile.
        forward = Tile(rows, 64, 4, 3 if rows == 128 else 2)
        # Triton 3.6 spills 20 bytes where 3.7 spills none; with masks both do.
        unmasked = not masked and not backward_kernels.has_idle_keys(layout)
        fits_thrice = capability < 100 and unmasked and TRITON_VERSION >= (3, 7)
        dkdv = Tile(64, 64, 4, 3, max_registers=168 if fits_thrice else None)
        return AttentionSettings(forward, Tile(64 if masked else rows, 64, 4, 3), dkdv, tma)
    # Blackwell's accumulators have a memory of their own, so that 4 warps hold the rest.
    forward = Tile(rows, 64, 8 if capability < 100 and rows == 128 else 4, 2)
    dq = Tile(64, 64, 4, 2) if masked or capability >= 100 else forward
    dkdv = Tile(64, 32 if masked else 64, 4, 2)
    return AttentionSettings(forward, dq, dkdv, tma)


def _settings(q: Tensor, layout: BlockLayout) -> AttentionSettings:
    return choose_settings(q.shape[-1], q.dtype, layout, target(q.device).capability)


@planned(lambda: (choose_settings, forward_kernel.L2_BYTES))
def _forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Sequence[int], scale: float
) -> Callable[..., tuple[Tensor, Tensor]]:
    blocks = _unpack(layout)
    take_q, take_k, take_v = (taken_as(_contiguous_rows, x) for x in (q, k, v))
    run = forward_kernel.forward(take_q(q), take_k(k), take_v(v), blocks, scale, _settings(q, blocks))
    return lambda q, k, v, *_: run(take_q(q), take_k(k), take_v(v))


@planned(lambda: (choose_settings, forward_kernel.L2_BYTES))
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Sequence[int], scale: float
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    blocks = _unpack(layout)
    takers: list[Callable[[Any], Any]] = [taken_as(_contiguous_rows, x) for x in (grad, q, k, v, out)]
    takers.append(taken_as(Tensor.contiguous, lse))

    def taken(*tensors: Tensor) -> list[Tensor]:
        return [take(x) for take, x in zip(takers, tensors, strict=True)]

    run = backward_kernels.backward(taken(grad, q, k, v, out, lse), blocks, scale, _settings(q, blocks))
    return lambda *arguments: run(*taken(*arguments[:6]))


def _pack(layout: BlockLayout) -> tuple[int, ...]:
    # Not dataclasses.astuple, which copies deeply: as long as the launch itself.
    return tuple([int(getattr(layout, name)) for name in _FIELDS])


def _unpack(fields: Sequence[int]) -> BlockLayout:
    size, noise, clean, cross, text, *queries = fields
    return BlockLayout(size, noise, clean, bool(cross), text, *map(bool, queries))


def _contiguous_rows(x: Tensor) -> Tensor:
    """The kernels take any strides but the last. Offsets inside a tile of 128 rows have 32 bits, all others 64."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 1 << 24 else x.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.layout, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = _call_backward(grad, *ctx.saved_tensors, ctx.layout, ctx.scale)
    return *grads, None, None


_call = register_differentiable(
    "block_causal_attention",
    "(Tensor q, Tensor k, Tensor v, int[] layout, float scale) -> (Tensor, Tensor)",
    _forward,
    lambda q, k, v, layout, scale: (packed_empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)),
    _setup_context,
    _autograd_backward,
)
_call_backward = register(
    "block_causal_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int[] layout, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad, q, k, v, *_: (packed_empty(q), packed_empty(k), packed_empty(v)),
)


def block_causal_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, return_lse: bool, *, kind: Kind | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention under ``layout``: the output, ``(B, H, Lq, D)`` over ``(B, Lq, H, D)`` memory, and, where asked for,
    the natural log-sum-exp of the scaled scores, ``(B, H, Lq)`` in float32, which no gradient flows into."""
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"q must have a head dim of at most {MAX_HEAD_DIM} for backend='triton', got {q.shape[-1]}")
    if scale <= 0:
        raise ValueError(f"scale must be above 0 for backend='triton', got {scale}")
    out, lse = _call(q, k, v, _pack(layout), scale, kind=kind)
    return out, lse * math.log(2) if return_lse else None
