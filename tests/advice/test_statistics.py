"""Statistics of latents against closed forms: Gaussians of a known covariance, noise of a known spectrum."""

from __future__ import annotations

import numpy as np
import pytest

from madformer.advice import predictability, spearman, spectrum, statistics
from madformer.advice.statistics import _best_penalty, _ridge, resamplings
from madformer.evaluation.moments import Array


def gaussian_chain(count: int, num_blocks: int, size: int, correlation: float) -> Array:
    """Every block is the one before it, its numbers in another order, and noise; of variance 1."""
    random = np.random.default_rng(0)
    blocks = [random.standard_normal((count, size))]
    for _ in range(num_blocks - 1):
        noise = random.standard_normal((count, size))
        blocks.append(correlation * blocks[-1][:, ::-1] + np.sqrt(1 - correlation**2) * noise)
    return np.stack(blocks, 1)


@pytest.mark.parametrize("correlation", [0.9, 0.5])
def test_a_gaussian_chain_is_explained_as_far_as_it_is_correlated(correlation: float) -> None:
    found = predictability(gaussian_chain(2000, 4, 3, correlation))
    expected = np.array([0, *[correlation**2] * 3])
    np.testing.assert_allclose(found.r2_M, expected, rtol=0, atol=0.025)
    assert found.explained == pytest.approx(expected.mean(), abs=0.02)


def test_a_gaussian_of_any_covariance() -> None:
    """``tr(S21 S11^-1 S12) / tr(S22)``, whatever the scale of numbers and their means."""
    random = np.random.default_rng(1)
    size = 5
    factor = random.standard_normal((2 * size, 2 * size)) * np.geomspace(0.1, 30, 2 * size)[:, None]
    covariance = factor @ factor.T
    of_11, of_12, of_22 = covariance[:size, :size], covariance[:size, size:], covariance[size:, size:]
    expected = np.trace(of_12.T @ np.linalg.solve(of_11, of_12)) / np.trace(of_22)
    drawn = random.standard_normal((3000, 2 * size)) @ factor.T + 100
    found = predictability(drawn.reshape(-1, 2, size))
    assert 0.2 < expected < 0.95
    assert found.r2_M[1] == pytest.approx(expected, abs=0.03)


def test_independent_blocks_explain_nothing() -> None:
    """Also where there are more numbers that predict than images."""
    for size in (4, 60):
        blocks = np.random.default_rng(2).standard_normal((160, 4, size))
        assert np.abs(predictability(blocks).r2_M).max() < 0.03


def test_the_regression_is_ridge_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of inner products, it gives what the normal equations of the numbers give, at the penalty that was chosen."""
    random = np.random.default_rng(3)
    for size in (7, 40):
        seen, new, target = (random.standard_normal(shape) for shape in ((25, size), (9, size), (25, 3)))
        seen, target = seen - seen.mean(0), target - target.mean(0)
        for chosen in (1e-2, 1.0, 30.0):
            monkeypatch.setattr(statistics, "_best_penalty", lambda *given, chosen=chosen: chosen)
            weights = np.linalg.solve(seen.T @ seen + chosen * np.eye(size), seen.T @ target)
            np.testing.assert_allclose(_ridge(seen, new, target), new @ weights, atol=1e-9)


@pytest.mark.parametrize("size", [6, 40])
def test_the_penalty_is_best_when_each_image_is_left_out(size: int) -> None:
    """Against so many regressions, each with a mean of its own; of images one of which is like no other."""
    random = np.random.default_rng(4)
    count, images = 24, random.standard_normal((24, size))
    images[0] *= 30
    target = images @ random.standard_normal((size, 2)) + 9 * random.standard_normal((count, 2))
    seen, centred = images - images.mean(0), target - target.mean(0)
    left, lengths, _ = np.linalg.svd(seen, full_matrices=False)
    left, values = left[:, lengths > 1e-9], np.square(lengths[lengths > 1e-9])
    errors = {}
    for penalty in statistics._PENALTIES * values.mean():
        errors[penalty] = 0.0
        for index in range(count):
            others, other_targets = (np.delete(of, index, 0) for of in (images, target))
            mean, mean_target = others.mean(0), other_targets.mean(0)
            moments = (others - mean).T @ (others - mean) + penalty * np.eye(size)
            weights = np.linalg.solve(moments, (others - mean).T @ (other_targets - mean_target))
            errors[penalty] += np.square(target[index] - mean_target - (images[index] - mean) @ weights).sum()
    best = min(errors, key=errors.__getitem__)
    assert best not in (min(errors), max(errors))
    assert _best_penalty(values, left, left.T @ centred, centred) == pytest.approx(best)


@pytest.mark.parametrize(("slope", "shape"), [(0.0, (12, 12)), (1.0, (16, 16)), (2.5, (8, 12))])
def test_noise_has_the_slope_that_it_was_made_with(slope: float, shape: tuple[int, int]) -> None:
    side = min(shape)
    radii = np.hypot(*np.meshgrid(*(np.fft.fftfreq(length) * side for length in shape), indexing="ij"))
    gains = np.where(radii > 0, np.where(radii > 0, radii, 1) ** (-slope / 2), 0)
    white = np.random.default_rng(5).standard_normal((800, 2, *shape))
    latents = np.fft.ifft2(np.fft.fft2(white) * gains).real
    # the mean over images is no part of the spectrum
    found = spectrum(latents + 50 * np.sin(np.arange(shape[1])))
    assert found.slope == pytest.approx(slope, abs=0.03)
    assert found.radii_R.min() >= side / max(shape)
    assert found.radii_R.max() <= side / 2


def test_resampled_statistics() -> None:
    """All images once give the value itself; intervals of more images are narrower, as the root of their number."""
    blocks = gaussian_chain(1600, 2, 4, 0.7)
    found = predictability(blocks)
    assert found.resampled(np.ones((1, 1600)))[0] == pytest.approx(found.explained)
    wide, narrow = (predictability(blocks[:count]).resampled(resamplings(count, 400)).std() for count in (100, 1600))
    assert wide / narrow == pytest.approx(4, rel=0.4)
    draws = resamplings(50, 7)
    assert draws.shape == (7, 50)
    assert (draws.sum(1) == 50).all()


def test_ranks_are_correlated_as_scipy_has_it() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(6)
    first, second = random.integers(0, 5, (4, 12)), random.standard_normal(12)
    found = spearman(first, second)
    np.testing.assert_allclose(found, [stats.spearmanr(row, second).statistic for row in first], atol=1e-12)
    assert np.isnan(spearman(np.ones(3), np.arange(3)))
