"""The Triton kernels of ``qk_norm_rope``; a launch does one stream.

A program takes a tile of tokens through some heads of one part (0 queries, 1 keys, 2 values); programs for the parts of
one tile are neighbours in the grid, and read whole rows together. The tables of a tile are loaded once and stay in
registers. A rotation pairs channel ``j`` of an axis with ``j + D / (2 * axes)``, so the two halves of every axis are
loaded and stored as separate tiles: partners meet in one thread, without a second load, a shuffle or shared memory.
"""

from __future__ import annotations

from madformer.kernels.launch import jit, tl


@jit
def forward_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, positions_ptr, rows_ptr, q_ptr, k_ptr, v_ptr,
    num_tokens, num_rows, num_slots, first_query, first_key, eps,
    stride_xb, stride_xl, stride_tb, stride_tl, stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, AXES: tl.constexpr, PARTS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
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
    row, slot, stored = batch, token + tl.where(part == 0, first_query, first_key), live
    if positions_ptr is not None:
        slot += tl.where(part == 0, 0, tl.load(positions_ptr + batch).to(tl.int64))
        stored &= (part == 0) | ((slot >= 0) & (slot < num_slots))
    if rows_ptr is not None:
        row = tl.where(part == 0, batch, tl.load(rows_ptr + batch).to(tl.int64))
        stored &= (part == 0) | ((row >= 0) & (row < num_rows))
    stride_yb = tl.where(part == 0, stride_qb, stride_kb)
    stride_yh = tl.where(part == 0, stride_qh, stride_kh)
    stride_yl = tl.where(part == 0, stride_ql, stride_kl)
    y_ptr = tl.where(part == 0, q_ptr, tl.where(part == 1, k_ptr, v_ptr))
    y_ptrs = y_ptr + (row * stride_yb + slot * stride_yl) * UNIT + col

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
def backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dqkv_ptr, partial_ptr,
    num_tokens, num_tiles, tiles_per_program, first_query, first_key, first_weight, eps,
    stride_xb, stride_xl, stride_tb, stride_tl,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, AXES: tl.constexpr, PARTS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
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
    first = tl.where(part == 0, first_query, first_key)
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
            dy_row = (batch * stride_yb + (first + token) * stride_yl + head.to(tl.int64) * stride_yh) * UNIT
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
        partial_ptrs = partial_ptr + ((first_weight + index) * num_programs + program) * HEAD_DIM + channel
        tl.store(partial_ptrs, tl.sum(tl.sum(dweight1, 1), 0), mask=mask)
        tl.store(partial_ptrs + HALF, tl.sum(tl.sum(dweight2, 1), 0), mask=mask)
