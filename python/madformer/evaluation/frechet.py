"""The Frechet distance of two sets of features, each taken for a Gaussian (arXiv:1706.08500).

With Inception's features it is the FID. All of it is in float64.

Shape legend: N images, D features, G groups.
"""

from __future__ import annotations

import math

import numpy as np

from madformer.evaluation.moments import Array, Moments, scatter
from madformer.evaluation.uncertainty import FEWEST, TOO_FEW, Estimate, groups_of, jackknife

__all__ = ["frechet_at_infinity", "frechet_distance", "frechet_estimate"]

SIZES = 15
"""Numbers of images that the distance is extrapolated from (arXiv:1911.07023, section 3)."""
SMALLEST = 5000
"""Of these numbers, where there are twice as many images."""
_NEGATIVE = 1e-6  # of the greatest eigenvalue: rounding stays far below it


def frechet_distance(first: Moments, second: Moments) -> float:
    """``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``; 0 for equal moments.

    The trace of the root is the sum of the singular values of ``S1^(1/2) S2^(1/2)``, which is real whatever the
    rounding; eigenvalues of products would lose half of the digits where a covariance has no full rank.

    Raises:
        ValueError: moments of different widths, or a covariance that is none.
    """
    _check_widths(first, second)
    product_DD = root(first.covariance_DD) @ root(second.covariance_DD)
    overlap = np.linalg.svd(product_DD, compute_uv=False).sum()
    return max(0.0, float(_apart(first, second) - 2 * overlap))


def frechet_estimate(features_ND: Array, reference: Moments, *, seed: int = 0) -> Estimate:
    """The distance of images from a reference, with an interval for what other images of this kind would give.

    The interval is of a jackknife that leaves out a twentieth at a time; the reference stands fixed. A bootstrap
    would not do: images that are drawn twice make the covariance narrower, and the distance is biased by its rank.

    Raises:
        ValueError: as :func:`frechet_distance`, or fewer than two images.
    """
    moments = Moments.of(features_ND)
    value = frechet_distance(moments, reference)
    if len(features_ND) < FEWEST:
        return Estimate.bare(value, TOO_FEW)
    root_DD, replicates = root(reference.covariance_DD), []
    for group in groups_of(len(features_ND), seed):
        left = _without(moments, np.asarray(features_ND[np.sort(group)], np.float64))
        replicates.append(_fast_distance(left, reference, root_DD))
    return jackknife(value, replicates)


def frechet_at_infinity(features_ND: Array, reference: Moments, *, seed: int = 0) -> Estimate:
    """The distance that infinitely many images would have (arXiv:1911.07023).

    It is biased by a term that falls with the number of images; a line through the distances of fifteen numbers of
    them, drawn at random, over one by their number ends in what is looked for. The interval is that of the line's end.

    Raises:
        ValueError: as :func:`frechet_distance`, or fewer than 30 images.
    """
    count = len(features_ND)
    if count < 2 * SIZES:
        raise ValueError(f"{count} images are too few to extrapolate from: {2 * SIZES} at least")
    random, root_DD = np.random.default_rng(seed), root(reference.covariance_DD)
    sizes = np.unique(np.linspace(min(SMALLEST, count // 2), count, SIZES).astype(int))
    distances = []
    for size in sizes:
        chosen = np.sort(random.choice(count, size, replace=False))
        distances.append(_fast_distance(Moments.of(features_ND[chosen]), reference, root_DD))
    line = np.stack([np.ones(len(sizes)), 1 / sizes], axis=1)
    (end, slope), *_ = np.linalg.lstsq(line, np.array(distances), rcond=None)
    residual = np.array(distances) - line @ (end, slope)
    variance = (residual @ residual) / (len(sizes) - 2) * np.linalg.inv(line.T @ line)[0, 0]
    method = f"line through {len(sizes)} numbers of images from {sizes[0]} to {count}"
    return Estimate.around(float(end), math.sqrt(variance), method, degrees=len(sizes) - 2)


def root(covariance_DD: Array) -> Array:
    """The symmetric square root.

    Raises:
        ValueError: the matrix is not symmetric, or has an eigenvalue below zero by more than rounding.
    """
    scale = np.abs(covariance_DD).max()
    if not np.allclose(covariance_DD, covariance_DD.T, rtol=0, atol=_NEGATIVE * scale):
        raise ValueError("a covariance must be symmetric")
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    if values_D[0] < -_NEGATIVE * max(values_D[-1], 0) or values_D[-1] < 0:
        raise ValueError(f"a covariance has no eigenvalue below zero, and this one has {values_D[0]:.3g}")
    return (vectors_DD * np.sqrt(values_D.clip(0))) @ vectors_DD.T


def _check_widths(first: Moments, second: Moments) -> None:
    if first.width != second.width:
        raise ValueError(f"features of {first.width} and of {second.width} numbers are of different extractors")


def _apart(first: Moments, second: Moments) -> float:
    """All but the root's trace."""
    means = np.square(first.mean_D - second.mean_D).sum()
    return float(means + np.trace(first.covariance_DD) + np.trace(second.covariance_DD))


def _fast_distance(first: Moments, second: Moments, root_DD: Array) -> float:
    """With the root of the second covariance at hand: a third of the time, half of the digits."""
    values_D = np.linalg.eigvalsh(root_DD @ first.covariance_DD @ root_DD)
    return _apart(first, second) - 2 * float(np.sqrt(values_D.clip(0)).sum())


def _without(moments: Moments, group_ND: Array) -> Moments:
    """Of the images that are not in a group, from those of all."""
    assert moments.count is not None
    count, out = moments.count - len(group_ND), len(group_ND)
    shift_D = (group_ND.mean(0) - moments.mean_D) * out / count
    total_DD = moments.covariance_DD * (moments.count - 1) - scatter(group_ND, moments.mean_D)
    covariance_DD = (total_DD - count * np.outer(shift_D, shift_D)) / (count - 1)
    return Moments(moments.mean_D - shift_D, covariance_DD, count)
