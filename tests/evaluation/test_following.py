"""Captions and classes that pictures follow, by hand; and how far pictures of one mode are from another's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from madformer.evaluation.fidelity import Pictures, fidelity, psnr, ssim
from madformer.evaluation.following import class_accuracy, numbered, retrieval
from madformer.evaluation.uncertainty import share
from tests.helpers.evaluation_cases import tiny_extractor


def test_own_latents_are_found() -> None:
    means, texts = torch.randn(30, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(30)[:, None]
    own = torch.tensor([3, 7, 29])
    assert list(retrieval(means[own], own, means, texts).values().values()) == [1.0, 1.0, 1, 0.0]


def test_retrieval_by_hand() -> None:
    """Images at 0, 1, ..., 14 on a line of two equal coordinates; those at 1 and 14 have one caption."""
    means = torch.arange(15.0)[:, None, None, None].expand(-1, 2, 1, 1)
    texts = numbered(["one" if index in (1, 14) else f"caption {index}" for index in range(15)])
    # nearest: its own; the one before it; ten others, of which one has its caption; ten others
    own, drawn = torch.tensor([5, 9, 14, 13]), torch.tensor([5.25, 8.25, -0.25, -0.25])
    found = retrieval(drawn[:, None, None, None].expand(-1, 2, 1, 1), own, means, texts)
    distance = (0.25**2 + 0.75**2 + 14.25**2 + 13.25**2) / 4
    assert list(found.values().values()) == pytest.approx([1 / 4, 3 / 4, (2 + 14) / 2, distance])
    assert found.precision_at_1 == share(1, 4)
    # ranks 1, 2, 14 and 15
    assert (found.median_rank.low, found.median_rank.high) == (1, 15)


def test_the_interval_of_a_median_rank_holds_it() -> None:
    """Of ranks that are alike from 1 to 999, whose median is 500: in at least nine of ten draws."""
    random, held = np.random.default_rng(0), 0
    means, texts = torch.arange(1000.0, dtype=torch.float64)[:, None], torch.arange(1000)[:, None]
    for _ in range(100):
        drawn = torch.from_numpy(random.random(60))[:, None] * 500
        found = retrieval(drawn, torch.full((60,), 0), means, texts).median_rank
        # of a picture at x, those at less than 2 x are nearer than the image at 0 is
        held += found.low <= 500 <= found.high
    assert held >= 90


def test_accuracy_by_hand() -> None:
    """Two classes on a line, ten images each from 0 and from 100 on, and one image of the first amid the second."""
    reference = np.concatenate([np.arange(10.0), 100 + np.arange(10.0), [104.5]])[:, None]
    labels = np.array([0] * 10 + [1] * 10 + [0])
    found = class_accuracy(np.array([[2.0], [103], [50.5], [104.4]]), np.array([0, 1, 0, 0]), reference, labels)
    # 50.5 is nearer to the first class's end, 104.4 has one neighbour of the first class and four of the second
    assert found.accuracy.value == 2 / 4 + 0 / 4 + 0.25 * (abs(50.5 - 9) < abs(50.5 - 100))
    assert found.ceiling.value == 20 / 21
    assert found.accuracy == share(3, 4)
    unknown = class_accuracy(np.array([[2.0], [3.0]]), np.array([0, -1]), reference, labels)
    assert unknown.accuracy == share(1, 1)
    with pytest.raises(ValueError, match="more than 5 images of the reference"):
        class_accuracy(reference[:2], labels[:2], reference[:5], labels[:5])


def test_similarity_is_that_of_the_paper() -> None:
    """By SciPy's Gaussian filter in two dimensions, cut to the window and to where it lies within the picture."""
    random = np.random.default_rng(0)
    x = random.random((2, 3, 20, 17))
    y = np.clip(x + 0.1 * random.standard_normal(x.shape), 0, 1)

    def blurred(plane: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return scipy.ndimage.gaussian_filter(plane, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    def plane_ssim(a: np.ndarray, b: np.ndarray) -> float:  # type: ignore[type-arg]
        ma, mb = blurred(a), blurred(b)
        va, vb, cov = blurred(a * a) - ma**2, blurred(b * b) - mb**2, blurred(a * b) - ma * mb
        top = (2 * ma * mb + 0.01**2) * (2 * cov + 0.03**2)
        return float((top / ((ma**2 + mb**2 + 0.01**2) * (va + vb + 0.03**2))).mean())

    expected = [np.mean([plane_ssim(x[b, c], y[b, c]) for c in range(3)]) for b in range(2)]
    np.testing.assert_allclose(ssim(torch.from_numpy(x), torch.from_numpy(y)).numpy(), expected, rtol=1e-9)
    same = torch.from_numpy(x)
    assert ssim(same, same).tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError, match=r"11 pixels along a side, got \(10, 17\)"):
        ssim(same[:, :, :10], same[:, :, :10])


def test_fidelity_of_a_known_difference() -> None:
    random = torch.Generator().manual_seed(0)
    latents, pictures = torch.zeros(2, 4, 8, 8), torch.rand(2, 3, 16, 16, generator=random) * 0.8
    latents[0, 0, 0, 0], latents[1, 0, 0, 0] = -3, 5
    off, light = latents.clone(), pictures.clone()
    off[0] += 0.2
    light[0] += 0.1
    exact, extractor = Pictures(latents, pictures), tiny_extractor()
    found = fidelity(Pictures(off, light), exact, extractor)
    assert found.picture_psnr_db == pytest.approx(20 + 10 * math.log10(2), rel=1e-5)
    assert found.worst_picture_psnr_db == pytest.approx(20, rel=1e-5)
    assert found.latent_psnr_db == pytest.approx(20 * math.log10(8 / 0.2) + 10 * math.log10(2), rel=1e-5)
    assert found.largest_latent_difference == pytest.approx(0.2, rel=1e-5)
    assert found.mean_latent_difference == pytest.approx(0.1, rel=1e-5)
    assert 1 > found.ssim > found.worst_ssim > 0
    same = fidelity(exact, exact, extractor)
    assert (same.picture_psnr_db, same.ssim, same.feature_distance) == (math.inf, pytest.approx(1), 0)
    assert found.feature_distance is not None
    assert 0 < found.feature_distance < 4
    assert psnr(pictures, pictures, 1.0) == math.inf
    off[1, 2, 3, 4] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        fidelity(Pictures(off, light), exact)
    with pytest.raises(ValueError, match="are no pairs"):
        fidelity(Pictures(latents[:1], pictures), exact)
