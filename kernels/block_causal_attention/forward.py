"""The forward kernel, and what the three kernels share: tiles, their ranges, loads and masks.

Shape legend: B batch, H heads, L tokens of the packed streams, D head dim; M queries, N keys of a tile.

Every row of the mask is the union of two intervals of keys, ``[0, prefix)`` and ``[start, stop)``, and both grow with
the row inside one stream. A tile of queries therefore meets two ranges of keys, between which the loop jumps, and a
tile of keys is full for all of its rows exactly if it is for the first and the last. Text is a stream of blocks of
one token. Where tiles divide blocks every tile that is met is full, and the kernels are compiled without masks
(``MASKED=False``); else a tile is masked only if it has to be, which one scalar comparison decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from madformer.kernels.block_causal_attention.layout import BlockLayout
from madformer.kernels.launch import Descriptor, jit, tl
from madformer.kernels.plans import Launch, fresh

LOG2_E = math.log2(math.e)
# What K and V of the heads that run at the same time may take: most of an A100's 40 MB of L2 cache, or an H100's 50.
L2_BYTES = 32 << 20


@dataclass(frozen=True)
class Tile:
    """How one kernel is cut.

    Attributes:
        rows: tokens of the tile that a program owns: queries of the forward and dQ kernels, keys of the dK/dV kernel.
        cols: tokens of the tiles that it loops over.
        max_registers: of a thread, so that one more program fits an SM; None for what the compiler takes.
    """

    rows: int
    cols: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class AttentionSettings:
    """How the three kernels are cut.

    Attributes:
        tma: whether the copy engine loads the tiles, where strides allow it.
        precision: of products of float32 tiles: ``"ieee"`` rounds as float32 does, without matrix units; ``"tf32"``
            has 10 bits of mantissa. Products of the other dtypes are exact.
    """

    forward: Tile
    dq: Tile
    dkdv: Tile
    tma: bool
    precision: str = "ieee"


@jit
def work_item(num_tiles, total_heads, group_heads):
    """Which tile of which head a program owns: all first tiles of a group of heads, then all second ones, and so on.

    Tiles are ranked by their work, the longest first, so that the short ones fill the gaps at the end; a group's
    keys and values fit the L2 cache.
    """
    group = tl.program_id(0) // (num_tiles * group_heads)
    item = tl.program_id(0) - group * num_tiles * group_heads
    size = tl.minimum(group_heads, total_heads - group * group_heads)
    return item // size, group * group_heads + item % size


@jit
def num_queries(text_length, clean_length, noise_length, TEXT_QUERIES: tl.constexpr, CLEAN_QUERIES: tl.constexpr):
    return (text_length if TEXT_QUERIES else 0) + (clean_length if CLEAN_QUERIES else 0) + noise_length


@jit
def query_tile(
    rank, text_length, clean_length, noise_length, block_size,
    TEXT_QUERIES: tl.constexpr, CLEAN_QUERIES: tl.constexpr, CROSS_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where a query tile starts in its stream, the tokens of that, its first query, and for :func:`visible_keys` its
    first key, the size of a block, the prefix that all have, the longest context that is added to that, and whether
    the own keys of a block follow its prefix at once.

    The last blocks of both image streams have the most keys, so they alternate from the end; the text is last.
    """
    text_rows = text_length if TEXT_QUERIES else 0
    clean_rows = clean_length if CLEAN_QUERIES else 0
    clean_tiles, noise_tiles = tl.cdiv(clean_rows, BLOCK), tl.cdiv(noise_length, BLOCK)
    common = tl.minimum(clean_tiles, noise_tiles)
    unpaired = clean_tiles + noise_tiles - 2 * common
    paired = rank - unpaired
    is_noise = tl.where(paired < 0, noise_tiles > clean_tiles, paired % 2 == 0)
    index = common - 1 - tl.where(paired < 0, paired, paired // 2)

    length = tl.where(is_noise, noise_length, clean_rows)
    first_query = text_rows + tl.where(is_noise, clean_rows, 0)
    first_key = text_length + tl.where(is_noise, clean_length, 0)
    size, base = block_size, text_length
    if CROSS_BLOCK:
        context = tl.where(clean_length == 0, noise_length, clean_length)
        joined = (is_noise == 0) | (clean_length == 0)
    else:
        context = 0
        joined = rank < 0
    if TEXT_QUERIES:
        text_rank = rank - clean_tiles - noise_tiles
        is_text = text_rank >= 0
        index = tl.where(is_text, tl.cdiv(text_length, BLOCK) - 1 - text_rank, index)
        length = tl.where(is_text, text_length, length)
        first_query, first_key = tl.where(is_text, 0, first_query), tl.where(is_text, 0, first_key)
        size, base = tl.where(is_text, 1, size), tl.where(is_text, 0, base)
        joined = joined | is_text
    return index * BLOCK, length, first_query, (first_key, size, base, context, joined)


@jit
def visible_keys(position, stream):
    """The intervals ``[0, prefix)`` and ``[start, stop)`` that the query at ``position`` of its stream attends to."""
    first_key, size, base, context, joined = stream
    block = position // size * size
    stop = first_key + block + size
    prefix = tl.where(joined, stop, base + tl.minimum(block, context))
    return prefix, tl.where(joined, 0, stop - size), tl.where(joined, 0, stop)


@jit
def head_of(x, batch, head, stride_b, stride_h, stride_l, last_row, UNIT: tl.constexpr, TMA: tl.constexpr):
    """One head of a tensor or of its descriptor, for :func:`load_tile`.

    Strides are counted in ``UNIT`` elements, 16 bytes where all of them allow it: the compiler knows by it that wide
    loads are aligned.
    """
    if TMA:
        return x, batch, head, stride_l, last_row
    else:
        pointer = x + (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h) * UNIT
        return pointer, batch, head, stride_l, last_row


@jit
def load_tile(
    x, row, FIRST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    UNIT: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``(ROWS, WIDTH)`` of one head from ``row`` and column ``FIRST`` on; columns past ``DIM`` are zero.

    Rows past the last one repeat it: whoever uses them masks the scores, not the load.
    """
    pointer, batch, head, stride, last_row = x
    if TMA:
        return pointer.load([batch, head, row, FIRST]).reshape(ROWS, WIDTH)
    else:
        rows = tl.arange(0, ROWS)
        if MASKED:
            rows = tl.minimum(rows, last_row - row)
        cols = FIRST + tl.arange(0, WIDTH)
        pointers = pointer + row.to(tl.int64) * stride * UNIT + (rows[:, None] * stride * UNIT + cols[None, :])
        if FIRST + WIDTH > DIM:
            return tl.load(pointers, mask=cols[None, :] < DIM, other=0.0)
        else:
            return tl.load(pointers)


@jit
def store_tile(pointer, values, rows, live, stride, FIRST: tl.constexpr, DIM: tl.constexpr):
    """Writes ``values`` to the rows of one head that are ``live``, from column ``FIRST`` on."""
    cols = FIRST + tl.arange(0, values.shape[1])
    pointers = pointer + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=live[:, None] & (cols[None, :] < DIM))


@jit
def within(first, start, stop, COUNT: tl.constexpr):
    """``(len(start), COUNT)``: whether each of ``first, first + 1, ...`` is in each interval."""
    offsets = first + tl.arange(0, COUNT)
    return (offsets[None, :] >= start[:, None]) & (offsets[None, :] < stop[:, None])


@jit
def _forward_kernel(
    q, k, v, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    score_scale, total_heads, num_heads, group_heads, num_tiles, text_length, clean_length, noise_length, block_size,
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
    q0 = load_tile(q, query, 0, DIM0, BLOCK_M, DIM, UNIT, MASKED, TMA)
    acc0 = tl.zeros([BLOCK_M, DIM0], tl.float32)
    if DIM1 > 0:
        q1 = load_tile(q, query, DIM0, DIM1, BLOCK_M, DIM, UNIT, MASKED, TMA)
        acc1 = tl.zeros([BLOCK_M, DIM1], tl.float32)
    # Finite, so that a row that has met only masked keys takes no difference of infinities.
    max_M = tl.full([BLOCK_M], -3.4e38, tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)

    prefix_tiles = tl.cdiv(last_prefix, BLOCK_N)
    for i in range(prefix_tiles + tl.cdiv(last_stop - start, BLOCK_N)):
        in_prefix = i < prefix_tiles
        key = tl.where(in_prefix, i * BLOCK_N, start + (i - prefix_tiles) * BLOCK_N)
        k0 = load_tile(k, key, 0, DIM0, BLOCK_N, DIM, UNIT, MASKED, TMA)
        scores = tl.dot(q0, k0.T, input_precision=PRECISION)
        if DIM1 > 0:
            k1 = load_tile(k, key, DIM0, DIM1, BLOCK_N, DIM, UNIT, MASKED, TMA)
            scores = tl.dot(q1, k1.T, scores, input_precision=PRECISION)
        if MASKED:
            cut = (key + BLOCK_N > tl.where(in_prefix, prefix, stop)) | (key < tl.where(in_prefix, 0, last_start))
            if cut:
                live = within(key, tl.where(in_prefix, 0, start_M), tl.where(in_prefix, prefix_M, stop_M), BLOCK_N)
                scores = tl.where(live, scores, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(scores, 1) * score_scale)
        p = tl.exp2(scores * score_scale - new_max_M[:, None])
        correction_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * correction_M + tl.sum(p, 1)
        max_M = new_max_M
        acc0 = acc0 * correction_M[:, None]
        v0 = load_tile(v, key, 0, DIM0, BLOCK_N, DIM, UNIT, MASKED, TMA)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0, input_precision=PRECISION)
        if DIM1 > 0:
            v1 = load_tile(v, key, DIM0, DIM1, BLOCK_N, DIM, UNIT, MASKED, TMA)
            acc1 = tl.dot(p, v1, acc1 * correction_M[:, None], input_precision=PRECISION)

    rows = query + tl.arange(0, BLOCK_M)
    live_rows = rows <= last_query
    query_length = num_queries(text_length, clean_length, noise_length, TEXT_QUERIES, CLEAN_QUERIES)
    tl.store(lse_ptr + item.to(tl.int64) * query_length + rows, max_M + tl.log2(sum_M), mask=live_rows)
    out_ptr += (batch.to(tl.int64) * query_length * num_heads + head) * DIM
    inverse_M = 1.0 / sum_M
    store_tile(out_ptr, acc0 * inverse_M[:, None], rows, live_rows, num_heads * DIM, 0, DIM)
    if DIM1 > 0:
        store_tile(out_ptr, acc1 * inverse_M[:, None], rows, live_rows, num_heads * DIM, DIM0, DIM)


def head_chunks(head_dim: int) -> tuple[int, int]:
    """The widths in which a head is held: powers of two, as Triton's tiles are, and at least 16, as matrix units ask.

    72, 80 and 96 become 64 + 16 (half of it zeros), 64 + 16 and 64 + 32: padded to 128 they would cost 1.8, 1.6 and
    1.3 times the arithmetic and as much more of registers and shared memory.
    """
    if 64 < head_dim <= 96:
        return 64, max(16, 1 << (head_dim - 65).bit_length())
    return max(16, 1 << (head_dim - 1).bit_length()), 0


def query_tiles(layout: BlockLayout, rows: int) -> int:
    """Tiles of all streams of queries; none lies in two streams."""
    clean = layout.clean_length if layout.clean_queries else 0
    noise = layout.noise_blocks * layout.block_size
    return sum(-(-length // rows) for length in (layout.text_query_length, clean, noise))


def key_tiles(layout: BlockLayout, rows: int) -> int:
    noise = layout.noise_blocks * layout.block_size
    return sum(-(-length // rows) for length in (layout.text_length, layout.clean_length, noise))


def is_masked(layout: BlockLayout, queries: int, keys: int) -> bool:
    """Whether tiles of so many queries and keys, both powers of two, cut blocks or the text."""
    aligned = layout.block_size % max(queries, keys) == 0 and layout.text_length % keys == 0
    return not aligned or layout.text_query_length > 0


def operands(loaded: list[tuple[Tensor, int]], tma: bool) -> tuple[list[Descriptor], list[int], dict[str, Any]]:
    """``(B, H, L, D)`` tensors, each with the rows of the tiles it is loaded in: (descriptors, strides, constants).

    The copy engine takes them where their strides are multiples of 16 bytes. A head in two chunks would need two
    descriptors a tensor, so it is loaded by pointers.
    """
    tensors = [x for x, _ in loaded]
    unit = 16 // tensors[0].element_size()
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    if any(stride % unit for stride in strides) or any(x.data_ptr() % 16 for x in tensors):
        unit = 1
    width, second = head_chunks(tensors[0].shape[3])
    # An expanded or empty tensor has no descriptor.
    tma = tma and unit > 1 and second == 0 and 0 not in strides and all(x.numel() for x in tensors)
    descriptors = [Descriptor(x, [1, 1, rows, width]) for x, rows in loaded] if tma else []
    return descriptors, [stride // unit for stride in strides], {"UNIT": unit, "TMA": tma}


def launch_of(
    kernel: Any,
    num_tiles: int,
    loaded: list[tuple[Tensor, int]],
    scales: list[float],
    layout: BlockLayout,
    tile: Tile,
    settings: AttentionSettings,
    **options: Any,
) -> Launch:
    """The launch of one of the kernels on ``num_tiles`` tiles of every head, for tensors like ``loaded`` and others."""
    first = loaded[0][0]
    batch, heads, _, dim = first.shape
    head_bytes = 2 * layout.key_length * dim * first.element_size()
    num_groups = max(1, min(batch * heads, -(-batch * heads * head_bytes // L2_BYTES)))
    group_heads = -(-batch * heads // num_groups)
    lengths = [layout.text_length, layout.clean_length, layout.noise_blocks * layout.block_size]
    descriptors, strides, loads = operands(loaded, settings.tma)
    dim0, dim1 = head_chunks(dim)
    return Launch(
        kernel,
        (num_tiles * batch * heads,),
        first.device,
        [*strides, *scales, batch * heads, heads, group_heads, num_tiles, *lengths, layout.block_size],
        descriptors,
        TEXT_QUERIES=layout.text_query_length > 0,
        CLEAN_QUERIES=layout.clean_queries and layout.clean_blocks > 0,
        CROSS_BLOCK=layout.cross_block,
        PRECISION=settings.precision,
        DIM=dim,
        DIM0=dim0,
        DIM1=dim1,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **({} if tile.max_registers is None else {"maxnreg": tile.max_registers}),
        **loads,
        **options,
    )


def packed_empty(like_BHLD: Tensor) -> Tensor:
    """``(B, H, L, D)`` over memory that is ``(B, L, H, D)``, as a projection takes and gives it."""
    batch, heads, length, dim = like_BHLD.shape
    return like_BHLD.new_empty(batch, length, heads, dim).transpose(1, 2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, settings: AttentionSettings
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What makes of tensors like these the output and, in base 2, the log-sum-exp of the scaled scores, ``(B, H, Lq)``
    in float32."""
    tile = settings.forward
    m, n = tile.rows, tile.cols
    launch = launch_of(
        _forward_kernel,
        query_tiles(layout, m),
        [(q, m), (k, n), (v, n)],
        [scale * LOG2_E],
        layout,
        tile,
        settings,
        MASKED=is_masked(layout, m, n),
        BLOCK_M=m,
        BLOCK_N=n,
    )
    new_out, new_lse = fresh(packed_empty(q)), fresh(torch.empty(q.shape[:3], device=q.device))

    def run(q, k, v):
        out, lse = new_out(), new_lse()
        launch(q, k, v, out, lse)
        return out, lse

    return run
