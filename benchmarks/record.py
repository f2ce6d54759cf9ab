"""Where records are kept, and how a benchmark ends; what they say and how they are written is the package's."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import ROOT
from benchmarks.kernel_record import WHOLE, source_of
from benchmarks.visit import PIPE, emit
from madformer.files.atomic import write_json
from madformer.machine import device_name, environment, git_commit

if TYPE_CHECKING:
    from madformer.training.trainer import Trainer

__all__ = [
    "RESULTS",
    "CannotCompare",
    "environment",
    "finish",
    "git_commit",
    "results_folder",
    "save",
    "train_whole",
    "write_json",
]

RESULTS = ROOT / "benchmarks" / "results"


class CannotCompare(Exception):
    """Why there is nothing to report, in one line."""


def train_whole(trainer: Trainer) -> None:
    """Train to the last step.

    Raises:
        CannotCompare: a signal ended it before, in good order, so that figures of a part would stand for all.
    """
    trainer.run()
    if trainer.step < trainer.config.steps:
        raise CannotCompare(f"it was stopped at step {trainer.step} of {trainer.config.steps}")


def finish(
    name: str,
    measure: Callable[[], dict[str, Any]],
    out: Path | None,
    *,
    shown: str | None = "metrics",
    errors: tuple[type[Exception], ...] = (CannotCompare, OSError),
) -> int:
    """Measure, write the record to ``out`` if there is one, and print it as JSON on the last line.

    Args:
        shown: the part that is printed; None for the whole record.
        errors: what is one line on stderr.

    Returns:
        The exit status.
    """
    try:
        record = measure()
        if out is not None:
            save(record, out)
    except errors as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(record if shown is None else record[shown]))
    return 0


def save(record: dict[str, Any], path: Path) -> None:
    """Write the record; within a visit to a GPU send it, and the visit writes it with what others have found."""
    if PIPE in os.environ:
        emit({"kind": "record", "name": record["benchmark"], "source": source_of(WHOLE), "record": record})
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)


def results_folder(device: torch.device) -> Path:
    """``benchmarks/results/<device>``, as in ``nvidia-h200``."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
