"""What a sweep has measured of block counts and splits, from its folder or its table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from madformer.advice.proposal import Candidate, Unit
from madformer.arguments import is_real, whole_number
from madformer.config import MADFormerConfig
from madformer.data.images import shape_of
from madformer.data.latents import LatentDescription
from madformer.evaluation import Estimate
from madformer.evaluation.moments import Array
from madformer.files.text import printable
from madformer.model.pretrained import config_of
from madformer.sweeps.config import HIGHER, LOWER, is_lower_better
from madformer.sweeps.folder import SweepFolder, read_table, scores_of
from madformer.sweeps.summary import point_of

__all__ = ["Measured", "Measurement", "read_measured", "spearman"]

Row = Mapping[str, Any]
_COSTS = {"layers": "nfe_layers", "steps": "nfe_steps"}


@dataclass(frozen=True)
class Measurement:
    """The best that a sweep has of a candidate within a budget.

    Attributes:
        estimate: of the figure, over training seeds and draws, or what of them there is. steps, guidance: how it was
            drawn. layers: evaluations that an image took, both branches of guidance included.
    """

    candidate: Candidate
    estimate: Estimate
    steps: int
    guidance: float
    layers: float


@dataclass(frozen=True)
class Measured:
    """Rows of one sweep, all of one protocol.

    Attributes:
        source: what messages call it. figure: what quality is. rows: that have it, by the candidates that they are of.
    """

    source: str
    figure: str
    rows: tuple[tuple[Candidate, Row], ...]

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller figure is a better one."""
        return is_lower_better(self.figure)

    def within(self, budget: float, unit: Unit) -> dict[Candidate, Measurement]:
        """The best of each candidate that is within the budget, best first."""
        sign = 1 if self.lower_is_better else -1
        groups: dict[tuple[Candidate, str], list[Row]] = {}
        for candidate, row in self.rows:
            if row["costs"][_COSTS[unit]] <= budget * (1 + 1e-9):
                groups.setdefault((candidate, _setting(row)), []).append(row)
        found: dict[Candidate, Measurement] = {}
        for (candidate, _), rows in groups.items():
            estimate, first = point_of(rows, self.figure).estimate, rows[0]
            known = found.get(candidate)
            if known is None or sign * estimate.value < sign * known.estimate.value:
                layers = float(first["costs"]["nfe_layers"])
                found[candidate] = Measurement(candidate, estimate, first["steps"], float(first["guidance"]), layers)
        return dict(sorted(found.items(), key=lambda item: sign * item[1].estimate.value))


def read_measured(
    path: str | Path,
    base: MADFormerConfig,
    description: LatentDescription | None,
    metric: str | None = None,
    *,
    otherwise: MADFormerConfig | None = None,
    same_data: bool = False,
) -> Measured:
    """A sweep's folder, finished or not, or a table (``.parquet``) of one.

    Args:
        base: a model of the same image and of as many layers.
        description: of the latents that advice is asked on; None where nobody noted what they are of.
        metric: what quality is; unless given, the first figure that was measured.
        otherwise: has the blocks and layers of a table's models where no column does.
        same_data: the sweep is of the same data, though its reference has another name.

    Raises:
        FileNotFoundError: there is none. ImportError: there is no pyarrow for a table.
        ValueError: it is damaged, empty, of other data or of models of another geometry, lacks a column, or mixes
            protocols or commits; one line.
    """
    name = printable(path)
    try:
        rows = _folder_rows(Path(path), base) if Path(path).is_dir() else _table_rows(Path(path))
    except ValueError as error:
        raise ValueError(str(error) if name in str(error) else f"{name}: {error}") from error
    if not rows:
        raise ValueError(f"{name} holds no row: the sweep has not measured anything yet")
    _check_rows(rows, name)
    if description is not None:
        _check_data(rows, description, name, same_data=same_data)
    placed = [(_candidate(row, base, otherwise, name), row) for row in rows]
    figures = [figure for figure in (*LOWER, *HIGHER) if any(figure in row["scores"] for row in rows)]
    known = f"it has {', '.join(figures)}" if figures else f"known are {', '.join((*LOWER, *HIGHER))}"
    if not figures or (metric is not None and metric not in figures):
        raise ValueError(f"{name} has no figure{f' {metric}' if metric else ''}: {known}")
    figure = metric or figures[0]
    has = [one for one in placed if figure in one[1]["scores"] and math.isfinite(scores_of(one[1])[figure].value)]
    return Measured(name, figure, tuple(has))


def _folder_rows(folder: Path, base: MADFormerConfig) -> list[Row]:
    name, found = printable(folder), list[Row]()
    for cell, row in SweepFolder.of(folder).rows():
        training = cell.model.config
        own = training.model if training is not None else config_of(str(cell.model.source))
        if own.latent_shape != base.latent_shape:
            given, taken = (" x ".join(map(str, shape)) for shape in (own.latent_shape, base.latent_shape))
            raise ValueError(f"{name} is of models of another geometry: their latents are {given}, these are {taken}")
        found.append(row | {"num_layers": own.num_layers, "num_blocks": own.num_blocks})
    return found


def _table_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no sweep's folder or table at {printable(path)}")
    return read_table(path)


def _check_rows(rows: Sequence[Row], name: str) -> None:
    """Raises ``ValueError`` for what is no number, and for figures that different commits made."""
    for row in rows:
        told = {"steps": row.get("steps"), "guidance": row.get("guidance"), **row["costs"]}
        for column in ("steps", "guidance", *_COSTS.values()):
            if not is_real(told.get(column)) or not math.isfinite(told[column]):
                raise ValueError(f"{name} is no table of a sweep: {column}={told.get(column)} is no number")
    for column in rows[0]:
        values = list(dict.fromkeys(str(row.get(column)) for row in rows))
        if column.rpartition(".")[2] == "commit" and len(values) > 1:
            raise ValueError(
                f"{name} mixes figures that are not to be compared: {column} is {' and '.join(values[:2])}"
            )


def _check_data(rows: Sequence[Row], description: LatentDescription, name: str, *, same_data: bool) -> None:
    """Raises ``ValueError`` where the pictures are of another size than the latents', or held against other data."""
    shape, source = shape_of(description.image_size), description.source.partition(", without ")[0]
    for protocol in (score.protocol for row in rows for score in scores_of(row).values()):
        if protocol.image_size != shape:
            given, taken = (" x ".join(map(str, sides)) for sides in (protocol.image_size, shape))
            raise ValueError(f"{name} is of pictures of {given} pixels, and these latents of {taken}")
        if not same_data and not _is_of(source, str(protocol.reference)):
            raise ValueError(
                f"{name} is of another data set: its reference is {printable(str(protocol.reference))}, and the "
                f"latents are of {printable(source)} (--same-data where these are two names of one)"
            )


def _is_of(source: str, reference: str) -> bool:
    """Whether two names say the same data; ``emoji:32`` is what ``data/emoji64`` holds, at another size."""
    ours, theirs = (name.rstrip("/").rpartition("/")[2] for name in (source, reference))
    rendered = re.fullmatch(r"([a-z]+):\d+", theirs)
    return re.fullmatch(f"{rendered[1]}:?\\d*", ours) is not None if rendered else ours == theirs


def _candidate(row: Row, base: MADFormerConfig, otherwise: MADFormerConfig | None, name: str) -> Candidate:
    def told(field: str) -> int:
        for value in (row.get(field), row["values"].get(f"model.{field}"), getattr(otherwise, field, None)):
            if value is not None:
                return whole_number(f"{name}: {field}", value, 1)
        raise ValueError(f"{name} does not say its models' {field}: give --model or --preset")

    if (layers := told("num_layers")) != base.num_layers:
        raise ValueError(f"{name} is of models with {layers} layers, and advice is asked for {base.num_layers}")
    return Candidate(told("num_blocks"), told("diffusion_layers"))


def _setting(row: Row) -> str:
    """Everything that makes rows more than draws of one thing."""
    names = ("model", "scheduler", "steps", "guidance", "refresh_every")
    return repr([*(row.get(name) for name in names), sorted(row["values"].items())])


def spearman(first: Array, second: Array) -> Array:
    """Rank correlation of the last axis, ties having their mean rank; NaN where one side is all ties."""
    ranks = [_ranks(np.asarray(side, np.float64)) for side in (first, second)]
    first, second = (side - side.mean(-1, keepdims=True) for side in ranks)
    with np.errstate(invalid="ignore"):
        return np.asarray((first * second).sum(-1) / np.sqrt(np.square(first).sum(-1) * np.square(second).sum(-1)))


def _ranks(values: Array) -> Array:
    less = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    return np.asarray(less + (equal + 1) / 2)
