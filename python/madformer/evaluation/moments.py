"""Mean and covariance of features, in float64 and in blocks; written and read as pytorch-fid does.

Shape legend: N images, D features.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from madformer.files.atomic import atomic_path
from madformer.files.text import first_line

__all__ = ["Array", "Moments", "blocks", "read_statistics", "write_statistics"]

Array = np.ndarray[Any, np.dtype[Any]]
"""Any array of NumPy's."""
BLOCK = 1024
"""Rows that are in memory as float64 at a time."""
_DESCRIPTION = "madformer"  # the array in a file of statistics that says what they are of


@dataclass(frozen=True)
class Moments:
    """Of a set of features.

    Attributes:
        mean_D, covariance_DD: float64; the covariance has ``N - 1`` in the denominator.
        count: N; None where nobody noted it.
    """

    mean_D: Array
    covariance_DD: Array
    count: int | None = None

    def __post_init__(self) -> None:
        width = self.mean_D.shape[-1] if self.mean_D.ndim else 0
        if self.mean_D.shape != (width,) or self.covariance_DD.shape != (width, width) or not width:
            raise ValueError(
                f"moments must be a mean (D,) and a covariance (D, D), "
                f"got {self.mean_D.shape} and {self.covariance_DD.shape}"
            )
        if not (np.isfinite(self.mean_D).all() and np.isfinite(self.covariance_DD).all()):
            raise ValueError("moments must be finite")

    @classmethod
    def of(cls, features_ND: Array) -> Moments:
        """In two passes, so that nothing is lost where the mean is large.

        Raises:
            ValueError: fewer than two images.
        """
        count = len(features_ND)
        if count < 2:
            raise ValueError(f"a covariance takes two images at least, got {count}")
        mean_D = sum(block.sum(0) for block in blocks(features_ND)) / count
        return cls(mean_D, scatter(features_ND, mean_D) / (count - 1), count)

    @property
    def width(self) -> int:
        """D."""
        return len(self.mean_D)

    @property
    def is_deficient(self) -> bool:
        """Whether the covariance has no full rank, there being no more images than features."""
        return self.count is not None and self.count <= self.width


def blocks(features_ND: Array, size: int = BLOCK) -> Iterator[Array]:
    """The rows as float64, ``size`` at a time."""
    for first in range(0, len(features_ND), size):
        yield np.asarray(features_ND[first : first + size], np.float64)


def scatter(features_ND: Array, mean_D: Array) -> Array:
    """The sum over images of the outer products of what they are off ``mean_D``, ``(D, D)``."""
    width = features_ND.shape[1]
    total_DD = np.zeros((width, width))
    for block in blocks(features_ND):
        off = block - mean_D
        total_DD += off.T @ off
    return total_DD


def write_statistics(path: Path, moments: Moments, description: dict[str, Any]) -> None:
    """Write ``mu`` and ``sigma`` as pytorch-fid does, and a third array that says what they are of.

    Args:
        path: ends in ``.npz``. description: in JSON's types; readers of pytorch-fid's files do not look at it.

    Raises:
        ValueError: the path ends otherwise. OSError: it cannot be written.
    """
    if path.suffix != ".npz":
        raise ValueError(f"{path} must end in .npz, as pytorch-fid's statistics do")
    note = np.array(json.dumps({**description, "count": moments.count}))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=moments.mean_D, sigma=moments.covariance_DD, madformer=note)


def read_statistics(path: Path) -> tuple[Moments, dict[str, Any]]:
    """What :func:`write_statistics` wrote, or pytorch-fid, whose files have no description.

    Raises:
        OSError: there is no such file. ValueError: it is none of statistics, or damaged; one line.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not {"mu", "sigma"} <= set(arrays.files):
                raise ValueError(
                    f"it holds {', '.join(arrays.files[:5]) or 'nothing'}, where mu and sigma are looked for"
                )
            mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
            description = json.loads(str(arrays[_DESCRIPTION])) if _DESCRIPTION in arrays.files else {}
        return Moments(mean, covariance, description.get("count")), description
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no statistics: {first_line(error)}") from error
