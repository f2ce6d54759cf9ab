"""``madformer::cached_attention`` as a torch operator over the Triton kernels: how they are cut, and their launches.

Shape legend: B batch, H heads, L queries, N own keys, R rows of the cache, S their capacity, D head dim, P splits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from madformer.kernels.cached_attention.kernels import combine_kernel, split_kernel
from madformer.kernels.launch import Target, next_power_of_2, target
from madformer.kernels.plans import Launch, fresh, planned
from madformer.kernels.registration import register, register_compiled

MAX_HEAD_DIM = 128
MAX_SPLITS = 32


@dataclass(frozen=True)
class CachedAttentionSettings:
    """How a launch is cut: queries and keys of a tile, shares of the keys, and what Triton is told."""

    block_m: int
    block_n: int
    num_splits: int
    num_warps: int
    num_stages: int


def choose_settings(
    num_heads: int, num_queries: int, num_keys: int, head_dim: int, dtype: torch.dtype, on: Target
) -> CachedAttentionSettings:
    """Tiles by dtype and head dim, splits by how much of the GPU the queries fill.

    Tiles are as large as the registers of two programs of four warps on an SM, or one of eight, hold: with 128 keys
    and four warps at D = 64 the scores, their bf16 copy and the result, all in use at once, do not fit.

    Args:
        num_heads: of all samples together.
        num_keys: the most that a sample may have, the length of its prefix being unknown.
    """
    block_m = 128 if num_queries > 64 else 64
    if dtype == torch.float32:
        # Products without matrix units are unrolled over D, and larger tiles spill.
        block_m, block_n, num_warps, num_stages = 64, 16, 8, 1
    else:
        block_n, num_warps, num_stages = 64, (4 if head_dim <= 64 else block_m // 16), 3
        if head_dim > 64 and on.capability < 90:
            block_n = 32  # Operands of the matrix units take registers there.
    num_programs = num_heads * -(-num_queries // block_m)
    num_splits = choose_num_splits(num_programs, num_keys, block_n, 8 // num_warps, on.num_sms)
    return CachedAttentionSettings(block_m, block_n, num_splits, num_warps, num_stages)


# Estimated, not measured, in keys that a program visits meanwhile: a second launch, and a partial result of fp32
# written and read again through the L2 cache (5 TB/s) by every program at once.
_COMBINE_LAUNCH = 128
_PARTIAL_RESULT = 180
# What one program on an SM takes of the time that two sharing it take.
_ALONE = 0.6


def choose_num_splits(num_programs: int, num_keys: int, block_n: int, resident: int, num_sms: int) -> int:
    """The smallest number of shares within a tenth of the least cost.

    Args:
        num_programs: without splits.
        resident: programs that an SM holds at once, 1 or 2.
    """
    num_tiles = -(-num_keys // block_n)

    def cost(splits: int) -> float:
        waves = num_programs * splits / (resident * num_sms)
        full, last = divmod(waves, 1)
        full += 0 if last == 0 else _ALONE if last * resident <= 1 < resident else 1
        combine = _COMBINE_LAUNCH + _PARTIAL_RESULT * waves if splits > 1 else 0
        return full * -(-num_tiles // splits) * block_n + combine

    costs = [cost(splits) for splits in range(1, max(1, min(num_tiles, MAX_SPLITS)) + 1)]
    return next(splits for splits, each in enumerate(costs, 1) if each <= 1.1 * min(costs))


@planned(lambda: choose_settings)
def _forward(
    q_BHLD: Tensor,
    k_cache_RHSD: Tensor,
    v_cache_RHSD: Tensor,
    lengths_B: Tensor,
    k_BHND: Tensor | None,
    v_BHND: Tensor | None,
    rows_B: Tensor | None,
    scale: float,
    num_splits: int | None,
) -> Callable[..., Tensor]:
    (B, H, L, D), (R, _, S, _), device = q_BHLD.shape, k_cache_RHSD.shape, q_BHLD.device
    N = 0 if k_BHND is None else k_BHND.shape[2]
    settings = choose_settings(B * H, L, S + N, D, q_BHLD.dtype, target(device))
    splits = settings.num_splits if num_splits is None else num_splits
    # Without an own block the cache stands in for it, and is not read as such.
    own = (k_cache_RHSD, v_cache_RHSD) if k_BHND is None or v_BHND is None else (k_BHND, v_BHND)
    heads = (q_BHLD, k_cache_RHSD, v_cache_RHSD, *own)
    unit = math.gcd(16 // q_BHLD.element_size(), *(stride for x in heads for stride in x.stride()[:3]))
    strides = [tuple(stride // unit for stride in x.stride()[:3]) for x in heads]
    rows_stride = (lengths_B if rows_B is None else rows_B).stride(0)
    launch = Launch(
        split_kernel,
        (B * splits * -(-L // settings.block_m), H),
        device,
        (*strides, lengths_B.stride(0), rows_stride, L, R, S, N, splits, scale * math.log2(math.e)),
        HAS_OWN=N > 0,
        HAS_ROWS=rows_B is not None,
        SPLIT=splits > 1,
        UNIT=unit,
        D=D,
        BLOCK_M=settings.block_m,
        BLOCK_N=settings.block_n,
        BLOCK_D=_block_d(D),
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )
    combine = _combination(splits, B * L * H, D, device)
    new_out = fresh(q_BHLD.new_empty(B, L, H, D))
    partial_shape = (splits if splits > 1 else 0, B, L, H, D)
    new_partial, new_lse = (fresh(torch.empty(shape, device=device)) for shape in (partial_shape, partial_shape[:-1]))

    def run(q, k_cache, v_cache, lengths, k, v, rows, *_):
        out_BLHD = new_out()
        own_k, own_v = (k_cache, v_cache) if k is None else (k, v)
        given = q, k_cache, v_cache, own_k, own_v, lengths, lengths if rows is None else rows
        if splits == 1:
            launch(*given, out_BLHD, out_BLHD)
            return out_BLHD
        partial, lse = new_partial(), new_lse()
        launch(*given, partial, lse)
        combine(partial, lse, out_BLHD)
        return out_BLHD

    return run


def _combination(num_splits: int, rows: int, head_dim: int, device: torch.device) -> Launch:
    # Of every split two loads of 16 bytes by each of 128 threads, and twice as many programs as SMs at batch 1.
    block_r = 1024 // _block_d(head_dim)
    return Launch(
        combine_kernel,
        (-(-rows // block_r),),
        device,
        [rows],
        NUM_SPLITS=num_splits,
        D=head_dim,
        BLOCK_R=block_r,
        BLOCK_D=_block_d(head_dim),
        num_warps=4,
    )


def _block_d(head_dim: int) -> int:
    """Matrix units take no fewer than 16 columns, and tiles are powers of two."""
    return max(16, next_power_of_2(head_dim))


def _empty_output(q: Tensor, *_: object) -> Tensor:
    B, H, L, D = q.shape
    return q.new_empty(B, L, H, D)


cached_attention_triton = register(
    "cached_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? k, Tensor? v, Tensor? rows, float scale,"
    " int? num_splits) -> Tensor",
    _forward,
    _empty_output,
)
cached_attention_cpp = register_compiled(
    "cached_attention_cpp",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? k, Tensor? v, Tensor? rows, float scale)"
    " -> Tensor",
    _empty_output,
)
