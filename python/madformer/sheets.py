"""Many pictures on one sheet."""

from __future__ import annotations

import math
from collections.abc import Iterable

from PIL import Image

# a larger picture is refused by Pillow's defaults; in memory it takes a gigabyte
MAX_PIXELS = 357_913_940


def grid_shape(count: int, rows: int | None = None) -> tuple[int, int]:
    """Rows and columns of a sheet of ``count`` pictures: a square, where no rows are given.

    Raises:
        ValueError: there are none.
    """
    if count < 1:
        raise ValueError(f"a grid of {count} pictures: there must be one at least")
    columns = math.isqrt(count - 1) + 1 if rows is None else -(-count // rows)
    return min(count, -(-count // columns) if rows is None else rows), columns


def check_grid(count: int, rows: int | None, height: int, width: int) -> None:
    """Refuse a sheet of pictures of a size that nothing could open.

    Raises:
        ValueError: more than ``MAX_PIXELS``.
    """
    down, across = grid_shape(count, rows)
    if down * height * across * width > MAX_PIXELS:
        fit = MAX_PIXELS // (height * width)
        raise ValueError(
            f"a grid of {count:,} pictures would have {across * width:,} x {down * height:,} pixels, more than the "
            f"{MAX_PIXELS:,} that picture viewers open: at most about {fit:,} pictures of {width} x {height} fit"
        )


def image_grid(images: Iterable[Image.Image], rows: int | None = None, *, count: int | None = None) -> Image.Image:
    """Pictures of one size in a square, row by row; or dealt to ``rows``, one after the other.

    Args:
        count: how many, of pictures that are made as they are asked for: one at a time is held.
    """
    if count is None:
        images = list(images)
        count = len(images)
    down, across = grid_shape(count, rows)
    grid = None
    for index, image in enumerate(images):
        if grid is None:
            width, height = image.size
            grid = Image.new("RGB", (across * width, down * height), "white")
        row, column = divmod(index, across) if rows is None else (index % rows, index // rows)
        grid.paste(image, (column * width, row * height))
    assert grid is not None
    return grid
