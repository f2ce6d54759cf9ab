"""Weights in the layout that oneDNN multiplies in, made once and not at every call.

PyTorch's eager convolutions and linear layers hand oneDNN and MKL plain weights, which are reordered in every call. At
the sizes of a denoising step (2 images, 8 x 8 to 16 x 16 positions) that costs as much as the arithmetic. On two cores,
128 to 512 channels, against channels-last eager: convolutions 1.2 to 1.5 times as fast in fp32 and 1.2 to 2.5 in bf16,
linear layers 1.05 to 1.4. In fp32 with AVX2 a linear layer is faster in MKL on plain weights where these are few, since
a call of oneDNN costs 20 to 50 microseconds more: 96 to 384 channels take MKL 0.35 to 0.9 of the time at 32 rows and
0.65 to 1.0 at 512, 512 x 512 weights 0.9 at 128 rows, but 768 x 2,304 weights 1.3 at 64 rows.

A weight can be written to in ways of which PyTorch keeps no account (``.data``, NumPy), so packed weights are kept by
what they were made of: a digest of the weight's bytes is looked at again in every tree of :func:`packed`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import platform
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from madformer.engine.structure import process_is_plain, rebuilt
from madformer.model import MADFormer

LEAST_WEIGHTS = 1 << 20
"""Of a linear layer that is packed in fp32 for a processor without AVX-512."""


def can_pack(tensor: Tensor | MADFormer) -> bool:
    """Whether this machine runs packed weights of this dtype on this device: x86 processors, through oneDNN."""
    return _can_pack(tensor.device.type, tensor.dtype)


@functools.cache
def _can_pack(device_type: str, dtype: torch.dtype) -> bool:
    return (
        device_type == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


@functools.cache
def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@dataclass
class PackedWeights:
    """Packed weights by the names of their layers, each with what it was made of, and the layers themselves.

    It takes the memory of the weights that are used a second time.
    """

    entries: dict[str, tuple[Hashable, Tensor]] = field(default_factory=dict)
    layers: dict[str, PackedLinear | PackedConv2d] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def get(self, name: str, weight: Tensor, how: Hashable, pack: Callable[[], Tensor]) -> Tensor:
        """``pack()`` of the weight as it is now, or what it gave before for the same bytes and the same ``how``."""
        made_of = how, weight.shape, weight.stride(), weight.dtype, digest(weight)
        entry = self.entries.get(name)
        if entry is None or entry[0] != made_of:
            entry = self.entries[name] = made_of, pack()
        return entry[1]


def digest(tensor: Tensor) -> Hashable:
    """Of a tensor's bytes in the order in which they lie in memory."""
    dense = tensor
    if not (tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)):
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        dense = tensor.detach().permute(order).contiguous()
    if _CONTENT_HASH is not None:
        return _CONTENT_HASH(dense.data_ptr(), dense.nbytes)
    content: Any = dense.detach().as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy()
    return hashlib.sha1(content, usedforsecurity=False).digest()


def _content_hash() -> Callable[[int, int], int] | None:
    """The extension's, ten times as fast as Python's."""
    try:
        return getattr(importlib.import_module("madformer._C"), "content_hash", None)
    except ImportError:
        return None


_CONTENT_HASH = _content_hash()


def packed(model: MADFormer, weights: PackedWeights | None = None) -> MADFormer:
    """The model as it is now, with its plain linear layers and convolutions computing with packed weights.

    It is for use until it is made anew: with the same ``weights`` that is as cheap as looking at the weights, and takes
    over the layers. It shares everything with the model but the modules that lead to packed ones. For inference only.
    """
    weights = weights if weights is not None else PackedWeights()
    names: set[str] = set()

    def stand_in(name: str, module: nn.Module) -> nn.Module | None:
        kind = _STAND_INS.get(type(module))
        # the time's projections are tabulated, once a run
        if kind is None or not kind.fits(module) or name.endswith(".time_emb_proj"):
            return None
        if not all(can_pack(tensor) for tensor in module._parameters.values() if tensor is not None):
            return None
        names.add(name)
        layer: Any = weights.layers.get(name)
        if layer is None or not layer.looks_again(module):
            layer = weights.layers[name] = kind(module, weights, name)
        return layer

    result = rebuilt(model, stand_in) if process_is_plain() else model
    for kept in (weights.entries, weights.layers):
        for name in kept.keys() - names:
            del kept[name]
    return result


ALONE: tuple[Any, ...] = "none", [], ""
PLUS: tuple[Any, ...] = "add", None, None, [], None
"""What oneDNN does with a result, in PyTorch's terms: nothing, or add another tensor to it."""

Geometry = tuple[list[int], list[int], list[int], int]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` by oneDNN, of a weight that is packed or not."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, *ALONE)


def convolution(
    x_NCHW: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, other_NCHW: Tensor | None = None
) -> Tensor:
    """A convolution by oneDNN, of a weight that is packed or not, plus another tensor if there is one."""
    if other_NCHW is None:
        return torch.ops.mkldnn._convolution_pointwise.default(x_NCHW, weight, bias, *geometry, *ALONE)
    return torch.ops.mkldnn._convolution_pointwise.binary(x_NCHW, other_NCHW, weight, bias, *geometry, *PLUS)


class PackedConv2d(nn.Module):
    """``nn.Conv2d`` on weights packed for the image size that it meets first, and again where that changes."""

    def __init__(self, conv: nn.Conv2d, weights: PackedWeights | None = None, name: str = "") -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = self.geometry_of(conv)
        self.weights, self.name = weights or PackedWeights(), name
        self.ready: tuple[torch.Size, Tensor] | None = None
        self.met: torch.Size | None = None

    @staticmethod
    def geometry_of(conv: nn.Conv2d) -> Geometry:
        return list(map(int, conv.padding)), list(conv.stride), list(conv.dilation), 1

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Whether one may stand in for a convolution of this geometry."""
        return conv.groups == 1 and conv.padding_mode == "zeros" and isinstance(conv.padding, tuple)

    def looks_again(self, conv: nn.Conv2d) -> bool:
        """Whether it stands in for this one still; if so, the next call looks at the weights again."""
        vars(self)["ready"] = None
        same = self.weight is conv.weight and self.bias is conv.bias
        return same and self.geometry == self.geometry_of(conv)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return convolution(x_NCHW, self._packed_for(x_NCHW.shape), self.bias, self.geometry)

    def plus(self, x_NCHW: Tensor, other_NCHW: Tensor) -> Tensor:
        """``other_NCHW + self(x_NCHW)``: a residual block's last addition, which is none of its own then."""
        return convolution(x_NCHW, self._packed_for(x_NCHW.shape), self.bias, self.geometry, other_NCHW)

    def packed_weight(self) -> Tensor | None:
        """The weight as it is now, packed for the images that it met last; None before it met any."""
        return None if self.met is None else self._packed_for(self.met)

    def _packed_for(self, images: torch.Size) -> Tensor:
        # not where the batch does: in-flight batching changes it at every step, and the layout is the same
        ready, shape = self.ready, images[1:]
        if ready is None or ready[0] != shape:
            how = shape, tuple(tuple(numbers) for numbers in self.geometry[:3])
            with self.weights.lock:
                packed = self.weights.get(self.name, self.weight, how, lambda: self._pack(images))
            # in one assignment: several threads may be here
            ready = self.ready = shape, packed
            self.met = images
        return ready[1]

    def _pack(self, shape: torch.Size) -> Tensor:
        weight = self.weight.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, list(shape))


class PackedLinear(nn.Module):
    """``nn.Linear`` on weights packed for the number of rows that it meets first."""

    def __init__(self, linear: nn.Linear, weights: PackedWeights | None = None, name: str = "") -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.weights, self.name = weights or PackedWeights(), name
        self.packed: Tensor | None = None
        self.met: torch.Size | None = None

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        """Whether one is faster."""
        weight = linear.weight
        return weight.dtype != torch.float32 or weight.numel() >= LEAST_WEIGHTS or _has_avx512()

    def looks_again(self, linear: nn.Linear) -> bool:
        """As that of :class:`PackedConv2d`."""
        vars(self)["packed"] = None
        return self.weight is linear.weight and self.bias is linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self._packed_for(x.shape), self.bias)

    def packed_weight(self) -> Tensor | None:
        """As that of :class:`PackedConv2d`."""
        return None if self.met is None else self._packed_for(self.met)

    def _packed_for(self, inputs: torch.Size) -> Tensor:
        packed = self.packed
        if packed is None:
            self.met, rows = inputs, inputs[:-1].numel()
            with self.weights.lock:
                packed = self.packed = self.weights.get(self.name, self.weight, rows, lambda: self._pack(rows))
        return packed

    def _pack(self, rows: int) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)


_STAND_INS: dict[type[nn.Module], Any] = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}
