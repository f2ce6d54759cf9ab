"""Put the tables and figures of the experiments into ``docs/experiments.md``, where its text has places for them.

    python -m benchmarks.experiments.page [--check]

A place is ``<!-- cells NAME [OTHER ...] against LABEL -->`` to ``<!-- end -->``: a row a model, a column a number of
steps, each with its interval over trainings; below it the differences from the model of that label
(:func:`differences`), and the cells of ``NAME.toml`` that were not run. ``<!-- noise NAME -->`` shows what the variance
of one model's figure consists of, and the least difference that seeds can resolve. ``<!-- modes NAME -->`` shows the
record of ``benchmarks.experiments.modes``. Names are those of tables in ``benchmarks/results/experiments``; OTHER are
tables whose models are compared as well, at the numbers of steps of NAME.

``--check`` changes nothing, and ends with status 1 where the page is not what the tables make of it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import scipy.stats

from benchmarks import ROOT
from benchmarks.experiments import FIGURE, SWEEPS, TABLES
from benchmarks.experiments.modes import less_exact
from benchmarks.precision import EXACT
from madformer.evaluation import Estimate
from madformer.evaluation.uncertainty import student
from madformer.sweeps import Line, Point, Sweep, lines, plot, read_table
from madformer.sweeps.summary import training_means

PAGE = ROOT / "docs" / "experiments.md"
IMAGES = ROOT / "docs" / "images" / "experiments"
SCALE = 1000
"""Numbers are shown times this."""
FEW = 2
"""Numbers of steps that need no figure."""
PLACE = re.compile(
    r"(<!-- (?P<kind>cells|noise|modes) (?P<names>[\w -]+?)(?: against (?P<base>[^>]+?))? -->\n).*?(<!-- end -->)",
    re.DOTALL,
)

Rows = Sequence[Mapping[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="say whether the page is up to date, and change nothing")
    options = parser.parse_args(arguments)
    before = PAGE.read_text()
    try:
        after = filled(before)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.check:
        if after != before:
            print(
                f"{PAGE.name} is not what the tables make of it: python -m benchmarks.experiments.page", file=sys.stderr
            )
        return int(after != before)
    PAGE.write_text(after)
    for name in sorted({match["names"].split()[0] for match in PLACE.finditer(after) if match["kind"] == "cells"}):
        if (file := TABLES / f"{name}.parquet").is_file() and figure(name, read_table(file)):
            IMAGES.mkdir(exist_ok=True)
            plot(file, FIGURE)["nfe_steps"].savefig(IMAGES / f"{name}.png", dpi=130, facecolor="white")
    return 0


def filled(text: str) -> str:
    """A page with its places filled from the tables.

    Raises:
        ValueError: numbers of different protocols would stand together, or a label is of no model.
    """

    def fill(match: re.Match[str]) -> str:
        names = match["names"].split()
        if match["kind"] == "modes":
            return match[1] + "\n".join(compared_modes(TABLES / f"{names[0]}.json")) + "\n" + match[5]
        files = [file for name in names if (file := TABLES / f"{name}.parquet").is_file()]
        rows = read_table(*files) if files else []
        if len(files) > 1:
            # of other tables what stands beside the first one's
            steps = {row["steps"] for row in read_table(files[0])}
            rows = [row for row in rows if row["steps"] in steps]
        if match["kind"] == "noise":
            return match[1] + "\n".join(noise(rows)) + "\n" + match[5]
        text = cells(rows, match["base"]) + not_run(names[0], rows) + figure(names[0], rows)
        return match[1] + "\n".join(text) + "\n" + match[5]

    return PLACE.sub(fill, text)


def cells(rows: Rows, base: str | None) -> list[str]:
    """A table of models and numbers of steps, and one of the differences from ``base``."""
    shown = lines(rows, FIGURE)
    if not shown:
        return ["*Not run yet.*", ""]
    steps = sorted({point.steps for line in shown for point in line.points})
    heads = ["model", *(f"{number} steps" for number in steps)]
    told = [[line.label, *(_value(line, number) for number in steps)] for line in shown]
    text = [f"KID x {SCALE}, 95 % intervals; {_of_what(shown)}.", "", *_table(heads, told), ""]
    if base is None:
        return text
    if base not in {line.model for line in shown}:
        raise ValueError(f"no model is called {base!r}: there are {', '.join(line.label for line in shown)}")
    if found := differences(shown, base):
        heads = [f"less *{base}*", *heads[1:]]
        told = [[label, *(by.get(number, "") for number in steps)] for label, by in found.items()]
        text += [
            "Differences (below 0 is better than it; **bold** where the interval leaves 0 out). Intervals hold for all",
            "of a column together, by the deviation of trainings that its models have in common:",
            "",
            *_table(heads, told),
            "",
        ]
    return text


def differences(shown: Sequence[Line], base: str) -> dict[str, dict[int, str]]:
    """Of every other model from the one called ``base`` and sampled alike, by its label and number of steps.

    Two or three trainings of one model say little of how far its trainings scatter. All models of a column together say
    enough, where they are taken to scatter alike: Student's interval by their common variance, at 95 % for all models
    of the column (Bonferroni).
    """
    columns: dict[tuple[str, int], dict[str, list[float]]] = {}
    for line in shown:
        for point in line.points:
            columns.setdefault((line.settings, point.steps), {})[line.model] = training_means(point, FIGURE)
    found: dict[str, dict[int, str]] = {}
    for (settings, steps), values in columns.items():
        degrees = sum(len(own) - 1 for own in values.values())
        if base not in values or len(values) == 1 or not degrees:
            continue
        variance = sum(statistics.pvariance(own) * len(own) for own in values.values()) / degrees
        quantile = float(scipy.stats.t.ppf(1 - 0.025 / (len(values) - 1), degrees))
        for model, own in values.items():
            if model == base:
                continue
            value = statistics.fmean(own) - statistics.fmean(values[base])
            half = quantile * math.sqrt(variance * (1 / len(own) + 1 / len(values[base])))
            label = f"{model}, {settings}" if settings else model
            found.setdefault(label, {})[steps] = _difference(value, half)
    return found


def noise(rows: Rows) -> list[str]:
    """What seeds alone come to, and the least difference of two means that is resolved."""
    shown = lines(rows, FIGURE)
    if not shown:
        return ["*Not run yet.*", ""]
    told = []
    for line in shown:
        for point in line.points:
            if (spread := point.spread) is None:
                continue
            # of one training, whose draws are averaged
            own = math.hypot(spread.training, spread.sampling / math.sqrt(_draws(point)))
            least = [SCALE * student(2 * seeds - 2) * own * math.sqrt(2 / seeds) for seeds in (2, 3, 5)]
            told.append(
                [
                    line.label, str(point.steps), f"{SCALE * point.estimate.value:.2f}",
                    f"{SCALE * spread.training:.2f}", f"{SCALE * spread.sampling:.2f}",
                    *(f"{value:.2f}" for value in least),
                ]
            )  # fmt: skip
    heads = ["model", "steps", "mean", "deviation of trainings", "of draws", "least, 2 seeds", "3 seeds", "5 seeds"]
    return [f"KID x {SCALE}; {_of_what(shown)}.", "", *_table(heads, told), ""]


def _draws(point: Point) -> int:
    return len({row["sampling_seed"] for row in point.rows})


def compared_modes(file: Path) -> list[str]:
    """The engine's modes, each beside ``exact``."""
    if not file.is_file():
        return ["*Not run yet.*", ""]
    record = json.loads(file.read_text())
    rows = record["rows"]
    heads = ["mode", "steps", "KID", "less exact", "PSNR, dB", "worst picture", "SSIM", "features", "time"]
    told = []
    for steps in sorted({row["steps"] for row in rows}):
        for mode in dict.fromkeys(row["mode"] for row in rows):
            own = [row for row in rows if (row["mode"], row["steps"]) == (mode, steps)]
            mean = {
                name: statistics.fmean(row[name] for row in own) for name, value in own[0].items() if name != "mode"
            }
            cells = [mode, str(steps), f"{SCALE * mean[FIGURE]:.1f}"]
            if mode == EXACT:
                exact = mean["seconds_per_image"]
                cells += [""] * 5
            else:
                less = less_exact(rows, mode, steps, FIGURE)
                # of one training there is no interval
                half = student(len(less) - 1) * statistics.stdev(less) / math.sqrt(len(less)) if less[1:] else math.nan
                cells += [_difference(statistics.fmean(less), half), f"{mean['picture_psnr_db']:.1f}"]
                cells += [f"{min(row['worst_picture_psnr_db'] for row in own):.1f}", f"{mean['ssim']:.4f}"]
                cells += [f"{mean['feature_distance']:.4f}"]
            told.append([*cells, f"{mean['seconds_per_image'] / exact:.2f}"])
    trainings, draws = (len({row[name] for row in rows}) for name in ("training_seed", "sampling_seed"))
    what = f"*{record['label']}* of `{record['sweep']}`, {trainings} trainings, {draws} draws"
    return [f"KID x {SCALE}; {what} of {record['num_images']} images.", "", *_table(heads, told), ""]


def not_run(name: str, rows: Rows) -> list[str]:
    """Cells of a sweep's file that no table has."""
    sweep = Sweep.of(tomllib.loads((SWEEPS / f"{name}.toml").read_text()))
    done = {row["cell"] for row in rows}
    missing = [cell for cell in sweep.cells if cell.id not in done]
    if not missing:
        return []
    models: dict[str, int] = {}
    for cell in missing:
        models[cell.model.label] = models.get(cell.model.label, 0) + 1
    listed = ", ".join(f"{label} ({count})" for label, count in models.items())
    return [f"Not run: {len(missing)} of {len(sweep.cells)} cells: {listed}.", ""]


def figure(name: str, rows: Rows) -> list[str]:
    """Where the figure stands, of a sweep over enough numbers of steps to draw lines through."""
    if len({row["steps"] for row in rows}) <= FEW:
        return []
    return [f"![KID against evaluations, with intervals](images/experiments/{name}.png)", ""]


def _value(line: Line, steps: int) -> str:
    estimate = next((point.estimate for point in line.points if point.steps == steps), None)
    return "" if estimate is None else _shown(estimate)


def _shown(estimate: Estimate) -> str:
    half = (estimate.high - estimate.low) / 2
    return f"{SCALE * estimate.value:.1f}" + ("" if math.isnan(half) else f" ± {SCALE * half:.1f}")


def _difference(value: float, half: float) -> str:
    text = f"{SCALE * value:+.1f}" + ("" if math.isnan(half) else f" ± {SCALE * half:.1f}")
    return f"**{text}**" if abs(value) > half else text


def _of_what(shown: Sequence[Line]) -> str:
    rows = [row for line in shown for point in line.points for row in point.rows]
    seeds = [
        len({row["training_seed"] for row in rows if row["model"] == model}) for model in {r["model"] for r in rows}
    ]
    draws = len({row["sampling_seed"] for row in rows})
    protocol = next(iter(rows[0]["scores"].values()))["protocol"]
    trainings = str(max(seeds)) if len(set(seeds)) == 1 else f"{min(seeds)} to {max(seeds)}"
    return (
        f"{trainings} trainings of each, {draws} draws of {protocol['num_images']} images against "
        f"{protocol['num_reference']} that were held out"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


if __name__ == "__main__":
    sys.exit(main())
