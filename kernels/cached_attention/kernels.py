"""The kernels of attention to a cached prefix and the own block.

The keys of a sample are cut into tiles that never straddle the end of the cached part: first the full tiles of the
cache and of the own block, which need no mask, then the at most two ragged ones. Softmax does not care about the order
of keys, so one loop runs over all full tiles, and its loads stay ahead of it across the seam.

Where a batch has too few tiles of queries to fill the GPU, the tiles of keys are shared out among P programs (split-K,
as in FlashDecoding). Each program takes an equal share of what its sample really has, whatever the capacity; the
second kernel merges the normalised results by their log-sum-exp.

Shape legend: B batch, H heads, L queries, N own keys, R rows of the cache, S their capacity, D head dim, P splits.
"""

from __future__ import annotations

from madformer.kernels.launch import jit, tl


@jit
def _rows_of_head(ptr, strides, sample, head, UNIT: tl.constexpr):
    """Where the rows of one head begin, and how far apart they are.

    Strides come divided by UNIT: of an argument Triton itself notices only that 16 divides it, and rows of 72 or 40
    would be read element by element.
    """
    return ptr + (sample * strides[0] + head * strides[1]) * UNIT, tl.cast(strides[2], tl.int64) * UNIT


@jit
def _load_rows(ptr, stride, first, stop, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr):
    """Rows ``first .. first + ROWS`` of one head; those from ``stop`` on (if MASKED) and columns from D on are 0."""
    rows = (first + tl.arange(0, ROWS).to(tl.int64))[:, None]
    cols = tl.arange(0, COLS)[None, :]
    ptrs = ptr + rows * stride + cols
    if MASKED:
        return tl.load(ptrs, mask=(rows < stop) & (cols < D), other=0.0)
    elif D < COLS:
        return tl.load(ptrs, mask=cols < D, other=0.0)
    else:
        return tl.load(ptrs)


@jit
def _attend(
    state, q, k_ptr, stride_k, v_ptr, stride_v, first, stop, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys in the online softmax (arXiv:2205.14135), in base 2; ``peak`` is the scaled maximum."""
    acc, norm, peak = state
    k = _load_rows(k_ptr, stride_k, first, stop, D, BLOCK_N, BLOCK_D, MASKED)
    # tf32 would keep 10 bits of float32; for the other dtypes the precision says nothing.
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(first + tl.arange(0, BLOCK_N)[None, :] < stop, scores, float("-inf"))
    # Every tile has a key that counts, so the new peak is finite, and no difference of infinities arises.
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    norm = norm * decay + tl.sum(weights, 1)
    v = _load_rows(v_ptr, stride_v, first, stop, D, BLOCK_N, BLOCK_D, MASKED)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, norm, new_peak


@jit
def split_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, lengths_ptr, rows_ptr, out_ptr, lse_ptr,
    strides_q, strides_kc, strides_vc, strides_k, strides_v, stride_lengths, stride_rows,
    num_queries, num_rows, capacity, num_own, num_splits, scale_log2,
    HAS_OWN: tl.constexpr, HAS_ROWS: tl.constexpr, SPLIT: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # The tiles of queries of one head and split run at about the same time, and share its keys in the L2 cache. Samples
    # lie along the one dimension of the grid that takes more than 65,535.
    num_query_tiles = tl.cdiv(num_queries, BLOCK_M)
    num_shares = num_query_tiles * num_splits
    share = tl.program_id(0) % num_shares
    split = share // num_query_tiles
    first_query = share % num_query_tiles * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    sample = (tl.program_id(0) // num_shares).to(tl.int64)
    num_samples = tl.num_programs(0) // num_shares

    length = tl.load(lengths_ptr + sample * stride_lengths)
    length = tl.minimum(tl.maximum(length, 0), capacity).to(tl.int32)
    row = sample
    if HAS_ROWS:
        row = tl.load(rows_ptr + sample * stride_rows).to(tl.int64)
        # Nothing is read of a row that is not there.
        length = tl.where((row >= 0) & (row < num_rows), length, 0)
    full_cached = length // BLOCK_N
    full_own = num_own // BLOCK_N
    num_full = full_cached + full_own
    num_tiles = tl.cdiv(length, BLOCK_N) + tl.cdiv(num_own, BLOCK_N)
    start = num_tiles * split // num_splits
    stop = num_tiles * (split + 1) // num_splits

    q_rows, stride_q = _rows_of_head(q_ptr, strides_q, sample, head, UNIT)
    kc_rows, stride_kc = _rows_of_head(k_cache_ptr, strides_kc, row, head, UNIT)
    vc_rows, stride_vc = _rows_of_head(v_cache_ptr, strides_vc, row, head, UNIT)
    k_rows, stride_k = _rows_of_head(k_ptr, strides_k, sample, head, UNIT)
    v_rows, stride_v = _rows_of_head(v_ptr, strides_v, sample, head, UNIT)
    q = _load_rows(q_rows, stride_q, first_query, num_queries, D, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    for tile in range(start, tl.minimum(stop, num_full)):
        if HAS_OWN:
            cached = tile < full_cached
            ks, step_k = tl.where(cached, kc_rows, k_rows), tl.where(cached, stride_kc, stride_k)
            vs, step_v = tl.where(cached, vc_rows, v_rows), tl.where(cached, stride_vc, stride_v)
            first = tl.where(cached, tile, tile - full_cached) * BLOCK_N
        else:
            ks, step_k, vs, step_v, first = kc_rows, stride_kc, vc_rows, stride_vc, tile * BLOCK_N
        acc, norm, peak = _attend(
            (acc, norm, peak), q, ks, step_k, vs, step_v, first, 0, scale_log2, D, BLOCK_N, BLOCK_D, False
        )
    for tile in tl.range(tl.maximum(start, num_full), stop, num_stages=1):
        # At most one ragged tile of the cache and one of the own block: nothing to pipeline, and registers to save.
        cached = (tile == num_full) & (length % BLOCK_N != 0)
        ks, step_k = tl.where(cached, kc_rows, k_rows), tl.where(cached, stride_kc, stride_k)
        vs, step_v = tl.where(cached, vc_rows, v_rows), tl.where(cached, stride_vc, stride_v)
        first = tl.where(cached, full_cached, full_own) * BLOCK_N
        end = tl.where(cached, length, num_own)
        acc, norm, peak = _attend(
            (acc, norm, peak), q, ks, step_k, vs, step_v, first, end, scale_log2, D, BLOCK_N, BLOCK_D, True
        )

    # Without keys the result is 0. A split without keys says so by its lse, and is not read.
    out = acc / tl.where(norm == 0, 1.0, norm)[:, None]
    queries = first_query + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    live = queries < num_queries
    rows = ((split * num_samples + sample) * num_queries + queries) * tl.num_programs(1) + head
    if SPLIT:
        tl.store(lse_ptr + rows, peak + tl.log2(tl.where(norm == 0, 1.0, norm)), mask=live)
        live = live & (start < stop)
    mask = live[:, None] & (cols < D)[None, :]
    tl.store(out_ptr + rows[:, None] * D + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def combine_kernel(
    partial_ptr, lse_ptr, out_ptr, num_rows,
    NUM_SPLITS: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)[None, :]
    live = rows < num_rows
    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    split_rows = rows
    for _ in tl.static_range(NUM_SPLITS):
        peak = tl.maximum(peak, tl.load(lse_ptr + split_rows, mask=live, other=float("-inf")))
        split_rows += num_rows
    peak = tl.where(peak == float("-inf"), 0.0, peak)

    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    norm = tl.zeros((BLOCK_R,), tl.float32)
    split_rows = rows
    for _ in tl.static_range(NUM_SPLITS):
        weight = tl.exp2(tl.load(lse_ptr + split_rows, mask=live, other=float("-inf")) - peak)
        mask = (weight > 0)[:, None] & (cols < D)
        partial = tl.load(partial_ptr + split_rows[:, None] * D + cols, mask=mask, other=0.0)
        acc += weight[:, None] * partial
        norm += weight
        split_rows += num_rows
    out = acc / tl.where(norm == 0, 1.0, norm)[:, None]
    mask = live[:, None] & (cols < D)
    tl.store(out_ptr + rows[:, None] * D + cols, out.to(out_ptr.dtype.element_ty), mask=mask)
