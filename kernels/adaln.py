"""AdaLN-Zero: gated residual, norm, scale and shift in one pass, forward and backward (arXiv:2212.09748, sec. 3.2).

Shape legend: B samples, M blocks of a sample with a row of modulation each, T tokens of a block, L = M * T tokens,
C columns. The kernels are ``norm_common``'s, which ``rms_norm`` has too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from madformer.kernels import dispatch
from madformer.kernels.checks import check_device, check_floating, check_same, rows_of, with_contiguous_columns
from madformer.kernels.norm_common import check_norm, empty_outputs, norm_backward, norm_forward, settings_in_use
from madformer.kernels.plans import fresh, once_a_kind, plain_kind, planned, taken_as
from madformer.kernels.registration import register, register_differentiable

OP = "adaln"
Norm = Literal["layer", "rms"]


def adaln_ref(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    norm: Norm = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`adaln` in plain PyTorch, in float32 or, for the oracle, in float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)

    def by_token(rows: Tensor) -> Tensor:
        """(B, C) or (B, M, C) as it broadcasts against (B, M, T, C)."""
        return rows.to(dtype).view(rows.shape[0], -1, 1, rows.shape[-1])

    blocks = 1 if shift.dim() == 2 else shift.shape[1]
    total = x.unflatten(1, (blocks, -1))
    if residual is not None:
        branch = total.to(dtype) if gate is None else total.to(dtype) * by_token(gate)
        total = (residual.unflatten(1, (blocks, -1)).to(dtype) + branch).to(residual.dtype)
    weight, bias = (None if parameter is None else parameter.to(dtype) for parameter in (weight, bias))
    if norm == "layer":
        y = F.layer_norm(total.to(dtype), total.shape[-1:], weight, bias, eps)
    else:
        y = F.rms_norm(total.to(dtype), total.shape[-1:], weight, eps)
        y = y if bias is None else y + bias
    y = (y * (1 + by_token(scale)) + by_token(shift)).to(x.dtype).flatten(1, 2)
    return y if residual is None else (y, total.flatten(1, 2))


def _taken(
    tensors: Sequence[Tensor | None], views: Sequence[Callable[..., Tensor]]
) -> tuple[list[Any], list[Callable[[Any], Any]]]:
    """Tensors in the views that the kernels take, and how others of their kind are passed to them."""
    pairs = list(zip(tensors, views, strict=True))
    return [None if x is None else view(x) for x, view in pairs], [taken_as(view, x) for x, view in pairs]


@planned(settings_in_use)
def _forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    centred: bool,
    eps: float,
) -> Callable[..., Any]:
    views: tuple[Callable[[Tensor], Tensor], ...] = (
        *([with_contiguous_columns] * 2),
        rows_of,
        Tensor.contiguous,
        Tensor.contiguous,
        rows_of,
        rows_of,
    )
    examples, takers = _taken((x, residual, gate, weight, bias, shift, scale), views)
    x_BLC, residual_BLC, *rows = examples
    modulation = dict(zip(("gate", "shift", "scale"), (rows[0], rows[3], rows[4]), strict=True))
    launch = norm_forward(x_BLC, residual=residual_BLC, **modulation, centred=centred, eps=eps)
    take_x, take_residual, take_gate, take_weight, take_bias, take_shift, take_scale = takers
    new_y, new_total = (fresh(each) for each in empty_outputs(x, residual))

    def run(x, shift, scale, weight, bias, residual, gate, *_):
        y, total = new_y(), new_total()
        affine = take_weight(weight), take_bias(bias)
        rows = *affine, take_shift(shift), take_scale(scale)
        launch(take_x(x), take_residual(residual), take_gate(gate), *rows, None if residual is None else total, y)
        return y, total

    return run


def _empty_gradients(
    grad_y: Tensor,
    total: Tensor,
    scale: Tensor,
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
    scale: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    eps: float,
    wanted: Sequence[bool],
) -> Callable[..., Any]:
    names = list(itertools.compress(_GRADIENTS, wanted))
    new_gradients = [fresh(each) for each in _empty_gradients(grad_y, total, scale, gate, weight, bias, wanted)]
    views: tuple[Callable[[Tensor], Tensor], ...] = (
        *([with_contiguous_columns] * 4),
        rows_of,
        Tensor.contiguous,
        Tensor.contiguous,
        rows_of,
    )
    examples, takers = _taken((grad_y, grad_total, total, x, gate, weight, bias, scale), views)
    *tensors, x_BLC, gate_rows, _, bias_C, scale_rows = examples
    modulation = dict(zip(("gate", "bias", "scale"), (gate_rows, bias_C, scale_rows), strict=True))
    fill = norm_backward(*tensors, x=x_BLC, **modulation, centred=centred, eps=eps, wanted=names)

    def run(grad_y, grad_total, total, x, scale, gate, weight, bias, *_):
        gradients = tuple([new() for new in new_gradients])
        given = grad_y, grad_total, total, x, gate, weight, bias, scale
        out = dict(zip(names, itertools.compress(gradients, wanted), strict=True))
        fill(*(take(tensor) for take, tensor in zip(takers, given, strict=True)), out)
        return gradients

    return run


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, scale, weight, bias, residual, gate, ctx.centred, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.has_residual = x.dtype, residual is not None
    gate_needs_x = ctx.needs_input_grad[6]
    total = output[1] if ctx.has_residual else x
    ctx.save_for_backward(total, x if gate_needs_x else None, scale, gate, weight, bias)


def _autograd_backward(ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
    total, x, scale, gate, weight, bias = ctx.saved_tensors
    _, *others = wanted = ctx.needs_input_grad[:7]
    needs_x, needs_residual = wanted[0], wanted[5]
    if grad_y is None:
        grad_y = torch.zeros_like(total, dtype=ctx.dtype)
    shared = needs_x and needs_residual and gate is None and ctx.dtype == total.dtype
    wanted = (needs_x and not shared, *others)
    grad_total = grad_total if ctx.has_residual else None
    arguments = (grad_y, grad_total, total, x, scale, gate, weight, bias, ctx.centred, ctx.eps, wanted)
    gradients = _call_backward(*arguments)
    results = [x if is_wanted else None for x, is_wanted in zip(gradients, wanted, strict=True)]
    if shared:
        results[0] = results[5]
    return (*results, None, None)


_call = register_differentiable(
    "adaln",
    "(Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? gate,"
    " bool centred, float eps) -> (Tensor, Tensor)",
    _forward,
    lambda x, shift, scale, weight, bias, residual, *_: empty_outputs(x, residual),
    _setup_context,
    _autograd_backward,
)
_call_backward = register(
    "adaln_backward",
    "(Tensor grad_y, Tensor? grad_total, Tensor total, Tensor? x, Tensor scale, Tensor? gate, Tensor? weight,"
    " Tensor? bias, bool centred, float eps, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda grad_y, grad_total, total, x, scale, gate, weight, bias, centred, eps, wanted: _empty_gradients(
        grad_y, total, scale, gate, weight, bias, wanted
    ),
)
dispatch.register(OP, "reference")
dispatch.register(OP, "triton", auto=("cuda",))


def adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    norm: Norm = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``total = residual + gate * x``, then ``norm(total) * (1 + scale) + shift``, differentiable.

    Computed in float32 and rounded once (by the reference in float64, for float64). The sum is rounded to its dtype
    before it is normalised, so that ``y`` is the norm of the ``total`` that is returned, as with two separate ops.

    Args:
        x: (B, L, C), a branch's output, C at most 8192; float32, bfloat16 or float16. Any strides: only the last
            dimension is copied where it is not contiguous.
        shift, scale: (B, C), one row for each sample, or (B, M, C), one for each of M runs of L / M tokens; of one
            dtype. They may be chunks of one projection.
        norm: ``"layer"``, less the mean and over the standard deviation, or ``"rms"``, over the root mean square.
        weight, bias: (C,), the affine part of the norm, before the modulation.
        eps: added to the variance or mean square; positive.
        residual: (B, L, C), the stream that the branch is added to; its dtype may differ from ``x``'s.
        gate: as ``shift``; only with ``residual``. None adds ``x`` as it is.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``y`` (B, L, C) contiguous, in the dtype of ``x``; with ``residual`` the pair of ``y`` and ``total``, which has
        the dtype of ``residual``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend is unknown.
        RuntimeError: the backend that was asked for cannot run here.
    """
    kind = plain_kind((x, shift, scale, weight, bias, residual, gate, norm, eps, backend))
    chosen = _choose(kind, (x, shift, scale, weight, bias, residual, gate), norm, eps, backend)
    if chosen == "reference":
        return adaln_ref(x, shift, scale, norm=norm, weight=weight, bias=bias, eps=eps, residual=residual, gate=gate)
    if shift.dim() == 2:
        shift, scale, gate = shift.unsqueeze(1), scale.unsqueeze(1), None if gate is None else gate.unsqueeze(1)
    y, total = _call(x, shift, scale, weight, bias, residual, gate, norm == "layer", eps, kind=kind)
    return y if residual is None else (y, total)


@once_a_kind
def _choose(tensors: tuple[Any, ...], norm: str, eps: float, backend: str) -> str:
    """The backend that runs these, where they can be run."""
    x, shift, scale, weight, bias, residual, gate = tensors
    chosen = dispatch.resolve(OP, backend, x.device, x.dtype)
    _check(x, shift, scale, norm, residual, gate)
    check_norm(x, {"weight": weight, "bias": bias}, residual, eps, compiled=chosen == "triton")
    if chosen != "reference":
        check_floating("shift", shift)
    return chosen


def _check(x: Tensor, shift: Tensor, scale: Tensor, norm: str, residual: Tensor | None, gate: Tensor | None) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be (B, L, C), got the shape {tuple(x.shape)}")
    if norm not in ("layer", "rms"):
        raise ValueError(f"norm={norm!r} must be 'layer' or 'rms'")
    samples, length, cols = x.shape
    shape = tuple(shift.shape)
    if shift.dim() not in (2, 3) or (shape[0], shape[-1]) != (samples, cols):
        raise ValueError(f"shift must be ({samples}, {cols}) or ({samples}, M, {cols}), got the shape {shape}")
    if shift.dim() == 3 and (shape[1] == 0 or length % shape[1]):
        raise ValueError(f"shift must have a number of rows that divides the {length} tokens of x, got {shape[1]}")
    check_device("shift", shift, x.device)
    check_same("scale", scale, "shift", shift)
    if gate is not None:
        if residual is None:
            raise ValueError("gate needs a residual to add x to")
        check_same("gate", gate, "shift", shift)
