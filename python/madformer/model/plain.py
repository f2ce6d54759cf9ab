"""When a fused kernel may stand in for a module's call, and linear layers that compute in fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of ``module`` is nothing but what ``kind`` computes of its own weights.

    It is not where the module has hooks (which may fetch its weights first), an adapter around it, parametrizations or
    a forward of its own. Then it has to be called.
    """
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not len(module._forward_hooks)
        and not len(module._forward_pre_hooks)
        and not len(module._backward_hooks)
        and not len(module._backward_pre_hooks)
    )


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which is not called for nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def projected(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)`` in the dtype of its weights, and the result in that of ``x``.

    diffusers' layerwise casting leaves some layers as they are stored, and the others compute in another dtype. Where a
    hook or a quantising library casts the weights in the call, that takes ``x`` as it is.
    """
    weight: Any = getattr(linear, "weight", None)
    casts = "forward" in linear.__dict__ or type(weight) not in (nn.Parameter, Tensor)
    if casts or weight.itemsize == 1 or not weight.is_floating_point():
        return linear(x)
    return cast(linear(cast(x, weight.dtype)), x.dtype)


def plus(layer: nn.Module, x: Tensor, other: Tensor) -> Tensor:
    """``other + layer(x)``, by one kernel where the layer has a method ``plus`` for it."""
    at_once = getattr(type(layer), "plus", None)
    return other + layer(x) if at_once is None else at_once(layer, x, other)


def precise(x: Tensor) -> Tensor:
    """``x`` in fp32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


class PreciseLinear(nn.Linear):
    """Computes in fp32 (float64 on weights in float64) whatever dtype its weights are stored in, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        weight = precise(self.weight)
        bias = None if self.bias is None else precise(self.bias)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(weight.dtype), weight, bias)
