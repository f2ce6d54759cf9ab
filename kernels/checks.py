"""What the public functions of ops share: validation of tensors, and rows of them as kernels read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from madformer.kernels.launch import DTYPES


def check_floating(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Raises ``ValueError`` unless the tensor has one of ``dtypes``."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raises ``ValueError`` unless the tensor has this shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ``ValueError`` unless the tensor is on ``device``."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises ``ValueError`` unless the tensor has the shape, dtype and device of another."""
    for what in ("shape", "dtype", "device"):
        mine, its = getattr(tensor, what), getattr(other, what)
        if mine != its:
            raise ValueError(f"{name} must have {other_name}'s {what} {its}, got {mine}")


def check_no_gradient(op: str, named: Mapping[str, Tensor | None]) -> None:
    """Raises ``ValueError`` where a tensor of an op without a backward requires a gradient, which no kind tells."""
    for name, tensor in named.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient: {op} has no backward")


def with_contiguous_columns(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor as ``(R, C)`` rows with contiguous columns: a view where its layout allows one, else a copy."""
    return with_contiguous_columns(tensor).reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
