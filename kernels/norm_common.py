"""The kernels of ``rms_norm`` and ``adaln``: one pass over rows that adds, normalises and modulates; its gradient.

Both ops are ``total = residual + gate * x``, ``n = normalise(total) * weight + bias``, ``y = n * (1 + scale) + shift``
with parts left out; a part that is left out is a null pointer, and costs nothing in the compiled kernel.

Shape legend: B samples, M blocks of a sample that share a row of shift, scale and gate, T tokens of a block,
L = M * T tokens, C columns; S programs that share a block in the backward pass.

A row is read in chunks whose width is a power of two, held in a tuple of tiles: 1152 columns as 5 chunks of 256 waste
a tenth of the lanes, one tile of 2048 would waste 44 %. All loads of a tile of rows are issued before anything is
computed or stored, since a load cannot be moved up across a store that may alias it: bytes in flight are what a
memory-bound kernel lives on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from madformer.kernels.checks import check_device, check_floating, check_shape
from madformer.kernels.launch import jit, launch, target, tl

MAX_COLS = 8192
"""Widest row: its chunks stay in the registers of one program."""


@jit
def _mask(live_rows, i, COLS: tl.constexpr, CHUNK: tl.constexpr):
    """The elements of chunk ``i`` that exist; a chunk that is whole needs no comparison of columns."""
    live = live_rows
    if (i + 1) * CHUNK > COLS:
        live = live & (i * CHUNK + tl.arange(0, CHUNK)[None, :] < COLS)
    return live


@jit
def _load(rows_ptr, live_rows, COLS: tl.constexpr, CHUNK: tl.constexpr):
    """The rows at the pointers ``rows_ptr`` (ROWS, 1) as a tuple of (ROWS, CHUNK) tiles, as they are in memory."""
    chunks = ()
    for i in tl.static_range((COLS + CHUNK - 1) // CHUNK):
        cols = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        chunks = chunks + (tl.load(rows_ptr + cols, mask=_mask(live_rows, i, COLS, CHUNK), other=0.0),)
    return chunks


@jit
def _store(rows_ptr, chunks, live_rows, COLS: tl.constexpr, CHUNK: tl.constexpr):
    for i in tl.static_range((COLS + CHUNK - 1) // CHUNK):
        cols = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        values = chunks[i].to(rows_ptr.dtype.element_ty)
        tl.store(rows_ptr + cols, values, mask=_mask(live_rows, i, COLS, CHUNK))


@jit
def _sum(chunks):
    """One tile that is the sum of the chunks."""
    sums = tl.zeros_like(chunks[0])
    for i in tl.static_range(len(chunks)):
        sums += chunks[i]
    return sums


@jit
def _dot(a, b):
    products = tl.zeros_like(a[0])
    for i in tl.static_range(len(a)):
        products += a[i] * b[i]
    return products


@jit
def _sum_rows(a, b):
    """The sums of the rows of two tiles, (ROWS, 1) each: joined, they take the barriers of one."""
    sum_a, sum_b = tl.split(tl.sum(tl.join(a, b), axis=1))
    return sum_a[:, None], sum_b[:, None]


@jit
def _centre(chunks, mean, COLS: tl.constexpr, CHUNK: tl.constexpr):
    centred = ()
    for i in tl.static_range(len(chunks)):
        values = chunks[i] - mean
        if (i + 1) * CHUNK > COLS:
            values = tl.where(i * CHUNK + tl.arange(0, CHUNK)[None, :] < COLS, values, 0.0)
        centred = centred + (values,)
    return centred


@jit
def norm_forward_kernel(
    x_ptr, residual_ptr, gate_ptr, weight_ptr, bias_ptr, shift_ptr, scale_ptr, total_ptr, y_ptr,
    eps, num_tokens, num_blocks, num_tiles,
    stride_xb, stride_xl, stride_rb, stride_rl, stride_gate, stride_shift, stride_scale,
    CENTRED: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS tokens of one block."""
    # Divided in 32 bits, multiplied by strides in 64.
    block = tl.program_id(0) // num_tiles
    token = tl.program_id(0) % num_tiles * ROWS + tl.arange(0, ROWS)[:, None]
    live = token < num_tokens
    sample = (block // num_blocks).to(tl.int64)
    position = (block % num_blocks * num_tokens + token).to(tl.int64)
    block = block.to(tl.int64)
    one_row = tl.zeros([ROWS, 1], tl.int32)  # Modulation is read as a tile too: in the layout in which it is used.
    x = _load(x_ptr + sample * stride_xb + position * stride_xl, live, COLS, CHUNK)
    if residual_ptr is not None:
        residual = _load(residual_ptr + sample * stride_rb + position * stride_rl, live, COLS, CHUNK)
    if gate_ptr is not None:
        gate = _load(gate_ptr + block * stride_gate + one_row, live, COLS, CHUNK)

    total = ()
    for i in tl.static_range(len(x)):
        value = x[i].to(tl.float32)
        if gate_ptr is not None:
            value = value * gate[i].to(tl.float32)
        if residual_ptr is not None:
            value = (value + residual[i].to(tl.float32)).to(total_ptr.dtype.element_ty).to(tl.float32)
        total = total + (value,)
    centred = total
    if CENTRED:
        centred = _centre(total, tl.sum(_sum(total), axis=1, keep_dims=True) / COLS, COLS, CHUNK)
    rstd = tl.rsqrt(tl.sum(_dot(centred, centred), axis=1, keep_dims=True) / COLS + eps)

    if weight_ptr is not None:
        weight = _load(weight_ptr + one_row, live, COLS, CHUNK)
    if bias_ptr is not None:
        bias = _load(bias_ptr + one_row, live, COLS, CHUNK)
    if scale_ptr is not None:
        shift = _load(shift_ptr + block * stride_shift + one_row, live, COLS, CHUNK)
        scale = _load(scale_ptr + block * stride_scale + one_row, live, COLS, CHUNK)
    y = ()
    for i in tl.static_range(len(x)):
        value = centred[i] * rstd
        if weight_ptr is not None:
            value = value * weight[i].to(tl.float32)
        if bias_ptr is not None:
            value = value + bias[i].to(tl.float32)
        if scale_ptr is not None:
            value = value * (1.0 + scale[i].to(tl.float32)) + shift[i].to(tl.float32)
        y = y + (value,)
    row = (block * num_tokens + token) * COLS
    if total_ptr is not None:
        _store(total_ptr + row, total, live, COLS, CHUNK)
    _store(y_ptr + row, y, live, COLS, CHUNK)


@jit
def _add_products(sums, a, b):
    added = ()
    for i in tl.static_range(len(sums)):
        added = added + (sums[i] + a[i].to(tl.float32) * b[i].to(tl.float32),)
    return added


@jit
def _zeros(ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr):
    chunks = ()
    for _i in tl.static_range((COLS + CHUNK - 1) // CHUNK):
        chunks = chunks + (tl.zeros([ROWS, CHUNK], tl.float32),)
    return chunks


@jit
def _store_sum(row_ptr, chunks, COLS: tl.constexpr, CHUNK: tl.constexpr):
    for i in tl.static_range(len(chunks)):
        cols = i * CHUNK + tl.arange(0, CHUNK)
        tl.store(row_ptr + cols, tl.sum(chunks[i], axis=0), mask=cols < COLS)


@jit
def norm_backward_kernel(
    grad_y_ptr, grad_total_ptr, total_ptr, x_ptr, gate_ptr, weight_ptr, scale_ptr,
    dtotal_ptr, dx_ptr, sum_ptr, dot_ptr, dgate_ptr,
    eps, num_tokens, num_blocks, num_tiles, num_splits,
    stride_yb, stride_yl, stride_gb, stride_gl, stride_tb, stride_tl, stride_xb, stride_xl, stride_gate, stride_scale,
    CENTRED: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Every ``num_splits``-th tile of one block, and what it adds to the sums over the tokens of the block."""
    # Divided in 32 bits, multiplied by strides in 64.
    block = tl.program_id(0) // num_splits
    sample = (block // num_blocks).to(tl.int64)
    first = block % num_blocks * num_tokens
    block = block.to(tl.int64)
    one_row = tl.zeros([ROWS, 1], tl.int32)
    everywhere = one_row == 0
    if scale_ptr is not None:
        scale = _load(scale_ptr + block * stride_scale + one_row, everywhere, COLS, CHUNK)
    if weight_ptr is not None:
        weight = _load(weight_ptr + one_row, everywhere, COLS, CHUNK)
    if gate_ptr is not None:
        gate = _load(gate_ptr + block * stride_gate + one_row, everywhere, COLS, CHUNK)
    if sum_ptr is not None:
        sums = _zeros(ROWS, COLS, CHUNK)
    if dot_ptr is not None:
        dots = _zeros(ROWS, COLS, CHUNK)
    if dgate_ptr is not None:
        dgate = _zeros(ROWS, COLS, CHUNK)

    for tile in tl.range(tl.program_id(0) % num_splits, num_tiles, num_splits, num_stages=STAGES):
        token = tile * ROWS + tl.arange(0, ROWS)[:, None]
        live = token < num_tokens
        position = (first + token).to(tl.int64)
        total = _load(total_ptr + sample * stride_tb + position * stride_tl, live, COLS, CHUNK)
        grad_y = _load(grad_y_ptr + sample * stride_yb + position * stride_yl, live, COLS, CHUNK)
        if grad_total_ptr is not None:
            grad_total = _load(grad_total_ptr + sample * stride_gb + position * stride_gl, live, COLS, CHUNK)
        if dgate_ptr is not None:
            x = _load(x_ptr + sample * stride_xb + position * stride_xl, live, COLS, CHUNK)

        values = ()
        grad = ()  # of what is normalised, before its weight
        for i in tl.static_range(len(total)):
            values = values + (total[i].to(tl.float32),)
            value = grad_y[i].to(tl.float32)
            if scale_ptr is not None:
                value = value * (1.0 + scale[i].to(tl.float32))
            if weight_ptr is not None:
                value = value * weight[i].to(tl.float32)
            grad = grad + (value,)
        mean_grad = 0.0
        if CENTRED:
            mean, mean_grad = _sum_rows(_sum(values), _sum(grad))
            values, mean_grad = _centre(values, mean / COLS, COLS, CHUNK), mean_grad / COLS
        squares, along = _sum_rows(_dot(values, values), _dot(grad, values))
        rstd = tl.rsqrt(squares / COLS + eps)
        along = along * rstd / COLS
        normalised = ()
        dtotal = ()
        for i in tl.static_range(len(grad)):
            normalised = normalised + (values[i] * rstd,)
            value = rstd * (grad[i] - mean_grad - normalised[i] * along)
            if grad_total_ptr is not None:
                value = value + grad_total[i].to(tl.float32)
            dtotal = dtotal + (value,)

        if sum_ptr is not None:
            added = ()
            for i in tl.static_range(len(sums)):
                added = added + (sums[i] + grad_y[i].to(tl.float32),)
            sums = added
        if dot_ptr is not None:
            dots = _add_products(dots, grad_y, normalised)
        if dgate_ptr is not None:
            dgate = _add_products(dgate, x, dtotal)
        row = (block * num_tokens + token) * COLS
        if dtotal_ptr is not None:
            _store(dtotal_ptr + row, dtotal, live, COLS, CHUNK)
        if dx_ptr is not None:
            dx = ()
            for i in tl.static_range(len(dtotal)):
                value = dtotal[i]
                if gate_ptr is not None:
                    value = value * gate[i].to(tl.float32)
                dx = dx + (value,)
            _store(dx_ptr + row, dx, live, COLS, CHUNK)

    partial = tl.program_id(0).to(tl.int64) * COLS
    if sum_ptr is not None:
        _store_sum(sum_ptr + partial, sums, COLS, CHUNK)
    if dot_ptr is not None:
        _store_sum(dot_ptr + partial, dots, COLS, CHUNK)
    if dgate_ptr is not None:
        _store_sum(dgate_ptr + partial, dgate, COLS, CHUNK)


@jit
def _reduce(partial_ptr, num_partials, cols, COLS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of ``num_partials`` rows at ``partial_ptr``, in ``cols``."""
    sums = tl.zeros([TILE, WIDTH], tl.float32)
    for start in tl.range(0, num_partials, TILE):
        rows = start + tl.arange(0, TILE)[:, None]
        live = (rows < num_partials) & (cols < COLS)[None, :]
        sums += tl.load(partial_ptr + rows * COLS + cols[None, :], mask=live, other=0.0)
    return tl.sum(sums, axis=0)


@jit
def norm_reduce_kernel(
    sum_ptr, dot_ptr, gate_sum_ptr, weight_ptr, bias_ptr, scale_ptr,
    dshift_ptr, dscale_ptr, dgate_ptr, dweight_ptr, dbias_ptr, num_partials, stride_scale,
    COLS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradients of one block's rows, in WIDTH columns, from its partial sums."""
    block = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    live = cols < COLS
    partial, row = block * num_partials * COLS, block * COLS + cols
    factor = 1.0
    if scale_ptr is not None:
        factor = 1.0 + tl.load(scale_ptr + block * stride_scale + cols, mask=live, other=0.0).to(tl.float32)
    if sum_ptr is not None:
        total = _reduce(sum_ptr + partial, num_partials, cols, COLS, TILE, WIDTH)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + row, total.to(dshift_ptr.dtype.element_ty), mask=live)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + row, (total * factor).to(dbias_ptr.dtype.element_ty), mask=live)
    if dot_ptr is not None:
        dot = _reduce(dot_ptr + partial, num_partials, cols, COLS, TILE, WIDTH)
        if dweight_ptr is not None:
            tl.store(dweight_ptr + row, (dot * factor).to(dweight_ptr.dtype.element_ty), mask=live)
        if dscale_ptr is not None:
            dscale = dot
            if weight_ptr is not None:
                dscale = dscale * tl.load(weight_ptr + cols, mask=live, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                dscale = dscale + total * tl.load(bias_ptr + cols, mask=live, other=0.0).to(tl.float32)
            tl.store(dscale_ptr + row, dscale.to(dscale_ptr.dtype.element_ty), mask=live)
    if dgate_ptr is not None:
        dgate = _reduce(gate_sum_ptr + partial, num_partials, cols, COLS, TILE, WIDTH)
        tl.store(dgate_ptr + row, dgate.to(dgate_ptr.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class Settings:
    """How a launch is cut: a program's tile of rows, the chunks of a row, and its warps.

    ``num_stages`` and ``programs_per_sm`` are the backward pass's: tiles in flight, and programs that run at once.
    """

    rows: int
    chunk: int
    num_warps: int
    num_stages: int = 1
    programs_per_sm: int = 0


def _chunk_of(num_cols: int, widest: int) -> int:
    """The widest chunk that leaves at most an eighth of the lanes without a column."""
    whole = min(widest, 1 << (num_cols - 1).bit_length())
    chunks = [whole >> shift for shift in range(8) if whole >> shift >= 64]
    return next((chunk for chunk in chunks if -num_cols % chunk * 8 <= num_cols), whole)


def choose_forward_settings(num_cols: int) -> Settings:
    """A warp to a row of up to 1536 columns, so that no sum leaves its warp; 16 bytes of bf16 a load.

    At 1152 columns 64 registers (127 for AdaLN): 8 (4) programs of 4 rows on an SM, 74 KB of loads in flight.
    """
    warps_of_row = 1 << (-(-num_cols // 1536) - 1).bit_length()
    chunk = _chunk_of(num_cols, 256 * warps_of_row)
    num_warps = max(4, warps_of_row)
    return Settings(rows=num_warps * 256 // chunk, chunk=chunk, num_warps=num_warps)


def choose_backward_settings(num_cols: int, num_sums: int) -> Settings:
    """Two warps to a row of 1152 columns: the row and its part of the sums over rows stay in registers.

    One sum takes 128 registers, the three of AdaLN take 205. The next tile is copied to shared memory meanwhile, which
    keeps the memory busy with the few warps that fit: at two stages there is one buffer, and nothing overlaps, but
    more does not fit for wide rows. At 8192 columns the three sums no longer fit either: some registers spill.
    """
    warps_of_row = 1 << (-(-num_cols // 640) - 1).bit_length()
    chunk = _chunk_of(num_cols, 128 * warps_of_row)
    num_warps = max(2, warps_of_row)
    return Settings(
        rows=num_warps * 128 // chunk,
        chunk=chunk,
        num_warps=num_warps,
        num_stages=3 if num_cols <= 4096 else 2,
        programs_per_sm=max(1, (12 if num_sums <= 1 else 8) // num_warps),
    )


@functools.cache
def choose_splits(blocks: int, tiles: int, programs: int) -> int:
    """Into how many programs a block's tiles are split, where ``programs`` run at once: those that finish first.

    The constant is what a program takes to start and to end, in tiles.
    """
    candidates = range(1, max(1, min(tiles, programs)) + 1)
    return min(candidates, key=lambda splits: -(-blocks * splits // programs) * (-(-tiles // splits) + 2))


def check_norm(
    x: Tensor, affine: Mapping[str, Tensor | None], residual: Tensor | None, eps: float, *, compiled: bool
) -> None:
    """Raises ``ValueError`` unless these can be normalised, and with ``compiled`` unless the kernels can do it."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have columns to normalise over, got the shape {tuple(x.shape)}")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be positive, got {eps}")
    named = {"residual": residual, **affine}
    for name, tensor in named.items():
        if tensor is not None:
            check_shape(name, tensor, x.shape if name == "residual" else x.shape[-1:])
            check_device(name, tensor, x.device)
    if compiled:
        for name, tensor in {"x": x, **named}.items():
            if tensor is not None:
                check_floating(name, tensor)
        if x.shape[-1] > MAX_COLS:
            raise ValueError(f"x must have at most {MAX_COLS} columns for the triton backend, got {x.shape[-1]}")


def with_contiguous_columns(x: Tensor) -> Tensor:
    """What the kernels take as rows: the tensor, or a copy of it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(tensor_BLC: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor_BLC is None else (tensor_BLC.stride(0), tensor_BLC.stride(1))


def norm_forward(
    x_BLC: Tensor,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    centred: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """``y`` (B, L, C) in the dtype of ``x``, and ``total`` in that of ``residual`` where there is one.

    ``x`` and ``residual`` have contiguous columns; ``gate``, ``shift`` and ``scale`` are (B * M, C) rows of such.
    """
    (samples, length, cols), device = x_BLC.shape, x_BLC.device
    y = torch.empty_like(x_BLC, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    if x_BLC.numel() == 0:
        return y, total
    blocks = samples if scale is None else scale.shape[0]
    tokens = samples * length // blocks
    settings = choose_forward_settings(cols)
    tiles = -(-tokens // settings.rows)
    launch(
        norm_forward_kernel,
        (blocks * tiles,),
        device,
        *(x_BLC, residual, gate, weight, bias, shift, scale, total, y),
        eps,
        tokens,
        blocks // samples,
        tiles,
        *_strides(x_BLC),
        *_strides(residual),
        *(0 if rows is None else rows.stride(0) for rows in (gate, shift, scale)),
        CENTRED=centred,
        COLS=cols,
        ROWS=settings.rows,
        CHUNK=settings.chunk,
        num_warps=settings.num_warps,
    )
    return y, total


def norm_backward(
    grad_y_BLC: Tensor,
    grad_total_BLC: Tensor | None,
    total_BLC: Tensor,
    *,
    x: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    centred: bool,
    eps: float,
    out: Mapping[str, Tensor],
) -> None:
    """Fills ``out``, the gradients that are wanted by name, contiguous.

    ``total`` is what was normalised, and its gradient is that of ``residual``; that of ``x`` differs by the gate.
    ``total`` and ``x`` are (B, L, C), ``gate``, ``shift`` and ``scale`` (B * M, C), ``weight`` and ``bias`` (C,).
    The other arguments are :func:`norm_forward`'s; ``x`` is only read for the gradient of ``gate``.
    """
    (samples, length, cols), device = total_BLC.shape, total_BLC.device
    if total_BLC.numel() == 0:
        for gradient in out.values():
            gradient.zero_()
        return
    blocks = samples if scale is None else scale.shape[0]
    tokens = samples * length // blocks
    needed = {
        "sum": not out.keys().isdisjoint({"shift", "bias"} if bias is None else {"shift", "bias", "scale"}),
        "dot": not out.keys().isdisjoint({"scale", "weight"}),
        "gate": "gate" in out,
    }
    settings = choose_backward_settings(cols, num_sums=sum(needed.values()))
    tiles = -(-tokens // settings.rows)
    splits = choose_splits(blocks, tiles, target(device).num_sms * settings.programs_per_sm)
    partials = [
        torch.empty(blocks * splits, cols, device=device) if is_needed else None for is_needed in needed.values()
    ]
    launch(
        norm_backward_kernel,
        (blocks * splits,),
        device,
        *(grad_y_BLC, grad_total_BLC, total_BLC, x, gate, weight, scale),
        *(out.get("total"), out.get("x"), *partials),
        eps,
        tokens,
        blocks // samples,
        tiles,
        splits,
        *_strides(grad_y_BLC),
        *_strides(grad_total_BLC),
        *_strides(total_BLC),
        *_strides(x),
        *(0 if rows is None else rows.stride(0) for rows in (gate, scale)),
        CENTRED=centred,
        COLS=cols,
        ROWS=settings.rows,
        CHUNK=settings.chunk,
        STAGES=settings.num_stages,
        num_warps=settings.num_warps,
    )
    if any(needed.values()):
        _reduce_partials(partials, weight, bias, scale, out)


def _reduce_partials(
    partials: Sequence[Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    out: Mapping[str, Tensor],
) -> None:
    """From the sums of every program to gradients, in one launch; with a scale, affine ones in one addition each."""
    rows, cols = next(partial.shape for partial in partials if partial is not None)
    device = next(iter(out.values())).device
    groups = 1 if scale is None else scale.shape[0]
    num_partials = rows // groups
    affine = {name: out[name] for name in ("weight", "bias") if name in out}
    by_group = (
        affine if scale is None else {name: scale.new_empty(groups, cols, dtype=torch.float32) for name in affine}
    )
    tile = min(1024, 1 << (num_partials - 1).bit_length())
    width = max(16, min(128, 4096 // tile))
    launch(
        norm_reduce_kernel,
        (groups, -(-cols // width)),
        device,
        *(*partials, weight, bias, scale),
        *(out.get(name) for name in ("shift", "scale", "gate")),
        *(by_group.get(name) for name in ("weight", "bias")),
        num_partials,
        0 if scale is None else scale.stride(0),
        COLS=cols,
        TILE=tile,
        WIDTH=width,
        num_warps=max(1, min(8, tile * width // 512)),
    )
    if scale is not None:
        for name, gradient in affine.items():
            gradient.copy_(by_group[name].sum(0))
