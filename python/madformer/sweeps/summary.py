"""Rows of a sweep as lines of a figure: one a model, each point with its interval over trainings and draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from madformer.evaluation import Estimate, Spread, variance_components
from madformer.evaluation.uncertainty import student
from madformer.sweeps.folder import scores_of

__all__ = ["Comparison", "Line", "Point", "comparisons", "lines", "point_of"]

Row = Mapping[str, Any]
SETTINGS = ("scheduler", "refresh_every", "diffusion_layers", "guidance")
"""What tells lines of a model apart, in this order."""


@dataclass(frozen=True)
class Point:
    """A model at one number of steps and one way to sample.

    Attributes:
        rows: of all its trainings and draws. estimate: of the figure, over them.
        spread: what the variance consists of; None without two trainings, one of them drawn from twice.
    """

    rows: tuple[Row, ...]
    estimate: Estimate
    spread: Spread | None

    @property
    def steps(self) -> int:
        """Of a block."""
        return int(self.rows[0]["steps"])

    def cost(self, name: str) -> float:
        """The mean of a cost, such as ``nfe_steps``."""
        return float(np.mean([row["costs"][name] for row in self.rows]))


@dataclass(frozen=True)
class Line:
    """A model and a way to sample it, over numbers of steps.

    Attributes:
        model: its label. settings: those that tell the sweep's lines apart, as text; empty where there are none.
        points: from the fewest steps on.
    """

    model: str
    settings: str
    points: tuple[Point, ...]

    @property
    def label(self) -> str:
        return f"{self.model}, {self.settings}" if self.settings else self.model


@dataclass(frozen=True)
class Comparison:
    """Two models, sampled in the same way.

    Attributes:
        settings, steps: how. difference: of the second less the first, with Welch's interval over trainings.
    """

    first: str
    second: str
    settings: str
    steps: int
    difference: Estimate


def lines(rows: Sequence[Row], figure: str) -> list[Line]:
    """The rows that have this figure, in the order in which models and settings appear."""
    rows = [row for row in rows if figure in row["scores"]]
    told = [name for name in SETTINGS if len({_setting(row, name) for row in rows}) > 1]
    groups: dict[tuple[str, str], dict[int, list[Row]]] = {}
    for row in rows:
        # a model's own number of layers is part of its name already
        names = [name for name in told if name != "diffusion_layers" or _splits(rows, row["model"]) > 1]
        settings = ", ".join(f"{name} {_setting(row, name)}" for name in names)
        groups.setdefault((row["model"], settings), {}).setdefault(row["steps"], []).append(row)
    return [
        Line(model, settings, tuple(point_of(points[steps], figure) for steps in sorted(points)))
        for (model, settings), points in groups.items()
    ]


def point_of(rows: Sequence[Row], figure: str) -> Point:
    """Over training seeds and draws, or what of them there is."""
    scores = [scores_of(row)[figure].estimate for row in rows]
    values: dict[int, list[float]] = {}
    for row, score in zip(rows, scores, strict=True):
        values.setdefault(row["training_seed"] or 0, []).append(score.value)
    sizes = list(map(len, values.values()))
    if len(scores) == 1:
        return Point(tuple(rows), scores[0], None)
    if len(values) > 1 and max(sizes) > 1:
        spread = variance_components(values)
        return Point(tuple(rows), spread.estimate, spread)
    how = f"{len(values)} training seeds" if len(values) > 1 else f"{len(scores)} sampling seeds of one training"
    return Point(tuple(rows), _mean([score.value for score in scores], how), None)


def comparisons(rows: Sequence[Row], figure: str) -> list[Comparison]:
    """Of all pairs of models that were trained from two seeds at least, at each way to sample that both have."""
    found = []
    for first, second in itertools.combinations(lines(rows, figure), 2):
        if first.model == second.model or first.settings != second.settings:
            continue
        others = {point.steps: point for point in second.points}
        for point in first.points:
            sides = [training_means(one, figure) for one in (point, others.get(point.steps)) if one is not None]
            if len(sides) == 2 and min(map(len, sides)) > 1:
                difference = _welch(*sides)
                found.append(Comparison(first.model, second.model, first.settings, point.steps, difference))
    return found


def training_means(point: Point, figure: str) -> list[float]:
    """The figure of each training, over its draws."""
    values: dict[int, list[float]] = {}
    for row in point.rows:
        values.setdefault(row["training_seed"] or 0, []).append(scores_of(row)[figure].value)
    return [float(np.mean(own)) for own in values.values()]


def _welch(first: Sequence[float], second: Sequence[float]) -> Estimate:
    variances = [float(np.var(side, ddof=1)) / len(side) for side in (first, second)]
    counts = [len(first) - 1, len(second) - 1]
    weight = sum(v**2 / n for v, n in zip(variances, counts, strict=True))
    degrees = max(1, math.floor(sum(variances) ** 2 / weight + 1e-9)) if weight else min(counts)
    how = f"{len(first)} and {len(second)} training seeds"
    value = float(np.mean(second) - np.mean(first))
    return Estimate.around(value, math.sqrt(sum(variances)), how, degrees=degrees)


def _mean(values: Sequence[float], how: str) -> Estimate:
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = student(len(values) - 1) * error
    mean = float(np.mean(values))
    return Estimate(mean, mean - half, mean + half, how)


def _setting(row: Row, name: str) -> str:
    value = row[name]
    if name == "guidance":
        return "tuned" if row["guidance_tuned"] else f"{value:g}"
    return str(value)


def _splits(rows: Sequence[Row], model: str) -> int:
    return len({row["diffusion_layers"] for row in rows if row["model"] == model})
