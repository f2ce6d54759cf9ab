"""What launches the kernels of ``qk_norm_rope``, one stream at a time.

Shape legend: B batch, L tokens, C packed channels (parts * H * D), H heads, D head dim, R cache rows, S cache slots,
P programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from madformer.kernels.launch import launch, target
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
class Settings:
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


def choose_settings(stream: Stream) -> Settings:
    """Eight channels of either half a thread: 16 bytes of bf16 a load, and registers for the tables beside them.

    Neighbouring heads in a tile make the pieces that are read longer than one head. Few tokens are not enough programs
    to fill the machine: then the heads are divided among several. In the backward a program takes one tile, until there
    are so many that their shares of the gradients of the weights would be long to sum.
    """
    batch, num_tokens, _ = stream.qkv.shape
    num_sms = target(stream.qkv.device).num_sms
    cols = _power_of_two(stream.head_dim // 2)
    rows = max(1, 512 // cols)
    heads = min(4, rows, stream.num_heads & -stream.num_heads)
    tokens = min(rows // heads, _power_of_two(num_tokens))
    tiles = batch * -(-num_tokens // tokens)
    head_tiles = stream.num_heads // heads
    groups = min(head_tiles, -(-8 * num_sms // max(1, stream.parts * tiles)))
    heads_per_program = -(-head_tiles // groups) * heads
    return Settings(tokens, heads, cols, heads_per_program, num_programs=min(tiles, 16 * num_sms))


def num_backward_programs(stream: Stream) -> int:
    return choose_settings(stream).num_programs


def _power_of_two(number: int) -> int:
    """The least that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


def _inner_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _weights(stream: Stream) -> tuple[Tensor | None, Tensor | None]:
    """Contiguous weights; a kernel takes that of the queries to be there where that of the keys is."""
    if stream.k_weight is None:
        return None, None
    k_weight = stream.k_weight.contiguous()
    return k_weight if stream.q_weight is None else stream.q_weight.contiguous(), k_weight


def _tables(stream: Stream) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Cosines, sines, and the strides of both from sample to sample and from token to token."""
    if stream.cos is None or stream.sin is None:
        return None, None, 0, 0
    cos, sin = stream.cos, stream.sin
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0) if cos.ndim == 3 else 0, cos.stride(-2)


def _common_unit(strides: list[int]) -> int:
    """What strides are counted in: eight channels where it divides all, and so aligns loads to 16 bytes of bf16.

    Triton itself looks at multiples of 16 alone, and head dimensions of 8 and 72 are none.
    """
    return 1 if any(stride % 8 for stride in strides) else 8


def forward(
    stream: Stream,
    q_BHLD: Tensor,
    k_RHSD: Tensor,
    v_RHSD: Tensor,
    positions_B: Tensor | None = None,
    rows_B: Tensor | None = None,
) -> None:
    """Writes a stream's queries, keys and values, the latter two from slot ``positions_B`` of row ``rows_B`` on.

    Without these from slot 0, and sample b to row b. Keys and values have the same strides, channels are contiguous.
    ``q_BHLD`` is empty where the stream has no queries.
    """
    qkv = _inner_contiguous(stream.qkv)
    positions, rows = (None if index is None else index.contiguous() for index in (positions_B, rows_B))
    # Not of every batch size a kernel of its own: a constant where nobody looks at it.
    num_rows = 0 if rows is None else len(k_RHSD)
    batch, num_tokens, _ = qkv.shape
    settings = choose_settings(stream)
    tiles = batch * -(-num_tokens // settings.tokens)
    cos, sin, *table_strides = _tables(stream)
    strides = [*qkv.stride()[:2], *table_strides, *q_BHLD.stride()[:3], *k_RHSD.stride()[:3]]
    unit = _common_unit(strides)
    launch(
        forward_kernel,
        (stream.parts * tiles, -(-stream.num_heads // settings.heads_per_program)),
        qkv.device,
        *(qkv, *_weights(stream), cos, sin, positions, rows, q_BHLD, k_RHSD, v_RHSD),
        *(num_tokens, num_rows, k_RHSD.shape[2], stream.eps),
        *(stride // unit for stride in strides),
        NUM_HEADS=stream.num_heads,
        HEAD_DIM=stream.head_dim,
        AXES=max(1, stream.axes),
        PARTS=stream.parts,
        TOKENS=settings.tokens,
        HEADS=settings.heads,
        HEADS_PER_PROGRAM=settings.heads_per_program,
        COLS=settings.cols,
        UNIT=unit,
        num_warps=settings.num_warps,
    )


def backward(
    stream: Stream,
    dq_BHLD: Tensor,
    dk_BHLD: Tensor,
    dv_BHLD: Tensor,
    partial_NPD: Tensor | None,
    num_programs: int,
) -> Tensor:
    """The gradient of a stream's ``qkv``; writes every program's share of those of its weights.

    Args:
        partial_NPD: fp32, contiguous, for the stream's N weights and P = ``num_programs``; None where nobody asks.
    """
    qkv = _inner_contiguous(stream.qkv)
    batch, num_tokens, _ = qkv.shape
    settings = choose_settings(stream)
    num_tiles = batch * -(-num_tokens // settings.tokens)
    cos, sin, *table_strides = _tables(stream)
    dqkv = qkv.new_empty(qkv.shape)
    gradients = [_inner_contiguous(x) for x in (dq_BHLD, dk_BHLD, dv_BHLD)]
    strides = [*qkv.stride()[:2], *table_strides, *(stride for x in gradients for stride in x.stride()[:3])]
    unit = _common_unit(strides)
    launch(
        backward_kernel,
        (stream.parts * num_programs,),
        qkv.device,
        *(*gradients, qkv, *_weights(stream), cos, sin, dqkv, partial_NPD),
        *(num_tokens, num_tiles, -(-num_tiles // max(1, num_programs)), stream.eps),
        *(stride // unit for stride in strides),
        NUM_HEADS=stream.num_heads,
        HEAD_DIM=stream.head_dim,
        AXES=max(1, stream.axes),
        PARTS=stream.parts,
        TOKENS=settings.tokens,
        HEADS=settings.heads,
        COLS=settings.cols,
        UNIT=unit,
        num_warps=settings.num_warps,
    )
    return dqkv
