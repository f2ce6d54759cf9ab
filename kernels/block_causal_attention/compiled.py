"""``madformer::block_causal_attention_cpp`` and its backward: training on a processor, with no mask and no copied keys.

PyTorch's attention for processors computes gradients at a quarter of the speed of its matrix products in fp32, and at
a tenth of it in bf16, and knows no layout: the two ranges of keys that a noisy block sees are copied together for it.
C++ takes one head of an image at a time, in fp32 inside, and computes the blocks' products range by range; gradients of
keys are summed up where they stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from madformer.kernels.block_causal_attention.layout import BlockLayout
from madformer.kernels.registration import register_compiled


def readers_of(layout: BlockLayout) -> tuple[int, ...]:
    """Of its text, and of each image block: first and end of its queries and of both ranges of keys, whether causal."""
    text, size = layout.text_query_length, layout.block_size
    numbers = [0, text, 0, text, 0, 0, 1] if text else []
    for block, ranges in enumerate(layout.key_ranges()):
        first, (own, *others) = text + block * size, ranges
        numbers += first, first + size, *own, *(others[0] if others else (0, 0)), 0
    return tuple(numbers)


def _packed(x: Tensor) -> Tensor:
    batch, heads, length, channels = x.shape
    return x.new_empty(batch, length, heads, channels)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.readers, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    grads = _call_backward(grad.transpose(1, 2), q, k, v, out.transpose(1, 2), lse, ctx.readers, ctx.scale)
    return *(total.transpose(1, 2) for total in grads), None, None


_call = register_compiled(
    "block_causal_attention_cpp",
    "(Tensor q, Tensor k, Tensor v, int[] readers, float scale) -> (Tensor, Tensor)",
    lambda q, k, v, readers, scale: (_packed(q), q.new_empty(q.shape[:3], dtype=torch.float32)),
    _setup_context,
    _autograd_backward,
)
_call_backward = register_compiled(
    "block_causal_attention_backward_cpp",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int[] readers, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    lambda grad, q, k, v, *_: (_packed(q), _packed(k), _packed(v)),
)


def block_causal_attention_cpp(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention under ``layout``, ``(B, H, Lq, D)`` over ``(B, Lq, H, D)`` memory, and the natural log-sum-exp of the
    scaled scores, ``(B, H, Lq)`` in float32."""
    out, lse = _call(q, k, v, readers_of(layout), scale)
    return out.transpose(1, 2), lse
