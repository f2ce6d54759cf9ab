"""Attention of a few tokens to each other, from projections and to what an output projection takes.

It is what the U-Net does with the pixels of a small map. 16 queries of 12 channels are too little for kernels that are
made of matrix products, and to lay their heads out takes longer than to attend.

Shape legend: B batch, L tokens, H heads, D head dim, C = H * D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from madformer.kernels import dispatch
from madformer.kernels.checks import check_floating, check_same
from madformer.kernels.plans import once_a_kind, plain_kind
from madformer.kernels.registration import register_compiled

OP = "self_attention"
SHORT = 64
"""Tokens up to which ``auto`` chooses C++: with more of them PyTorch's products are faster."""


def self_attention_ref(q_BLC: Tensor, k_BLC: Tensor, v_BLC: Tensor, num_heads: int) -> Tensor:
    """:func:`self_attention` by PyTorch's ``scaled_dot_product_attention``: in float64 it is the oracle."""
    heads = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q_BLC, k_BLC, v_BLC))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


_call_cpp = register_compiled(
    "self_attention_cpp",
    "(Tensor q, Tensor k, Tensor v, int num_heads) -> Tensor",
    lambda q, k, v, num_heads: q.new_empty(q.shape),
)
dispatch.register(OP, "reference")
dispatch.register(OP, "cpp", ("cpu",), kernel="self_attention_cpp")


def self_attention(q_BLC: Tensor, k_BLC: Tensor, v_BLC: Tensor, num_heads: int, *, backend: str = "auto") -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` of every head; differentiable by the reference, which ``auto`` takes for that.

    Args:
        q_BLC, k_BLC, v_BLC: ``(B, L, C)`` of one shape, dtype (float32, bfloat16, float16) and device, each head's
            channels after those of the one before. They may be thirds of one packed tensor.
        num_heads: H, a divisor of C.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``.

    Returns:
        ``(B, L, C)`` in the dtype of ``q_BLC``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, the backend is unknown, or a gradient is asked of
            C++, which has none.
        RuntimeError: the backend that was asked for cannot run here.
    """
    tensors = q_BLC, k_BLC, v_BLC
    kind = plain_kind((*tensors, num_heads, backend))
    chosen = _choose(kind, *tensors, num_heads, backend)
    if chosen == "cpp" and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        if backend != dispatch.AUTO:
            raise ValueError(f"{OP} has no gradient in C++: backend='auto' takes the reference for it")
        chosen = "reference"
    if chosen == "reference":
        return self_attention_ref(*tensors, num_heads)
    return _call_cpp(*tensors, num_heads, kind=kind)


@once_a_kind
def _choose(q_BLC: Tensor, k_BLC: Tensor, v_BLC: Tensor, num_heads: int, backend: str) -> str:
    """The backend that runs these, where they can be run."""
    if q_BLC.dim() != 3:
        raise ValueError(f"q_BLC must be (B, L, C), got the shape {tuple(q_BLC.shape)}")
    if num_heads < 1 or q_BLC.shape[2] % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide the {q_BLC.shape[2]} channels of q_BLC")
    chosen = dispatch.resolve(OP, backend, q_BLC.device, q_BLC.dtype)
    check_same("k_BLC", k_BLC, "q_BLC", q_BLC)
    check_same("v_BLC", v_BLC, "q_BLC", q_BLC)
    if backend == dispatch.AUTO and q_BLC.shape[1] > SHORT:
        return "reference"
    if chosen != "reference":
        check_floating("q_BLC", q_BLC)
    return chosen
