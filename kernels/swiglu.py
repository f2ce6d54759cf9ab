"""SwiGLU: ``silu(gate) * up`` in one pass, forward and backward (arXiv:2002.05202, eq. 6).

Shape legend: R rows (all dimensions but the last, flattened), I columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from madformer.kernels import dispatch
from madformer.kernels.checks import check_floating, check_same, rows_of
from madformer.kernels.launch import jit, tl
from madformer.kernels.plans import Launch, fresh, once_a_kind, plain_kind, planned, taken_as
from madformer.kernels.registration import register, register_compiled, register_differentiable

OP = "swiglu"


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """:func:`swiglu` in plain PyTorch, in the dtype of its arguments: in float64 it is the oracle."""
    return F.silu(gate) * up


@jit
def _forward_kernel(gate_ptr, up_ptr, out_ptr, num_cols, stride_gr, stride_ur, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < num_cols
    gate = tl.load(gate_ptr + row * stride_gr + cols, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_ur + cols, mask=live, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * num_cols + cols, out.to(out_ptr.dtype.element_ty), mask=live)


@jit
def _backward_kernel(
    grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, num_cols, stride_dr, stride_gr, stride_ur, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < num_cols
    grad = tl.load(grad_ptr + row * stride_dr + cols, mask=live, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gr + cols, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_ur + cols, mask=live, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dup = grad * silu
    dgate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dgate_ptr + row * num_cols + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=live)
    tl.store(dup_ptr + row * num_cols + cols, dup.to(dup_ptr.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class SwigluSettings:
    """How a launch is cut: columns of a program, and its warps."""

    block: int
    num_warps: int


def choose_settings(num_cols: int) -> SwigluSettings:
    """Eight elements a thread (16 bytes of bf16), so that every load is as wide as the hardware has."""
    block = min(2048, max(32, 1 << (num_cols - 1).bit_length()))
    return SwigluSettings(block, num_warps=max(1, min(8, block // 256)))


def _launch_of(kernel: object, *tensors: Tensor) -> Launch:
    """For tensors of one shape, which come with a row stride each."""
    rows, cols = math.prod(tensors[0].shape[:-1]), tensors[0].shape[-1]
    settings = choose_settings(cols)
    strides = [rows_of(x).stride(0) for x in tensors]
    grid = (rows, -(-cols // settings.block))
    return Launch(kernel, grid, tensors[0].device, (cols, *strides), BLOCK=settings.block, num_warps=settings.num_warps)


@planned(lambda: choose_settings)
def _forward(gate: Tensor, up: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    launch, new_out = _launch_of(_forward_kernel, gate, up), fresh(gate.new_empty(gate.shape))
    rows_of_gate, rows_of_up = (taken_as(rows_of, x) for x in (gate, up))

    def run(gate, up):
        out = new_out()
        launch(rows_of_gate(gate), rows_of_up(up), out)
        return out

    return run


@planned(lambda: choose_settings)
def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    launch, new_gradient = _launch_of(_backward_kernel, grad, gate, up), fresh(gate.new_empty(gate.shape))
    rows_of_grad, rows_of_gate, rows_of_up = (taken_as(rows_of, x) for x in (grad, gate, up))

    def run(grad, gate, up):
        dgate, dup = new_gradient(), new_gradient()
        launch(rows_of_grad(grad), rows_of_gate(gate), rows_of_up(up), dgate, dup)
        return dgate, dup

    return run


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd_backward(backward: Callable[..., Any], ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return backward(grad, *ctx.saved_tensors)


def _empty_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_SCHEMA = "(Tensor gate, Tensor up) -> Tensor", "(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)"
_call_backward = register("swiglu_backward", _SCHEMA[1], _backward, _empty_gradients)
_call = register_differentiable(
    "swiglu",
    _SCHEMA[0],
    _forward,
    lambda gate, up: gate.new_empty(gate.shape),
    _setup_context,
    functools.partial(_autograd_backward, _call_backward),
)
_call_cpp_backward = register_compiled("swiglu_backward_cpp", _SCHEMA[1], _empty_gradients)
_call_cpp = register_compiled(
    "swiglu_cpp",
    _SCHEMA[0],
    lambda gate, up: gate.new_empty(gate.shape),
    _setup_context,
    functools.partial(_autograd_backward, _call_cpp_backward),
)
dispatch.register(OP, "reference")
dispatch.register(OP, "triton", auto=("cuda",))
dispatch.register(OP, "cpp", ("cpu",), kernel="swiglu_backward_cpp")


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """``silu(gate) * up``, differentiable, computed in float32 (by the reference in float64, for float64).

    Args:
        gate, up: (..., I) of one shape, dtype (float32, bfloat16, float16) and device. They may be halves of one
            packed tensor: only the last dimension is copied where it is not contiguous.
        backend: ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Returns:
        (..., I) contiguous, in the dtype of ``gate``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend is unknown.
        RuntimeError: the backend that was asked for cannot run here.
    """
    kind = plain_kind((gate, up, backend))
    chosen = _choose(kind, gate, up, backend)
    if chosen == "reference":
        return swiglu_ref(gate, up)
    return (_call_cpp if chosen == "cpp" else _call)(gate, up, kind=kind)


@once_a_kind
def _choose(gate: Tensor, up: Tensor, backend: str) -> str:
    """The backend that runs these, where they can be run."""
    chosen = dispatch.resolve(OP, backend, gate.device, gate.dtype)
    if chosen != "reference":
        check_floating("gate", gate)
    check_same("up", up, "gate", gate)
    return chosen
