"""RMSNorm with a fused residual addition, forward and backward (arXiv:1910.07467, eq. 4).

Its op is ``norm_common``'s, which ``adaln`` has too.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from madformer.kernels import dispatch
from madformer.kernels.norm_common import check_norm
from madformer.kernels.norm_common.op import norm_op, norm_op_cpp
from madformer.kernels.plans import once_a_kind, plain_kind

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


dispatch.register(OP, "reference")
dispatch.register(OP, "triton", auto=("cuda",))
dispatch.register(OP, "cpp", ("cpu",), kernel="residual_norm_backward_cpp")


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
        x: (..., C), C at most 8192 for Triton; float32, bfloat16 or float16. Rows may be spaced as a slice of a packed
            tensor's are: only the last dimension is copied where it is not contiguous.
        weight: (C,) of any of these dtypes, or None.
        eps: added to the mean square; positive.
        residual: (..., C), the stream that ``x`` is added to; its dtype may differ from ``x``'s.
        backend: ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

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
    op = norm_op_cpp if chosen == "cpp" else norm_op
    y, total = op(x, None, None, weight, None, residual, None, False, eps, kind=kind)
    return y if residual is None else (y, total)


@once_a_kind
def _choose(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, backend: str) -> str:
    """The backend that runs these, where they can be run."""
    chosen = dispatch.resolve(OP, backend, x.device, x.dtype)
    check_norm(x, {"weight": weight}, residual, eps, backend=chosen)
    return chosen
