"""What latents tell before anything is trained: how well earlier blocks predict the next one, and their spectrum.

Shape legend: N images, M blocks, D numbers of a block, C channels, H rows, W columns, F folds, R radii, S resamplings,
T images of a fold, V images of the others, P numbers that predict, E eigenvalues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from madformer.evaluation.moments import Array

__all__ = ["FEWEST", "Predictability", "Spectrum", "predictability", "resamplings", "spectrum"]

FEWEST = 100
"""Images that statistics take: of fewer, most of an explained share is chance."""
FOLDS = 4
_PENALTIES = np.logspace(-3, 3, 19)  # times the mean eigenvalue
_NEGLIGIBLE = 1e-10  # of the largest eigenvalue: rounding


@dataclass(frozen=True)
class Predictability:
    """How much of each block the blocks before it explain, on images that the regression did not see.

    Attributes:
        errors_NM: squared error of the prediction of an image's block, summed over its numbers.
        totals_NM: squared distance of the block from the mean block of the images that the regression saw.
    """

    errors_NM: Array
    totals_NM: Array

    @property
    def r2_M(self) -> Array:
        """Explained share of each block's variance, in the order in which blocks are made; 0 of the first one."""
        return 1 - self.errors_NM.sum(0) / self.totals_NM.sum(0)

    @property
    def explained(self) -> float:
        """Explained share of the whole image's variance, its first block included."""
        return float(1 - self.errors_NM.sum() / self.totals_NM.sum())

    def resampled(self, weights_SN: Array) -> Array:
        """:attr:`explained` of resampled images, ``(S,)``."""
        return np.asarray(1 - (weights_SN @ self.errors_NM.sum(1)) / (weights_SN @ self.totals_NM.sum(1)))


def predictability(blocks_NMD: Array, *, folds: int = FOLDS, seed: int = 0) -> Predictability:
    """Predict every block from all blocks before it by ridge regression, cross-fitted over images.

    Each fold's images are predicted by a regression on the images of the others, in closed form, whose penalty, one a
    block, is the one with the least leave-one-out error among those images (Allen's PRESS, 1974).

    Args:
        blocks_NMD: in the order in which blocks are made. folds: into which images are dealt at random, by ``seed``.

    Raises:
        ValueError: fewer than :data:`FEWEST` images, numbers that are not finite, or blocks that do not vary.
    """
    check_images(blocks_NMD)
    count, num_blocks, _ = blocks_NMD.shape
    fold_N = np.random.default_rng(seed).permutation(count) % folds
    errors_NM, totals_NM = np.zeros((count, num_blocks)), np.zeros((count, num_blocks))
    for fold in range(folds):
        held_N = fold_N == fold
        seen_VMD = np.asarray(blocks_NMD[~held_N], np.float64)
        mean_MD = seen_VMD.mean(0)
        seen_VMD, new_TMD = seen_VMD - mean_MD, blocks_NMD[held_N] - mean_MD
        totals_NM[held_N] = np.square(new_TMD).sum(-1)
        errors_NM[held_N, 0] = totals_NM[held_N, 0]
        for block in range(1, num_blocks):
            before_VP, new_TP = (of[:, :block].reshape(len(of), -1) for of in (seen_VMD, new_TMD))
            predicted_TD = _ridge(before_VP, new_TP, seen_VMD[:, block])
            errors_NM[held_N, block] = np.square(new_TMD[:, block] - predicted_TD).sum(-1)
    if not totals_NM.sum(0).all():
        raise ValueError("a block is the same in all images: there is nothing to predict")
    return Predictability(errors_NM, totals_NM)


def _ridge(seen_VP: Array, new_TP: Array, target_VD: Array) -> Array:
    """Predictions ``(T, D)``, from the eigenvectors of the smaller of the two matrices of inner products."""
    wide = seen_VP.shape[1] > len(seen_VP)
    values_E, vectors = np.linalg.eigh(seen_VP @ seen_VP.T if wide else seen_VP.T @ seen_VP)
    kept_E = values_E > _NEGLIGIBLE * max(values_E[-1], np.finfo(np.float64).tiny)
    if not kept_E.any():
        return np.zeros((len(new_TP), target_VD.shape[1]))
    values_E, vectors = values_E[kept_E], vectors[:, kept_E]
    lengths_E = np.sqrt(values_E)
    # the left singular vectors of what predicts
    left_VE = vectors if wide else seen_VP @ vectors / lengths_E
    projected_ED = left_VE.T @ target_VD
    penalty = _best_penalty(values_E, left_VE, projected_ED, target_VD)
    right_PE = seen_VP.T @ vectors / lengths_E if wide else vectors
    return np.asarray(new_TP @ (right_PE @ ((lengths_E / (values_E + penalty))[:, None] * projected_ED)))


def _best_penalty(values_E: Array, left_VE: Array, projected_ED: Array, target_VD: Array) -> float:
    """Of the least error when each image is left out in turn, its mean as well: exact, without fitting anew.

    A mean of leverages (generalised cross-validation) would not do: data sets have a few images that are like no other.
    """
    squares_VE, errors = np.square(left_VE), []
    penalties = _PENALTIES * values_E.mean()
    for penalty in penalties:
        shrunk_E = values_E / (values_E + penalty)
        residuals_V = np.square(target_VD - left_VE @ (shrunk_E[:, None] * projected_ED)).sum(1)
        free_V = 1 - 1 / len(target_VD) - squares_VE @ shrunk_E
        errors.append((residuals_V / np.square(np.maximum(free_V, _NEGLIGIBLE))).sum())
    return float(penalties[np.argmin(errors)])


@dataclass(frozen=True)
class Spectrum:
    """Power of latents by spatial frequency, without the mean over images.

    Attributes:
        radii_R: every length of a frequency up to the highest that both axes have, in cycles over the shorter side.
        power_NR: of each image, the mean over the frequencies of that length and over channels.
    """

    radii_R: Array
    power_NR: Array

    @property
    def slope(self) -> float:
        """``a`` where power falls as ``radius ** -a``: least squares of logarithms, every octave with one weight."""
        return float(self.resampled(np.ones((1, len(self.power_NR))))[0])

    def resampled(self, weights_SN: Array) -> Array:
        """:attr:`slope` of resampled images, ``(S,)``."""
        # rings grow with their radius, and so do the rings in an octave
        weights_R = 1 / np.square(self.radii_R)
        weights_R /= weights_R.sum()
        x_R = np.log(self.radii_R)
        x_R -= weights_R @ x_R
        y_SR = np.log(weights_SN @ self.power_NR)
        return np.asarray(-(y_SR * weights_R) @ x_R / (weights_R @ np.square(x_R)))


def spectrum(latents_NCHW: Array) -> Spectrum:
    """The radial power spectrum.

    Raises:
        ValueError: as :func:`predictability`, or an image that is too small for two frequencies.
    """
    check_images(latents_NCHW)
    height, width = latents_NCHW.shape[2:]
    side = min(height, width)
    if side < 4:
        raise ValueError(f"a spectrum takes latents of 4 x 4 or more, got {height} x {width}")
    rows_H, columns_W = (np.fft.fftfreq(length) * side for length in (height, width))
    # rounded, so that a ring is not split by the last bit
    radii_HW = np.round(np.hypot(rows_H[:, None], columns_W), 9)
    radii_R, ring_HW = np.unique(radii_HW, return_inverse=True)
    wanted_R = (radii_R > 0) & (radii_R <= side / 2)
    size_R = np.bincount(ring_HW.ravel())
    mean_CHW = latents_NCHW.mean(0, dtype=np.float64)
    power_NR = np.stack([_rings(image_CHW - mean_CHW, ring_HW, size_R) for image_CHW in latents_NCHW])[:, wanted_R]
    if not power_NR.sum(0).all():
        raise ValueError("latents have no power at some frequency: they are no data's")
    return Spectrum(radii_R[wanted_R], power_NR)


def _rings(image_CHW: Array, ring_HW: Array, size_R: Array) -> Array:
    power_HW = np.square(np.abs(np.fft.fft2(image_CHW, norm="ortho"))).mean(0)
    return np.asarray(np.bincount(ring_HW.ravel(), power_HW.ravel()) / size_R)


def resamplings(count: int, number: int, seed: int = 0) -> Array:
    """How often each of ``count`` images is drawn in each of ``number`` resamplings with replacement, ``(S, N)``."""
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=number)
    return np.asarray(draws, np.float64)


def check_images(latents: Array) -> None:
    """Raises ``ValueError`` for fewer images than statistics take, and for numbers that are not finite."""
    if len(latents) < FEWEST:
        raise ValueError(f"statistics of latents take {FEWEST} images, and there are {len(latents)}")
    finite: Any = np.isfinite(latents).reshape(len(latents), -1).all(1)
    if not finite.all():
        raise ValueError(f"latents of {int((~finite).sum())} of {len(latents)} images are not finite")
