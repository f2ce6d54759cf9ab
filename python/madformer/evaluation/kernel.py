"""Distances between sets of features by kernels: KID (arXiv:1801.01401) and CMMD (arXiv:2401.09603), in float64.

Shape legend: N images, M images of the reference, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from madformer.evaluation.moments import Array, blocks
from madformer.evaluation.uncertainty import FEWEST, GROUPS, TOO_FEW, Estimate, groups_of

__all__ = ["cmmd_estimate", "kid_estimate", "polynomial_mmd", "rbf_mmd"]

SUBSETS = 100
SUBSET_SIZE = 1000
"""Of each of the subsets that KID is the mean over."""
SIGMA, SCALE = 10.0, 1000.0
"""CMMD's bandwidth, and what its values are multiplied with to be readable."""


def polynomial_mmd(features_ND: Array, reference_MD: Array) -> float:
    """The unbiased squared MMD under ``(x.y / D + 1)^3``; it may be negative, and is 0 on average for one distribution.

    Raises:
        ValueError: fewer than two images in either, or features of different extractors.
    """
    x_ND, y_MD = _pair(features_ND, reference_MD)
    width, n, m = x_ND.shape[1], len(x_ND), len(y_MD)

    def kernel(a: Array, b: Array) -> Array:
        return np.asarray((a @ b.T / width + 1) ** 3)

    xx_NN, yy_MM = kernel(x_ND, x_ND), kernel(y_MD, y_MD)
    own_x = (xx_NN.sum() - np.trace(xx_NN)) / (n * (n - 1))
    own_y = (yy_MM.sum() - np.trace(yy_MM)) / (m * (m - 1))
    return float(own_x + own_y - 2 * kernel(x_ND, y_MD).mean())


def kid_estimate(
    features_ND: Array, reference_MD: Array, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> Estimate:
    """Mean and standard deviation over random subsets, each without repetition.

    The deviation says how much subsets of this size vary; there is none where both sets are of that size, and all their
    subsets are the same. The interval is of the whole sets: both are dealt to twenty
    disjoint groups, whose values are independent.

    Args:
        subset_size: less where either set has fewer images.

    Raises:
        ValueError: fewer than two images in either, or features of different extractors.
    """
    size = min(subset_size, len(features_ND), len(reference_MD))
    if size == len(features_ND) == len(reference_MD):
        value = polynomial_mmd(features_ND, reference_MD)
        found = _with_interval(value, polynomial_mmd, features_ND, reference_MD, seed)
        return replace(found, method=f"{found.method}; no subset is smaller than all {size}")
    random = np.random.default_rng(seed)

    def subset(rows: Array) -> Array:
        return np.asarray(rows[np.sort(random.choice(len(rows), size, replace=False))])

    values = [polynomial_mmd(subset(features_ND), subset(reference_MD)) for _ in range(subsets)]
    found = _with_interval(float(np.mean(values)), polynomial_mmd, features_ND, reference_MD, seed)
    method = f"{found.method}; deviation over {subsets} subsets of {size}"
    return replace(found, method=method, deviation=float(np.std(values)))


def rbf_mmd(features_ND: Array, reference_MD: Array) -> float:
    """CMMD: 1000 times the squared MMD of features of length one under a Gaussian of bandwidth 10.

    It is the estimate of least variance, with the diagonals, as in the paper's implementation; 0 for equal sets.

    Raises:
        ValueError: fewer than two images in either, features of different extractors, or one of no length.
    """
    x_ND, y_MD = (_unit(rows) for rows in _pair(features_ND, reference_MD))
    means = [_mean_kernel(a, b) for a, b in ((x_ND, x_ND), (y_MD, y_MD), (x_ND, y_MD))]
    return SCALE * (means[0] + means[1] - 2 * means[2])


def cmmd_estimate(features_ND: Array, reference_MD: Array, *, seed: int = 0) -> Estimate:
    """:func:`rbf_mmd` with an interval from twenty disjoint groups.

    Raises:
        ValueError: as :func:`rbf_mmd`.
    """
    return _with_interval(rbf_mmd(features_ND, reference_MD), rbf_mmd, features_ND, reference_MD, seed)


def _with_interval(
    value: float, distance: Callable[[Array, Array], float], features_ND: Array, reference_MD: Array, seed: int
) -> Estimate:
    """From the distance's values on disjoint groups of both sets."""
    if min(len(features_ND), len(reference_MD)) < FEWEST:
        return Estimate.bare(value, TOO_FEW)
    pairs = zip(groups_of(len(features_ND), seed), groups_of(len(reference_MD), seed + 1), strict=True)
    values = [distance(features_ND[np.sort(ours)], reference_MD[np.sort(theirs)]) for ours, theirs in pairs]
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate.around(value, error, f"{GROUPS} disjoint groups", degrees=GROUPS - 1)


def _pair(features_ND: Array, reference_MD: Array) -> tuple[Array, Array]:
    if features_ND.shape[1] != reference_MD.shape[1]:
        raise ValueError(
            f"features of {features_ND.shape[1]} and of {reference_MD.shape[1]} numbers are of different extractors"
        )
    if min(len(features_ND), len(reference_MD)) < 2:
        raise ValueError("a distance by a kernel takes two images at least on either side")
    return np.asarray(features_ND, np.float64), np.asarray(reference_MD, np.float64)


def _unit(rows_ND: Array) -> Array:
    lengths_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    if not lengths_N1.all():
        raise ValueError("features that are all zero have no direction, which CMMD compares")
    return np.asarray(rows_ND / lengths_N1)


def _mean_kernel(a_ND: Array, b_MD: Array) -> float:
    """Of vectors of length one: ``|a - b|^2`` is ``2 - 2 a.b``."""
    total = sum(float(np.exp((block @ b_MD.T - 1) / SIGMA**2).sum()) for block in blocks(a_ND))
    return total / (len(a_ND) * len(b_MD))
