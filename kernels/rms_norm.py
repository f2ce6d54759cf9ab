"""RMSNorm with a fused residual addition, forward and backward (arXiv:1910.07467, eq. 4).

Shape legend: B samples, L rows of a sample (or all rows, as those of one sample), C columns. The kernels
are ``norm_common``'s, which ``adaln`` has too.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, overload

import torch
from torch import Tensor, library

from madformer.kernels import dispatch
from madformer.kernels.norm_common import check_norm, norm_backward, norm_forward, with_contiguous_columns

OP = "rms_norm"


def rms_norm_ref(
    x: Tensor, weight: Tensor | None, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`rms_norm` in plain PyTorch, in float32 or, for the oracle, in float64."""
    total = x if residual is None else (x + residual).to(residual.dtype)
    # Half the passes over memory of F.rms_norm on a CPU, where that is no fused kernel.
    dtype = torch.promote_types(total.dtype, torch.float32)
    norm = torch.linalg.vector_norm(total, dim=-1, keepdim=True, dtype=dtype)
    y = total * torch.rsqrt(norm.square() / total.shape[-1] + eps)
    y = (y if weight is None else y * weight).to(x.dtype)
    return y if residual is None else (y, total)


def _sample_shape(*tensors: Tensor | None) -> tuple[int, int, int]:
    """Tensors of one shape as (B, L, C); B is 1 where each of them has evenly spaced rows."""
    given = [x for x in tensors if x is not None]
    *sizes, cols = given[0].shape
    if all(x.stride(-1) != 1 or _has_even_rows(x) for x in given):
        return 1, math.prod(sizes), cols
    return math.prod(sizes[:-1]), sizes[-1], cols


def _has_even_rows(x: Tensor) -> bool:
    rows = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in itertools.pairwise(rows))


def _in_samples(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    return with_contiguous_columns(x).reshape(shape)


def _forward(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    shape = _sample_shape(x, residual)
    residual_BLC = None if residual is None else _in_samples(residual, shape)
    y, total = norm_forward(_in_samples(x, shape), residual=residual_BLC, weight=weight, centred=False, eps=eps)
    return y.view(x.shape), x.new_empty(0) if total is None else total.view(x.shape)


def _empty_gradients(
    grad_y: Tensor, total: Tensor, weight: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of ``x``, ``weight`` and ``residual``, without elements where not ``wanted``."""
    dx, dweight, dresidual = wanted
    return (
        grad_y.new_empty(total.shape if dx else 0),
        total.new_empty(0) if weight is None else weight.new_empty(weight.shape if dweight else 0),
        total.new_empty(total.shape if dresidual else 0),
    )


def _backward(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, eps: float, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(grad_y, total, weight, wanted)
    names = ("x", "weight", "total")
    out = {name: x for name, x, is_wanted in zip(names, gradients, wanted, strict=True) if is_wanted}
    shape = _sample_shape(grad_y, grad_total, total)
    norm_backward(
        _in_samples(grad_y, shape),
        None if grad_total is None else _in_samples(grad_total, shape),
        _in_samples(total, shape),
        weight=weight,
        centred=False,
        eps=eps,
        out=out,
    )
    return gradients


library.define("madformer::rms_norm", "(Tensor x, Tensor? weight, Tensor? residual, float eps) -> (Tensor, Tensor)")
library.define(
    "madformer::rms_norm_backward",
    "(Tensor grad_y, Tensor? grad_total, Tensor total, Tensor? weight, float eps, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor)",
)
library.impl("madformer::rms_norm", ("cpu", "cuda"), _forward)
library.impl("madformer::rms_norm_backward", ("cpu", "cuda"), _backward)


@library.register_fake("madformer::rms_norm")
def _(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if residual is None else residual.new_empty(x.shape)


@library.register_fake("madformer::rms_norm_backward")
def _(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, eps: float, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(grad_y, total, weight, wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, residual, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.has_residual = x.dtype, residual is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight)


def _autograd_backward(ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_residual, _ = ctx.needs_input_grad
    if grad_y is None:
        grad_y = torch.zeros_like(total, dtype=ctx.dtype)
    shared = needs_x and needs_residual and ctx.dtype == total.dtype
    wanted = [needs_x and not shared, needs_weight, needs_residual]
    dx, dweight, dresidual = torch.ops.madformer.rms_norm_backward(
        grad_y, grad_total if ctx.has_residual else None, total, weight, ctx.eps, wanted
    )
    dx = dresidual if shared else dx if needs_x else None
    return dx, dweight if needs_weight else None, dresidual if needs_residual else None, None


library.register_autograd("madformer::rms_norm", _autograd_backward, setup_context=_setup_context)
dispatch.register(OP, "reference")
dispatch.register(OP, "triton", auto=("cuda",))


@overload
def rms_norm(
    x: Tensor, weight: Tensor | None, *, eps: float, residual: None = None, backend: str = "auto"
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None, *, eps: float, residual: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor | None, *, eps: float, residual: Tensor | None = None, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """``total = x + residual``, then ``total / sqrt(mean(total ** 2) + eps) * weight``, differentiable.

    Computed in float32 and rounded once (by the reference in float64, for float64). The sum is rounded to its dtype
    before it is normalised, so that ``y`` is the norm of the ``total`` that is returned, as with two separate ops.

    Args:
        x: (..., C), C at most 8192; float32, bfloat16 or float16. Rows may be spaced as a slice of a packed tensor's
            are: only the last dimension is copied where it is not contiguous.
        weight: (C,) of any of these dtypes, or None.
        eps: added to the mean square; positive.
        residual: (..., C), the stream that ``x`` is added to; its dtype may differ from ``x``'s.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``y`` (..., C) contiguous, in the dtype of ``x``; with ``residual`` the pair of ``y`` and ``total``, which has
        the dtype of ``residual``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend is unknown.
        RuntimeError: the backend that was asked for cannot run here.
    """
    chosen = dispatch.resolve(OP, backend, x.device, x.dtype)
    check_norm(x, {"weight": weight}, residual, eps, compiled=chosen == "triton")
    if chosen == "reference":
        return rms_norm_ref(x, weight, eps=eps, residual=residual)
    y, total = torch.ops.madformer.rms_norm(x, weight, residual, eps)
    return y if residual is None else (y, total)
