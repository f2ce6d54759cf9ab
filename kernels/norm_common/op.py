"""The op of ``rms_norm`` and ``adaln`` for PyTorch: tensors as its kernels take them, its launches, its gradients.

Shape legend: B samples, M blocks of a sample with a row of modulation each, L tokens, C columns.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from madformer.kernels.checks import rows_of, with_contiguous_columns
from madformer.kernels.norm_common import empty_outputs, norm_backward, norm_forward, settings_in_use
from madformer.kernels.plans import fresh, planned, taken_as
from madformer.kernels.registration import register, register_compiled, register_differentiable


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


def _in_samples(scale: Tensor | None, *tensors: Tensor | None) -> Callable[[Tensor], Tensor]:
    """How tensors of one shape are taken: with modulation they are (B, L, C), without it rows may be joined."""
    if scale is not None:
        return with_contiguous_columns
    return functools.partial(_reshaped, shape=_sample_shape(*tensors))


def _reshaped(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    return with_contiguous_columns(x).reshape(shape)


def _taken(
    tensors: Sequence[Tensor | None], views: Sequence[Callable[..., Tensor]]
) -> tuple[list[Any], list[Callable[[Any], Any]]]:
    """Tensors in the views that the kernels take, and how others of their kind are passed to them."""
    pairs = list(zip(tensors, views, strict=True))
    return [None if x is None else view(x) for x, view in pairs], [taken_as(view, x) for x, view in pairs]


@planned(settings_in_use)
def _forward(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    centred: bool,
    eps: float,
) -> Callable[..., Any]:
    in_samples = _in_samples(scale, x, residual)
    views = in_samples, in_samples, rows_of, Tensor.contiguous, Tensor.contiguous, rows_of, rows_of
    examples, takers = _taken((x, residual, gate, weight, bias, shift, scale), views)
    launch = norm_forward(*examples, centred=centred, eps=eps)
    new_y, new_total = (fresh(each) for each in empty_outputs(x, residual))

    def run(x, shift, scale, weight, bias, residual, gate, *_):
        y, total = new_y(), new_total()
        given = x, residual, gate, weight, bias, shift, scale
        written = None if residual is None else total
        launch(*[take(tensor) for take, tensor in zip(takers, given, strict=True)], written, y)
        return y, total

    return run


def _empty_gradients(
    grad_y: Tensor,
    total: Tensor,
    scale: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Those of the arguments in their order, without elements where not ``wanted``."""
    likes = (grad_y, scale, scale, weight, bias, total, gate)
    return tuple(
        like.new_empty(like.shape) if is_wanted and like is not None else total.new_empty(0)
        for like, is_wanted in zip(likes, wanted, strict=True)
    )


_GRADIENTS = ("x", "shift", "scale", "weight", "bias", "total", "gate")


@planned(settings_in_use)
def _backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    eps: float,
    wanted: Sequence[bool],
) -> Callable[..., Any]:
    names = list(itertools.compress(_GRADIENTS, wanted))
    new_gradients = [fresh(each) for each in _empty_gradients(grad_y, total, scale, gate, weight, bias, wanted)]
    in_samples = _in_samples(scale, grad_y, grad_total, total, x)
    views = *[in_samples] * 4, rows_of, Tensor.contiguous, Tensor.contiguous, rows_of
    examples, takers = _taken((grad_y, grad_total, total, x, gate, weight, bias, scale), views)
    fill = norm_backward(*examples, centred=centred, eps=eps, wanted=names)

    def run(grad_y, grad_total, total, x, scale, gate, weight, bias, *_):
        gradients = tuple([new() for new in new_gradients])
        given = grad_y, grad_total, total, x, gate, weight, bias, scale
        out = dict(zip(names, itertools.compress(gradients, wanted), strict=True))
        fill(*[take(tensor) for take, tensor in zip(takers, given, strict=True)], out)
        return gradients

    return run


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, scale, weight, bias, residual, gate, ctx.centred, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.has_residual = x.dtype, residual is not None
    gate_needs_x = ctx.needs_input_grad[6]
    total = output[1] if ctx.has_residual else x
    ctx.save_for_backward(total, x if gate_needs_x else None, scale, gate, weight, bias)


def _autograd_backward(
    backward: Callable[..., Any], ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None
) -> tuple[Tensor | None, ...]:
    total, x, scale, gate, weight, bias = ctx.saved_tensors
    _, *others = wanted = ctx.needs_input_grad[:7]
    needs_x, needs_residual = wanted[0], wanted[5]
    if grad_y is None:
        grad_y = torch.zeros_like(total, dtype=ctx.dtype)
    shared = needs_x and needs_residual and gate is None and ctx.dtype == total.dtype
    wanted = (needs_x and not shared, *others)
    grad_total = grad_total if ctx.has_residual else None
    arguments = (grad_y, grad_total, total, x, scale, gate, weight, bias, ctx.centred, ctx.eps, wanted)
    gradients = backward(*arguments)
    results = [x if is_wanted else None for x, is_wanted in zip(gradients, wanted, strict=True)]
    if shared:
        results[0] = results[5]
    return (*results, None, None)


_SCHEMA = (
    "(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? gate,"
    " bool centred, float eps) -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_y, Tensor? grad_total, Tensor total, Tensor? x, Tensor? scale, Tensor? gate, Tensor? weight,"
    " Tensor? bias, bool centred, float eps, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake(x: Tensor, shift: Any, scale: Any, weight: Any, bias: Any, residual: Tensor | None, *_: Any) -> Any:
    return empty_outputs(x, residual)


def _fake_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    return _empty_gradients(grad_y, total, scale, gate, weight, bias, wanted)


norm_op = register_differentiable(
    "residual_norm",
    _SCHEMA,
    _forward,
    _fake,
    _setup_context,
    functools.partial(
        _autograd_backward, register("residual_norm_backward", _BACKWARD_SCHEMA, _backward, _fake_backward)
    ),
)
norm_op_cpp = register_compiled(
    "residual_norm_cpp",
    _SCHEMA,
    _fake,
    _setup_context,
    functools.partial(
        _autograd_backward, register_compiled("residual_norm_backward_cpp", _BACKWARD_SCHEMA, _fake_backward)
    ),
)
