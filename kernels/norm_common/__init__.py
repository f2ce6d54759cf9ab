"""What ``rms_norm`` and ``adaln`` share: checks, launch settings, and launchers of the kernels and op beside this file.

Both ops are ``total = residual + gate * x``, ``n = normalise(total) * weight + bias``, ``y = n * (1 + scale) + shift``
with parts left out.

Shape legend: B samples, M blocks of a sample that share a row of shift, scale and gate, T tokens of a block,
L = M * T tokens, C columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from madformer.kernels.checks import check_device, check_floating, check_shape
from madformer.kernels.launch import target
from madformer.kernels.norm_common.kernels import norm_backward_kernel, norm_forward_kernel, norm_reduce_kernel
from madformer.kernels.plans import Launch, fresh

MAX_COLS = 8192
"""Widest row: its chunks stay in the registers of one program."""


@dataclass(frozen=True)
class NormSettings:
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


def choose_forward_settings(num_cols: int) -> NormSettings:
    """A warp to a row of up to 1536 columns, so that no sum leaves its warp; 16 bytes of bf16 a load.

    At 1152 columns 64 registers (127 for AdaLN): 8 (4) programs of 4 rows on an SM, 74 KB of loads in flight.
    """
    warps_of_row = 1 << (-(-num_cols // 1536) - 1).bit_length()
    chunk = _chunk_of(num_cols, 256 * warps_of_row)
    num_warps = max(4, warps_of_row)
    return NormSettings(rows=num_warps * 256 // chunk, chunk=chunk, num_warps=num_warps)


def choose_backward_settings(num_cols: int, num_sums: int) -> NormSettings:
    """Two warps to a row of 1152 columns: the row and its part of the sums over rows stay in registers.

    One sum takes 128 registers, the three of AdaLN take 205. The next tile is copied to shared memory meanwhile, which
    keeps the memory busy with the few warps that fit: at two stages there is one buffer, and nothing overlaps, but
    more does not fit for wide rows. At 8192 columns the three sums no longer fit either: some registers spill.
    """
    warps_of_row = 1 << (-(-num_cols // 640) - 1).bit_length()
    chunk = _chunk_of(num_cols, 128 * warps_of_row)
    num_warps = max(2, warps_of_row)
    return NormSettings(
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
    x: Tensor, affine: Mapping[str, Tensor | None], residual: Tensor | None, eps: float, *, backend: str
) -> None:
    """Raises ``ValueError`` unless these can be normalised, by this backend."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have columns to normalise over, got the shape {tuple(x.shape)}")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be positive, got {eps}")
    named = {"residual": residual, **affine}
    for name, tensor in named.items():
        if tensor is not None:
            check_shape(name, tensor, x.shape if name == "residual" else x.shape[-1:])
            check_device(name, tensor, x.device)
    if backend != "reference":
        for name, tensor in {"x": x, **named}.items():
            if tensor is not None:
                check_floating(name, tensor)
    if backend == "triton" and x.shape[-1] > MAX_COLS:
        raise ValueError(f"x must have at most {MAX_COLS} columns for the triton backend, got {x.shape[-1]}")


def empty_outputs(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """``y`` and the sum, which has no elements where there is no residual."""
    return x.new_empty(x.shape), x.new_empty(0) if residual is None else residual.new_empty(x.shape)


def _strides(tensor_BLC: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor_BLC is None else (tensor_BLC.stride(0), tensor_BLC.stride(1))


def _row_strides(*rows: Tensor | None) -> list[int]:
    return [0 if each is None else each.stride(0) for each in rows]


def _blocks_and_tokens(like_BLC: Tensor, scale: Tensor | None) -> tuple[int, int]:
    """Blocks that share a row of modulation, and the tokens of one."""
    samples, length, _ = like_BLC.shape
    blocks = samples if scale is None else scale.shape[0]
    return blocks, samples * length // max(1, blocks)


def settings_in_use() -> tuple[object, ...]:
    """For :func:`~madformer.kernels.plans.planned`: what chooses the settings of the launches that are made here."""
    return choose_forward_settings, choose_backward_settings, choose_splits


def norm_forward(
    x_BLC: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    centred: bool,
    eps: float,
) -> Launch:
    """The launch for tensors like these, and ``total`` and ``y``, in this order.

    ``x`` and ``residual`` have contiguous columns; ``gate``, ``shift`` and ``scale`` are (B * M, C) rows of such,
    ``weight``, ``bias``, ``total`` and ``y`` are contiguous. ``y`` has the dtype of ``x``, ``total`` the residual's.
    """
    cols = x_BLC.shape[2]
    blocks, tokens = _blocks_and_tokens(x_BLC, scale)
    settings = choose_forward_settings(cols)
    tiles = -(-tokens // settings.rows)
    return Launch(
        norm_forward_kernel,
        (blocks * tiles,),
        x_BLC.device,
        (
            *(eps, tokens, blocks // max(1, len(x_BLC)), tiles),
            *(*_strides(x_BLC), *_strides(residual), *_row_strides(gate, shift, scale)),
        ),
        CENTRED=centred,
        COLS=cols,
        ROWS=settings.rows,
        CHUNK=settings.chunk,
        num_warps=settings.num_warps,
    )


def norm_backward(
    grad_y_BLC: Tensor,
    grad_total_BLC: Tensor | None,
    total_BLC: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    *,
    centred: bool,
    eps: float,
    wanted: Collection[str],
) -> Callable[..., None]:
    """What fills the gradients that are wanted by name, from tensors like these.

    It is called with these, in this order, and a mapping of contiguous gradients.
    ``total`` is what was normalised, and its gradient is that of ``residual``; that of ``x`` differs by the gate.
    ``total`` and ``x`` are (B, L, C), ``gate``, ``shift`` and ``scale`` (B * M, C), ``weight`` and ``bias`` (C,).
    ``x`` is only read for the gradient of ``gate``.
    """
    (samples, _, cols), device = total_BLC.shape, total_BLC.device
    if total_BLC.numel() == 0:
        return _fill_with_zeros
    blocks, tokens = _blocks_and_tokens(total_BLC, scale)
    names = set(wanted)
    needed = (
        not names.isdisjoint({"shift", "bias"} if bias is None else {"shift", "bias", "scale"}),
        not names.isdisjoint({"scale", "weight"}),
        "gate" in names,
    )
    settings = choose_backward_settings(cols, num_sums=sum(needed))
    tiles = -(-tokens // settings.rows)
    splits = choose_splits(blocks, tiles, target(device).num_sms * settings.programs_per_sm)
    rows = blocks * splits
    main = Launch(
        norm_backward_kernel,
        (rows,),
        device,
        (
            *(eps, tokens, blocks // samples, tiles, splits),
            *(*_strides(grad_y_BLC), *_strides(grad_total_BLC), *_strides(total_BLC), *_strides(x)),
            *_row_strides(gate, scale),
        ),
        CENTRED=centred,
        COLS=cols,
        ROWS=settings.rows,
        CHUNK=settings.chunk,
        STAGES=settings.num_stages,
        num_warps=settings.num_warps,
    )
    reduce = _reduction(rows, cols, scale, names, device) if any(needed) else None
    new_partial = fresh(torch.empty(rows, cols, device=device))

    def run(grad_y, grad_total, total, x, gate, weight, bias, scale, out):
        partials = [new_partial() if is_needed else None for is_needed in needed]
        dtotal, dx = out.get("total"), out.get("x")
        main(grad_y, grad_total, total, x, gate, weight, scale, dtotal, dx, *partials)
        if reduce is not None:
            reduce(partials, weight, bias, scale, out)

    return run


def _fill_with_zeros(*arguments: Any) -> None:
    for gradient in arguments[-1].values():
        gradient.zero_()


def reduction_launch(groups: int, num_partials: int, cols: int, device: torch.device, stride_scale: int = 0) -> Launch:
    """The launch of ``norm_reduce_kernel`` over partial sums ``(groups * num_partials, cols)`` in fp32."""
    tile = min(1024, 1 << (num_partials - 1).bit_length())
    width = max(16, min(128, 4096 // tile))
    return Launch(
        norm_reduce_kernel,
        (groups, -(-cols // width)),
        device,
        [num_partials, stride_scale],
        COLS=cols,
        TILE=tile,
        WIDTH=width,
        num_warps=max(1, min(8, tile * width // 512)),
    )


def _reduction(
    rows: int, cols: int, scale: Tensor | None, wanted: Collection[str], device: torch.device
) -> Callable[..., None]:
    """From the sums of every program to gradients, in one launch; with a scale, affine ones in one addition each."""
    groups = 1 if scale is None else scale.shape[0]
    num_partials = rows // groups
    affine = [name for name in ("weight", "bias") if name in wanted]
    new_rows = fresh(torch.empty(groups, cols, device=device))
    launch = reduction_launch(groups, num_partials, cols, device, *_row_strides(scale))

    def run(partials, weight, bias, scale, out):
        by_group = out if scale is None else {name: new_rows() for name in affine}
        shift_scale_gate = [out.get(name) for name in ("shift", "scale", "gate")]
        launch(*partials, weight, bias, scale, *shift_scale_gate, by_group.get("weight"), by_group.get("bias"))
        if scale is not None:
            for name in affine:
                out[name].copy_(by_group[name].sum(0))

    return run
