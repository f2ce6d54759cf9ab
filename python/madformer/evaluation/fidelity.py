"""How far pictures of one mode of the engine are from those of another on the same seeds.

Shape legend: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from madformer.evaluation.extractors import Extractor
from madformer.evaluation.moments import Array
from madformer.evaluation.uncertainty import Estimate, mean_estimate
from madformer.vae import to_uint8

__all__ = ["Fidelity", "Pictures", "fidelity", "paired_estimates", "psnr", "ssim"]

_WINDOW, _SIGMA = 11, 1.5  # of SSIM, as in the paper
_K1, _K2 = 0.01, 0.03


@dataclass(frozen=True)
class Pictures:
    """What a mode drew: latents ``(B, C, H, W)``, pictures ``(B, 3, H, W)`` in [0, 1]; number ``i`` from one seed."""

    latents: Tensor
    pictures: Tensor


@dataclass(frozen=True)
class Fidelity:
    """Of a mode against another.

    Attributes:
        picture_psnr_db: of all pixels together, peak 1. worst_picture_psnr_db: of the worst picture.
        ssim: structural similarity, mean over pictures, 1 where they are equal. worst_ssim: of the worst.
        latent_psnr_db: of the latents, peak: the range of the exact ones.
        largest_latent_difference, mean_latent_difference: absolute.
        feature_distance: squared distance of an extractor's features of length one, mean over pictures, as LPIPS has
            it for the layers of its network (arXiv:1801.03924); from 0 to 4, None without an extractor.
    """

    picture_psnr_db: float
    worst_picture_psnr_db: float
    ssim: float
    worst_ssim: float
    latent_psnr_db: float
    largest_latent_difference: float
    mean_latent_difference: float
    feature_distance: float | None = None


def fidelity(actual: Pictures, exact: Pictures, extractor: Extractor | None = None) -> Fidelity:
    """All of :class:`Fidelity`.

    Raises:
        FloatingPointError: a latent or a pixel of ``actual`` is not finite. ValueError: they have different shapes.
    """
    if actual.latents.shape != exact.latents.shape or actual.pictures.shape != exact.pictures.shape:
        raise ValueError("pictures of different sizes or numbers are no pairs")
    if not (actual.latents.isfinite().all() and actual.pictures.isfinite().all()):
        raise FloatingPointError("a latent or a pixel is not finite")
    difference = (actual.latents.double() - exact.latents.double()).abs()
    similar_B = ssim(actual.pictures, exact.pictures)
    return Fidelity(
        picture_psnr_db=psnr(actual.pictures, exact.pictures, 1.0),
        worst_picture_psnr_db=min(psnr(a, e, 1.0) for a, e in zip(actual.pictures, exact.pictures, strict=True)),
        ssim=similar_B.mean().item(),
        worst_ssim=similar_B.min().item(),
        latent_psnr_db=psnr(actual.latents, exact.latents, (exact.latents.max() - exact.latents.min()).item()),
        largest_latent_difference=difference.max().item(),
        mean_latent_difference=difference.mean().item(),
        feature_distance=None if extractor is None else _feature_distance(actual, exact, extractor),
    )


def paired_estimates(
    pairs: Iterable[tuple[Pictures, Pictures]], extractor: Extractor
) -> tuple[dict[str, Estimate], tuple[int, int]]:
    """Figures of batches of pairs, none of which is kept, and height and width of the pictures.

    ``psnr`` is of all pixels together, with its interval from the pictures' mean squared errors; ``worst_psnr`` and
    ``largest_latent_difference`` are of the worst picture, and have none.

    Raises:
        As :func:`fidelity`.
    """
    errors, similar, distances, largest, size = list[float](), list[float](), list[float](), 0.0, (0, 0)
    for actual, exact in pairs:
        for index in range(len(exact.pictures)):
            one, other = (Pictures(side.latents[index][None], side.pictures[index][None]) for side in (actual, exact))
            found = fidelity(one, other, extractor)
            assert found.feature_distance is not None
            errors.append(10 ** (-found.picture_psnr_db / 10))
            similar.append(found.ssim)
            distances.append(found.feature_distance)
            largest = max(largest, found.largest_latent_difference)
        size = (exact.pictures.shape[2], exact.pictures.shape[3])
    error = mean_estimate(errors)
    # the larger the error, the smaller the ratio
    value, low, high = (math.inf if one <= 0 else -10 * math.log10(one) for one in (error.value, error.high, error.low))
    return {
        "psnr": Estimate(value, low, high, error.method),
        "worst_psnr": Estimate.bare(-10 * math.log10(max(errors)) if max(errors) else math.inf, "of one picture"),
        "ssim": mean_estimate(similar),
        "feature_distance": mean_estimate(distances),
        "largest_latent_difference": Estimate.bare(largest, "of one picture"),
    }, size


def psnr(actual: Tensor, expected: Tensor, peak: float) -> float:
    """Peak signal-to-noise ratio in dB, of all values together; infinite where they are equal."""
    error = (actual.double() - expected.double()).square().mean().item()
    return 10 * math.log10(peak**2 / error) if error else math.inf


def ssim(actual_BCHW: Tensor, expected_BCHW: Tensor) -> Tensor:
    """Structural similarity ``(B,)`` of pictures in [0, 1], float64 (Wang et al., IEEE Trans. Image Process. 13, 2004).

    Windows of 11 x 11 with a Gaussian of 1.5 pixels, where they lie within the picture; channels each by itself.

    Raises:
        ValueError: pictures of fewer than 11 pixels along a side.
    """
    if min(actual_BCHW.shape[2:]) < _WINDOW:
        raise ValueError(f"SSIM takes pictures of {_WINDOW} pixels along a side, got {tuple(actual_BCHW.shape[2:])}")
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    weights /= weights.sum()
    # channels each by itself: as pictures of one
    x, y = (pictures.double().cpu().flatten(0, 1)[:, None] for pictures in (actual_BCHW, expected_BCHW))

    def blurred(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x.square(), blurred(y * y) - mean_y.square()
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similar /= (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    return similar.flatten(1).mean(1).view(actual_BCHW.shape[:2]).mean(1)


def _feature_distance(actual: Pictures, exact: Pictures, extractor: Extractor) -> float:
    ours, theirs = (_unit_features(side.pictures, extractor) for side in (actual, exact))
    return float(np.square(ours - theirs).sum(1).mean())


def _unit_features(pictures_BCHW: Tensor, extractor: Extractor) -> Array:
    images = [Image.fromarray(image) for image in to_uint8(pictures_BCHW).cpu().numpy()]
    rows = [extractor.features(extractor.prepare(image)[None])[0] for image in images]
    features_BD = np.asarray(rows, np.float64)
    return np.asarray(features_BD / np.linalg.norm(features_BD, axis=1, keepdims=True))
