"""What a sweep has measured of block counts and splits, from its folder or its table."""

from __future__ import annotations

import dataclasses
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
from madformer.evaluation import MEASURED, Estimate, Protocol
from madformer.evaluation.moments import Array
from madformer.evaluation.uncertainty import student
from madformer.files.text import first_line, printable
from madformer.model.pretrained import config_of
from madformer.sweeps.config import HIGHER, LOWER, is_lower_better
from madformer.sweeps.folder import VARYING, SweepFolder, flat_row, pyarrow_or_why_not

__all__ = ["Measured", "Measurement", "read_measured", "spearman"]

Row = Mapping[str, Any]
_COMMIT = "commit"
_NUMBERS = ("steps", "guidance", "nfe_steps", "nfe_layers")
"""Columns that a table has to have, in every row."""


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
        source: what messages call it. figure: what quality is. lower_is_better: of the figure.
    """

    source: str
    figure: str
    rows: tuple[Row, ...]

    @property
    def lower_is_better(self) -> bool:
        return is_lower_better(self.figure)

    def within(self, budget: float, unit: Unit) -> dict[Candidate, Measurement]:
        """The best of each candidate that is within the budget, best first."""
        sign = 1 if self.lower_is_better else -1
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            if row["nfe_layers" if unit == "layers" else "nfe_steps"] <= budget * (1 + 1e-9):
                groups.setdefault(_setting(row), []).append(row)
        found: dict[Candidate, Measurement] = {}
        for rows in groups.values():
            one = self._measurement(rows)
            known = found.get(one.candidate)
            if known is None or sign * one.estimate.value < sign * known.estimate.value:
                found[one.candidate] = one
        return dict(sorted(found.items(), key=lambda item: sign * item[1].estimate.value))

    def _measurement(self, rows: Sequence[Row]) -> Measurement:
        values: dict[Any, list[float]] = {}
        for row in rows:
            values.setdefault(row.get("training_seed"), []).append(float(row[self.figure]))
        first = rows[0]
        means = [float(np.mean(own)) for own in values.values()]
        if len(means) > 1:
            estimate = _around(means, f"{len(means)} training seeds")
        elif len(rows) > 1:
            estimate = _around(values.popitem()[1], f"{len(rows)} sampling seeds of one training")
        else:
            low, high = (first.get(f"{self.figure}_{end}") for end in ("low", "high"))
            estimate = Estimate.bare(means[0], "no interval: one training, one draw")
            if low is not None and high is not None:
                estimate = Estimate(means[0], low, high, "one training, one draw")
        return Measurement(
            first["candidate"], estimate, int(first["steps"]), float(first["guidance"]), float(first["nfe_layers"])
        )


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
    rows = _folder_rows(Path(path), base) if Path(path).is_dir() else _table_rows(Path(path), base, otherwise)
    if not rows:
        raise ValueError(f"{name} holds no row: the sweep has not measured anything yet")
    _check_protocol(rows, name)
    if description is not None:
        _check_data(rows, description, name, same_data=same_data)
    figures = [figure for figure in (*LOWER, *HIGHER) if any(_is_number(row.get(figure)) for row in rows)]
    if metric is not None and metric not in figures:
        known = f"there are {', '.join(figures)}" if figures else "there is none"
        raise ValueError(f"{name} has no figure {metric}: {known}")
    if not figures:
        raise ValueError(f"{name} has no figure; known are {', '.join((*LOWER, *HIGHER))}")
    figure = metric or figures[0]
    return Measured(name, figure, tuple(row for row in rows if _is_number(row.get(figure))))


def _folder_rows(folder: Path, base: MADFormerConfig) -> list[dict[str, Any]]:
    name, found = printable(folder), []
    for cell, row in SweepFolder.of(folder).rows():
        training = cell.model.config
        own = training.model if training is not None else config_of(str(cell.model.source))
        if own.latent_shape != base.latent_shape:
            given, taken = (" x ".join(map(str, shape)) for shape in (own.latent_shape, base.latent_shape))
            raise ValueError(f"{name} is of models of another geometry: their latents are {given}, these are {taken}")
        told = {"num_layers": own.num_layers, "num_blocks": own.num_blocks}
        found.append(_with_candidate(flat_row(row) | told, base, None, name))
    return found


def _table_rows(path: Path, base: MADFormerConfig, otherwise: MADFormerConfig | None) -> list[dict[str, Any]]:
    pyarrow = pyarrow_or_why_not()
    if not path.is_file():
        raise FileNotFoundError(f"no sweep's folder or table at {printable(path)}")
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{printable(path)} is no table: {first_line(error)}") from error
    for column in _NUMBERS if rows else ():
        if column not in rows[0]:
            raise ValueError(f"{printable(path)} is no table of a sweep: it has no column {column}")
        if not all(_is_number(row[column]) for row in rows):
            raise ValueError(f"{printable(path)} is no table of a sweep: {column} is no number in some rows")
    return [_with_candidate(row, base, otherwise, printable(path)) for row in rows]


def _with_candidate(
    row: dict[str, Any], base: MADFormerConfig, otherwise: MADFormerConfig | None, name: str
) -> dict[str, Any]:
    """With the row's place among candidates."""

    def told(field: str) -> int:
        for value in (row.get(field), row.get(f"train.model.{field}"), getattr(otherwise, field, None)):
            if value is not None:
                return whole_number(f"{name}: {field}", value, 1)
        raise ValueError(f"{name} does not say its models' {field}: give --model or --preset")

    if (layers := told("num_layers")) != base.num_layers:
        raise ValueError(f"{name} is of models with {layers} layers, and advice is asked for {base.num_layers}")
    return row | {"candidate": Candidate(told("num_blocks"), told("diffusion_layers"))}


def _is_number(value: Any) -> bool:
    return is_real(value) and math.isfinite(value)


def _check_protocol(rows: Sequence[Row], name: str) -> None:
    """Raises ``ValueError`` where figures were found in different ways."""
    own = [field.name for field in dataclasses.fields(Protocol) if field.name not in (*MEASURED, *VARYING)]
    columns = [*(f"protocol.{field}" for field in own), *(key for key in rows[0] if key.split(".")[-1] == _COMMIT)]
    columns += [column for column in rows[0] if column.endswith("_options")]
    for column in columns:
        found = {repr(row.get(column)): row.get(column) for row in rows}
        # a row that lacks a figure lacks its options
        values = [value for value in found.values() if value is not None or not column.endswith("_options")]
        if len(values) > 1:
            raise ValueError(
                f"{name} mixes figures that are not to be compared: {column} is {values[0]!r} and {values[1]!r}"
            )


def _check_data(rows: Sequence[Row], description: LatentDescription, name: str, *, same_data: bool) -> None:
    """Raises ``ValueError`` where the pictures are of another size than the latents', or held against other data."""
    shape, source = shape_of(description.image_size), description.source.partition(", without ")[0]
    for row in rows:
        size, reference = row.get("protocol.image_size"), str(row.get("protocol.reference"))
        if size is not None and tuple(size) != shape:
            given, taken = (" x ".join(map(str, sides)) for sides in (size, shape))
            raise ValueError(f"{name} is of pictures of {given} pixels, and these latents of {taken}")
        if not same_data and _bare(reference) != _bare(source):
            raise ValueError(
                f"{name} is of another data set: its reference is {printable(reference)}, and the latents are of "
                f"{printable(source)} (--same-data where these are two names of one)"
            )


def _bare(source: str) -> str:
    """``data/emoji64`` and ``emoji:64`` alike."""
    return re.sub("[^a-z0-9]", "", source.rstrip("/").rpartition("/")[2].lower())


def _setting(row: Row) -> tuple[Any, ...]:
    """Everything that makes rows more than draws of one thing."""
    names = ["candidate", "model", "scheduler", "steps", "guidance", "refresh_every"]
    names += sorted(name for name in row if name.startswith("train."))
    return tuple(repr(row.get(name)) for name in names)


def _around(values: Sequence[float], method: str) -> Estimate:
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = student(len(values) - 1) * error
    mean = float(np.mean(values))
    return Estimate(mean, mean - half, mean + half, method)


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
