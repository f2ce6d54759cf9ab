"""Weights in the layout that oneDNN multiplies in, made once and not at every call.

PyTorch's eager convolutions and linear layers hand oneDNN and MKL plain weights, which are reordered in every call. At
the sizes of a denoising step (2 images, 8 x 8 to 16 x 16 positions) that costs as much as the arithmetic. On two cores,
128 to 512 channels, against channels-last eager: convolutions 1.2 to 1.5 times as fast in fp32 and 1.2 to 2.5 in bf16,
linear layers 1.05 to 1.4.
"""

from __future__ import annotations

import copy
import platform

import torch
from torch import Tensor, nn

from madformer.model import MADFormer


def can_pack(model: MADFormer) -> bool:
    """Whether this machine runs packed weights of the model's dtype: x86 processors, through oneDNN."""
    return (
        model.device.type == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and (
            model.dtype == torch.float32
            or (model.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


def shared_copy(model: MADFormer) -> MADFormer:
    """A module tree of its own over the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def packed(model: MADFormer) -> MADFormer:
    """A copy of the module tree, over the same parameters, that computes with packed ones.

    It takes the memory of the weights that it uses a second time, packs each at its first use, and does not follow
    later changes: compare :func:`madformer.engine.memory.fingerprint`. For inference only.
    """
    duplicate = shared_copy(model)
    for module in list(duplicate.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv2d and child.groups == 1 and child.padding_mode == "zeros":
                setattr(module, name, PackedConv2d(child))
            elif type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
    return duplicate


class PackedConv2d(nn.Module):
    """``nn.Conv2d`` on weights packed for the image size that it meets first, and again where that changes."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = list(conv.padding), list(conv.stride), list(conv.dilation), 1
        self.shape: torch.Size | None = None
        self.packed: Tensor | None = None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        # not where the batch does: in-flight batching changes it at every step, and the layout is the same
        if x_NCHW.shape[1:] != self.shape:
            weight = self.weight.contiguous(memory_format=torch.channels_last)
            self.shape = x_NCHW.shape[1:]
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, list(x_NCHW.shape))
        return torch.ops.mkldnn._convolution_pointwise(x_NCHW, self.packed, self.bias, *self.geometry, "none", [], "")


class PackedLinear(nn.Module):
    """``nn.Linear`` on weights packed for the number of rows that it meets first."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            rows = x.numel() // x.shape[-1]
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
