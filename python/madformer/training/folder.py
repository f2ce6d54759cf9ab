"""A run's folder: whom it belongs to, what it is of, and that nothing in it changes before a run has been accepted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from madformer.files.atomic import atomic_path, check_unlocked, locked, made, remove_leftovers
from madformer.files.resumable import LOCK, first_difference
from madformer.objects import read_object
from madformer.pipeline_files import MODEL_INDEX, names_of_classes
from madformer.training.checkpoint import step_of, whole_checkpoints
from madformer.training.config import MAY_CHANGE, RUN_CONFIG, TrainingConfig
from madformer.training.data import TrainingData

ENVIRONMENT = "environment.json"
# what `atomic_path` writes into a run's folder, wherever in it
WRITTEN = (RUN_CONFIG, ENVIRONMENT, "metrics.jsonl", "*.json", "*.safetensors", "step-*.png")


class RunFolder:
    """The folder of one run. Nothing but :meth:`opened` touches it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def check_free(self, data: str, *, resume: bool) -> None:
        """Whether a run can begin here at all, before its data are opened.

        Raises:
            ValueError: the folder holds a run that is not to be resumed, or one of other data.
            OSError: another process is training into it, or it cannot be written.
        """
        check_can_be_made(self.path)
        check_unlocked(self.path / LOCK)
        if not whole_checkpoints(self.checkpoints):
            return
        if not resume:
            raise ValueError(f"{self.path} already holds a run; resume it, or choose another folder")
        if (stored := self._stored()) is not None:
            self._check_same(stored, dataclasses.replace(stored, data=data))

    def newest(self, config: TrainingConfig) -> Path | None:
        """The checkpoint that a run goes on from, if it does.

        Raises:
            ValueError: the folder is of a run that differs in more than
                :data:`~madformer.training.config.MAY_CHANGE`; the message names the first field and both values. Or it
                is of something else.
        """
        found, stored = whole_checkpoints(self.checkpoints), self._stored()
        if not found:
            # what ended before its first checkpoint binds nobody
            return None
        if stored is not None:
            self._check_same(stored, config)
        if config.steps < (step := step_of(found[-1])):
            raise ValueError(f"steps={config.steps} is less than the {step} that {self.path} has come to")
        return found[-1]

    def check_data(self, data: TrainingData) -> None:
        """Whether a run can go on, or begin, with data that were opened.

        Raises:
            ValueError: it would find its own samples among the pictures of a folder that it lies in, or the numbers of
                its classes stand for others than they have so far.
        """
        if data.root is not None and self.path.resolve().is_relative_to(data.root.resolve()):
            raise ValueError(f"{self.path} lies within the data, whose pictures its samples would be: choose another")
        index = self.path / "model" / MODEL_INDEX
        stored = names_of_classes(read_object(index).get("class_names")) if index.exists() else None
        for number, (theirs, ours) in enumerate(zip(stored or (), data.class_names, strict=False)):
            if theirs != ours and whole_checkpoints(self.checkpoints):
                raise ValueError(
                    f"{self.path} is of a run whose class {number} is {theirs!r}, and the data's is {ours!r}: name the "
                    f"classes as they were, or choose another folder"
                )

    def _stored(self) -> TrainingConfig | None:
        return TrainingConfig.of_run(self.path) if (self.path / RUN_CONFIG).exists() else None

    def _check_same(self, stored: TrainingConfig, config: TrainingConfig) -> None:
        if difference := first_difference(*map(_lasting, (stored, config))):
            raise ValueError(
                f"{self.path} is of a run with {difference}: resume it as it was, or choose another folder"
            )

    @contextlib.contextmanager
    def opened(self, config: TrainingConfig, described: dict[str, Any], step: int) -> Iterator[None]:
        """Hold the folder for a run that has been accepted: write what it is, and clear away what a kill left.

        Args:
            described: what ``environment.json`` is to say. step: that the run goes on from.

        Raises:
            OSError: another process is at work in it or has been meanwhile, or it cannot be written. Then nothing in it
                has changed, and a new folder is not there.
        """
        lock = self.path / LOCK
        with contextlib.ExitStack() as undo:
            for folder in make_folders(self.path):
                undo.callback(remove_empty, folder)
            is_new = not lock.exists()
            with locked(lock, wait=False):
                with contextlib.ExitStack() as undo_lock:
                    if is_new:
                        undo_lock.callback(lock.unlink)
                    self._take(config, described, step)
                    undo_lock.pop_all()
                undo.pop_all()
                yield

    def _take(self, config: TrainingConfig, described: dict[str, Any], step: int) -> None:
        newest = max(map(step_of, whole_checkpoints(self.checkpoints)), default=0)
        if newest > step:
            raise OSError(f"{self.path} has come to step {newest} meanwhile: another process went on with it")
        self._describe(config, described)
        for left_over in self.checkpoints.glob(".step-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        remove_leftovers(self.path, *WRITTEN)

    def _describe(self, config: TrainingConfig, described: dict[str, Any]) -> None:
        # both are written before either is renamed
        with atomic_path(self.path / RUN_CONFIG) as run, atomic_path(self.path / ENVIRONMENT) as environment:
            run.write_text(config.to_json(), encoding="utf-8")
            environment.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _lasting(config: TrainingConfig) -> dict[str, Any]:
    """The fields that must not change."""
    names = [own.name for own in dataclasses.fields(config) if own.name not in (*MAY_CHANGE, "model")]
    return {**{name: getattr(config, name) for name in names}, "model": config.model.to_dict()}


def check_can_be_made(folder: Path) -> None:
    """Raise ``OSError`` where a folder is none, or cannot be made or written, without trying it."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(f"cannot write to {folder}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {folder}: {there} is read-only for this user")


def make_folders(folder: Path) -> list[Path]:
    """Make a folder and those that it lies in; gives those that were not there, outermost first.

    Raises:
        OSError: it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    made(folder)
    return missing[::-1]


def remove_empty(folder: Path) -> None:
    """The inverse, of one of them that nothing was written into."""
    with contextlib.suppress(OSError):
        folder.rmdir()
