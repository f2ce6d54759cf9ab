"""RMSNorm with a fused residual addition, forward and backward (arXiv:1910.07467, eq. 4).

Shape legend: B samples, L rows of a sample (or all rows, as those of one sample), C columns. The kernels
are ``norm_common``'s, which ``adaln`` has too.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from madformer.kernels import dispatch
from madformer.kernels.checks import with_contiguous_columns
from madformer.kernels.norm_common import check_norm, empty_outputs, norm_backward, norm_forward, settings_in_use
from madformer.kernels.plans import fresh, itself, once_a_kind, plain_kind, planned, taken_as
from madformer.kernels.registration import register, register_differentiable

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


def _taken(x: Tensor | None, shape: tuple[int, int, int]) -> tuple[Tensor | None, Callable[[Any], Any]]:
    """A tensor as (B, L, C), and how others of its kind are passed to a kernel that was made for it."""
    if x is None:
        return None, itself
    view = functools.partial(_in_samples, shape=shape)
    return view(x), taken_as(view, x)


@planned(settings_in_use)
def _forward(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> Callable[..., Any]:
    shape = _sample_shape(x, residual)
    (x_BLC, take_x), (residual_BLC, take_residual) = (_taken(tensor, shape) for tensor in (x, residual))
    assert x_BLC is not None
    launch = norm_forward(x_BLC, residual=residual_BLC, centred=False, eps=eps)
    take_weight = taken_as(Tensor.contiguous, weight)
    new_y, new_total = (fresh(each) for each in empty_outputs(x, residual))

    def run(x, weight, residual, _):
        y, total = new_y(), new_total()
        written = None if residual is None else total
        launch(take_x(x), take_residual(residual), None, take_weight(weight), None, None, None, written, y)
        return y, total

    return run


def _empty_gradients(
    grad_y: Tensor, total: Tensor, weight: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of ``x``, ``weight`` and ``residual``, without elements where not ``wanted``."""
    dx, dweight, dresidual = wanted
    return (
        grad_y.new_empty(total.shape if dx else 0),
        total.new_empty(0) if weight is None else weight.new_empty(weight.shape if dweight else 0),
        total.new_empty(total.shape if dresidual else 0),
    )


@planned(settings_in_use)
def _backward(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, eps: float, wanted: Sequence[bool]
) -> Callable[..., Any]:
    names = [name for name, is_wanted in zip(("x", "weight", "total"), wanted, strict=True) if is_wanted]
    new_gradients = [fresh(each) for each in _empty_gradients(grad_y, total, weight, wanted)]
    shape = _sample_shape(grad_y, grad_total, total)
    examples, takers = zip(*(_taken(tensor, shape) for tensor in (grad_y, grad_total, total)), strict=True)
    fill = norm_backward(*examples, centred=False, eps=eps, wanted=names)
    take_grad, take_grad_total, take_total = takers
    take_weight = taken_as(Tensor.contiguous, weight)

    def run(grad_y, grad_total, total, weight, *_):
        gradients = tuple([new() for new in new_gradients])
        out = dict(zip(names, itertools.compress(gradients, wanted), strict=True))
        given = take_grad(grad_y), take_grad_total(grad_total), take_total(total)
        fill(*given, None, None, take_weight(weight), None, None, out)
        return gradients

    return run


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, residual, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.has_residual = x.dtype, residual is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight)


def _autograd_backward(ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_residual, _ = ctx.needs_input_grad[:4]
    if grad_y is None:
        grad_y = torch.zeros_like(total, dtype=ctx.dtype)
    shared = needs_x and needs_residual and ctx.dtype == total.dtype
    wanted = needs_x and not shared, needs_weight, needs_residual
    dx, dweight, dresidual = _call_backward(
        grad_y, grad_total if ctx.has_residual else None, total, weight, ctx.eps, wanted
    )
    dx = dresidual if shared else dx if needs_x else None
    return dx, dweight if needs_weight else None, dresidual if needs_residual else None, None


_call = register_differentiable(
    "rms_norm",
    "(Tensor x, Tensor? weight, Tensor? residual, float eps) -> (Tensor, Tensor)",
    _forward,
    lambda x, weight, residual, eps: empty_outputs(x, residual),
    _setup_context,
    _autograd_backward,
)
_call_backward = register(
    "rms_norm_backward",
    "(Tensor grad_y, Tensor? grad_total, Tensor total, Tensor? weight, float eps, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad_y, grad_total, total, weight, eps, wanted: _empty_gradients(grad_y, total, weight, wanted),
)
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
    kind = plain_kind((x, weight, residual, eps, backend))
    chosen = _choose(kind, x, weight, residual, eps, backend)
    if chosen == "reference":
        return rms_norm_ref(x, weight, eps=eps, residual=residual)
    y, total = _call(x, weight, residual, eps, kind=kind)
    return y if residual is None else (y, total)


@once_a_kind
def _choose(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, backend: str) -> str:
    """The backend that runs these, where they can be run."""
    chosen = dispatch.resolve(OP, backend, x.device, x.dtype)
    check_norm(x, {"weight": weight}, residual, eps, compiled=chosen == "triton")
    return chosen
