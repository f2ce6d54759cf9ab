"""A 3x3 convolution in training: Winograd's minimal filtering, forward and backward (arXiv:1509.09308, sec. 4.1).

On processors a convolution is bound by arithmetic. F(2x2, 3x3) makes 2 x 2 results of 16 products where 36 stand in
the sum: C++ turns maps into tiles and back, and between are matrix products, one for each of a tile's numbers. Of maps
whose pixels have been doubled in both directions 9 products are left. Errors of float32 are no larger than those of
oneDNN's convolution (128 to 512 channels: 2.4e-7 to 2.9e-7 of the result, where its are 3.9e-7 to 7.6e-7).

Shape legend: N maps, C channels of the input, K of the result, H rows, W columns, T tiles of 2 x 2 results, S numbers
of a tile: 16, or 9.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from madformer.kernels import dispatch
from madformer.kernels.checks import check_device, check_floating, check_shape
from madformer.kernels.plans import once_a_kind, plain_kind, short_apply
from madformer.kernels.registration import register_compiled

OP = "conv3x3"
LEAST_WEIGHTS = {False: 128 * 128, True: 96 * 96}
"""Channels of the input times those of the result, plain and doubled, from which ``auto`` chooses C++.

With fewer, sums take longer than the products that are saved. Forward and backward, one thread of an EPYC with AVX2:
128 x 128 at 16 x 16 pixels 1.27 times as fast, 192 x 96 at 4 x 4 1.3, 96 x 96 at 8 x 8 0.73; doubled, 96 x 96 at 4 x 4
2.7, 256 x 256 at 8 x 8 3.1.
"""


def conv3x3_ref(x_NCHW: Tensor, weight_KC33: Tensor, bias_K: Tensor | None = None, *, doubled: bool = False) -> Tensor:
    """:func:`conv3x3` by PyTorch: in float64 it is the oracle."""
    x_NCHW = F.interpolate(x_NCHW, scale_factor=2.0, mode="nearest") if doubled else x_NCHW
    return F.conv2d(x_NCHW, weight_KC33, bias_K, padding=1)


def _empty_tiles(maps: Tensor, doubled: bool, per_side: int = 2) -> Tensor:
    count = len(maps) * math.prod(-(-size // per_side) for size in maps.shape[2:])
    return maps.new_empty(count, 9 if doubled else 16, maps.shape[1]).transpose(0, 1)


def _empty_maps(tiles: Tensor, height: int, width: int, per_side: int = 2) -> Tensor:
    count = tiles.shape[1] // (-(-height // per_side) * -(-width // per_side))
    return tiles.new_empty(count, height, width, tiles.shape[2]).permute(0, 3, 1, 2)


_spread = register_compiled(
    "winograd_spread_cpp",
    "(Tensor maps, bool doubled) -> Tensor",
    lambda maps, doubled: _empty_tiles(maps, doubled, 1 if doubled else 2),
)
_spread_backward = register_compiled(
    "winograd_spread_backward_cpp",
    "(Tensor tiles, int height, int width, bool doubled) -> Tensor",
    lambda tiles, height, width, doubled: _empty_maps(tiles, height, width, 1 if doubled else 2),
)
_gather = register_compiled(
    "winograd_gather_cpp",
    "(Tensor tiles, Tensor? bias, int height, int width, bool doubled) -> Tensor",
    lambda tiles, bias, height, width, doubled: _empty_maps(tiles, height, width),
)
_gather_backward = register_compiled(
    "winograd_gather_backward_cpp", "(Tensor grad, bool doubled) -> Tensor", _empty_tiles
)
dispatch.register(OP, "reference")
dispatch.register(OP, "cpp", ("cpu",), kernel="winograd_spread_cpp")


_ROWS = (1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0)


def _filter(like: Tensor, doubled: bool) -> Tensor:
    """The numbers of a tile's weights as sums of the nine of a filter, ``(S, 9)``."""
    rows = [_ROWS[i] for i in (0, 1, 3)] if doubled else _ROWS
    return like.new_tensor([[a * b for a in first for b in second] for first in rows for second in rows])


def _spread_weight(weight_KC33: Tensor, doubled: bool) -> Tensor:
    """``(S, K, C)``."""
    weight_K9C = weight_KC33.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.bmm(_filter(weight_K9C, doubled).expand(len(weight_K9C), -1, -1), weight_K9C).transpose(0, 1)


def _gather_weight(grad_SKC: Tensor, doubled: bool) -> Tensor:
    """The gradient of :func:`_spread_weight`, ``(K, C, 3, 3)``."""
    grad_K9C = torch.bmm(_filter(grad_SKC, doubled).T.expand(grad_SKC.shape[1], -1, -1), grad_SKC.transpose(0, 1))
    return grad_K9C.unflatten(1, (3, 3)).permute(0, 3, 1, 2)


class _Filtered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, weight_KC33: Tensor, bias_K: Tensor | None, doubled: bool) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight_KC33)
        ctx.doubled = doubled
        products_STK = torch.bmm(_spread(x_NCHW, doubled), _spread_weight(weight_KC33, doubled).mT)
        height, width = x_NCHW.shape[2:]
        return _gather(products_STK, bias_K, height << doubled, width << doubled, doubled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NKHW: Tensor) -> tuple[Tensor | None, ...]:
        x_NCHW, weight_KC33 = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = dweight = dbias = None
        doubled = ctx.doubled
        if needs_x or needs_weight:
            grad_STK = _gather_backward(grad_NKHW, doubled)
        if needs_x:
            dtiles_STC = torch.bmm(grad_STK, _spread_weight(weight_KC33, doubled))
            dx = _spread_backward(dtiles_STC, *x_NCHW.shape[2:], doubled)
        if needs_weight:
            # Tiles are made anew: they are four times as large as the maps.
            dweight = _gather_weight(torch.bmm(grad_STK.mT, _spread(x_NCHW, doubled)), doubled)
        if needs_bias:
            dbias = grad_NKHW.sum((0, 2, 3))
        return dx, dweight, dbias, None


_apply = short_apply(_Filtered)


def conv3x3(
    x_NCHW: Tensor,
    weight_KC33: Tensor,
    bias_K: Tensor | None = None,
    *,
    doubled: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=1)``, differentiable once.

    Args:
        x_NCHW: ``(N, C, H, W)``; for C++ float32, which is copied where it is not channels-last.
        weight_KC33: ``(K, C, 3, 3)`` of the same dtype.
        bias_K: ``(K,)``, or None.
        doubled: convolve maps of twice the height and width, in which a pixel of ``x_NCHW`` is 2 x 2 of its kind;
            C++ does not make them.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``. ``"auto"`` takes C++ where a gradient is asked of float32 and
            there are no fewer channels than :data:`LEAST_WEIGHTS`, but not under autocast, in what is traced, or for
            a subclass of tensors.

    Returns:
        ``(N, K, H, W)``, or ``(N, K, 2 * H, 2 * W)``; of C++ channels-last.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend is unknown.
        RuntimeError: the backend that was asked for cannot run here.
    """
    tensors = x_NCHW, weight_KC33, bias_K
    kind = plain_kind((*tensors, doubled, backend))
    chosen = _choose(kind, *tensors, doubled, backend)
    if backend == dispatch.AUTO and chosen == "cpp" and (kind is None or not _trains(*tensors)):
        chosen = "reference"
    if chosen == "reference":
        return conv3x3_ref(*tensors, doubled=doubled)
    return _Filtered.apply(*tensors, doubled) if kind is None else _apply(*tensors, doubled)


def _trains(*tensors: Tensor | None) -> bool:
    """Whether a gradient is asked of a convolution in float32."""
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return any(x is not None and x.requires_grad for x in tensors)


@once_a_kind
def _choose(x_NCHW: Tensor, weight_KC33: Tensor, bias_K: Tensor | None, doubled: bool, backend: str) -> str:
    """The backend that runs these, where they can be run."""
    chosen = dispatch.resolve(OP, backend, x_NCHW.device, x_NCHW.dtype)
    if x_NCHW.dim() != 4 or 0 in x_NCHW.shape[1:]:
        raise ValueError(f"x_NCHW must be (N, C, H, W) with channels and pixels, got {tuple(x_NCHW.shape)}")
    channels, results = x_NCHW.shape[1], weight_KC33.shape[0]
    check_shape("weight_KC33", weight_KC33, (results, channels, 3, 3))
    named = {"weight_KC33": weight_KC33}
    if bias_K is not None:
        check_shape("bias_K", bias_K, (results,))
        named["bias_K"] = bias_K
    for name, tensor in named.items():
        check_device(name, tensor, x_NCHW.device)
    in_float32 = all(tensor.dtype == torch.float32 for tensor in (x_NCHW, *named.values()))
    if backend == dispatch.AUTO:
        return chosen if in_float32 and channels * results >= LEAST_WEIGHTS[doubled] else "reference"
    if chosen == "cpp":
        for name, tensor in (("x_NCHW", x_NCHW), *named.items()):
            check_floating(name, tensor, (torch.float32,))
    return chosen
