"""The kernels of ``group_norm_silu``: moments and output, channel sums and gradients.

Shape legend: N maps, C channels, H rows, W columns, P = H * W pixels, G groups, K = C / G channels of a group,
S splits of a slab.
"""

from __future__ import annotations

from madformer.kernels.launch import jit, tl


@jit
def _channels(ptr, PRESENT: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """One value for each channel of a group, in float32; zeros where there are none."""
    if PRESENT:
        cols = tl.arange(0, BLOCK_K)
        values = tl.load(ptr + cols, cols < K, 0.0).to(tl.float32)
    else:
        values = tl.zeros((BLOCK_K,), tl.float32)
    return values[None, :]


@jit
def _live(pixel, last, K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, RAGGED: tl.constexpr):
    """Which places of the tile at ``pixel`` are there."""
    if RAGGED:
        live = (tl.arange(0, BLOCK_P) < last - pixel)[:, None] & (tl.arange(0, BLOCK_K) < K)[None, :]
    else:
        live = tl.full((BLOCK_P, BLOCK_K), 1, tl.int1)
    return live


@jit
def _sigmoid(x, EXACT: tl.constexpr):
    if EXACT:
        sigmoid = tl.sigmoid(x)
    else:
        # 5 instructions in place of 12: no guards of exp and division, for arguments that give 0 or 1 without them. At
        # the speed of memory there is time for about 25 an element. An error of 2^-22 drowns in 16 bits.
        root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
        sigmoid = root * root
    return sigmoid


@jit
def _moments(
    x_ptr, temb, first, last, stride_xp,
    K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Mean and centred sum of squares of ``x + temb`` over the pixels [first, last) of a slab.

    Every place of the tile runs Welford's update by itself, and they are merged once, at the end (Chan, Golub and
    LeVeque, 1979). A plain sum of squares would cancel where the mean is large beside the deviation.
    """
    rows, cols = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    tile = rows[:, None] * stride_xp + cols[None, :]
    mean = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for index in range(tl.cdiv(last - first, BLOCK_P)):
        pixel = first + index * BLOCK_P
        live = _live(pixel, last, K, BLOCK_P, BLOCK_K, RAGGED)
        # The caches are to keep it for the second reading.
        x = tl.load(x_ptr + pixel.to(tl.int64) * stride_xp + tile, live, 0.0, eviction_policy="evict_last")
        x = x.to(tl.float32)
        delta = tl.where(live, x - mean, 0.0)
        mean += delta * (1.0 / (index + 1))
        squares += delta * (x - mean)
    seen = ((last - first - rows + BLOCK_P - 1) // BLOCK_P)[:, None] * (cols < K).to(tl.int32)[None, :]
    count = seen.to(tl.float32)
    mean += temb
    slab_mean = tl.sum(count * mean) / (last - first) / K
    apart = mean - slab_mean
    return slab_mean, tl.sum(squares + count * apart * apart)


@jit
def _merged_moments(partial_ptr, num_splits, num_pixels, chunk, K: tl.constexpr, BLOCK_S: tl.constexpr):
    """Mean and centred sum of squares of a slab from those of its splits."""
    split = tl.arange(0, BLOCK_S)
    live = split < num_splits
    means = tl.load(partial_ptr + split, live, 0.0)
    squares = tl.load(partial_ptr + num_splits + split, live, 0.0)
    count = tl.where(live, tl.minimum(chunk, num_pixels - split * chunk), 0).to(tl.float32) * K
    mean = tl.sum(count * means) / num_pixels / K
    apart = means - mean
    return mean, tl.sum(squares + count * apart * apart)


@jit
def forward_kernel(
    x_ptr, temb_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, partial_ptr,
    num_groups, num_pixels, chunk, eps, stride_xn, stride_xp, stride_tn,
    K: tl.constexpr, HAS_TEMB: tl.constexpr, SILU: tl.constexpr, MOMENTS: tl.constexpr, OUTPUT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Grid (N * G, S): the moments of one split of one slab, its output from all splits' moments, or both (S = 1)."""
    slab, split = tl.program_id(0), tl.program_id(1)
    num_splits, num_channels = tl.num_programs(1), num_groups * K
    n, channel = (slab // num_groups).to(tl.int64), slab % num_groups * K
    x_ptr += n * stride_xn + channel
    temb = _channels(temb_ptr + n * stride_tn + channel, HAS_TEMB, K, BLOCK_K)
    partial_ptr += 2 * slab * num_splits
    first = split * chunk
    last = tl.minimum(first + chunk, num_pixels)
    if MOMENTS:
        mean, squares = _moments(x_ptr, temb, first, last, stride_xp, K, BLOCK_P, BLOCK_K, RAGGED)
        if not OUTPUT:
            tl.store(partial_ptr + split, mean)
            tl.store(partial_ptr + num_splits + split, squares)
            return
    else:
        mean, squares = _merged_moments(partial_ptr, num_splits, num_pixels, chunk, K, BLOCK_S)
    rstd = 1.0 / tl.sqrt_rn(squares / num_pixels / K + eps)
    if split == 0:
        tl.store(mean_ptr + slab, mean)
        tl.store(rstd_ptr + slab, rstd)

    y_ptr += n * num_pixels * num_channels + channel
    scale = _channels(weight_ptr + channel, True, K, BLOCK_K) * rstd
    shift = _channels(bias_ptr + channel, True, K, BLOCK_K) + (temb - mean) * scale
    rows, cols = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    tile_x = rows[:, None] * stride_xp + cols[None, :]
    tile_y = rows[:, None] * num_channels + cols[None, :]
    num_tiles = tl.cdiv(last - first, BLOCK_P)
    for index in range(num_tiles):
        # Backwards: what was read last is what the caches still have.
        pixel = first + (num_tiles - 1 - index) * BLOCK_P
        live = _live(pixel, last, K, BLOCK_P, BLOCK_K, RAGGED)
        x = tl.load(x_ptr + pixel.to(tl.int64) * stride_xp + tile_x, live, 0.0, eviction_policy="evict_first")
        y = x.to(tl.float32) * scale + shift
        if SILU:
            y *= _sigmoid(y, x.dtype == tl.float32)
        tl.store(y_ptr + pixel.to(tl.int64) * num_channels + tile_y, y.to(y_ptr.dtype.element_ty), live)


@jit
def _affine_gradient(grad, x, shift, rstd, weight, bias, SILU: tl.constexpr):
    """``normed``, the normalised value, and ``dout``, the gradient of ``normed * weight + bias``."""
    normed = x.to(tl.float32) * rstd + shift
    dout = grad.to(tl.float32)
    if SILU:
        out = normed * weight + bias
        sigmoid = _sigmoid(out, x.dtype == tl.float32)
        dout *= sigmoid * (1.0 + out * (1.0 - sigmoid))
    return normed, dout


@jit
def _channel_sums(
    grad_ptr, x_ptr, dout_ptr, sums_ptr, shift, rstd, weight, bias, first, last, stride_gp, stride_xp, num_channels,
    K: tl.constexpr, HAS_TEMB: tl.constexpr, SILU: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Sums over the pixels [first, last) of ``dout``, ``dout * normed`` and ``normed``, for each channel.

    ``KEEP``: write ``dout`` down.
    """
    rows, cols = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    tile_g = rows[:, None] * stride_gp + cols[None, :]
    tile_x = rows[:, None] * stride_xp + cols[None, :]
    tile_dout = rows[:, None] * num_channels + cols[None, :]
    sum_dout = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    sum_product = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    sum_normed = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for index in range(tl.cdiv(last - first, BLOCK_P)):
        pixel = first + index * BLOCK_P
        live = _live(pixel, last, K, BLOCK_P, BLOCK_K, RAGGED)
        grad = tl.load(grad_ptr + pixel.to(tl.int64) * stride_gp + tile_g, live, 0.0, eviction_policy="evict_last")
        x = tl.load(x_ptr + pixel.to(tl.int64) * stride_xp + tile_x, live, 0.0, eviction_policy="evict_last")
        normed, dout = _affine_gradient(grad, x, shift, rstd, weight, bias, SILU)
        if KEEP:
            kept = dout.to(dout_ptr.dtype.element_ty)
            tl.store(dout_ptr + pixel.to(tl.int64) * num_channels + tile_dout, kept, live, eviction_policy="evict_last")
        sum_dout += dout
        sum_product += dout * normed
        if HAS_TEMB:
            sum_normed += tl.where(live, normed, 0.0)
    dout, product, normed = tl.sum(sum_dout, 0), tl.sum(sum_product, 0), tl.sum(sum_normed, 0)
    tl.store(sums_ptr + cols, dout, cols < K)
    tl.store(sums_ptr + num_channels + cols, product, cols < K)
    if HAS_TEMB:
        tl.store(sums_ptr + 2 * num_channels + cols, normed, cols < K)
    return dout[None, :], product[None, :], normed[None, :]


@jit
def _merged_sums(ptr, stride_row, num_rows, K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    """One of the sums of :func:`_channel_sums`, of all splits of a slab or of all maps."""
    rows, cols = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for index in range(tl.cdiv(num_rows, BLOCK_P)):
        row = (index * BLOCK_P + rows).to(tl.int64)[:, None]
        total += tl.load(ptr + row * stride_row + cols[None, :], (row < num_rows) & (cols < K)[None, :], 0.0)
    return tl.sum(total, 0)[None, :]


@jit
def weights_kernel(
    sums_ptr, dweight_ptr, dbias_ptr, num_rows, stride_row, num_channels,
    K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (G,): the gradients of weight and bias. One launch where PyTorch's sums and casts are four."""
    channel, cols = tl.program_id(0) * K, tl.arange(0, BLOCK_K)[None, :]
    dbias = _merged_sums(sums_ptr + channel, stride_row, num_rows, K, BLOCK_P, BLOCK_K)
    dweight = _merged_sums(sums_ptr + num_channels + channel, stride_row, num_rows, K, BLOCK_P, BLOCK_K)
    tl.store(dbias_ptr + channel + cols, dbias.to(dbias_ptr.dtype.element_ty), cols < K)
    tl.store(dweight_ptr + channel + cols, dweight.to(dweight_ptr.dtype.element_ty), cols < K)


@jit
def backward_kernel(
    grad_ptr, x_ptr, temb_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dx_ptr, dtemb_ptr, sums_ptr,
    num_groups, num_pixels, chunk, stride_gn, stride_gp, stride_xn, stride_xp, stride_tn,
    K: tl.constexpr, HAS_TEMB: tl.constexpr, SILU: tl.constexpr, SUMS: tl.constexpr, OUTPUT: tl.constexpr,
    KEEP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Grid (N * G, S): the sums of one split of one slab, its dx from all splits' sums, or both (S = 1).

    With ``scale = weight * rstd`` the gradient of what is normalised is
    ``scale * dout - mean(scale * dout) - normed * mean(scale * dout * normed)``, with means over the slab. They follow
    from the channels' sums, and so do the gradients of weight, bias and temb.

    ``KEEP``: ``dout`` is computed once, and lies in dx until that takes its place, in the dtype of dx.
    """
    slab, split = tl.program_id(0), tl.program_id(1)
    num_splits, num_channels = tl.num_programs(1), num_groups * K
    n, channel = (slab // num_groups).to(tl.int64), slab % num_groups * K
    stride_split = num_channels * (3 if HAS_TEMB else 2)
    grad_ptr += n * stride_gn + channel
    x_ptr += n * stride_xn + channel
    dx_ptr += n * num_pixels * num_channels + channel
    sums_ptr += n * num_splits * stride_split + channel
    rstd = tl.load(rstd_ptr + slab)
    shift = (_channels(temb_ptr + n * stride_tn + channel, HAS_TEMB, K, BLOCK_K) - tl.load(mean_ptr + slab)) * rstd
    weight = _channels(weight_ptr + channel, True, K, BLOCK_K)
    bias = _channels(bias_ptr + channel, True, K, BLOCK_K)
    first = split * chunk
    last = tl.minimum(first + chunk, num_pixels)
    if SUMS:
        sum_dout, sum_product, sum_normed = _channel_sums(
            grad_ptr, x_ptr, dx_ptr, sums_ptr + split * stride_split, shift, rstd, weight, bias,
            first, last, stride_gp, stride_xp, num_channels, K, HAS_TEMB, SILU, KEEP, BLOCK_P, BLOCK_K, RAGGED,
        )  # fmt: skip
        if not OUTPUT:
            return
    else:
        sum_dout = _merged_sums(sums_ptr, stride_split, num_splits, K, BLOCK_P, BLOCK_K)
        sum_product = _merged_sums(sums_ptr + num_channels, stride_split, num_splits, K, BLOCK_P, BLOCK_K)
        if HAS_TEMB:
            sum_normed = _merged_sums(sums_ptr + 2 * num_channels, stride_split, num_splits, K, BLOCK_P, BLOCK_K)
    scale = weight * rstd
    mean_dout = tl.sum(scale * sum_dout) / num_pixels / K
    mean_product = tl.sum(scale * sum_product) / num_pixels / K
    rows, cols = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    if HAS_TEMB:
        dtemb = scale * sum_dout - (num_pixels * mean_dout + sum_normed * mean_product)
        mask = (cols < K)[None, :] & (split == 0)
        tl.store(dtemb_ptr + n * num_channels + channel + cols[None, :], dtemb.to(dtemb_ptr.dtype.element_ty), mask)

    if KEEP and SUMS:
        tl.debug_barrier()  # What other threads have written is read.
    # dx = scale * dout - slope * x - offset
    slope, offset = rstd * mean_product, mean_dout + shift * mean_product
    tile_g = rows[:, None] * stride_gp + cols[None, :]
    tile_x = rows[:, None] * stride_xp + cols[None, :]
    tile_dx = rows[:, None] * num_channels + cols[None, :]
    num_tiles = tl.cdiv(last - first, BLOCK_P)
    for index in range(num_tiles):
        # Backwards, as in the forward kernel.
        pixel = first + (num_tiles - 1 - index) * BLOCK_P
        live = _live(pixel, last, K, BLOCK_P, BLOCK_K, RAGGED)
        at_dx = dx_ptr + pixel.to(tl.int64) * num_channels + tile_dx
        x = tl.load(x_ptr + pixel.to(tl.int64) * stride_xp + tile_x, live, 0.0, eviction_policy="evict_first")
        if KEEP:
            dout = tl.load(at_dx, live, 0.0).to(tl.float32)
        else:
            at_grad = grad_ptr + pixel.to(tl.int64) * stride_gp + tile_g
            grad = tl.load(at_grad, live, 0.0, eviction_policy="evict_first")
            _, dout = _affine_gradient(grad, x, shift, rstd, weight, bias, SILU)
        dx = scale * dout - (x.to(tl.float32) * slope + offset)
        tl.store(at_dx, dx.to(dx_ptr.dtype.element_ty), live)
