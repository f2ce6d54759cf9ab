"""Layers of a compiled program whose weights it is given at every call, packed for oneDNN or not.

Inductor packs weights that are constants of a program, and leaves plain ones to be reordered in every call. These are
neither: to Inductor they are tensors like others, which it hands to PyTorch's operators on packed weights; those ask
the tensor itself how it is laid out, so both give the same. PyTorch's operators cannot be exported as they are, one for
want of shapes and one since it is compiled for constants alone, so these two stand for them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, library, nn
from torch._inductor import mkldnn_ir
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import register_lowering

from madformer.engine.packing import ALONE, PLUS, PackedConv2d, convolution, linear

# for every backend: of packed weights and of plain ones
library.define("madformer::given_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
library.define(
    "madformer::given_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, int[] padding, int[] stride, int[] dilation, Tensor? other) -> Tensor",
)


library.impl("madformer::given_linear", "CompositeExplicitAutograd", linear)


@library.register_fake("madformer::given_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


@register_lowering(torch.ops.madformer.given_linear.default, type_promotion_kind=None)
def _(x: Any, weight: Any, bias: Any) -> Any:
    return TensorBox.create(mkldnn_ir.LinearUnary.create(x, weight, bias, *ALONE))


@library.impl("madformer::given_conv2d", "CompositeExplicitAutograd")
def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    padding, stride, dilation, other = rest
    return convolution(x, weight, bias, (padding, stride, dilation, 1), other)


@library.register_fake("madformer::given_conv2d")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    padding, stride, dilation, _ = rest
    sides = zip(x.shape[2:], weight.shape[2:], padding, stride, dilation, strict=True)
    maps = [(side + 2 * pad - reach * (kernel - 1) - 1) // step + 1 for side, kernel, pad, step, reach in sides]
    return torch.empty_like(x.new_empty((len(x), len(weight), *maps)), memory_format=torch.channels_last)


@register_lowering(torch.ops.madformer.given_conv2d.default, type_promotion_kind=None)
def _(x: Any, weight: Any, bias: Any, padding: Any, stride: Any, dilation: Any, other: Any) -> Any:
    geometry = padding, stride, dilation, 1
    if other is None:
        return TensorBox.create(mkldnn_ir.ConvolutionUnary.create(x, weight, bias, *geometry, *ALONE))
    return TensorBox.create(mkldnn_ir.ConvolutionBinary.create(x, other, weight, bias, *geometry, *PLUS))


class GivenConv2d(nn.Module):
    """In the place of a convolution that :class:`~madformer.engine.packing.PackedConv2d` may stand in for."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = PackedConv2d.geometry_of(conv)[:3]

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return torch.ops.madformer.given_conv2d.default(x_NCHW, self.weight, self.bias, *self.geometry, None)

    def plus(self, x_NCHW: Tensor, other_NCHW: Tensor) -> Tensor:
        """As that of :class:`~madformer.engine.packing.PackedConv2d`."""
        return torch.ops.madformer.given_conv2d.default(x_NCHW, self.weight, self.bias, *self.geometry, other_NCHW)


class GivenLinear(nn.Module):
    """In the place of a linear layer that :class:`~madformer.engine.packing.PackedLinear` may stand in for."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.madformer.given_linear.default(x, self.weight, self.bias)


def given(layer: nn.Module) -> nn.Module:
    """What stands in a program for a linear layer or convolution that is packed elsewhere."""
    return GivenLinear(layer) if isinstance(layer, nn.Linear) else GivenConv2d(cast(nn.Conv2d, layer))
