"""Images as sequences of blocks.

A block's *place* is its number in raster order, row by row. Blocks are made in an order of places.

Shape legend: B batch, C channels, H rows, W columns, M blocks, L latents of a block, N = B * M.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from torch import Tensor

from madformer.arguments import as_whole, shown
from madformer.config import MADFormerConfig


def to_blocks(latents_BCHW: Tensor, config: MADFormerConfig) -> Tensor:
    """Cut images into blocks, by place: ``(B, M, L, C)``."""
    (rows, columns), (height, width) = config.grid, config.block_latents
    x = latents_BCHW.unflatten(-1, (columns, width)).unflatten(-3, (rows, height))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def from_blocks(blocks_BMLC: Tensor, config: MADFormerConfig) -> Tensor:
    """Inverse of :func:`to_blocks`: ``(B, C, H, W)``."""
    x = blocks_BMLC.unflatten(1, config.grid).unflatten(3, config.block_latents)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def to_maps(blocks: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
    """Every block as a small image of its own, ``(N, C, rows, columns)``, channels last in memory.

    Args:
        blocks: ``(B, M, L, C)``, or all latents or tokens of a sample one block after the other, ``(B, M * L, C)``.
        shape: rows and columns; None for a square, of ``(B, M, L, C)`` alone.
    """
    shape = shape or (math.isqrt(blocks.shape[2]),) * 2
    return blocks.reshape(-1, *shape, blocks.shape[-1]).permute(0, 3, 1, 2)


def from_maps(maps_NCHW: Tensor, num_blocks: int) -> Tensor:
    """Inverse of :func:`to_maps`: ``(B, M, L, C)``."""
    channels, rows, columns = maps_NCHW.shape[1:]
    return maps_NCHW.permute(0, 2, 3, 1).reshape(-1, num_blocks, rows * columns, channels)


def in_order(blocks_BMLC: Tensor, config: MADFormerConfig, order_BM: Tensor | None = None) -> Tensor:
    """Blocks by place, put in the order that they are made in: the model's, or one of each sample's own."""
    if order_BM is None:
        return blocks_BMLC if config.block_order != "spiral" else blocks_BMLC[:, block_order(config)]
    return blocks_BMLC.gather(1, order_BM[..., None, None].expand(-1, -1, *blocks_BMLC.shape[2:]))


def block_order(config: MADFormerConfig) -> list[int]:
    """Places in the order that a model makes them in, raster order for one that was trained in every order.

    A spiral goes round its centre and outwards, and ends in the upper left corner.
    """
    rows, columns = config.grid
    if config.block_order != "spiral":
        return list(range(rows * columns))
    left = [[row * columns + column for column in range(columns)] for row in range(rows)]
    inwards: list[int] = []
    while left:
        inwards += left[0]
        # what is left, turned so that its right side is on top
        left = [list(row) for row in zip(*left[1:], strict=True)][::-1]
    return inwards[::-1]


def order_around(redrawn: Collection[int], config: MADFormerConfig) -> list[int]:
    """The order in which these places see most of the others: last, where the model knows every order."""
    order = block_order(config)
    return sorted(order, key=lambda place: place in redrawn) if config.block_order == "random" else order


def check_blocks(blocks: Collection[int], config: MADFormerConfig) -> None:
    """Raises ``ValueError`` for what are no places of blocks."""
    places = [as_whole(block) for block in blocks] if isinstance(blocks, Collection) else []
    if not places or not all(place is not None and 0 <= place < config.num_blocks for place in places):
        raise ValueError(f"blocks={shown(blocks)} must be some of 0 to {config.num_blocks - 1}")


def check_order(order: Sequence[int], config: MADFormerConfig) -> None:
    """Raises ``ValueError`` for what is no order of all places, or none that the model was trained in."""
    places = list(order)
    if sorted(places) != list(range(config.num_blocks)):
        raise ValueError(f"order={places} must name every block from 0 to {config.num_blocks - 1} once")
    if config.block_order != "random" and places != block_order(config):
        raise ValueError(f"order={places} is none for this model, which knows block_order={config.block_order!r} alone")
