"""Precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797), and nearest neighbours.

A set's manifold is the union of balls around its images, each as far as the k-th nearest of the others. Distances are
Euclidean, in float64, and no more of them in memory than ``BLOCK`` x ``BLOCK``.

Shape legend: N images, M images of the reference, D features, B images of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from madformer.evaluation.moments import BLOCK, Array
from madformer.evaluation.uncertainty import Estimate, share

__all__ = ["Manifolds", "manifold_estimates", "nearest_distances"]

NEAREST_K = 5
"""The neighbour that a ball reaches to, as in the paper of density and coverage."""


@dataclass(frozen=True)
class Manifolds:
    """How two sets lie in one another.

    Attributes:
        precision: share of images within the reference's manifold. recall: share of the reference within the images'.
        density: how many of the reference's balls an image lies in, over k, on average; above 1 where images keep to
            where the reference is dense. coverage: share of the reference whose ball holds an image.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def manifold_estimates(features_ND: Array, reference_MD: Array, *, nearest_k: int = NEAREST_K) -> Manifolds:
    """All four, in one pass over the distances between the sets.

    The intervals take the manifolds as given, and are of the images that are counted: those of the one set for
    precision and density, those of the reference for recall and coverage.

    Raises:
        ValueError: no more than ``nearest_k`` images in either, or features of different extractors.
    """
    if features_ND.shape[1] != reference_MD.shape[1]:
        raise ValueError(
            f"features of {features_ND.shape[1]} and of {reference_MD.shape[1]} numbers are of different extractors"
        )
    if min(len(features_ND), len(reference_MD)) <= nearest_k or nearest_k < 1:
        raise ValueError(
            f"nearest_k={nearest_k} takes more images than that in either set, "
            f"got {len(features_ND)} and {len(reference_MD)}"
        )
    radius_N, radius_M = (_radii(rows, nearest_k) for rows in (features_ND, reference_MD))
    balls_N = np.zeros(len(features_ND), np.int64)
    found_M, covered_M = np.zeros(len(reference_MD), bool), np.zeros(len(reference_MD), bool)
    for rows, columns, distance_BB in _distances(features_ND, reference_MD):
        within_BB = distance_BB < radius_M[columns]
        balls_N[rows] += within_BB.sum(1)
        covered_M[columns] |= within_BB.any(0)
        found_M[columns] |= (distance_BB < radius_N[rows, None]).any(0)
    density_N = balls_N / nearest_k
    error = float(density_N.std(ddof=1)) / np.sqrt(len(density_N))
    return Manifolds(
        precision=share(int((balls_N > 0).sum()), len(balls_N)),
        recall=share(int(found_M.sum()), len(found_M)),
        density=Estimate.around(float(density_N.mean()), error, f"normal, {len(density_N)} images"),
        coverage=share(int(covered_M.sum()), len(covered_M)),
    )


def nearest_distances(features_ND: Array, reference_MD: Array) -> Array:
    """From every image to the nearest of the reference, ``(N,)``."""
    nearest_N = np.full(len(features_ND), np.inf)
    for rows, _, distance_BB in _distances(features_ND, reference_MD):
        nearest_N[rows] = np.minimum(nearest_N[rows], distance_BB.min(1))
    return nearest_N


def _radii(features_ND: Array, nearest_k: int) -> Array:
    """From every image to the k-th nearest of the others, ``(N,)``."""
    best_NK = np.full((len(features_ND), nearest_k), np.inf)
    for rows, columns, distance_BB in _distances(features_ND, features_ND):
        if rows == columns:
            np.fill_diagonal(distance_BB, np.inf)
        both = np.concatenate([best_NK[rows], distance_BB], axis=1)
        best_NK[rows] = np.partition(both, nearest_k - 1, axis=1)[:, :nearest_k]
    return np.asarray(best_NK.max(1))


def _distances(first_ND: Array, second_MD: Array) -> Iterator[tuple[slice, slice, Array]]:
    """Of blocks of both: which rows, which columns, and the distances."""
    for row in range(0, len(first_ND), BLOCK):
        rows = slice(row, min(row + BLOCK, len(first_ND)))
        a_BD = np.asarray(first_ND[rows], np.float64)
        for column in range(0, len(second_MD), BLOCK):
            columns = slice(column, min(column + BLOCK, len(second_MD)))
            b_BD = np.asarray(second_MD[columns], np.float64)
            squares_BB = np.square(a_BD).sum(1)[:, None] + np.square(b_BD).sum(1) - 2 * a_BD @ b_BD.T
            yield rows, columns, np.sqrt(squares_BB.clip(0))
