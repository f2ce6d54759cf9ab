"""Registration of ``qk_norm_rope`` with PyTorch: streams in, joint tensors out, gradients.

Shape legend: B batch, L tokens, H heads, D head dim, N normalised parts of all streams (queries before keys).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, library

from madformer.kernels.qk_norm_rope import launchers
from madformer.kernels.qk_norm_rope.launchers import Stream


def _streams(
    qkv: Sequence[Tensor],
    weights: Sequence[Tensor],
    tables: Sequence[Tensor],
    normalised: Sequence[bool],
    axes: Sequence[int],
    num_heads: int,
    head_dim: int,
    eps: float,
) -> list[Stream]:
    """Streams from the op's lists, which hold no None: autograd does not look into a list that does."""
    weight, table = iter(weights), iter(tables)
    streams = []
    for x, norm, pairing in zip(qkv, normalised, axes, strict=True):
        q_weight = next(weight) if norm and x.shape[2] == 3 * num_heads * head_dim else None
        k_weight = next(weight) if norm else None
        cos, sin = (next(table), next(table)) if pairing else (None, None)
        streams.append(Stream(x, q_weight, k_weight, cos, sin, pairing, num_heads, head_dim, eps))
    return streams


def _spans(streams: Sequence[Stream]) -> Iterator[tuple[Stream, slice, slice]]:
    """Every stream with the span of its queries and that of its keys in the joint tensors."""
    query = token = 0
    for stream in streams:
        num_tokens = stream.qkv.shape[1]
        num_queries = num_tokens if stream.has_queries else 0
        yield stream, slice(query, query + num_queries), slice(token, token + num_tokens)
        query, token = query + num_queries, token + num_tokens


def _empty_heads(like: Stream, num_tokens: int) -> Tensor:
    """``(B, H, L, D)`` over ``(B, L, H, D)`` memory."""
    return like.qkv.new_empty(like.qkv.shape[0], num_tokens, like.num_heads, like.head_dim).transpose(1, 2)


def _empty_outputs(qkv: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    streams = _streams(qkv, *arguments)
    num_queries = sum(stream.qkv.shape[1] for stream in streams if stream.has_queries)
    num_tokens = sum(stream.qkv.shape[1] for stream in streams)
    q, k, v = (_empty_heads(streams[0], length) for length in (num_queries, num_tokens, num_tokens))
    return q, k, v


def _forward(qkv: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _empty_outputs(qkv, *arguments)
    for stream, queries, tokens in _spans(_streams(qkv, *arguments)):
        launchers.forward(stream, q[:, :, queries], k[:, :, tokens], v[:, :, tokens])
    return q, k, v


def _backward(
    dq: Tensor, dk: Tensor, dv: Tensor, needs_weights: bool, qkv: list[Tensor], weights: list[Tensor], *arguments: Any
) -> tuple[list[Tensor], Tensor]:
    streams = _streams(qkv, weights, *arguments)
    # As many programs for every stream, so that one sum finishes the weights of all.
    num_programs = max(launchers.num_backward_programs(stream) for stream in streams)
    partial_NPD = dk.new_empty(len(weights), num_programs, dk.shape[3], dtype=torch.float32)
    dqkv, row = [], 0
    for stream, queries, tokens in _spans(streams):
        partial = partial_NPD[row : row + stream.num_weights] if needs_weights and stream.num_weights else None
        row += stream.num_weights
        gradients = dq[:, :, queries], dk[:, :, tokens], dv[:, :, tokens]
        dqkv.append(launchers.backward(stream, *gradients, partial, num_programs))
    return dqkv, partial_NPD.sum(1) if needs_weights else partial_NPD.new_empty(0, dk.shape[3])


def _cached_stream(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, *scalars: Any
) -> tuple[Stream, Tensor]:
    """The one stream of the cached op, and its queries yet to be written."""
    num_heads, head_dim, axes, eps = scalars
    stream = Stream(qkv, q_weight, k_weight, cos, sin, 0 if cos is None else axes, num_heads, head_dim, eps)
    return stream, _empty_heads(stream, qkv.shape[1] if stream.has_queries else 0)


def _cached(*arguments: Any) -> Tensor:
    stream, q = _cached_stream(*arguments[:5], *arguments[9:])
    launchers.forward(stream, q, *arguments[5:9])
    return q


def _empty_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, needs_weights: bool, qkv: list[Tensor], weights: list[Tensor], *arguments: Any
) -> tuple[list[Tensor], Tensor]:
    dweights = dk.new_empty(len(weights) if needs_weights else 0, dk.shape[3], dtype=torch.float32)
    return [x.new_empty(x.shape) for x in qkv], dweights


def _empty_queries(*arguments: Any) -> Tensor:
    return _cached_stream(*arguments[:5], *arguments[9:])[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, weights, tables, *ctx.scalars = inputs
    ctx.counts = len(qkv), len(weights), len(tables)
    ctx.save_for_backward(*qkv, *weights, *tables)


def _autograd_backward(backward: Any, ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:
    num_streams, num_weights, num_tables = ctx.counts
    saved = list(ctx.saved_tensors)
    qkv, weights = saved[:num_streams], saved[num_streams : num_streams + num_weights]
    tables = saved[num_streams + num_weights :]
    needed = ctx.needs_input_grad[1]
    dqkv, dweight_ND = backward(dq, dk, dv, any(needed), qkv, weights, tables, *ctx.scalars)
    dweights: list[Tensor | None] = [None] * num_weights
    if any(needed):
        rows = dweight_ND.to(weights[0].dtype)  # One cast for all, where they have one dtype.
        dweights = [
            row.to(weight.dtype) if need else None for row, weight, need in zip(rows, weights, needed, strict=True)
        ]
    return dqkv, dweights, [None] * num_tables, *([None] * len(ctx.scalars))


_STREAMS = (
    "Tensor[] qkv, Tensor[] weights, Tensor[] tables, bool[] normalised, int[] axes,"
    " int num_heads, int head_dim, float eps"
)
_OPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "": (f"({_STREAMS}) -> (Tensor, Tensor, Tensor)", _empty_outputs),
    "_backward": (
        f"(Tensor dq, Tensor dk, Tensor dv, bool needs_weights, {_STREAMS}) -> (Tensor[], Tensor)",
        _empty_gradients,
    ),
    "_cached": (
        "(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, Tensor(a!) k_cache,"
        " Tensor(b!) v_cache, Tensor positions, Tensor? rows, int num_heads, int head_dim, int axes, float eps)"
        " -> Tensor",
        _empty_queries,
    ),
}
# C++ registers itself, for the CPU; ops of its own, because there, interpreted, Triton's stand beside them.
for _language in ("", "_cpp"):
    for _name, (_schema, _fake) in _OPS.items():
        library.define(f"madformer::qk_norm_rope{_name}{_language}", _schema)
        library.register_fake(f"madformer::qk_norm_rope{_name}{_language}", _fake)
    library.register_autograd(
        f"madformer::qk_norm_rope{_language}",
        partial(_autograd_backward, getattr(torch.ops.madformer, f"qk_norm_rope_backward{_language}")),
        setup_context=_setup_context,
    )
library.impl("madformer::qk_norm_rope", ("cpu", "cuda"), _forward)
library.impl("madformer::qk_norm_rope_backward", ("cpu", "cuda"), _backward)
library.impl("madformer::qk_norm_rope_cached", ("cpu", "cuda"), _cached)
