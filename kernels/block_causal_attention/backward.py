"""The backward kernels: dQ, then dK and dV. Deterministic: every element is summed by one program, in a fixed order.

Shape legend: B batch, H heads, L tokens of the packed streams, D head dim; M queries, N keys of a tile.

With P = exp2(scores - lse), dP = dO V^T and delta the row sums of dO * O: dS = P * (dP - delta), dV = P^T dO,
dQ = scale * dS K, dK = scale * dS^T Q (FlashAttention-2, arXiv:2307.08691, algorithm 2).

The scores and dP are computed in both kernels, so there are 7 matrix products in place of 5, and every exponential
twice. What would save them costs more: adding dQ from the dK/dV kernel by atomics is not deterministic and moves
4 bytes through L2 for each element of Q and each key tile; keeping dS for a matrix product afterwards takes 2 bytes
of device memory for each live pair and head, 0.6 GB an image at FFHQ-1024, written and read once. The dQ kernel makes
delta on its way, which saves a pass over O and dO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from madformer.kernels.block_causal_attention.forward import (
    LOG2_E,
    AttentionSettings,
    head_of,
    is_masked,
    key_tiles,
    launch_of,
    load_tile,
    num_queries,
    packed_empty,
    query_tile,
    query_tiles,
    store_tile,
    visible_keys,
    within,
    work_item,
)
from madformer.kernels.block_causal_attention.layout import BlockLayout
from madformer.kernels.launch import jit, tl
from madformer.kernels.plans import fresh


@jit
def _dq_kernel(
    q, k, v, out, dout, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ob, stride_oh, stride_ol, stride_db, stride_dh, stride_dl, scale, score_scale,
    total_heads, num_heads, group_heads, num_tiles, text_length, clean_length, noise_length, block_size,
    TEXT_QUERIES: tl.constexpr, CLEAN_QUERIES: tl.constexpr, CROSS_BLOCK: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, DIM0: tl.constexpr, DIM1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rank, item = work_item(num_tiles, total_heads, group_heads)
    batch, head = item // num_heads, item % num_heads
    position, length, first_query, stream = query_tile(
        rank, text_length, clean_length, noise_length, block_size, TEXT_QUERIES, CLEAN_QUERIES, CROSS_BLOCK, BLOCK_M
    )
    last = tl.minimum(position + BLOCK_M, length) - 1
    prefix, start, stop = visible_keys(position, stream)
    last_prefix, last_start, last_stop = visible_keys(last, stream)
    if MASKED:
        prefix_M, start_M, stop_M = visible_keys(tl.minimum(position + tl.arange(0, BLOCK_M), last), stream)

    query, last_query = first_query + position, first_query + last
    last_key = text_length + clean_length + noise_length - 1
    q = head_of(q, batch, head, stride_qb, stride_qh, stride_ql, last_query, UNIT, TMA)
    k = head_of(k, batch, head, stride_kb, stride_kh, stride_kl, last_key, UNIT, TMA)
    v = head_of(v, batch, head, stride_vb, stride_vh, stride_vl, last_key, UNIT, TMA)
    out = head_of(out, batch, head, stride_ob, stride_oh, stride_ol, last_query, UNIT, TMA)
    dout = head_of(dout, batch, head, stride_db, stride_dh, stride_dl, last_query, UNIT, TMA)
    do0 = load_tile(dout, query, 0, DIM0, BLOCK_M, DIM, UNIT, MASKED, TMA)
    out0 = load_tile(out, query, 0, DIM0, BLOCK_M, DIM, UNIT, MASKED, TMA)
    q0 = load_tile(q, query, 0, DIM0, BLOCK_M, DIM, UNIT, MASKED, TMA)
    delta_M = tl.sum(out0.to(tl.float32) * do0.to(tl.float32), 1)
    dq0 = tl.zeros([BLOCK_M, DIM0], tl.float32)
    if DIM1 > 0:
        do1 = load_tile(dout, query, DIM0, DIM1, BLOCK_M, DIM, UNIT, MASKED, TMA)
        out1 = load_tile(out, query, DIM0, DIM1, BLOCK_M, DIM, UNIT, MASKED, TMA)
        q1 = load_tile(q, query, DIM0, DIM1, BLOCK_M, DIM, UNIT, MASKED, TMA)
        delta_M += tl.sum(out1.to(tl.float32) * do1.to(tl.float32), 1)
        dq1 = tl.zeros([BLOCK_M, DIM1], tl.float32)
    rows = query + tl.arange(0, BLOCK_M)
    live_rows = rows <= last_query
    query_length = num_queries(text_length, clean_length, noise_length, TEXT_QUERIES, CLEAN_QUERIES)
    row_offset = item.to(tl.int64) * query_length
    tl.store(delta_ptr + row_offset + rows, delta_M, mask=live_rows)
    lse_M = tl.load(lse_ptr + row_offset + tl.minimum(rows, last_query))

    prefix_tiles = tl.cdiv(last_prefix, BLOCK_N)
    for i in range(prefix_tiles + tl.cdiv(last_stop - start, BLOCK_N)):
        in_prefix = i < prefix_tiles
        key = tl.where(in_prefix, i * BLOCK_N, start + (i - prefix_tiles) * BLOCK_N)
        k0 = load_tile(k, key, 0, DIM0, BLOCK_N, DIM, UNIT, MASKED, TMA)
        v0 = load_tile(v, key, 0, DIM0, BLOCK_N, DIM, UNIT, MASKED, TMA)
        scores = tl.dot(q0, k0.T, input_precision=PRECISION)
        dp = tl.dot(do0, v0.T, input_precision=PRECISION)
        if DIM1 > 0:
            k1 = load_tile(k, key, DIM0, DIM1, BLOCK_N, DIM, UNIT, MASKED, TMA)
            v1 = load_tile(v, key, DIM0, DIM1, BLOCK_N, DIM, UNIT, MASKED, TMA)
            scores = tl.dot(q1, k1.T, scores, input_precision=PRECISION)
            dp = tl.dot(do1, v1.T, dp, input_precision=PRECISION)
        p = tl.exp2(scores * score_scale - lse_M[:, None])
        if MASKED:
            cut = (key + BLOCK_N > tl.where(in_prefix, prefix, stop)) | (key < tl.where(in_prefix, 0, last_start))
            if cut:
                live = within(key, tl.where(in_prefix, 0, start_M), tl.where(in_prefix, prefix_M, stop_M), BLOCK_N)
                p = tl.where(live, p, 0.0)
        ds = (p * (dp - delta_M[:, None])).to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
        if DIM1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)

    dq_ptr += (batch.to(tl.int64) * query_length * num_heads + head) * DIM
    store_tile(dq_ptr, dq0 * scale, rows, live_rows, num_heads * DIM, 0, DIM)
    if DIM1 > 0:
        store_tile(dq_ptr, dq1 * scale, rows, live_rows, num_heads * DIM, DIM0, DIM)


@jit
def _key_tile(
    rank, text_length, clean_length, noise_length, block_size,
    TEXT_QUERIES: tl.constexpr, CLEAN_QUERIES: tl.constexpr, CROSS_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where a key tile starts in its stream, the tokens of that, its first key, and what :func:`_visible_to` needs.

    The packed order is the order of work already: text is read by all, early blocks by most, noise by its own.
    """
    text_tiles, clean_tiles = tl.cdiv(text_length, BLOCK), tl.cdiv(clean_length, BLOCK)
    is_text, is_noise = rank < text_tiles, rank >= text_tiles + clean_tiles
    position = BLOCK * (rank - tl.where(is_text, 0, text_tiles + tl.where(is_noise, clean_tiles, 0)))
    length = tl.where(is_text, text_length, tl.where(is_noise, noise_length, clean_length))
    first_key = tl.where(is_text, 0, text_length + tl.where(is_noise, clean_length, 0))

    text_rows = text_length if TEXT_QUERIES else 0
    first_noise = text_rows + (clean_length if CLEAN_QUERIES else 0)
    query_length = first_noise + noise_length
    first = tl.where(is_text, 0, tl.where(is_noise, first_noise, text_rows))
    stop = tl.where(is_text | is_noise, query_length, first_noise)
    size = tl.where(is_text, 1 if TEXT_QUERIES else text_length, block_size)
    if CROSS_BLOCK:
        to_end = (is_noise == 0) | (clean_length == 0)
        first_later = tl.where(is_text | is_noise, query_length, first_noise)
    else:
        to_end = is_text
        first_later = query_length
    return position, length, first_key, (first, stop, size, to_end, first_later, query_length)


@jit
def _visible_to(position, stream):
    """The intervals ``[start, stop)`` and ``[later, Lq)`` of queries that attend to the key at ``position`` of its
    stream: those of the same stream (for text, of all), and the noise that reads a clean key."""
    first, stop, size, to_end, first_later, query_length = stream
    block = position // size * size
    start = tl.minimum(first + block, stop)
    later = tl.minimum(first_later + block + size, query_length)
    return start, tl.where(to_end, stop, tl.minimum(start + size, stop)), later


@jit
def _dkdv_kernel(
    k, v, q, dout, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_qb, stride_qh, stride_ql, stride_db, stride_dh, stride_dl, scale, score_scale,
    total_heads, num_heads, group_heads, num_tiles, text_length, clean_length, noise_length, block_size,
    TEXT_QUERIES: tl.constexpr, CLEAN_QUERIES: tl.constexpr, CROSS_BLOCK: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, DIM0: tl.constexpr, DIM1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rank, item = work_item(num_tiles, total_heads, group_heads)
    batch, head = item // num_heads, item % num_heads
    position, length, first_key, stream = _key_tile(
        rank, text_length, clean_length, noise_length, block_size, TEXT_QUERIES, CLEAN_QUERIES, CROSS_BLOCK, BLOCK_N
    )
    last = tl.minimum(position + BLOCK_N, length) - 1
    start, stop, later = _visible_to(position, stream)
    last_start, last_stop, last_later = _visible_to(last, stream)
    if MASKED:
        start_N, stop_N, later_N = _visible_to(tl.minimum(position + tl.arange(0, BLOCK_N), last), stream)

    query_length = num_queries(text_length, clean_length, noise_length, TEXT_QUERIES, CLEAN_QUERIES)
    key, last_key, last_query = first_key + position, first_key + last, query_length - 1
    k = head_of(k, batch, head, stride_kb, stride_kh, stride_kl, last_key, UNIT, TMA)
    v = head_of(v, batch, head, stride_vb, stride_vh, stride_vl, last_key, UNIT, TMA)
    q = head_of(q, batch, head, stride_qb, stride_qh, stride_ql, last_query, UNIT, TMA)
    dout = head_of(dout, batch, head, stride_db, stride_dh, stride_dl, last_query, UNIT, TMA)
    k0 = load_tile(k, key, 0, DIM0, BLOCK_N, DIM, UNIT, MASKED, TMA)
    v0 = load_tile(v, key, 0, DIM0, BLOCK_N, DIM, UNIT, MASKED, TMA)
    dk0, dv0 = tl.zeros([BLOCK_N, DIM0], tl.float32), tl.zeros([BLOCK_N, DIM0], tl.float32)
    if DIM1 > 0:
        k1 = load_tile(k, key, DIM0, DIM1, BLOCK_N, DIM, UNIT, MASKED, TMA)
        v1 = load_tile(v, key, DIM0, DIM1, BLOCK_N, DIM, UNIT, MASKED, TMA)
        dk1, dv1 = tl.zeros([BLOCK_N, DIM1], tl.float32), tl.zeros([BLOCK_N, DIM1], tl.float32)
    lse_ptr += item.to(tl.int64) * query_length
    delta_ptr += item.to(tl.int64) * query_length

    own_tiles = tl.cdiv(last_stop - start, BLOCK_M)
    # Without masks every key has a query. Of a loop that may not run ptxas would not overlap the products (C7515).
    for i in range(tl.maximum(own_tiles + tl.cdiv(query_length - later, BLOCK_M), 1)):
        is_own = i < own_tiles
        query = tl.where(is_own, start + i * BLOCK_M, later + (i - own_tiles) * BLOCK_M)
        rows = query + tl.arange(0, BLOCK_M)
        if MASKED:
            rows = tl.minimum(rows, last_query)
        lse_M = tl.load(lse_ptr + rows)
        q0 = load_tile(q, query, 0, DIM0, BLOCK_M, DIM, UNIT, MASKED, TMA)
        do0 = load_tile(dout, query, 0, DIM0, BLOCK_M, DIM, UNIT, MASKED, TMA)
        # Transposed, so that P^T and dS^T are left operands, which matrix units take from registers.
        scores = tl.dot(k0, q0.T, input_precision=PRECISION)
        if DIM1 > 0:
            q1 = load_tile(q, query, DIM0, DIM1, BLOCK_M, DIM, UNIT, MASKED, TMA)
            do1 = load_tile(dout, query, DIM0, DIM1, BLOCK_M, DIM, UNIT, MASKED, TMA)
            scores = tl.dot(k1, q1.T, scores, input_precision=PRECISION)
        p = tl.exp2(scores * score_scale - lse_M[None, :])
        if MASKED:
            first_full, full_stop = tl.where(is_own, last_start, last_later), tl.where(is_own, stop, query_length)
            cut = (query < first_full) | (query + BLOCK_M > full_stop)
            if cut:
                first_N, stop_of_N = tl.where(is_own, start_N, later_N), tl.where(is_own, stop_N, query_length)
                live = within(query, first_N, stop_of_N, BLOCK_M)
                p = tl.where(live, p, 0.0)
        # dV and dP are in flight together, and dK with the next scores.
        p_low = p.to(do0.dtype)
        dv0 = tl.dot(p_low, do0, dv0, input_precision=PRECISION)
        dp = tl.dot(v0, do0.T, input_precision=PRECISION)
        if DIM1 > 0:
            dv1 = tl.dot(p_low, do1, dv1, input_precision=PRECISION)
            dp = tl.dot(v1, do1.T, dp, input_precision=PRECISION)
        delta_M = tl.load(delta_ptr + rows)
        ds = (p * (dp - delta_M[None, :])).to(q0.dtype)
        dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
        if DIM1 > 0:
            dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)

    rows = key + tl.arange(0, BLOCK_N)
    live_rows = rows <= last_key
    key_length = text_length + clean_length + noise_length
    offset = (batch.to(tl.int64) * key_length * num_heads + head) * DIM
    store_tile(dk_ptr + offset, dk0 * scale, rows, live_rows, num_heads * DIM, 0, DIM)
    store_tile(dv_ptr + offset, dv0, rows, live_rows, num_heads * DIM, 0, DIM)
    if DIM1 > 0:
        store_tile(dk_ptr + offset, dk1 * scale, rows, live_rows, num_heads * DIM, DIM0, DIM)
        store_tile(dv_ptr + offset, dv1, rows, live_rows, num_heads * DIM, DIM0, DIM)


def has_idle_keys(layout: BlockLayout) -> bool:
    """Whether there is a clean block that no query attends to."""
    if layout.clean_blocks == 0 or layout.clean_queries:
        return False
    return layout.clean_blocks >= layout.noise_blocks or not layout.cross_block


def backward(
    examples: Sequence[Tensor], layout: BlockLayout, scale: float, settings: AttentionSettings
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """What makes the gradients of q, k and v of tensors like the ``examples``: the gradient of the output, q, k and v,
    the output, and the log-sum-exp as :func:`forward` gives it."""
    grad, q, k, v, out, lse = examples
    if layout.query_length == 0:
        return lambda grad, q, k, v, *_: (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    m, n = settings.dq.rows, settings.dq.cols
    make_dq = launch_of(
        _dq_kernel,
        query_tiles(layout, m),
        [(q, m), (k, n), (v, n), (out, m), (grad, m)],
        [scale, scale * LOG2_E],
        layout,
        settings.dq,
        settings,
        MASKED=is_masked(layout, m, n),
        BLOCK_M=m,
        BLOCK_N=n,
    )
    n, m = settings.dkdv.rows, settings.dkdv.cols
    make_dk_dv = launch_of(
        _dkdv_kernel,
        key_tiles(layout, n),
        [(k, n), (v, n), (q, m), (grad, m)],
        [scale, scale * LOG2_E],
        layout,
        settings.dkdv,
        settings,
        MASKED=is_masked(layout, m, n) or has_idle_keys(layout),
        BLOCK_M=m,
        BLOCK_N=n,
    )
    new_dq, new_dk, new_delta = fresh(packed_empty(q)), fresh(packed_empty(k)), fresh(torch.empty_like(lse))

    def run(grad, q, k, v, out, lse):
        dq, dk, dv, delta = new_dq(), new_dk(), new_dk(), new_delta()
        make_dq(q, k, v, out, grad, lse, delta, dq)
        make_dk_dv(k, v, q, grad, lse, delta, dk, dv)
        return dq, dk, dv

    return run
