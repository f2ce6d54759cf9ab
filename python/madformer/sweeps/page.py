"""A sweep as one page of HTML that needs nothing else: figures, samples, the table and the protocol."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import madformer
from madformer.evaluation import Estimate
from madformer.files.atomic import atomic_path
from madformer.sweeps.config import Cell
from madformer.sweeps.figures import AXES, figure_of, plot
from madformer.sweeps.folder import SweepFolder, scores_of
from madformer.sweeps.summary import Line, comparisons, lines
from madformer.sweeps.template import PAGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]

REPORT = "report.html"
INK = "#010203"
"""A colour that nothing else has, in whose place the page's own goes."""
HEADINGS = {cost: f"Against {label}" for cost, label in AXES.items()} | {"training": "Training"}
MOST_LINES = 24
"""Of which samples are shown."""


@dataclass(frozen=True)
class Entry:
    """Of a table: what it says, what it is sorted by, and what stands small beside it."""

    text: str
    sort: float | str = ""
    more: str = ""

    @classmethod
    def number(cls, value: float | None, how: str = ".4g", more: str = "") -> Entry:
        if value is None or not math.isfinite(value):
            return cls("–")
        return cls(format(value, how), value, more)

    @classmethod
    def estimate(cls, one: Estimate) -> Entry:
        interval = f"[{one.low:.4g}, {one.high:.4g}]" if math.isfinite(one.low) else ""
        return cls.number(one.value, more=interval)


def write_report(path: str | Path, out: str | Path | None = None, figure: str | None = None) -> Path:
    """Write the report of a sweep's folder, finished or not, and give its path.

    Args:
        out: the file; unless given, ``report.html`` in the folder. figure: as :func:`plot` has it.

    Raises:
        As :func:`plot`; ``OSError`` where the file cannot be written.
    """
    import jinja2

    folder = SweepFolder.of(path)
    rows = folder.rows()
    values = [row for _, row in rows]
    name = figure_of(values, figure, folder.path)
    figures = [(HEADINGS[key], svg_of(drawn, key)) for key, drawn in plot(path, name, ink=INK).items()]
    shown = lines(values, name)
    columns, entries = _table(values)
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(PAGE)
    text = page.render(
        title=f"Sweep: {folder.path.resolve().name}",
        done=len(rows),
        total=len(folder.sweep.cells),
        models=len({cell.model.id for cell, _ in rows}),
        intervals=f"Intervals are of 95 %: {_methods(shown)}.",
        warnings=list(dict.fromkeys(line for row in values for line in row["warnings"])),
        figures=figures,
        **_sureness(shown, values, name),
        strips=_strips(folder, shown, rows),
        shown="; ".join(filter(None, values[0].get("shown", []))),
        columns=columns,
        rows=entries,
        protocols=_protocols(values),
        footer=f"Made by madformer {madformer.__version__} report. NFE counts both branches of guidance.",
    )
    target = Path(out) if out is not None else folder.path / REPORT
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def svg_of(figure: Figure, name: str) -> str:
    """The figure as an element of a page, whose text and axes have the colour of the page's."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # texts stay texts, and no two figures of a page name a part alike
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace(INK, "currentColor").replace("<svg ", '<svg role="img" ', 1)


def _methods(shown: Sequence[Line]) -> str:
    methods = dict.fromkeys(point.estimate.method for line in shown for point in line.points)
    return "; ".join(methods)


def _sureness(shown: Sequence[Line], rows: Sequence[Mapping[str, Any]], figure: str) -> dict[str, Any]:
    spreads = [
        [
            Entry(line.label, line.label),
            Entry.number(point.steps, "d"),
            Entry.estimate(point.estimate),
            Entry.number(point.spread.training),
            Entry.number(point.spread.sampling),
            Entry.number(point.spread.ratio, ".2g"),
        ]
        for line in shown
        for point in line.points
        if point.spread is not None
    ]
    differences = [
        [
            Entry(f"{one.first} → {one.second}", one.first),
            Entry(one.settings, one.settings),
            Entry.number(one.steps, "d"),
            Entry.estimate(one.difference),
        ]
        for one in comparisons(rows, figure)
    ]
    return {
        "spreads": spreads,
        "spread_columns": ["model", "steps", f"{figure}, mean", "between trainings", "between draws", "ratio"],
        "differences": differences,
        "difference_columns": ["models", "settings", "steps", f"difference of {figure}"],
    }


def _strips(
    folder: SweepFolder, shown: Sequence[Line], rows: Sequence[tuple[Cell, Mapping[str, Any]]]
) -> list[tuple[str, list[tuple[int, str]]]]:
    """Of each line its strips by the number of steps, base64."""
    cells = {cell.id: cell for cell, _ in rows}
    found = []
    for line in shown[:MOST_LINES]:
        strips = []
        for point in line.points:
            data = folder.pictures(cells[point.rows[0]["cell"]])
            if data is not None:
                strips.append((point.steps, base64.b64encode(data).decode()))
        if strips:
            found.append((line.label, strips))
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Entry]]]:
    """Headings and rows; settings that are the same in all rows stand in the protocol alone."""
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    settings = [
        name
        for name in ("training_seed", "scheduler", "guidance", "refresh_every", "diffusion_layers", "sampling_seed")
        if len({row[name] for row in rows}) > 1
    ]
    costs = {
        "nfe_steps": ("NFE", 1, ".4g"),
        "nfe_layers": ("NFE, layers", 1, ".5g"),
        "flops_per_image": ("GFLOP", 1e9, ".4g"),
        "seconds_per_image": ("s/image", 1, ".3g"),
        "peak_memory_bytes": ("peak MB", 1e6, ".0f"),
    }
    columns = ["model", *(name.replace("_", " ") for name in settings), "steps", *names]
    columns += [heading for heading, _, _ in costs.values()]
    entries = []
    for row in rows:
        scores = scores_of(row)
        cells = [Entry(row["model"], row["model"])]
        cells += [_setting(row[name]) for name in settings]
        cells.append(Entry.number(row["steps"], "d"))
        cells += [Entry.estimate(scores[name].estimate) if name in scores else Entry("–") for name in names]
        cells += [Entry.number(row["costs"][cost] / unit, how) for cost, (_, unit, how) in costs.items()]
        entries.append(cells)
    return columns, entries


def _setting(value: Any) -> Entry:
    if value is None:
        return Entry("–")
    return Entry(value, value) if isinstance(value, str) else Entry.number(value)


def _protocols(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The fields of the figures' protocols: those that all have alike, then each one's own."""
    found: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        for name, score in scores_of(row).items():
            for field, value in score.protocol.to_dict().items():
                values = found.setdefault(name, {}).setdefault(field, [])
                if value not in values:
                    values.append(value)
    first = next(iter(found.values()))
    alike = [field for field in first if all(fields.get(field) == first[field] for fields in found.values())]
    told = {
        name: [(f, _told(values)) for f, values in fields.items() if values not in ([None], [""]) and f != "metric"]
        for name, fields in found.items()
    }
    own = [(name, [entry for entry in entries if entry[0] not in alike]) for name, entries in told.items()]
    common = next(iter(told.values()))
    return [
        ("all figures", [e for e in common if e[0] in alike]),
        *((name, entries) for name, entries in own if entries),
    ]


def _told(values: Sequence[Any]) -> str:
    if len(values) == 1:
        return " x ".join(map(str, values[0])) if isinstance(values[0], tuple) else str(values[0])
    if len(values) <= 6 and all(isinstance(value, (int, float)) for value in values):
        return ", ".join(map(str, values))
    return f"{len(values)} different ones"
