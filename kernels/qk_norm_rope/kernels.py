"""The Triton kernels of ``qk_norm_rope`` and what launches them, one stream at a time.

Shape legend: B batch, L tokens, C packed channels (parts * H * D), H heads, D head dim, S cache slots, P programs.

A program takes a tile of tokens through some heads of one part (0 queries, 1 keys, 2 values); programs for the parts of
one tile are neighbours in the grid, and read whole rows together. The tables of a tile are loaded once and stay in
registers. A rotation pairs channel ``j`` of an axis with ``j + D / (2 * axes)``, so the two halves of every axis are
loaded and stored as separate tiles: partners meet in one thread, without a second load, a shuffle or shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from madformer.kernels.launch import jit, launch, target, tl


@jit
def _forward_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    num_tokens,
    num_slots,
    eps,
    stride_xb,
    stride_xl,
    stride_tb,
    stride_tl,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    AXES: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // (2 * AXES)
    tile, index = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    part = index + (3 - PARTS)
    tiles = tl.cdiv(num_tokens, TOKENS)
    batch = (tile // tiles).to(tl.int64)
    token = (tile % tiles * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None, None]
    head = tl.program_id(1) * HEADS_PER_PROGRAM + tl.arange(0, HEADS)[None, :, None]
    # As large as the tile: weights and tables are then loaded in its layout, repeated for every head. Loaded once and
    # broadcast they were shuffled between threads in each iteration, a third of the loop's instructions on sm_90.
    pair = tl.broadcast_to(tl.arange(0, COLS)[None, None, :], [TOKENS, HEADS, COLS])
    col = pair // HALF * (2 * HALF) + pair % HALF
    live_col = pair < HEAD_DIM // 2
    live = live_col & (token < num_tokens)

    x_ptrs = qkv_ptr + (batch * stride_xb + token * stride_xl) * UNIT + index * (NUM_HEADS * HEAD_DIM) + col
    slot, stored = token, live
    if positions_ptr is not None:
        slot += tl.where(part == 0, 0, tl.load(positions_ptr + batch).to(tl.int64))
        stored &= (part == 0) | ((slot >= 0) & (slot < num_slots))
    stride_yb = tl.where(part == 0, stride_qb, stride_kb)
    stride_yh = tl.where(part == 0, stride_qh, stride_kh)
    stride_yl = tl.where(part == 0, stride_ql, stride_kl)
    y_ptr = tl.where(part == 0, q_ptr, tl.where(part == 1, k_ptr, v_ptr))
    y_ptrs = y_ptr + (batch * stride_yb + slot * stride_yl) * UNIT + col

    if k_weight_ptr is not None:
        weight_ptrs = tl.where(part == 0, q_weight_ptr, k_weight_ptr) + col
        weight1 = tl.load(weight_ptrs, mask=live_col, other=0.0).to(tl.float32)
        weight2 = tl.load(weight_ptrs + HALF, mask=live_col, other=0.0).to(tl.float32)
    if cos_ptr is not None:
        rotated = live & (part < 2)
        table = (batch * stride_tb + token * stride_tl) * UNIT + col
        cos1 = tl.load(cos_ptr + table, mask=rotated, other=0.0).to(tl.float32)
        cos2 = tl.load(cos_ptr + table + HALF, mask=rotated, other=0.0).to(tl.float32)
        sin1 = tl.load(sin_ptr + table, mask=rotated, other=0.0).to(tl.float32)
        sin2 = tl.load(sin_ptr + table + HALF, mask=rotated, other=0.0).to(tl.float32)
        if k_weight_ptr is not None:
            # Scale and rotation are one linear map, the same for every head.
            cos1, cos2, sin1, sin2 = cos1 * weight1, cos2 * weight2, sin1 * weight2, sin2 * weight1

    next1 = tl.load(x_ptrs + head * HEAD_DIM, mask=live & (head < NUM_HEADS), other=0.0)
    next2 = tl.load(x_ptrs + head * HEAD_DIM + HALF, mask=live & (head < NUM_HEADS), other=0.0)
    for start in range(0, HEADS_PER_PROGRAM, HEADS):
        x1, x2 = next1.to(tl.float32), next2.to(tl.float32)
        # Ahead of the stores, over which the compiler moves no load: they might write what it reads.
        more = live & (head + HEADS < NUM_HEADS) & (start + HEADS < HEADS_PER_PROGRAM)
        next1 = tl.load(x_ptrs + (head + HEADS) * HEAD_DIM, mask=more, other=0.0)
        next2 = tl.load(x_ptrs + (head + HEADS) * HEAD_DIM + HALF, mask=more, other=0.0)
        if part < 2:
            if k_weight_ptr is not None:
                rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 2, keep_dims=True) / HEAD_DIM + eps)
                x1 *= rstd
                x2 *= rstd
            if cos_ptr is not None:
                x1, x2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
            elif k_weight_ptr is not None:
                x1 *= weight1
                x2 *= weight2
        ptrs = y_ptrs + head.to(tl.int64) * stride_yh * UNIT
        tl.store(ptrs, x1.to(ptrs.dtype.element_ty), mask=stored & (head < NUM_HEADS))
        tl.store(ptrs + HALF, x2.to(ptrs.dtype.element_ty), mask=stored & (head < NUM_HEADS))
        head += HEADS


@jit
def _backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    dqkv_ptr,
    partial_ptr,
    num_tokens,
    num_tiles,
    tiles_per_program,
    eps,
    stride_xb,
    stride_xl,
    stride_tb,
    stride_tl,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    AXES: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // (2 * AXES)
    PART_COLS: tl.constexpr = NUM_HEADS * HEAD_DIM
    program, index = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    num_programs = tl.num_programs(0) // PARTS
    part = index + (3 - PARTS)
    tiles = tl.cdiv(num_tokens, TOKENS)
    pair = tl.broadcast_to(tl.arange(0, COLS)[None, None, :], [TOKENS, HEADS, COLS])
    col = pair // HALF * (2 * HALF) + pair % HALF
    live_col = pair < HEAD_DIM // 2

    x_ptrs = qkv_ptr + index * PART_COLS + col
    dx_ptrs = dqkv_ptr + index * PART_COLS + col
    dy_ptrs = tl.where(part == 0, dq_ptr, tl.where(part == 1, dk_ptr, dv_ptr)) + col
    stride_yb = tl.where(part == 0, stride_qb, tl.where(part == 1, stride_kb, stride_vb))
    stride_yh = tl.where(part == 0, stride_qh, tl.where(part == 1, stride_kh, stride_vh))
    stride_yl = tl.where(part == 0, stride_ql, tl.where(part == 1, stride_kl, stride_vl))
    if k_weight_ptr is not None:
        weight_ptrs = tl.where(part == 0, q_weight_ptr, k_weight_ptr) + col
        weight1 = tl.load(weight_ptrs, mask=live_col, other=0.0).to(tl.float32)
        weight2 = tl.load(weight_ptrs + HALF, mask=live_col, other=0.0).to(tl.float32)
    dweight1 = tl.zeros([TOKENS, HEADS, COLS], tl.float32)
    dweight2 = tl.zeros([TOKENS, HEADS, COLS], tl.float32)

    for step in range(tiles_per_program):
        tile = program + step * num_programs
        batch = (tile // tiles).to(tl.int64)
        token = (tile % tiles * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None, None]
        live = live_col & (token < num_tokens) & (tile < num_tiles)
        if cos_ptr is not None:
            rotated = live & (part < 2)
            table = (batch * stride_tb + token * stride_tl) * UNIT + col
            cos1 = tl.load(cos_ptr + table, mask=rotated, other=0.0).to(tl.float32)
            cos2 = tl.load(cos_ptr + table + HALF, mask=rotated, other=0.0).to(tl.float32)
            sin1 = tl.load(sin_ptr + table, mask=rotated, other=0.0).to(tl.float32)
            sin2 = tl.load(sin_ptr + table + HALF, mask=rotated, other=0.0).to(tl.float32)
        for start in range(0, NUM_HEADS, HEADS):
            head = start + tl.arange(0, HEADS)[None, :, None]
            live_head = live & (head < NUM_HEADS)
            dy_row = (batch * stride_yb + token * stride_yl + head.to(tl.int64) * stride_yh) * UNIT
            dx1 = tl.load(dy_ptrs + dy_row, mask=live_head, other=0.0).to(tl.float32)
            dx2 = tl.load(dy_ptrs + dy_row + HALF, mask=live_head, other=0.0).to(tl.float32)
            if part < 2:
                if k_weight_ptr is not None:
                    x_row = (batch * stride_xb + token * stride_xl) * UNIT + head * HEAD_DIM
                    x1 = tl.load(x_ptrs + x_row, mask=live_head, other=0.0).to(tl.float32)
                    x2 = tl.load(x_ptrs + x_row + HALF, mask=live_head, other=0.0).to(tl.float32)
                if cos_ptr is not None:
                    dx1, dx2 = dx1 * cos1 + dx2 * sin2, dx2 * cos2 - dx1 * sin1
                if k_weight_ptr is not None:
                    rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 2, keep_dims=True) / HEAD_DIM + eps)
                    x1 *= rstd
                    x2 *= rstd
                    dweight1 += dx1 * x1
                    dweight2 += dx2 * x2
                    dx1 *= weight1
                    dx2 *= weight2
                    along = tl.sum(dx1 * x1 + dx2 * x2, 2, keep_dims=True) / HEAD_DIM
                    dx1 = rstd * (dx1 - along * x1)
                    dx2 = rstd * (dx2 - along * x2)
            dx_row = (batch * num_tokens + token) * (PARTS * PART_COLS) + head * HEAD_DIM
            tl.store(dx_ptrs + dx_row, dx1.to(dx_ptrs.dtype.element_ty), mask=live_head)
            tl.store(dx_ptrs + dx_row + HALF, dx2.to(dx_ptrs.dtype.element_ty), mask=live_head)

    if partial_ptr is not None:
        pair = tl.arange(0, COLS)
        channel = pair // HALF * (2 * HALF) + pair % HALF
        mask = (pair < HEAD_DIM // 2) & (part < 2)
        partial_ptrs = partial_ptr + (index * num_programs + program) * HEAD_DIM + channel
        tl.store(partial_ptrs, tl.sum(tl.sum(dweight1, 1), 0), mask=mask)
        tl.store(partial_ptrs + HALF, tl.sum(tl.sum(dweight2, 1), 0), mask=mask)


class Stream(NamedTuple):
    """One stream as the kernels take it.

    Attributes:
        qkv: ``(B, L, C)``: queries, keys and values, or keys and values.
        q_weight, k_weight: ``(D,)``, or None for no norm; without queries ``q_weight`` is None.
        cos, sin: ``(L, D)`` or ``(B, L, D)``, or None for no rotation.
        axes: into how many parts of an angle each the head dimension falls; 0 for no rotation.
    """

    qkv: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    axes: int
    num_heads: int
    head_dim: int
    eps: float

    @property
    def parts(self) -> int:
        return self.qkv.shape[2] // (self.num_heads * self.head_dim)

    @property
    def has_queries(self) -> bool:
        return self.parts == 3

    @property
    def num_weights(self) -> int:
        return sum(weight is not None for weight in (self.q_weight, self.k_weight))


@dataclass(frozen=True)
class Settings:
    """How a launch is cut.

    Attributes:
        tokens, heads: of the tile that a program holds at once.
        cols: channels of half a head, rounded up to a power of two.
        heads_per_program: through how many a forward program goes, tile by tile; a multiple of ``heads``.
        num_programs: how many share the token tiles of one part in the backward.
        num_warps: of a program.
    """

    tokens: int
    heads: int
    cols: int
    heads_per_program: int
    num_programs: int
    num_warps: int = 2


def choose_settings(stream: Stream) -> Settings:
    """Eight channels of either half a thread: 16 bytes of bf16 a load, and registers for the tables beside them.

    Neighbouring heads in a tile make the pieces that are read longer than one head. Few tokens are not enough programs
    to fill the machine: then the heads are divided among several.
    """
    batch, num_tokens, _ = stream.qkv.shape
    num_sms = target(stream.qkv.device).num_sms
    cols = _power_of_two(stream.head_dim // 2)
    rows = max(1, 512 // cols)
    heads = min(4, rows, stream.num_heads & -stream.num_heads)
    tokens = min(rows // heads, _power_of_two(num_tokens))
    tiles = batch * -(-num_tokens // tokens)
    head_tiles = stream.num_heads // heads
    groups = min(head_tiles, -(-4 * num_sms // max(1, stream.parts * tiles)))
    heads_per_program = -(-head_tiles // groups) * heads
    return Settings(tokens, heads, cols, heads_per_program, num_programs=min(tiles, 4 * num_sms))


def num_backward_programs(stream: Stream) -> int:
    return choose_settings(stream).num_programs


def _power_of_two(number: int) -> int:
    """The least that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


def _inner_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _weights(stream: Stream) -> tuple[Tensor | None, Tensor | None]:
    """Contiguous weights; a kernel takes that of the queries to be there where that of the keys is."""
    if stream.k_weight is None:
        return None, None
    k_weight = stream.k_weight.contiguous()
    return k_weight if stream.q_weight is None else stream.q_weight.contiguous(), k_weight


def _tables(stream: Stream) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Cosines, sines, and the strides of both from sample to sample and from token to token."""
    if stream.cos is None or stream.sin is None:
        return None, None, 0, 0
    cos, sin = stream.cos, stream.sin
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0) if cos.ndim == 3 else 0, cos.stride(-2)


def _common_unit(strides: list[int]) -> int:
    """What strides are counted in: eight channels where it divides all, and so aligns loads to 16 bytes of bf16.

    Triton itself looks at multiples of 16 alone, and head dimensions of 8 and 72 are none.
    """
    return 1 if any(stride % 8 for stride in strides) else 8


def forward(stream: Stream, q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, positions_B: Tensor | None) -> None:
    """Writes a stream's queries, keys and values, the latter from slot ``positions_B`` on where that is given.

    Keys and values have the same strides, channels are contiguous. ``q_BHLD`` is empty where the stream has no queries.
    """
    qkv = _inner_contiguous(stream.qkv)
    batch, num_tokens, _ = qkv.shape
    settings = choose_settings(stream)
    tiles = batch * -(-num_tokens // settings.tokens)
    cos, sin, *table_strides = _tables(stream)
    strides = [*qkv.stride()[:2], *table_strides, *q_BHLD.stride()[:3], *k_BHSD.stride()[:3]]
    unit = _common_unit(strides)
    launch(
        _forward_kernel,
        (stream.parts * tiles, -(-stream.num_heads // settings.heads_per_program)),
        qkv.device,
        *(qkv, *_weights(stream), cos, sin, positions_B, q_BHLD, k_BHSD, v_BHSD),
        *(num_tokens, k_BHSD.shape[2], stream.eps),
        *(stride // unit for stride in strides),
        NUM_HEADS=stream.num_heads,
        HEAD_DIM=stream.head_dim,
        AXES=max(1, stream.axes),
        PARTS=stream.parts,
        TOKENS=settings.tokens,
        HEADS=settings.heads,
        HEADS_PER_PROGRAM=settings.heads_per_program,
        COLS=settings.cols,
        UNIT=unit,
        num_warps=settings.num_warps,
    )


def backward(
    stream: Stream,
    dq_BHLD: Tensor,
    dk_BHLD: Tensor,
    dv_BHLD: Tensor,
    partial_NPD: Tensor | None,
    num_programs: int,
) -> Tensor:
    """The gradient of a stream's ``qkv``; writes every program's share of those of its weights.

    Args:
        partial_NPD: fp32, contiguous, for the stream's N weights and P = ``num_programs``; None where nobody asks.
    """
    qkv = _inner_contiguous(stream.qkv)
    batch, num_tokens, _ = qkv.shape
    settings = choose_settings(stream)
    num_tiles = batch * -(-num_tokens // settings.tokens)
    cos, sin, *table_strides = _tables(stream)
    dqkv = qkv.new_empty(qkv.shape)
    gradients = [_inner_contiguous(x) for x in (dq_BHLD, dk_BHLD, dv_BHLD)]
    strides = [*qkv.stride()[:2], *table_strides, *(stride for x in gradients for stride in x.stride()[:3])]
    unit = _common_unit(strides)
    launch(
        _backward_kernel,
        (stream.parts * num_programs,),
        qkv.device,
        *(*gradients, qkv, *_weights(stream), cos, sin, dqkv, partial_NPD),
        *(num_tokens, num_tiles, -(-num_tiles // max(1, num_programs)), stream.eps),
        *(stride // unit for stride in strides),
        NUM_HEADS=stream.num_heads,
        HEAD_DIM=stream.head_dim,
        AXES=max(1, stream.axes),
        PARTS=stream.parts,
        TOKENS=settings.tokens,
        HEADS=settings.heads,
        COLS=settings.cols,
        UNIT=unit,
        num_warps=settings.num_warps,
    )
    return dqkv
