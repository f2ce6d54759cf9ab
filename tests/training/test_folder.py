"""A run's folder: what is refused leaves every byte of it, and one run at a time is at work in it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from madformer.cli.main import main
from madformer.files.atomic import atomic_path, locked, remove_leftovers
from madformer.training import trainer as trainer_module
from madformer.training.config import MAY_CHANGE, TrainingConfig
from madformer.training.trainer import Trainer
from tests.helpers.training_run import MODEL, losses, stop_after


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = contents(folder)
    yield
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 5}, "seed=0, not 5"),
        ({"batch_size": 2}, "batch_size=4, not 2"),
        ({"learning_rate": 0.5}, "learning_rate=0.001, not 0.5"),
        ({"data": "elsewhere"}, "data='.*images', not 'elsewhere'"),
        ({"ema_decays": (0.9,)}, "ema_decays.1=0.5, not 'absent'"),
        ({"model": MODEL.replace(num_layers=4)}, "model.num_layers=2, not 4"),
        (
            {"model": MODEL.replace(unet=dataclasses.replace(MODEL.unet, num_heads=2))},  # type: ignore[type-var]
            "model.unet.num_heads=8, not 2",
        ),
        ({"steps": 2}, "steps=2 is less than the 4"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_another_run_is_not_resumed(
    config: TrainingConfig, stopped: Path, changes: dict[str, Any], difference: str
) -> None:
    with unchanged(stopped), pytest.raises(ValueError, match=difference):
        Trainer(dataclasses.replace(config, **changes), stopped, resume=True)


def test_what_may_change_is_known() -> None:
    assert set(MAY_CHANGE) < {field.name for field in dataclasses.fields(TrainingConfig)}


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def spoil_checkpoint(run: Path) -> None:
    (part,) = (run / "checkpoints" / "step-00000004").glob("*.distcp")
    part.write_bytes(part.read_bytes()[:1000])


def spoil_config(run: Path) -> None:
    (run / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("spoil", "patched", "error"),
    [
        (spoil_checkpoint, {}, "step-00000004 is damaged"),
        (spoil_config, {}, "config.json"),
        (None, {"environment": no_space}, "No space left"),
        (None, {"make_model": interrupt}, None),
        (None, {"environment": interrupt}, None),
    ],
    ids=["checkpoint", "config", "full disk", "Ctrl-C", "Ctrl-C at the end"],
)
def test_a_start_that_fails_changes_nothing(
    config: TrainingConfig,
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None] | None,
    patched: dict[str, Any],
    error: str | None,
) -> None:
    if spoil is not None:
        spoil(stopped)
    for name, replacement in patched.items():
        monkeypatch.setattr(trainer_module, name, replacement)
    kinds: Any = KeyboardInterrupt if error is None else (ValueError, OSError)
    with unchanged(stopped), pytest.raises(kinds, match=error):
        Trainer(config, stopped, resume=True).run()


def test_a_full_disk_at_the_start(config: TrainingConfig, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the second of the two files that say what a run is; and a folder that was not there is not there."""
    write = Path.write_text

    def fail_for_environment(path: Path, text: str, **options: Any) -> int:
        return no_space() if "environment" in path.name else write(path, text, **options)  # type: ignore[func-returns-value]

    monkeypatch.setattr(Path, "write_text", fail_for_environment)
    (stopped / ".lock").unlink()
    with unchanged(stopped), pytest.raises(OSError, match=r"environment\.json: No space left"):
        Trainer(dataclasses.replace(config, steps=8), stopped, resume=True).run()
    new = stopped.parent / "deep" / "new"
    with pytest.raises(OSError, match=r"environment\.json: No space left"):
        Trainer(config, new).run()
    assert not new.parent.exists()


def test_a_folder_of_something_else_is_left_alone(config: TrainingConfig, unbroken: Path, tmp_path: Path) -> None:
    model = shutil.copytree(unbroken / "model" / "transformer", tmp_path / "model")
    with unchanged(model), pytest.raises(ValueError, match=r"config.json is of no run of this version"):
        Trainer(config, model)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file is a file"):
        Trainer(config, tmp_path / "file" / "run")


def test_one_run_at_a_time(config: TrainingConfig, tmp_path: Path) -> None:
    """The first runs outside the main thread, as Ray runs one; it is resumable and exportable meanwhile."""
    entered, go_on, run = threading.Event(), threading.Event(), tmp_path / "run"
    config = dataclasses.replace(config, save_every=2)
    first = Trainer(config, run)
    step = first._train_step

    def wait(batches: Any) -> Any:
        if first.step == 3:
            first.checkpoints.finish()
            entered.set()
            go_on.wait(60)
            first.stop()
        return step(batches)

    first._train_step = wait  # type: ignore[method-assign]
    late = Trainer(config, run)
    thread = threading.Thread(target=first.run)
    thread.start()
    assert entered.wait(60)
    with unchanged(run / "model"):
        for resume in (False, True):
            with pytest.raises(OSError, match=f"another process is filling {run}"):
                Trainer(config, run, resume=resume)
        with pytest.raises(OSError, match=f"another process is filling {run}"):
            late.run()
        assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    go_on.set()
    thread.join()
    with pytest.raises(OSError, match="has come to step 4 meanwhile"):
        late.run()
    resumed = Trainer.from_folder(run)
    resumed.run()
    assert len(losses(run)) == config.steps


def test_a_workers_copy_of_a_lock_holds_nothing(tmp_path: Path) -> None:
    """A loader's workers live on for seconds when a run is killed."""
    ready, end = os.pipe(), os.pipe()
    with locked(tmp_path / ".lock", wait=False):
        child = os.fork()
        if not child:
            os.close(end[1])
            os.write(ready[1], b"!")
            os.read(end[0], 1)
            os._exit(0)
        with pytest.raises(OSError, match="another process"), locked(tmp_path / ".lock", wait=False):
            pass
        os.read(ready[0], 1)
    with locked(tmp_path / ".lock", wait=False):
        os.close(end[1])
        assert os.waitpid(child, 0)[1] == 0
    for handle in (*ready, end[0]):
        os.close(handle)


def test_leftovers_of_the_dead_alone_are_removed(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from madformer.files.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]) as path:\n"
        "    path.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    dead = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a" / "x.json")], check=False)
    assert dead.returncode == -signal.SIGKILL
    (tmp_path / ".x.original").write_text("somebody's")
    assert len(list((tmp_path / "a").iterdir())) == 1
    with atomic_path(tmp_path / "a" / "y.json") as living:
        living.write_text("whole")
        remove_leftovers(tmp_path, "*.json")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["y.json"]
    assert (tmp_path / ".x.original").exists()


def test_a_killed_runs_leftovers_are_removed(config: TrainingConfig, stopped: Path) -> None:
    begun = [
        stopped / ".config.json.ab12_x9z", stopped / "model" / "transformer" / ".config.json.ab12_x9z",
        stopped / "samples" / ".step-00000004.png.ab12_x9z", stopped / "checkpoints" / ".step-00000006" / "part",
    ]  # fmt: skip
    for path in begun:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    trainer = Trainer(config, stopped, resume=True)
    assert all(path.exists() for path in begun)
    trainer.stop()
    trainer.run()
    assert all(path.exists() for path in begun)
    stop_after(trainer, 5)
    trainer.run()
    assert not any(path.exists() for path in begun)
    assert json.loads((stopped / "config.json").read_text())["steps"] == config.steps
