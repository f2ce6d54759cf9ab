"""Registration of ``qk_norm_rope`` with PyTorch: streams in, joint tensors out, gradients.

Shape legend: B batch, L tokens, H heads, D head dim, N normalised parts of all streams (queries before keys).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from madformer.kernels.checks import with_contiguous_columns
from madformer.kernels.norm_common import reduction_launch
from madformer.kernels.plans import Kind, eager, fresh, planned, short_apply, taken_as
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


class _Place(NamedTuple):
    """A stream, where its queries and keys begin in the joint tensors, its first weight in the joint gradients, and
    how its kernels' arguments are made of the op's ``(None, *qkv, *weights, *tables)``: by which entry, and how taken.
    """

    stream: Stream
    first_query: int
    first_key: int
    first_weight: int
    arguments: list[tuple[int, Callable[[Any], Any]]]


def _placed(streams: Sequence[Stream]) -> Iterator[_Place]:
    query = key = weight = 0
    at_weight = 1 + len(streams)
    at_table = at_weight + sum(stream.num_weights for stream in streams)
    for number, stream in enumerate(streams):
        # A kernel takes the weight of the queries to be there where that of the keys is.
        q_at = k_at = 0
        if stream.k_weight is not None:
            q_at, k_at = at_weight + weight, at_weight + weight + stream.num_weights - 1
        tables = (0, 0) if stream.cos is None else (at_table, at_table + 1)
        entries = (1 + number, q_at, k_at, *tables)
        take_qkv, take_q_weight, take_k_weight, *take_tables = launchers.takers(stream)
        takers = take_qkv, take_k_weight if stream.q_weight is None else take_q_weight, take_k_weight, *take_tables
        yield _Place(stream, query, key, weight, list(zip(entries, takers, strict=True)))
        query += stream.qkv.shape[1] if stream.has_queries else 0
        key += stream.qkv.shape[1]
        weight += stream.num_weights
        at_table += 0 if stream.cos is None else 2


def _empty_heads(like: Stream, num_tokens: int) -> Tensor:
    """``(B, H, L, D)`` over ``(B, L, H, D)`` memory."""
    return like.qkv.new_empty(like.qkv.shape[0], num_tokens, like.num_heads, like.head_dim).transpose(1, 2)


def _output_lengths(streams: Sequence[Stream]) -> tuple[int, int]:
    """Tokens of all queries, and of all keys."""
    lengths = [(stream.qkv.shape[1], stream.has_queries) for stream in streams]
    return sum(length for length, has_queries in lengths if has_queries), sum(length for length, _ in lengths)


def _empty_outputs(qkv: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    streams = _streams(qkv, *arguments)
    num_queries, num_tokens = _output_lengths(streams)
    q, k, v = (_empty_heads(streams[0], length) for length in (num_queries, num_tokens, num_tokens))
    return q, k, v


@planned(lambda: launchers.choose_settings)
def _forward(*arguments: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    streams, outputs = _streams(*arguments), _empty_outputs(*arguments)
    new_q, new_k = fresh(outputs[0]), fresh(outputs[1])
    steps = [
        (
            launchers.forward(place.stream, *outputs, first_query=place.first_query, first_key=place.first_key),
            place.arguments,
        )
        for place in _placed(streams)
    ]

    def run(qkv, weights, tables, *_):
        q, k, v = new_q(), new_k(), new_k()
        entries = (None, *qkv, *weights, *tables)
        for launch, taken in steps:
            launch(*[take(entries[at]) for at, take in taken], None, None, q, k, v)
        return q, k, v

    return run


@planned(lambda: launchers.choose_settings)
def _backward(
    dq: Tensor, dk: Tensor, dv: Tensor, needs_weights: bool, qkv: list[Tensor], weights: list[Tensor], *arguments: Any
) -> Callable[..., tuple[list[Tensor], Tensor]]:
    streams = _streams(qkv, weights, *arguments)
    # As many programs for every stream, so that one sum finishes the weights of all.
    num_programs = max(launchers.choose_settings(stream).num_programs for stream in streams)
    num_sums, head_dim = len(weights) if needs_weights else 0, dk.shape[3]
    gradients = [with_contiguous_columns(x) for x in (dq, dk, dv)]
    takers = [taken_as(with_contiguous_columns, x) for x in (dq, dk, dv)]
    new_dqkv = [fresh(x.new_empty(x.shape)) for x in qkv]
    shapes = (num_sums, num_programs, head_dim), (num_sums, head_dim)
    new_partial, new_dweights = (fresh(torch.empty(shape, device=dk.device)) for shape in shapes)
    reduce = reduction_launch(num_sums, num_programs, head_dim, dk.device)
    steps = []
    for place in _placed(streams):
        firsts = place._asdict()
        launch = launchers.backward(
            place.stream,
            gradients,
            num_programs,
            **{name: firsts[name] for name in ("first_query", "first_key", "first_weight")},
        )
        steps.append((launch, place.arguments, needs_weights and place.stream.num_weights > 0))

    def run(dq, dk, dv, _, qkv, weights, tables, *__):
        entries = (None, *qkv, *weights, *tables)
        partial_NPD, dweights_ND = new_partial(), new_dweights()
        given = [take(x) for take, x in zip(takers, (dq, dk, dv), strict=True)]
        dqkv = [new() for new in new_dqkv]
        for dx, (launch, taken, has_weights) in zip(dqkv, steps, strict=True):
            launch(*given, *[take(entries[at]) for at, take in taken], dx, partial_NPD if has_weights else None)
        reduce(None, partial_NPD, *[None] * 7, dweights_ND, None)
        return dqkv, dweights_ND

    return run


def _cached_stream(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, *scalars: Any
) -> tuple[Stream, Tensor]:
    """The one stream of the cached op, and its queries yet to be written."""
    num_heads, head_dim, axes, eps = scalars
    stream = Stream(qkv, q_weight, k_weight, cos, sin, 0 if cos is None else axes, num_heads, head_dim, eps)
    return stream, _empty_heads(stream, qkv.shape[1] if stream.has_queries else 0)


@planned(lambda: launchers.choose_settings)
def _cached(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    *scalars: Any,
) -> Callable[..., Tensor]:
    stream, q = _cached_stream(qkv, q_weight, k_weight, cos, sin, *scalars)
    launch = launchers.forward(stream, q, k_cache, v_cache, has_rows=rows is not None)
    take_qkv, take_q_weight, take_k_weight, take_cos, take_sin = launchers.takers(stream)
    take_positions, take_rows = (taken_as(Tensor.contiguous, index) for index in (positions, rows))
    new_q = fresh(q)

    def run(qkv, q_weight, k_weight, cos, sin, k_cache, v_cache, positions, rows, *_):
        q = new_q()
        of_k = take_k_weight(k_weight)
        # A kernel takes the weight of the queries to be there where that of the keys is.
        of_q = of_k if q_weight is None else take_q_weight(q_weight)
        launch(
            take_qkv(qkv), of_q, of_k, take_cos(cos), take_sin(sin), take_positions(positions), take_rows(rows),
            q, k_cache, v_cache,
        )  # fmt: skip
        return q

    return run


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


def _gradients(
    backward: Any, ctx: Any, needed: Sequence[bool], grads: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Of qkv and of the weights; the tables get none."""
    num_streams, num_weights, _ = ctx.counts
    saved = list(ctx.saved_tensors)
    qkv, weights = saved[:num_streams], saved[num_streams : num_streams + num_weights]
    tables = saved[num_streams + num_weights :]
    dqkv, dweight_ND = backward(*grads, any(needed), qkv, weights, tables, *ctx.scalars)
    dweights: list[Tensor | None] = [None] * num_weights
    if any(needed):
        dtypes = {weight.dtype for weight in weights}
        if len(dtypes) == 1 and dweight_ND.dtype not in dtypes:
            dweight_ND = dweight_ND.to(*dtypes)  # One cast for all.
        dweights = [
            (row if weight.dtype == row.dtype else row.to(weight.dtype)) if need else None
            for row, weight, need in zip(dweight_ND.unbind(), weights, needed, strict=True)
        ]
    return dqkv, dweights


def _autograd_backward(backward: Any, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    dqkv, dweights = _gradients(backward, ctx, ctx.needs_input_grad[1], grads)
    return dqkv, dweights, [None] * ctx.counts[2], *([None] * len(ctx.scalars))


class _Recorded(torch.autograd.Function):
    """The op for autograd, which does not look into lists: their tensors come one by one."""

    @staticmethod
    def forward(ctx: Any, kind: Kind, counts: tuple[int, int, int], scalars: tuple[Any, ...], *tensors: Tensor) -> Any:
        ctx.counts, ctx.scalars = counts, scalars
        ctx.save_for_backward(*tensors)
        num_streams, num_weights, _ = counts
        tables = num_streams + num_weights
        given = tensors[:num_streams], tensors[num_streams:tables], tensors[tables:], *scalars
        return _forward.run_kind(kind, given)  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        num_streams, num_weights, num_tables = ctx.counts
        needed = ctx.needs_input_grad[3 + num_streams : 3 + num_streams + num_weights]
        dqkv, dweights = _gradients(_call_backward, ctx, needed, grads)
        return None, None, None, *dqkv, *dweights, *([None] * num_tables)


_apply = short_apply(_Recorded)


def _record(qkv: list[Tensor], weights: list[Tensor], tables: list[Tensor], *others: Any) -> Any:
    *scalars, kind = others
    return _apply(kind, (len(qkv), len(weights), len(tables)), scalars, *qkv, *weights, *tables)


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
qk_norm_rope_triton = eager(torch.ops.madformer.qk_norm_rope, _forward, _record)
qk_norm_rope_cached_triton = eager(torch.ops.madformer.qk_norm_rope_cached, _cached)
_call_backward = eager(torch.ops.madformer.qk_norm_rope_backward, _backward)
