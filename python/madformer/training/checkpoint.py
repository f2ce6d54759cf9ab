"""Checkpoints of a run: written behind the next steps, there whole or not at all, read by any number of processes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from madformer.training.optimization import MovingAverages, StepGuard

# one process is what it says it assumes
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

NAME = re.compile(r"step-(\d{8})")


class RunState:
    """What a run goes on from. Random numbers are not in it: they depend on the seed and the step alone."""

    def __init__(self, model: nn.Module, averages: MovingAverages, optimizer: Optimizer, guard: StepGuard) -> None:
        self.model, self.averages, self.optimizer, self.guard = model, averages, optimizer, guard
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "ema": self.averages.state_dict(),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "guard": self.guard.state_dict(),
            "step": self.step,
        }

    def load(self, path: Path) -> None:
        """Take over a checkpoint, whatever number of processes wrote it.

        Raises:
            ValueError: it is damaged, or of another model.
        """
        state = self.state_dict()
        read_checkpoint(path, state)
        # averages and guard were read into their own tensors
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        self.step = state["step"]


def read_checkpoint(path: Path, state: dict[str, Any], **options: Any) -> None:
    """Read those entries of a checkpoint that ``state`` has, tensors in place.

    Args:
        options: of ``torch.distributed.checkpoint.load``.

    Raises:
        ValueError: it is damaged, or of another model.
    """
    try:
        dcp.load(state, checkpoint_id=path, **options)
    except (Exception, CheckpointException) as error:
        _raise_interrupt(error)
        raise ValueError(
            f"{path} is damaged or of another model; the one before may serve: {_one_line(error)}"
        ) from error


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The inverse: of a checkpoint's path."""
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def whole_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name))


class Checkpoints:
    """The checkpoints in a folder, as ``step-NNNNNNNN/`` in the format of ``torch.distributed.checkpoint``.

    Args:
        keep: how many of the newest to keep.
        is_first: of all processes, the one that names and removes.
    """

    def __init__(self, folder: Path, keep: int, *, is_first: bool) -> None:
        self.folder, self.keep, self.is_first = folder, keep, is_first
        # of its own: what is exchanged behind the steps must not meet what the steps exchange
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: Future[Any] | None = None
        self._target: Path | None = None

    def paths(self) -> list[Path]:
        """Those that are whole, oldest first."""
        return whole_checkpoints(self.folder)

    def save(self, state: RunState) -> None:
        """Copy the state, and write the copy while the run goes on; the write before this one has to be finished."""
        assert self._pending is None
        path = self.folder / checkpoint_name(state.step)
        written = dcp.async_save(state.state_dict(), checkpoint_id=self._hidden(path), process_group=self.group)
        assert isinstance(written, Future)
        self._target, self._pending = path, Future()
        written.add_done_callback(self._publish)

    def finish(self) -> None:
        """Wait until what was saved is there.

        Raises:
            OSError: it could not be written.
        """
        if self._pending is None:
            return
        try:
            self._pending.result()
        except (Exception, CheckpointException) as error:
            assert self._target is not None
            if self.is_first:
                shutil.rmtree(self._hidden(self._target), ignore_errors=True)
            raise OSError(f"cannot write {self._target}: {_one_line(error)}") from error
        finally:
            self._pending = None

    def abandon(self) -> None:
        """Wait as well, where it no longer matters whether it could be written."""
        with contextlib.suppress(OSError):
            self.finish()

    def _hidden(self, path: Path) -> Path:
        return path.with_name(f".{path.name}")

    def _publish(self, written: Future[Any]) -> None:
        """When this process has written its part; that of the first ends with the description of all parts."""
        assert self._target is not None
        assert self._pending is not None
        try:
            written.result()
            if self.is_first:
                os.replace(self._hidden(self._target), self._target)
                self._remove_old()
        except BaseException as error:
            self._pending.set_exception(error)
        else:
            self._pending.set_result(None)

    def _remove_old(self) -> None:
        for old in self.paths()[: -self.keep]:
            # under its own name it is whole until the end
            os.replace(old, self._hidden(old))
            shutil.rmtree(self._hidden(old), ignore_errors=True)


def _raise_interrupt(error: BaseException) -> None:
    """Raise again what ended the program, or was to, in the midst of a checkpoint, where PyTorch catches everything."""
    if isinstance(error, CheckpointException):
        for cause, _ in error.failures.values():
            if not isinstance(cause, Exception):
                raise cause from None


def _one_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        # a traceback for every process
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:200]
