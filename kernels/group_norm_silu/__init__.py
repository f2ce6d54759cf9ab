"""GroupNorm and SiLU of channels-last maps, with an optional time embedding added first, forward and backward.

It is what a residual block of a U-Net does before each of its convolutions (diffusers' ``ResnetBlock2D``). A group of
one map, its *slab*, is P rows of K neighbouring values. Where the slabs alone fill the GPU, one program takes one slab:
it reads it once from memory and a second time, backwards, from the caches. Where they do not (one map has 8 groups, an
H200 132 multiprocessors), each slab is split over programs, and a first launch leaves partial sums that every program
of the second one merges.

Shape legend: N maps, C channels, H rows, W columns, P = H * W pixels, G groups, K = C / G channels of a group,
S splits of a slab.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from madformer.kernels import dispatch
from madformer.kernels.checks import check_device, check_floating, check_shape, with_contiguous_columns
from madformer.kernels.group_norm_silu.kernels import backward_kernel, forward_kernel, weights_kernel
from madformer.kernels.launch import Target, next_power_of_2, target
from madformer.kernels.plans import Launch, fresh, once_a_kind, plain_kind, planned, taken_as
from madformer.kernels.registration import register, register_compiled, register_differentiable

OP = "group_norm_silu"
MAX_GROUP_CHANNELS = 4096
"""Channels of a group that one program can hold: it takes whole pixels of a slab."""
NARROW_GROUP = 4
"""PyTorch's channels-last kernel for CPUs takes a variance as a difference of squares. In a group of fewer channels the
time embedding can be all mean: two channels then err by 1e-4 in float32, over contiguous memory by 5e-7."""
MAX_REGISTERS = 128
"""Of a thread, so that a multiprocessor has room for 16 warps: left alone, programs of 8 take 160 and run alone."""


def group_norm_silu_ref(
    x_NCHW: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    temb_NC: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """:func:`group_norm_silu` in plain PyTorch, in the dtype of ``x_NCHW``: in float64 it is the oracle."""
    if temb_NC is not None:
        x_NCHW = x_NCHW + temb_NC.to(x_NCHW.dtype)[:, :, None, None]
    if x_NCHW.shape[1] < NARROW_GROUP * num_groups:
        x_NCHW = x_NCHW.contiguous()
    # One dtype, because CUDA's group_norm takes no other; the wider, which is what autocast makes of the two.
    wide = torch.promote_types(x_NCHW.dtype, weight.dtype)
    y = F.group_norm(x_NCHW.to(wide), num_groups, weight.to(wide), bias.to(wide), eps)
    return (F.silu(y) if silu else y).to(x_NCHW.dtype)


@dataclass(frozen=True)
class GroupNormSettings:
    """How a launch is cut.

    Attributes:
        block_pixels: rows of a tile; a tile has all channels of a group.
        chunk: pixels of a program, a multiple of ``block_pixels``. Where it covers a slab, one launch does all.
        num_warps: warps of a program.
        keep: in the backward, write the gradient before SiLU down and read it again, in place of computing it twice.
    """

    block_pixels: int
    chunk: int
    num_warps: int
    keep: bool = False

    def ragged(self, num_pixels: int, group_channels: int) -> bool:
        """Whether some tile reaches beyond its slab, so that masks are needed."""
        return num_pixels % self.block_pixels != 0 or next_power_of_2(group_channels) != group_channels


def choose_settings(
    slabs: int, num_pixels: int, group_channels: int, on: Target, *, backward: bool
) -> GroupNormSettings:
    """One program a slab where those fill most of the multiprocessors, else enough to fill them four times over.

    To keep up with its share of HBM, a multiprocessor needs about 32 KiB under way (4.8 TB/s, 0.8 us: Little's law):
    16 warps, each thread with four loads of 16 bytes. Two programs share them, so that one reads while the other
    writes, where there are as many slabs and the caches hold that many until they are read again.
    """
    columns = next_power_of_2(group_channels)
    slab = columns * next_power_of_2(num_pixels)
    whole = slab <= 4096 or 4 * slabs >= 3 * on.num_sms
    # The backward loads two tensors, and keeps two or three sums for each element of a tile.
    per_thread = 16 if backward or not whole else 32
    shared = slabs >= 2 * on.num_sms and slab <= (32768 if backward else 65536)
    num_warps = 4 if not whole else 8 if shared else 16
    tile = max(columns, min(slab, 32 * num_warps * per_thread))
    block_pixels = tile // columns
    num_warps = min(16, max(1, tile // (32 * per_thread)))
    tiles = -(-num_pixels // block_pixels)
    splits = 1 if whole else -(-4 * on.num_sms // slabs)
    return GroupNormSettings(block_pixels, -(-tiles // splits) * block_pixels, num_warps, keep=backward)


def _rows(x_NCHW: Tensor) -> Tensor:
    """As (N, P, C) with neighbouring channels: a view of channels-last memory, a copy of other layouts."""
    return with_contiguous_columns(x_NCHW.permute(0, 2, 3, 1)).flatten(1, 2)


def _channels_last(x_NCHW: Tensor) -> Tensor:
    return torch.empty_like(x_NCHW, memory_format=torch.channels_last)


def _phases(splits: int) -> tuple[tuple[bool, bool], ...]:
    """What each launch does: sums and output at once, or one after the other where slabs are split."""
    return ((True, True),) if splits == 1 else ((True, False), (False, True))


@planned(lambda: choose_settings)
def _forward(
    x: Tensor, temb: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> Callable[..., Any]:
    x_NPC, maps, device = _rows(x), len(x), x.device
    slabs, num_pixels, group_channels = maps * num_groups, x_NPC.shape[1], x.shape[1] // num_groups
    settings = choose_settings(slabs, num_pixels, group_channels, target(device), backward=False)
    splits = -(-num_pixels // settings.chunk)
    temb_stride = weight.shape[0] if temb is None else with_contiguous_columns(temb).stride(0)
    numbers = (num_groups, num_pixels, settings.chunk, eps, x_NPC.stride(0), x_NPC.stride(1), temb_stride)
    launches = [
        Launch(
            forward_kernel, (slabs, splits), device, numbers,
            K=group_channels, HAS_TEMB=temb is not None, SILU=silu, MOMENTS=moments, OUTPUT=output,
            BLOCK_P=settings.block_pixels, BLOCK_K=next_power_of_2(group_channels), BLOCK_S=next_power_of_2(splits),
            RAGGED=settings.ragged(num_pixels, group_channels), num_warps=settings.num_warps, maxnreg=MAX_REGISTERS,
        )
        for moments, output in _phases(splits)
    ]  # fmt: skip
    take_x, take_temb = taken_as(_rows, x), taken_as(with_contiguous_columns, temb)
    take_weight, take_bias = (taken_as(Tensor.contiguous, each) for each in (weight, bias))

    new_y, new_moment = fresh(_channels_last(x)), fresh(torch.empty(maps, num_groups, device=device))
    new_partial = fresh(torch.empty(slabs, 2, splits, device=device)) if splits > 1 else None

    def run(x, temb, weight, bias, *_):
        y, mean, rstd = new_y(), new_moment(), new_moment()
        partial = mean if new_partial is None else new_partial()
        affine = take_weight(weight), take_bias(bias)
        # Without an embedding the kernel does not look at it.
        tensors = take_x(x), affine[0] if temb is None else take_temb(temb), *affine, y, mean, rstd, partial
        for launch in launches:
            launch(*tensors)
        return y, mean, rstd

    return run


def _empty_gradients(
    dx: Tensor, temb: Tensor | None, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtemb = dx.new_empty(0) if temb is None else temb.new_empty(temb.shape)
    return dx, dtemb, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


@planned(lambda: choose_settings)
def _backward(
    grad: Tensor,
    x: Tensor,
    temb: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    silu: bool,
) -> Callable[..., Any]:
    grad_NPC, x_NPC, (maps, channels), device = _rows(grad), _rows(x), x.shape[:2], x.device
    slabs, num_pixels, group_channels = maps * num_groups, x_NPC.shape[1], channels // num_groups
    settings = choose_settings(slabs, num_pixels, group_channels, target(device), backward=True)
    splits, columns = -(-num_pixels // settings.chunk), next_power_of_2(group_channels)
    num_sums = 2 if temb is None else 3
    temb_stride = channels if temb is None else with_contiguous_columns(temb).stride(0)
    strides = (*grad_NPC.stride()[:2], *x_NPC.stride()[:2], temb_stride)
    launches = [
        Launch(
            backward_kernel, (slabs, splits), device, (num_groups, num_pixels, settings.chunk, *strides),
            K=group_channels, HAS_TEMB=temb is not None, SILU=silu, SUMS=take_sums, OUTPUT=output,
            KEEP=silu and settings.keep, BLOCK_P=settings.block_pixels, BLOCK_K=columns,
            RAGGED=settings.ragged(num_pixels, group_channels), num_warps=settings.num_warps, maxnreg=MAX_REGISTERS,
        )
        for take_sums, output in _phases(splits)
    ]  # fmt: skip
    finish = Launch(
        weights_kernel, (num_groups,), device, (maps * splits, num_sums * channels, channels),
        K=group_channels, BLOCK_P=max(1, 2048 // columns), BLOCK_K=columns, num_warps=4,
    )  # fmt: skip
    take_grad, take_x, take_temb = taken_as(_rows, grad), taken_as(_rows, x), taken_as(with_contiguous_columns, temb)
    take_weight, take_bias = (taken_as(Tensor.contiguous, each) for each in (weight, bias))
    sums = torch.empty(maps, splits, num_sums, channels, device=device)
    new_tensors = [fresh(each) for each in (*_empty_gradients(_channels_last(x), temb, weight, bias), sums)]

    def run(grad, x, temb, weight, bias, mean, rstd, *_):
        dx, dtemb, dweight, dbias, sums = [new() for new in new_tensors]
        affine = take_weight(weight), take_bias(bias)
        given = take_grad(grad), take_x(x), affine[0] if temb is None else take_temb(temb)
        for launch in launches:
            launch(*given, *affine, mean, rstd, dx, dtemb, sums)
        finish(sums, dweight, dbias)
        return dx, dtemb, dweight, dbias

    return run


def _as_laid_out(x_NCHW: Tensor) -> Tensor:
    """What C++ makes of maps: it is contiguous where they are, too."""
    return (
        torch.empty_like(x_NCHW, memory_format=torch.contiguous_format)
        if x_NCHW.is_contiguous()
        else _channels_last(x_NCHW)
    )


def _empty_outputs(
    y: Tensor, temb: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (y.new_empty(len(y), num_groups, dtype=torch.float32) for _ in range(2))
    return y, mean, rstd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, temb, weight, bias, ctx.num_groups, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, temb, weight, bias, mean, rstd)


def _autograd_backward(backward: Callable[..., Any], ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # Once: gradient checkpointing computes them anew each time.
    dx, dtemb, dweight, dbias = backward(grad, *saved, ctx.num_groups, ctx.silu)
    return dx, None if saved[1] is None else dtemb, dweight, dbias, None, None, None


_SCHEMA = (
    "(Tensor x, Tensor? temb, Tensor weight, Tensor bias, int num_groups, float eps, bool silu)"
    " -> (Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor x, Tensor? temb, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int num_groups,"
    " bool silu) -> (Tensor, Tensor, Tensor, Tensor)"
)
_call = register_differentiable(
    "group_norm_silu",
    _SCHEMA,
    _forward,
    lambda x, *others: _empty_outputs(_channels_last(x), *others),
    _setup_context,
    functools.partial(
        _autograd_backward,
        register(
            "group_norm_silu_backward",
            _BACKWARD_SCHEMA,
            _backward,
            lambda grad, x, *others: _empty_gradients(_channels_last(x), *others),
        ),
    ),
)
_call_cpp = register_compiled(
    "group_norm_silu_cpp",
    _SCHEMA,
    lambda x, *others: _empty_outputs(_as_laid_out(x), *others),
    _setup_context,
    functools.partial(
        _autograd_backward,
        register_compiled(
            "group_norm_silu_backward_cpp",
            _BACKWARD_SCHEMA,
            lambda grad, x, *others: _empty_gradients(_as_laid_out(x), *others),
        ),
    ),
)
dispatch.register(OP, "reference")
dispatch.register(OP, "triton", auto=("cuda",))
dispatch.register(OP, "cpp", ("cpu",), kernel="group_norm_silu_backward_cpp")


def group_norm_silu(
    x_NCHW: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    temb_NC: Tensor | None = None,
    silu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """``silu(group_norm(x + temb))``, differentiable, computed in float32 (by the reference in float64, for float64).

    Kernels read and write channels-last memory; C++ takes contiguous memory too, and then leaves it contiguous. An
    input that is not laid out so is copied first; channels that are a slice of such a map are read where they are. The
    result and the gradient of ``x_NCHW`` are channels-last, but where C++ was given contiguous maps.

    Args:
        x_NCHW: (N, C, H, W), float32, bfloat16 or float16; N may be 0.
        num_groups: G, a divisor of C, with at most 4096 channels in a group for Triton.
        weight, bias: (C,), of any of these dtypes, as ``nn.GroupNorm`` has them.
        eps: added to the variance.
        temb_NC: (N, C) of any of these dtypes, added to every pixel before the norm.
        silu: False for the norm alone.
        backend: ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Returns:
        (N, C, H, W) in the dtype of ``x_NCHW``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or the backend is unknown.
        RuntimeError: the backend that was asked for cannot run here.
    """
    kind = plain_kind((x_NCHW, temb_NC, weight, bias, num_groups, eps, silu, backend))
    chosen = _choose(kind, x_NCHW, num_groups, weight, bias, eps, temb_NC, backend)
    if chosen == "reference":
        return group_norm_silu_ref(x_NCHW, num_groups, weight, bias, eps=eps, temb_NC=temb_NC, silu=silu)
    y, _, _ = (_call_cpp if chosen == "cpp" else _call)(x_NCHW, temb_NC, weight, bias, num_groups, eps, silu, kind=kind)
    return y


@once_a_kind
def _choose(
    x_NCHW: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, temb_NC: Tensor | None, backend: str
) -> str:
    """The backend that runs these, where they can be run."""
    chosen = dispatch.resolve(OP, backend, x_NCHW.device, x_NCHW.dtype)
    _validate(x_NCHW, num_groups, weight, bias, eps, temb_NC)
    if chosen == "reference":
        return chosen
    for name, tensor in (("x_NCHW", x_NCHW), ("weight", weight), ("bias", bias), ("temb_NC", temb_NC)):
        if tensor is not None:
            check_floating(name, tensor)
    if chosen == "triton" and x_NCHW.shape[1] > MAX_GROUP_CHANNELS * num_groups:
        raise ValueError(f"num_groups={num_groups} puts more than {MAX_GROUP_CHANNELS} channels into a group")
    return chosen


def _validate(
    x_NCHW: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, temb_NC: Tensor | None
) -> None:
    if x_NCHW.dim() != 4 or 0 in x_NCHW.shape[1:]:
        raise ValueError(f"x_NCHW must be (N, C, H, W) with channels and pixels, got {tuple(x_NCHW.shape)}")
    channels = x_NCHW.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups={num_groups} must divide the {channels} channels of x_NCHW")
    if not eps > 0:  # Not `eps <= 0`, which lets NaN pass.
        raise ValueError(f"eps={eps} must be positive")
    shapes = {"weight": (weight, x_NCHW.shape[1:2]), "bias": (bias, x_NCHW.shape[1:2])}
    if temb_NC is not None:
        shapes["temb_NC"] = (temb_NC, x_NCHW.shape[:2])
    for name, (tensor, shape) in shapes.items():
        check_shape(name, tensor, shape)
        check_device(name, tensor, x_NCHW.device)
