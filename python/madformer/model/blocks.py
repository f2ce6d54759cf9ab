"""Images as sequences of square blocks.

Shape legend: B batch, C channels, H rows, W columns, M blocks, L latents of a block, N = B * M.
"""

from __future__ import annotations

import math

from torch import Tensor


def to_blocks(latents_BCHW: Tensor, num_blocks: int) -> Tensor:
    """Cut an image into ``num_blocks`` squares in raster order: ``(B, M, L, C)``."""
    grid, side = math.isqrt(num_blocks), latents_BCHW.shape[-1] // math.isqrt(num_blocks)
    x = latents_BCHW.unflatten(-1, (grid, side)).unflatten(-3, (grid, side))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def from_blocks(blocks_BMLC: Tensor) -> Tensor:
    """Inverse of :func:`to_blocks`: ``(B, C, H, W)``."""
    grid, side = math.isqrt(blocks_BMLC.shape[1]), math.isqrt(blocks_BMLC.shape[2])
    x = blocks_BMLC.unflatten(1, (grid, grid)).unflatten(3, (side, side))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def to_maps(blocks_BMLC: Tensor) -> Tensor:
    """Every block as a small image of its own, ``(N, C, side, side)``, channels last in memory."""
    side = math.isqrt(blocks_BMLC.shape[2])
    return blocks_BMLC.flatten(0, 1).unflatten(1, (side, side)).permute(0, 3, 1, 2)


def from_maps(maps_NCHW: Tensor, num_blocks: int) -> Tensor:
    """Inverse of :func:`to_maps`: ``(B, M, L, C)``."""
    return maps_NCHW.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, (-1, num_blocks))
