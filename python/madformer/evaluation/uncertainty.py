"""How sure a number is: intervals for one model, and what retraining moves beside redrawing.

All intervals are of 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from madformer.evaluation.moments import Array

__all__ = ["Estimate", "Spread", "groups_of", "jackknife", "mean_estimate", "share", "student", "variance_components"]

GROUPS = 20
"""Into which a set is divided to see how much its figure varies."""
_NORMAL = 1.960  # at 97.5 %
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # from one degree of freedom on


@dataclass(frozen=True)
class Estimate:
    """A figure and how far it can be relied on.

    Attributes:
        value: the figure. low, high: the 95 % interval; NaN where there are too few images for one.
        method: how the interval was found.
        deviation: a standard deviation that belongs to the metric's own definition, such as KID's over subsets; None
            where there is none.
    """

    value: float
    low: float
    high: float
    method: str
    deviation: float | None = None

    @classmethod
    def around(
        cls, value: float, error: float, method: str, *, degrees: int | None = None, deviation: float | None = None
    ) -> Estimate:
        """From a standard error that was found with so many degrees of freedom; None for very many."""
        quantile = _NORMAL if degrees is None else student(degrees)
        return cls(value, value - quantile * error, value + quantile * error, method, deviation)

    @classmethod
    def bare(cls, value: float, why: str) -> Estimate:
        """Without an interval."""
        return cls(value, math.nan, math.nan, why)


FEWEST = 2 * GROUPS
"""Images that an interval takes."""
TOO_FEW = f"no interval: fewer than {FEWEST} images"


def groups_of(count: int, seed: int, groups: int = GROUPS) -> list[Array]:
    """The numbers below ``count``, dealt at random to groups whose sizes differ by one at most."""
    order = np.random.default_rng(seed).permutation(count)
    return [order[first::groups] for first in range(groups)]


def jackknife(value: float, replicates: Sequence[float]) -> Estimate:
    """From the values without each of several equal groups (Efron and Stein 1981); the value itself stays as it is."""
    left = np.asarray(replicates, np.float64)
    error = math.sqrt((len(left) - 1) * float(left.var()))
    return Estimate.around(value, error, f"jackknife over {len(left)} groups", degrees=len(left) - 1)


def share(successes: int, count: int) -> Estimate:
    """Of so many that have a property: Wilson's interval, which stays within 0 and 1.

    Raises:
        ValueError: there are none, or more successes than trials.
    """
    if not 0 <= successes <= count or count < 1:
        raise ValueError(f"{successes} of {count} is no share")
    fraction, z2 = successes / count, _NORMAL**2
    middle = (fraction + z2 / (2 * count)) / (1 + z2 / count)
    half = _NORMAL / (1 + z2 / count) * math.sqrt(fraction * (1 - fraction) / count + z2 / (4 * count**2))
    return Estimate(fraction, max(0.0, middle - half), min(1.0, middle + half), f"Wilson, {count} images")


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Of figures of single images, by the normal approximation."""
    of = np.asarray(values, np.float64)
    if len(of) < 2:
        return Estimate.bare(float(of.mean()), "no interval: one picture")
    return Estimate.around(float(of.mean()), float(of.std(ddof=1)) / math.sqrt(len(of)), f"normal, {len(of)} images")


@dataclass(frozen=True)
class Spread:
    """What a figure's variance consists of, over training seeds and sampling seeds (arXiv:2606.20536).

    Attributes:
        mean: over trainings of the mean over samplings.
        training: the standard deviation between trainings, with that of sampling taken out; 0 where it is no greater.
        sampling: the standard deviation between samplings of one training.
        estimate: the mean with its interval, over trainings: drawing more images of the same models narrows it only
            so far.
    """

    mean: float
    training: float
    sampling: float
    estimate: Estimate

    @property
    def ratio(self) -> float:
        """How many times as much retraining moves the figure as redrawing; NaN where neither does."""
        if self.sampling:
            return self.training / self.sampling
        return math.inf if self.training else math.nan


def variance_components(values: Mapping[int, Sequence[float]]) -> Spread:
    """Of a metric's values by training seed, one for every sampling seed, by analysis of variance.

    Trainings may have different numbers of samplings. The interval of the mean has Student's quantile for the number
    of trainings.

    Raises:
        ValueError: fewer than two trainings, one without values, none with two, or a value that is not finite.
    """
    rows = [np.asarray(row, np.float64) for row in values.values()]
    counts = list(map(len, rows))
    if len(rows) < 2 or min(counts) < 1 or max(counts) < 2:
        raise ValueError(f"components of variance take two training seeds, one of them with two values, got {counts}")
    if not all(np.isfinite(row).all() for row in rows):
        raise ValueError("components of variance are of finite values")
    sizes, means = np.array([len(row) for row in rows]), np.array([row.mean() for row in rows])
    total = sizes.sum()
    within = sum(float(np.square(row - row.mean()).sum()) for row in rows) / (total - len(rows))
    grand = float(sizes @ means / total)
    between = float(sizes @ np.square(means - grand)) / (len(rows) - 1)
    # with equal sizes it is the number of samplings; Searle, Casella, McCulloch: Variance Components, section 3.6
    effective = (total - float(np.square(sizes).sum()) / total) / (len(rows) - 1)
    training = max(0.0, (between - within) / effective)
    error = math.sqrt(float(means.var(ddof=1)) / len(rows))
    method = f"{len(rows)} training seeds x {sizes.min()} sampling seeds"
    mean = float(means.mean())
    estimate = Estimate.around(mean, error, method, degrees=len(rows) - 1)
    return Spread(mean, math.sqrt(training), math.sqrt(within), estimate)


def student(degrees: int) -> float:
    """Student's quantile at 97.5 %, right to 1 %."""
    return _STUDENT[degrees - 1] if degrees <= len(_STUDENT) else _NORMAL + 2.5 / degrees
