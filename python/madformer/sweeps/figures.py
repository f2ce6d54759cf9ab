"""The figures of a sweep: quality against what it costs, and what training came to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from madformer.files.text import first_line
from madformer.sweeps.config import is_lower_better
from madformer.sweeps.folder import SweepFolder, read_table
from madformer.sweeps.summary import Line, lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot"]

COLOURS = ("#3b8fd9", "#e08a1e", "#2aa77d", "#c86fa5", "#8a7ff0", "#d9534f", "#8c8c8c")
"""As light as paper and as dark as night can bear; markers tell lines apart, too."""
MARKERS, DASHES = "osD^vPX", ("-", "--", ":", "-.")
AXES = {
    "nfe_steps": "denoising evaluations of a block (NFE)",
    "nfe_layers": "layer evaluations an image (NFE x layers)",
    "seconds_per_image": "seconds an image",
}
"""What quality is shown against, by the names of the costs."""
MOST_POINTS = 300  # of a training curve


def plot(path: str | Path, figure: str | None = None, *, ink: str = "#222222") -> dict[str, Figure]:
    """The figures of a sweep's folder, finished or not, or of its table alone, as matplotlib has them.

    Args:
        path: the folder, or a ``table.parquet``, which holds no training curves.
        figure: what quality is, such as ``kid``; unless given, the first that was measured.
        ink: colour of the text and of the axes.

    Returns:
        By name: quality against ``nfe_steps``, ``nfe_layers`` and ``seconds_per_image``, and ``training`` where a model
        was trained.

    Raises:
        FileNotFoundError: there is no sweep. ValueError: no cell of it is done, or none has the figure; the file is no
            table. ImportError: there is no matplotlib.
    """
    folder = None if Path(path).is_file() else SweepFolder.of(path)
    rows = read_table(path) if folder is None else [row for _, row in folder.rows()]
    name = figure_of(rows, figure, Path(path))
    shown = lines(rows, name)
    figures = {cost: _quality(shown, name, cost, ink) for cost in AXES}
    curves = {} if folder is None else training_curves(folder)
    return figures | ({"training": _training(curves, ink)} if curves else {})


def figure_of(rows: Sequence[Mapping[str, Any]], figure: str | None, path: Path) -> str:
    """The name of a figure that rows have; raises ``ValueError`` where they do not."""
    known = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    if not known:
        raise ValueError(f"no cell of {path} is done yet")
    if figure is not None and figure not in known:
        raise ValueError(f"{path} has no {figure}: there are {', '.join(known)}")
    return figure or known[0]


def training_curves(folder: SweepFolder) -> dict[str, list[tuple[list[int], list[float]]]]:
    """Steps and losses by the names of the models, a pair of lists for each seed."""
    found: dict[str, list[tuple[list[int], list[float]]]] = {}
    for model in folder.sweep.all_models:
        file = folder.training(model) / "metrics.jsonl"
        if model.source is not None or not file.is_file():
            continue
        records = [record for line in file.read_text().splitlines() if (record := _record(line)) is not None]
        if records:
            steps, losses = np.array(records).T
            pieces = np.array_split(np.arange(len(steps)), min(len(steps), MOST_POINTS))
            means = [[float(values[piece].mean()) for piece in pieces] for values in (steps, losses)]
            found.setdefault(model.label, []).append((list(map(round, means[0])), means[1]))
    return found


def _record(line: str) -> tuple[float, float] | None:
    """None for a line that a run is writing."""
    try:
        record = json.loads(line)
        return float(record["step"]), float(record["loss"])
    except (ValueError, KeyError, TypeError):
        return None


def _figure(legend: int, ink: str) -> tuple[Figure, Axes]:
    """An empty one with room for so many entries below it."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"figures need matplotlib: pip install 'madformer[evaluation]' ({first_line(error)})"
        ) from error
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    with matplotlib.rc_context(dict.fromkeys(names, ink) | {"font.size": 10}):
        figure = Figure(figsize=(4.7, 3.2 + 0.19 * legend), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(alpha=0.18)
        axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Figure, ink: str) -> None:
    figure.legend(loc="outside lower left", frameon=False, labelcolor=ink, fontsize=9)


def styles(shown: Sequence[Line]) -> list[dict[str, Any]]:
    """Colour, marker and dash of each line: by the model, and by the settings where there are several models."""
    models = list(dict.fromkeys(line.model for line in shown))
    settings = list(dict.fromkeys(line.settings for line in shown))
    found = []
    for line in shown:
        by_model, by_setting = models.index(line.model), settings.index(line.settings)
        colour = by_model if len(models) > 1 else by_setting
        found.append(
            {
                "color": COLOURS[colour % len(COLOURS)],
                "marker": MARKERS[colour % len(MARKERS)],
                "linestyle": DASHES[by_setting % len(DASHES)] if len(models) > 1 else "-",
            }
        )
    return found


def _quality(shown: Sequence[Line], figure: str, cost: str, ink: str) -> Figure:
    drawn, axes = _figure(len(shown), ink)
    for line, style in zip(shown, styles(shown), strict=True):
        values = [point.estimate for point in line.points]
        middle = [one.value for one in values]
        # where there is no interval, none is drawn
        below = [one.value - one.low if math.isfinite(one.low) else 0.0 for one in values]
        above = [one.high - one.value if math.isfinite(one.high) else 0.0 for one in values]
        axes.errorbar(
            [point.cost(cost) for point in line.points], middle, yerr=[below, above], label=line.label, capsize=2.5,
            markersize=4, linewidth=1.4, elinewidth=1, **style,
        )  # fmt: skip
    _scale(axes.set_xscale, axes.set_xticks, sorted({point.cost(cost) for line in shown for point in line.points}))
    direction = "less is better" if is_lower_better(figure) else "more is better"
    axes.set(xlabel=AXES[cost], ylabel=f"{figure.upper()} ({direction})")
    lows = [one.estimate.low for line in shown for one in line.points]
    highs = [one.estimate.value for line in shown for one in line.points]
    if min(highs) > 0 and min(lows) > 0 and max(highs) / min(highs) > 30:
        axes.set_yscale("log")
    _legend(drawn, ink)
    return drawn


def _scale(set_scale: Callable[..., Any], set_ticks: Callable[..., Any], values: Sequence[float]) -> None:
    """Logarithmic where costs double from point to point; labelled at the points where these are few."""
    if values[0] <= 0 or values[-1] / values[0] < 4:
        return
    set_scale("log")
    ticks: list[float] = []
    for value in values:
        # those too near to the one before would be printed over it
        if not ticks or value / ticks[-1] > 1.25:
            ticks.append(value)
    if len(ticks) <= 10:
        set_ticks(ticks, [f"{tick:.3g}" for tick in ticks])
        set_ticks([], minor=True)


def _training(curves: Mapping[str, Sequence[tuple[list[int], list[float]]]], ink: str) -> Figure:
    drawn, axes = _figure(len(curves), ink)
    for index, (label, runs) in enumerate(curves.items()):
        for number, (steps, losses) in enumerate(runs):
            name = label if number == 0 else None
            axes.plot(steps, losses, color=COLOURS[index % len(COLOURS)], linewidth=1, alpha=0.8, label=name)
    axes.set(xlabel="training steps", ylabel="loss")
    values = [loss for runs in curves.values() for _, losses in runs for loss in losses if loss > 0]
    if values and max(values) / min(values) > 10:
        axes.set_yscale("log")
    _legend(drawn, ink)
    return drawn
