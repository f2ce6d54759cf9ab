"""AdaLN-Zero: gated residual, norm, scale and shift in one pass, forward and backward (arXiv:2212.09748, sec. 3.2).

Shape legend: B samples, M blocks of a sample with a row of modulation each, T tokens of a block, L = M * T tokens,
C columns. Its op is ``norm_common``'s, which ``rms_norm`` has too.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from madformer.kernels import dispatch
from madformer.kernels.checks import check_device, check_floating, check_same
from madformer.kernels.norm_common import check_norm
from madformer.kernels.norm_common.op import norm_op, norm_op_cpp
from madformer.kernels.plans import once_a_kind, plain_kind

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


dispatch.register(OP, "reference")
dispatch.register(OP, "triton", auto=("cuda",))
dispatch.register(OP, "cpp", ("cpu",), kernel="residual_norm_backward_cpp")


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
        x: (B, L, C), a branch's output, C at most 8192 for Triton; float32, bfloat16 or float16. Any strides: only the
            last dimension is copied where it is not contiguous.
        shift, scale: (B, C), one row for each sample, or (B, M, C), one for each of M runs of L / M tokens; of one
            dtype. They may be chunks of one projection.
        norm: ``"layer"``, less the mean and over the standard deviation, or ``"rms"``, over the root mean square.
        weight, bias: (C,), the affine part of the norm, before the modulation.
        eps: added to the variance or mean square; positive.
        residual: (B, L, C), the stream that the branch is added to; its dtype may differ from ``x``'s.
        gate: as ``shift``; only with ``residual``. None adds ``x`` as it is.
        backend: ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

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
    op = norm_op_cpp if chosen == "cpp" else norm_op
    y, total = op(x, shift, scale, weight, bias, residual, gate, norm == "layer", eps, kind=kind)
    return y if residual is None else (y, total)


@once_a_kind
def _choose(tensors: tuple[Any, ...], norm: str, eps: float, backend: str) -> str:
    """The backend that runs these, where they can be run."""
    x, shift, scale, weight, bias, residual, gate = tensors
    chosen = dispatch.resolve(OP, backend, x.device, x.dtype)
    _check(x, shift, scale, norm, residual, gate)
    check_norm(x, {"weight": weight, "bias": bias}, residual, eps, backend=chosen)
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
