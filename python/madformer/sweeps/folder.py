"""A sweep's folder: what it is of, a file a cell, and the table that they make.

``sweep.json`` says what the sweep is. ``cells/ID.json`` is a row, which is there when its cell is done, and
``cells/ID.webp`` shows some of its pictures. ``models/ID/`` holds a training run and, once it is at its end, a pipeline
in ``finished/``. ``latents/`` holds encoded data, ``reference/`` features of the reference, ``tuning/`` what was found
out about guidance. ``table.parquet`` is made of the rows.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from PIL import Image

from madformer.evaluation import Score, check_comparable
from madformer.files.atomic import atomic_path, remove_leftovers, write_json
from madformer.files.resumable import first_difference, goes_on, taken
from madformer.files.text import first_line
from madformer.objects import read_object
from madformer.sweeps.config import Cell, Model, Sweep

if TYPE_CHECKING:
    import pyarrow

__all__ = ["SweepFolder", "pyarrow_or_why_not", "read_table"]

DESCRIPTION, TABLE = "sweep.json", "table.parquet"
VARYING = ("steps", "guidance", "scheduler", "refresh_every", "prompts", "image_size")
"""What rows of a table may differ in: the axes, and what the models are, which the hash of the prompts is of, too."""
COSTS = (
    "nfe_steps", "nfe_layers", "flops_per_image", "seconds_per_image", "peak_memory_bytes", "parameters",
    "training_flops",
)  # fmt: skip
"""Columns of what a row costs."""
UNEQUAL = ("seconds_per_image", "peak_memory_bytes")
"""Columns that another run of the same sweep has otherwise."""


def pyarrow_or_why_not() -> Any:
    """The package; raises ``ImportError`` that names the extra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"a sweep's table needs pyarrow: pip install 'madformer[evaluation]' ({error})") from error
    return pyarrow


class SweepFolder:
    """Where a sweep's results are. Making one touches no file: :meth:`opened` does.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path, sweep: Sweep) -> None:
        self.path, self.sweep = Path(path), sweep

    @classmethod
    def of(cls, path: str | Path) -> Self:
        """One that is there.

        Raises:
            FileNotFoundError: it holds no sweep. ValueError: it is of another version.
        """
        file = Path(path) / DESCRIPTION
        if not file.is_file():
            raise FileNotFoundError(f"{path} holds no sweep: no {DESCRIPTION}")
        try:
            return cls(path, Sweep.of(read_object(file)))
        except ValueError as error:
            raise ValueError(f"{file} is of no sweep of this version: {error}") from error

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Take the folder for this sweep, and clear away what a killed one left.

        Raises:
            ValueError: it is of another sweep; names the first field that differs. Nothing in it is changed.
            OSError: it cannot be written, or another sweep is at work in it.
        """
        with taken(self.path, 0, self._settle):
            yield

    def _settle(self) -> None:
        there = [*self.path.glob("cells/*.json"), *self.path.glob("models/*"), *self.path.glob("tuning/*.json")]
        found = min((str(path.relative_to(self.path)) for path in there), default=None)

        def difference() -> str | None:
            return first_difference(SweepFolder.of(self.path).sweep.lasting(), self.sweep.lasting())

        goes_on(self.path, DESCRIPTION, found, difference, "run it as it was, or choose another folder")
        write_json(self.path / DESCRIPTION, self.sweep.to_dict())
        remove_leftovers(self.path, "*.json", "*.npy", "*.webp", "*.parquet", "*.html", "*.png")

    def model(self, model: Model) -> str:
        """Folder or hub id to load a model from; one that is trained here may not be there yet."""
        return model.source or str(self.training(model) / "finished")

    def training(self, model: Model) -> Path:
        """Where a model is trained."""
        return self.path / "models" / model.id

    def is_there(self, model: Model) -> bool:
        """Whether a model need not be trained."""
        return model.source is not None or Path(self.model(model)).is_dir()

    def row(self, cell: Cell) -> dict[str, Any] | None:
        """What was found out about a cell; None where it is not done."""
        # one that a system crash has damaged is as good as none
        with suppress(OSError, ValueError):
            return read_object(self._file(cell, "json"))
        return None

    def missing(self) -> list[Cell]:
        """The cells that are not done."""
        return [cell for cell in self.sweep.cells if self.row(cell) is None]

    def write(self, cell: Cell, row: Mapping[str, Any], pictures: Sequence[Image.Image] = ()) -> None:
        """Note that a cell is done; its row is there whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        if pictures:
            with atomic_path(self._file(cell, "webp")) as temporary:
                temporary.write_bytes(_strip(pictures))
        write_json(self._file(cell, "json"), row)

    def pictures(self, cell: Cell) -> bytes | None:
        """Some pictures of a cell, beside each other, as WebP."""
        file = self._file(cell, "webp")
        return file.read_bytes() if file.is_file() else None

    def rows(self) -> list[tuple[Cell, dict[str, Any]]]:
        """Those that are done, in the order of the cells.

        Raises:
            ValueError: rows are of different protocols, or a model was another one when some of its cells were done.
        """
        rows = [
            # what a model is called is the file's to say: another may have had the cell done
            (cell, row | {"model": cell.model.label})
            for cell in self.sweep.cells
            if (row := self.row(cell)) is not None
        ]
        check_comparable((score for _, row in rows for score in scores_of(row).values()), varying=VARYING)
        weights: dict[tuple[str, int | None], str] = {}
        for cell, row in rows:
            known = weights.setdefault((cell.model.id, cell.diffusion_layers), row["weights"])
            if known != row["weights"]:
                raise ValueError(
                    f"{cell.model.label} has become another model since some of its cells were done: its weights are "
                    f"{row['weights']}, and were {known}. Choose another folder"
                )
        return rows

    def write_table(self) -> pyarrow.Table:
        """Make ``table.parquet`` of the rows that are there, and give it.

        Raises:
            ValueError: as :meth:`rows`. OSError: it cannot be written. ImportError: there is no pyarrow.
        """
        pyarrow = pyarrow_or_why_not()
        table = pyarrow.Table.from_pylist(_complete([flat_row(row) for _, row in self.rows()]))
        with atomic_path(self.path / TABLE) as temporary:
            pyarrow.parquet.write_table(table, temporary)
        return table

    def _file(self, cell: Cell, kind: str) -> Path:
        return self.path / "cells" / f"{cell.id}.{kind}"


def scores_of(row: Mapping[str, Any]) -> dict[str, Score]:
    """A row's figures by name."""
    return {name: Score.of(score) for name, score in row["scores"].items()}


def flat_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: figures as ``NAME``, ``NAME_low`` and so on, and the protocol, which they have in common."""
    told = {name: value for name, value in row.items() if name not in ("scores", "values", "costs", "shown")}
    told |= {f"train.{name}": value for name, value in row["values"].items()}
    protocol: dict[str, Any] = {}
    for name, score in scores_of(row).items():
        estimate, protocol = score.estimate, score.protocol.to_dict()
        told |= {
            name: estimate.value,
            f"{name}_low": _number(estimate.low),
            f"{name}_high": _number(estimate.high),
            f"{name}_deviation": estimate.deviation,
            f"{name}_interval": estimate.method,
            f"{name}_options": protocol["options"],
        }
    own = ("metric", "options")
    return (
        told | row["costs"] | {f"protocol.{name}": _plain(value) for name, value in protocol.items() if name not in own}
    )


def read_table(*files: str | Path) -> list[dict[str, Any]]:
    """The rows of tables that sweeps wrote, as :func:`~madformer.sweeps.lines` and ``comparisons`` take them.

    A cell that two of them have is taken once.

    Raises:
        FileNotFoundError, OSError: a file is not there. ImportError: there is no pyarrow.
        ValueError: it is no table of a sweep; or numbers in them are of different protocols, of which a field is named.
    """
    pyarrow, rows = pyarrow_or_why_not(), dict[str, dict[str, Any]]()
    for file in files:
        try:
            table = pyarrow.parquet.read_table(file)
            for flat in table.to_pylist():
                rows.setdefault(flat["cell"], _unflat(flat))
        except (pyarrow.ArrowInvalid, KeyError, ValueError) as error:
            raise ValueError(f"{file} is no table of a sweep: {first_line(error)}") from error
    check_comparable((score for row in rows.values() for score in scores_of(row).values()), varying=VARYING)
    return list(rows.values())


def _unflat(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flat_row`, but for fields of the grid that a row has not, and what is not in a table."""
    figures = [name for name in flat if f"{name}_interval" in flat and flat[f"{name}_interval"] is not None]
    protocol = {name.removeprefix("protocol."): value for name, value in flat.items() if name.startswith("protocol.")}
    estimate = ("low", "high", "deviation")
    scores = {
        name: {
            "metric": name,
            "value": flat[name],
            "method": flat[f"{name}_interval"],
            **{part: flat[f"{name}_{part}"] for part in estimate},
            "protocol": protocol | {"metric": name, "options": flat[f"{name}_options"]},
        }
        for name in figures
    }
    values = {
        name.removeprefix("train."): value
        for name, value in flat.items()
        if name.startswith("train.") and value is not None
    }
    apart = {f"{name}_{part}" for name in figures for part in (*estimate, "interval", "options")}
    told = {
        name: value
        for name, value in flat.items()
        if name not in (*figures, *COSTS, *apart) and not name.startswith(("train.", "protocol."))
    }
    return told | {"values": values, "scores": scores, "costs": {name: flat[name] for name in COSTS}}


def _complete(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All with all columns; a column whose values no one type holds becomes text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in names} for row in rows]
    for name in names:
        kinds = {type(row[name]) for row in rows} - {type(None)}
        if len(kinds) > 1 and kinds != {int, float}:
            rows = [{**row, name: None if row[name] is None else json.dumps(row[name])} for row in rows]
    return rows


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _strip(pictures: Sequence[Image.Image], side: int = 128) -> bytes:
    """Beside each other, none larger than ``side``."""
    small = [image.copy() for image in pictures]
    for image in small:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    width, height = small[0].size
    strip = Image.new("RGB", (width * len(small), height))
    for index, image in enumerate(small):
        strip.paste(image, (index * width, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()
