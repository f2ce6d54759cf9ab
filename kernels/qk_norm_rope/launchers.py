"""What launches the kernels of ``qk_norm_rope``, one stream at a time.

Shape legend: B batch, L tokens, C packed channels (parts * H * D), H heads, D head dim, R cache rows, S cache slots,
P programs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from madformer.kernels.checks import with_contiguous_columns
from madformer.kernels.launch import next_power_of_2, target
from madformer.kernels.plans import Launch, itself, taken_as
from madformer.kernels.qk_norm_rope.kernels import backward_kernel, forward_kernel


class Stream(NamedTuple):
    """One stream as the kernels take it.

    Attributes:
        qkv: ``(B, L, C)``: queries, keys and values, or keys and values.
        q_weight, k_weight: ``(D,)``, or None for no norm; without queries ``q_weight`` is None.
        cos, sin: ``(L, D)`` or ``(B, L, D)``, or None for no rotation.
        axes: into how many parts of an angle each the head dimension falls; 0 for no rotation.
    """

    qkv: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    axes: int
    num_heads: int
    head_dim: int
    eps: float

    @property
    def parts(self) -> int:
        return self.qkv.shape[2] // (self.num_heads * self.head_dim)

    @property
    def has_queries(self) -> bool:
        return self.parts == 3

    @property
    def num_weights(self) -> int:
        return sum(weight is not None for weight in (self.q_weight, self.k_weight))


@dataclass(frozen=True)
class RopeSettings:
    """How a launch is cut.

    Attributes:
        tokens, heads: of the tile that a program holds at once.
        cols: channels of half a head, rounded up to a power of two.
        heads_per_program: through how many a forward program goes, tile by tile; a multiple of ``heads``.
        num_programs: how many share the token tiles of one part in the backward.
        num_warps: of a program.
    """

    tokens: int
    heads: int
    cols: int
    heads_per_program: int
    num_programs: int
    num_warps: int = 2


def choose_settings(stream: Stream) -> RopeSettings:
    """Eight channels of either half a thread: 16 bytes of bf16 a load, and registers for the tables beside them.

    Neighbouring heads in a tile make the pieces that are read longer than one head. Few tokens are not enough programs
    to fill the machine: then the heads are divided among several. In the backward a program takes one tile, until there
    are so many that their shares of the gradients of the weights would be long to sum.
    """
    batch, num_tokens, _ = stream.qkv.shape
    num_sms = target(stream.qkv.device).num_sms
    cols = next_power_of_2(stream.head_dim // 2)
    rows = max(1, 512 // cols)
    heads = min(4, rows, stream.num_heads & -stream.num_heads)
    tokens = min(rows // heads, next_power_of_2(num_tokens))
    tiles = batch * -(-num_tokens // tokens)
    head_tiles = stream.num_heads // heads
    groups = min(head_tiles, -(-8 * num_sms // max(1, stream.parts * tiles)))
    heads_per_program = -(-head_tiles // groups) * heads
    return RopeSettings(tokens, heads, cols, heads_per_program, num_programs=min(tiles, 16 * num_sms))


def _table_strides(stream: Stream) -> tuple[int, int]:
    """Of cosines and sines as :func:`takers` take them: from sample to sample, and from token to token."""
    if stream.cos is None:
        return 0, 0
    cos = takers(stream)[3](stream.cos)
    return cos.stride(0) if cos.ndim == 3 else 0, cos.stride(-2)


def _common_unit(strides: list[int]) -> int:
    """What strides are counted in: eight channels where it divides all, and so aligns loads to 16 bytes of bf16.

    Triton itself looks at multiples of 16 alone, and head dimensions of 8 and 72 are none.
    """
    return 1 if any(stride % 8 for stride in strides) else 8


def _contiguous_float32(weight: Tensor) -> Tensor:
    return weight.float().contiguous()


def takers(stream: Stream) -> list[Callable[[Any], Any]]:
    """How the first five entries of streams of this kind are passed to a kernel."""
    cos, sin = stream.cos, stream.sin
    alike = cos is None or sin is None or (cos.stride(-1) == 1 and cos.stride() == sin.stride())
    table = itself if alike else Tensor.contiguous
    given = stream.q_weight, stream.k_weight
    # A program chooses between their addresses, which must be of one dtype.
    in_float32 = len({weight.dtype for weight in given if weight is not None}) > 1
    weights = (taken_as(_contiguous_float32 if in_float32 else Tensor.contiguous, weight) for weight in given)
    return [taken_as(with_contiguous_columns, stream.qkv), *weights, table, table]


def _launch(
    kernel: Any, stream: Stream, grid: tuple[int, ...], numbers: list[int], strides: list[int], **constants: Any
) -> Launch:
    """The launch of a kernel, with what all of them are told of a stream."""
    settings, unit = choose_settings(stream), _common_unit(strides)
    return Launch(
        kernel,
        grid,
        stream.qkv.device,
        [*numbers, stream.eps, *(stride // unit for stride in strides)],
        NUM_HEADS=stream.num_heads,
        HEAD_DIM=stream.head_dim,
        AXES=max(1, stream.axes),
        PARTS=stream.parts,
        TOKENS=settings.tokens,
        HEADS=settings.heads,
        **constants,
        COLS=settings.cols,
        UNIT=unit,
        num_warps=settings.num_warps,
    )


def forward(
    stream: Stream, q_BHLD: Tensor, k_RHSD: Tensor, v_RHSD: Tensor, *, first_query: int = 0, first_key: int = 0,
    has_rows: bool = False,
) -> Launch:  # fmt: skip
    """The launch that writes a stream's queries, keys and values.

    It takes what :func:`takers` make of the stream, positions and rows of a cache or None, and q, k and v like these:
    the first from ``first_query`` on, the others from ``first_key`` on, or, in a cache, from the slot that positions
    say. Keys and values have the same strides, channels are contiguous. ``q_BHLD`` is empty where the stream has no
    queries.
    """
    qkv = with_contiguous_columns(stream.qkv)
    # Not of every batch size a kernel of its own: a constant where nobody looks at it.
    num_rows = len(k_RHSD) if has_rows else 0
    batch, num_tokens, _ = qkv.shape
    settings = choose_settings(stream)
    tiles = batch * -(-num_tokens // settings.tokens)
    strides = [*qkv.stride()[:2], *_table_strides(stream), *q_BHLD.stride()[:3], *k_RHSD.stride()[:3]]
    grid = stream.parts * tiles, -(-stream.num_heads // settings.heads_per_program)
    numbers = [num_tokens, num_rows, k_RHSD.shape[2], first_query, first_key]
    return _launch(forward_kernel, stream, grid, numbers, strides, HEADS_PER_PROGRAM=settings.heads_per_program)


def backward(
    stream: Stream, gradients_BHLD: Sequence[Tensor], num_programs: int, *, first_query: int, first_key: int,
    first_weight: int,
) -> Launch:  # fmt: skip
    """The launch that makes the gradient of a stream's ``qkv``, and writes every program's share of its weights'.

    It takes gradients of q, k and v like these (the stream's part of them begins at ``first_query`` and ``first_key``),
    what :func:`takers` make of the stream, the gradient, and the shares ``(N, P, D)`` of all streams in fp32, P being
    ``num_programs`` and ``first_weight`` the first of this one's; None where nobody asks.
    """
    qkv = with_contiguous_columns(stream.qkv)
    batch, num_tokens, _ = qkv.shape
    num_tiles = batch * -(-num_tokens // choose_settings(stream).tokens)
    strides = [*qkv.stride()[:2], *_table_strides(stream)]
    strides += [stride for x in gradients_BHLD for stride in x.stride()[:3]]
    tiles_per_program = -(-num_tiles // max(1, num_programs))
    numbers = [num_tokens, num_tiles, tiles_per_program, first_query, first_key, first_weight]
    return _launch(backward_kernel, stream, (stream.parts * num_programs,), numbers, strides)
