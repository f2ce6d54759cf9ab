"""Every metric's arithmetic: closed forms, sets that are built for known values, and others' implementations.

Shape legend: N images, D features.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.special
import scipy.stats
import torch

from madformer.evaluation.frechet import frechet_at_infinity, frechet_distance, frechet_estimate, root
from madformer.evaluation.inception_score import inception_score, score_estimate, softmax
from madformer.evaluation.kernel import cmmd_estimate, kid_estimate, polynomial_mmd, rbf_mmd
from madformer.evaluation.manifold import manifold_estimates, nearest_distances
from madformer.evaluation.moments import Array, Moments
from madformer.evaluation.uncertainty import Estimate, jackknife, share, student, variance_components


def features(count: int, width: int, seed: int = 0, shift: float = 0.0) -> Array:
    """Correlated ones, of different scales, as a network has them: float32."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((width, width)) / math.sqrt(width)
    return np.asarray(np.maximum(random.standard_normal((count, width)) @ mixing + shift, -0.5), np.float32)


def gaussian(width: int, seed: int) -> Moments:
    random = np.random.default_rng(seed)
    factor = random.standard_normal((width, 2 * width))
    return Moments(random.standard_normal(width), factor @ factor.T / width)


# Frechet distance


@pytest.mark.parametrize("width", [1, 64])
def test_distance_of_shifted_gaussians(width: int) -> None:
    first = gaussian(width, 0)
    shift = np.linspace(0.5, 2, width)
    assert frechet_distance(first, Moments(first.mean_D + shift, first.covariance_DD)) == pytest.approx(
        float(shift @ shift), rel=1e-6
    )
    # (s1 - s2)^2 in every direction for covariances of the same axes
    wider = Moments(first.mean_D, 2.25 * first.covariance_DD)
    assert frechet_distance(first, wider) == pytest.approx(0.25 * np.trace(first.covariance_DD), rel=1e-6)


def test_distance_of_gaussians_with_different_axes() -> None:
    """In two dimensions ``tr (AB)^(1/2) = (tr AB + 2 det(AB)^(1/2))^(1/2)``."""
    a, b = gaussian(2, 1), gaussian(2, 2)
    product = a.covariance_DD @ b.covariance_DD
    overlap = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    means = float(np.square(a.mean_D - b.mean_D).sum())
    expected = means + np.trace(a.covariance_DD + b.covariance_DD) - 2 * overlap
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [40, 400])
def test_distance_is_that_of_scipy(count: int) -> None:
    """Also where there are fewer images than features, as long as SciPy's root is real there."""
    ours, theirs = features(count, 96), features(500, 96, seed=1, shift=0.3)
    moments = [
        (rows.astype(np.float64).mean(0), np.cov(rows.astype(np.float64), rowvar=False)) for rows in (ours, theirs)
    ]
    (m1, s1), (m2, s2) = moments
    covmean = scipy.linalg.sqrtm(s1 @ s2)
    expected = np.square(m1 - m2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(covmean).real
    assert frechet_distance(Moments.of(ours), Moments.of(theirs)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("count", [30, 300])
def test_a_set_is_no_distance_from_itself(count: int) -> None:
    moments = Moments.of(features(count, 80))
    assert moments.is_deficient == (count <= 80)
    assert 0 <= frechet_distance(moments, moments) < 1e-9


def test_moments_are_those_of_numpy_however_large_the_mean() -> None:
    rows = features(3000, 8, shift=1.0).astype(np.float64) + 1e6
    moments = Moments.of(rows)
    np.testing.assert_allclose(moments.mean_D, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance_DD, np.cov(rows, rowvar=False), rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="two images at least, got 1"):
        Moments.of(rows[:1])
    with pytest.raises(ValueError, match="must be finite"):
        Moments.of(np.full((3, 2), np.nan))


def test_what_is_no_covariance_is_refused() -> None:
    with pytest.raises(ValueError, match="no eigenvalue below zero, and this one has -1"):
        root(np.diag([1.0, -1.0]))
    with pytest.raises(ValueError, match="must be symmetric"):
        root(np.array([[1.0, 1.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="features of 2 and of 3 numbers are of different extractors"):
        frechet_distance(gaussian(2, 0), gaussian(3, 0))


def test_interval_of_the_distance() -> None:
    """A jackknife by hand, and an interval that holds what other draws give."""
    reference = Moments.of(features(4000, 6, seed=5, shift=0.4))
    rows = features(600, 6)
    found = frechet_estimate(rows, reference, seed=3)
    order = np.random.default_rng(3).permutation(600)
    left = [frechet_distance(Moments.of(np.delete(rows, order[g::20], axis=0)), reference) for g in range(20)]
    assert found.value == frechet_distance(Moments.of(rows), reference)
    assert found.high - found.value == pytest.approx(student(19) * math.sqrt(19 * np.var(left)), rel=1e-4)
    others = [frechet_distance(Moments.of(features(600, 6, seed)), reference) for seed in range(100, 130)]
    assert (found.high - found.low) / (2 * student(19)) == pytest.approx(np.std(others), rel=0.5)


def test_distance_at_infinity_is_nearer_to_the_truth() -> None:
    """Of one distribution it is 0, where the distance of 400 images in 40 dimensions is not."""
    truth = Moments(np.zeros(40), np.eye(40))
    rows = np.random.default_rng(0).standard_normal((400, 40))
    biased, extrapolated = frechet_distance(Moments.of(rows), truth), frechet_at_infinity(rows, truth)
    assert biased > 1
    assert abs(extrapolated.value) < 0.15 * biased
    assert extrapolated.low < extrapolated.value < extrapolated.high
    with pytest.raises(ValueError, match="29 images are too few to extrapolate from: 30 at least"):
        frechet_at_infinity(rows[:29], truth)


# Kernels


def test_kid_by_the_definition() -> None:
    """Sums over pairs, one by one."""
    x, y = features(7, 3).astype(np.float64), features(5, 3, seed=1).astype(np.float64)

    def k(a: Array, b: Array) -> float:
        return float((a @ b / 3 + 1) ** 3)

    own_x = sum(k(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    own_y = sum(k(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / (5 * 4)
    across = sum(k(a, b) for a in x for b in y) / 35
    assert polynomial_mmd(x, y) == pytest.approx(own_x + own_y - 2 * across, rel=1e-12)


def test_kid_of_one_distribution_is_0_on_average() -> None:
    """Whatever the number of images: the mean over many small draws is within its error of 0, and some are below it."""
    random = np.random.default_rng(0)
    for size in (4, 20):
        draws = [polynomial_mmd(*random.standard_normal((2, size, 8))) for _ in range(800)]
        assert abs(np.mean(draws)) < 3 * np.std(draws) / math.sqrt(len(draws))
        assert min(draws) < 0
    found = kid_estimate(features(600, 16), features(500, 16, seed=1), subsets=20, subset_size=200)
    assert found.low < 0 < found.high
    assert found.deviation is not None
    assert found.deviation > 0


def test_kid_has_an_interval_for_the_whole_sets() -> None:
    sets = [features(400, 16, seed) for seed in range(6)]
    reference = features(400, 16, seed=50, shift=0.3)
    found = [kid_estimate(rows, reference, subsets=2, subset_size=300) for rows in sets]
    # all pairs take part in it: with everything in the subset it is the one value
    whole = kid_estimate(sets[0], reference, subsets=2)
    assert whole.value == pytest.approx(polynomial_mmd(sets[0], reference), rel=1e-12)
    assert whole.deviation is None
    assert whole.method == "20 disjoint groups; no subset is smaller than all 400"
    assert whole.high > whole.value > whole.low > 0
    error = np.mean([one.high - one.low for one in found]) / (2 * student(19))
    assert 0.5 < error / np.std([one.value for one in found]) < 3
    few = kid_estimate(sets[0][:39], reference, subsets=2)
    assert math.isnan(few.low)
    assert few.method == "no interval: fewer than 40 images; deviation over 2 subsets of 39"
    with pytest.raises(ValueError, match="features of 16 and of 15 numbers"):
        kid_estimate(sets[0], reference[:, :15])


def test_cmmd_by_the_definition() -> None:
    x, y = features(60, 5).astype(np.float64), features(50, 5, seed=1, shift=0.4).astype(np.float64)
    u, v = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))

    def mean(a: Array, b: Array) -> float:
        return float(np.exp(-scipy.spatial.distance.cdist(a, b, "sqeuclidean") / 200).mean())

    expected = 1000 * (mean(u, u) + mean(v, v) - 2 * mean(u, v))
    assert rbf_mmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert rbf_mmd(x, 3 * x) == pytest.approx(0, abs=1e-9)
    found = cmmd_estimate(x, y)
    assert found.value == rbf_mmd(x, y)
    assert found.low < found.value < found.high
    with pytest.raises(ValueError, match="all zero have no direction"):
        rbf_mmd(x, 0 * y)


# Manifolds


def test_manifolds_by_hand() -> None:
    """The reference at 0, 1, 2, 3, 10 on a line, images at 0.5, 1.5, 50, 50.2; k = 1.

    Balls of the reference reach 1, 1, 1, 1 and 7; those of the images 1, 1, 0.2 and 0.2.
    """
    reference, images = np.array([[0.0], [1], [2], [3], [10]]), np.array([[0.5], [1.5], [50], [50.2]])
    found = manifold_estimates(images, reference, nearest_k=1)
    assert found.precision.value == 0.5
    # 0.5 lies in the balls of 0 and 1, 1.5 in those of 1 and 2
    assert found.density.value == (2 + 2) / 4
    # within 1 of 0.5 lie 0 and 1; within 1 of 1.5 lie 1 and 2
    assert found.recall.value == 3 / 5
    # the balls of 0, 1 and 2 hold one
    assert found.coverage.value == 3 / 5
    np.testing.assert_allclose(nearest_distances(images, reference), [0.5, 0.5, 40, 40.2])
    with pytest.raises(ValueError, match="nearest_k=4 takes more images than that in either set, got 4 and 5"):
        manifold_estimates(images, reference, nearest_k=4)


def test_manifolds_of_equal_and_of_distant_sets() -> None:
    rows = features(90, 8)
    same, far = manifold_estimates(rows, rows), manifold_estimates(rows, rows + 1000)
    assert [same.precision.value, same.recall.value, same.coverage.value] == [1, 1, 1]
    # every image lies in its own ball and in those of the images that it is among the four nearest of
    assert 0.9 < same.density.value < 1.1
    assert [far.precision.value, far.recall.value, far.density.value, far.coverage.value] == [0] * 4


def test_manifolds_are_those_of_the_definition_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against whole matrices of distances, in blocks that divide nothing."""
    monkeypatch.setattr("madformer.evaluation.manifold.BLOCK", 13)
    x, y, k = features(70, 6), features(55, 6, seed=1, shift=0.2), 3
    xy = scipy.spatial.distance.cdist(x, y)
    radius_x, radius_y = (np.sort(scipy.spatial.distance.cdist(rows, rows), axis=1)[:, k] for rows in (x, y))
    found = manifold_estimates(x, y, nearest_k=k)
    assert found.precision.value == (xy < radius_y).any(1).mean()
    assert found.recall.value == (xy < radius_x[:, None]).any(0).mean()
    assert found.density.value == pytest.approx((xy < radius_y).sum(1).mean() / k)
    assert found.coverage.value == (xy < radius_y).any(0).mean()
    np.testing.assert_allclose(nearest_distances(x, y), xy.min(1), rtol=1e-5)


def test_manifolds_are_those_of_prdc(capsys: pytest.CaptureFixture[str]) -> None:
    prdc = pytest.importorskip("prdc", reason="the package prdc is not installed")
    x, y = features(80, 6), features(60, 6, seed=1, shift=0.2)
    theirs, ours = prdc.compute_prdc(y.astype(np.float64), x.astype(np.float64), 5), manifold_estimates(x, y)
    assert {name: getattr(ours, name).value for name in theirs} == pytest.approx(theirs)


def test_distances_are_those_of_torchmetrics() -> None:
    """Its arithmetic, on the same features in float64."""
    fid = pytest.importorskip("torchmetrics.image.fid", reason="the package torchmetrics is not installed")
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = (torch.from_numpy(features(200, 24, seed, shift).astype(np.float64)) for seed, shift in ((0, 0.0), (1, 0.2)))
    moments = [part for rows in (x, y) for part in (rows.mean(0), rows.T.cov())]
    assert frechet_distance(Moments.of(x.numpy()), Moments.of(y.numpy())) == pytest.approx(
        fid._compute_fid(*moments).item(), rel=1e-6
    )
    assert polynomial_mmd(x.numpy(), y.numpy()) == pytest.approx(kid.poly_mmd(x, y).item(), rel=1e-9)


# Inception Score


def test_score_of_certain_and_of_uniform_predictions() -> None:
    assert inception_score(np.tile(np.eye(10), (7, 1))) == pytest.approx(10, rel=1e-12)
    assert inception_score(np.full((50, 10), 0.1)) == pytest.approx(1, rel=1e-12)
    assert inception_score(np.tile([[0.7, 0.2, 0.1]], (9, 1))) == pytest.approx(1, rel=1e-12)
    found = score_estimate(np.tile(np.eye(4), (500, 1)))
    assert found.value == pytest.approx(4, rel=0.02)
    assert found.deviation is not None
    assert found.deviation < 0.05
    with pytest.raises(ValueError, match="rows must be probabilities"):
        inception_score(np.full((3, 2), 0.6))


def test_score_is_that_of_the_entropies() -> None:
    """``H(y) - H(y|x)``, with SciPy's entropies and softmax."""
    logits = 2 * features(200, 12)
    p = scipy.special.softmax(logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(softmax(logits), p, rtol=1e-12)
    expected = math.exp(scipy.stats.entropy(p.mean(0)) - scipy.stats.entropy(p, axis=1).mean())
    assert inception_score(softmax(logits)) == pytest.approx(expected, rel=1e-12)


# Intervals


def test_share_is_wilsons() -> None:
    found = share(8, 10)
    interval = scipy.stats.binomtest(8, 10).proportion_ci(method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((0.8, interval.low, interval.high), rel=1e-3)
    assert share(0, 5).low == 0
    assert share(5, 5).high == 1


def test_students_quantiles() -> None:
    for degrees in (1, 2, 9, 10, 11, 19, 50, 1000):
        assert student(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=0.01)


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    groups = np.random.default_rng(0).standard_normal(20)
    left = [(groups.sum() - group) / 19 for group in groups]
    found = jackknife(float(groups.mean()), left)
    assert found.high - found.value == pytest.approx(student(19) * groups.std(ddof=1) / math.sqrt(20), rel=1e-9)
    assert Estimate.bare(1.0, "none").method == "none"


def test_components_of_variance() -> None:
    """By hand for two trainings of two samplings, and as drawn for many."""
    found = variance_components({0: [1.0, 3.0], 1: [7.0, 9.0]})
    # within: 2, between: (36 / 2 * 2 - 2) / 2
    assert (found.mean, found.sampling**2, found.training**2) == pytest.approx((5, 2, 17))
    assert found.estimate.high - 5 == pytest.approx(12.706 * 3)
    random = np.random.default_rng(0)
    rows = {seed: 10 + 3 * random.standard_normal() + random.standard_normal(4 + seed % 3) for seed in range(300)}
    found = variance_components(rows)  # type: ignore[arg-type]
    assert (found.training, found.sampling, found.ratio) == pytest.approx((3, 1, 3), rel=0.1)
    with pytest.raises(ValueError, match="two training seeds"):
        variance_components({0: [1.0, 2.0]})
