"""The kernels of ``rms_norm`` and ``adaln``: one pass over rows that adds, normalises and modulates; its gradient.

A part of the computation that is left out is a null pointer, and costs nothing in the compiled kernel.

A row is read in chunks whose width is a power of two, held in a tuple of tiles: 1152 columns as 5 chunks of 256 waste
a tenth of the lanes, one tile of 2048 would waste 44 %. All loads of a tile of rows are issued before anything is
stored, since a load cannot be moved up across a store that may alias it: bytes in flight are what a memory-bound
kernel lives on.
"""

# Tuples grow by addition in Triton, which knows no unpacking, and change their type by it.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

from madformer.kernels.launch import jit, tl


@jit
def _load(rows_ptr, live_rows, COLS: tl.constexpr, CHUNK: tl.constexpr):
    """The rows at the pointers ``rows_ptr`` (ROWS, 1) as a tuple of (ROWS, CHUNK) tiles, as they are in memory."""
    chunks = ()
    for i in tl.static_range((COLS + CHUNK - 1) // CHUNK):
        cols = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        live = live_rows
        if (i + 1) * CHUNK > COLS:  # A chunk that is whole needs no comparison of columns.
            live = live_rows & (cols < COLS)
        chunks = chunks + (tl.load(rows_ptr + cols, mask=live, other=0.0),)
    return chunks


@jit
def _store(rows_ptr, chunks, live_rows, COLS: tl.constexpr, CHUNK: tl.constexpr):
    for i in tl.static_range(len(chunks)):
        cols = i * CHUNK + tl.arange(0, CHUNK)[None, :]
        live = live_rows
        if (i + 1) * CHUNK > COLS:
            live = live_rows & (cols < COLS)
        tl.store(rows_ptr + cols, chunks[i].to(rows_ptr.dtype.element_ty), mask=live)


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
def _add(sums, a):
    added = ()
    for i in tl.static_range(len(sums)):
        added = added + (sums[i] + a[i].to(tl.float32),)
    return added


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
            sums = _add(sums, grad_y)
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
