"""How a run ends that does not come to its last step: what it says, its status, and what is left to go on from."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import FileSystemReader
from torch.utils.data import DataLoader

from madformer.cli.main import main
from madformer.data.workers import fetch_batches
from madformer.training.export import load_checkpoint
from madformer.training.stopping import Ending
from madformer.training.trainer import Trainer
from tests.helpers.training_run import losses, metrics


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_signals(unbroken: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int) -> None:
    """The step is finished and saved; then the command goes on, as the run's own configuration says."""
    step = Trainer._train_step

    def interrupted(trainer: Trainer, batches: Any) -> Any:
        if trainer.step == 4:
            os.kill(os.getpid(), number)
        return step(trainer, batches)

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["train", "--resume", "--out", str(stopped)])
    assert end.value.code == status
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert max(path.name for path in (stopped / "checkpoints").iterdir()) == "step-00000005"
    monkeypatch.undo()
    assert main(["train", "--resume", "--out", str(stopped)]) == 0
    assert losses(stopped) == losses(unbroken)


def test_the_second_signal_ends_at_once() -> None:
    ending, before = Ending(), signal.getsignal(signal.SIGTERM)
    with ending.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert (ending.asked, ending.signal) == (True, signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_command_in_another_thread(stopped: Path) -> None:
    """Where Python lets nobody say what signals do."""
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(main(["train", "--resume", "--out", str(stopped)])))
    thread.start()
    thread.join()
    assert statuses == [0]
    assert len(metrics(stopped)) == 6


@pytest.mark.usefixtures("soon_noticed")
def test_a_killed_worker(stopped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained is saved; then one line."""
    step, trained = Trainer._train_step, []

    def killing(trainer: Trainer, batches: Any) -> Any:
        if trainer.step == 4:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
        trained.append(trainer.step + 1)
        return step(trainer, batches)

    monkeypatch.setattr(Trainer, "_train_step", killing)
    resume = ["train", "--resume", "--out", str(stopped), "--steps", "100", "--num-workers", "1", "--save-every", "100"]
    assert main(resume) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("madformer train: error: a process that reads the data")
    assert trained[-1] < 100
    assert max(path.name for path in (stopped / "checkpoints").iterdir()) == f"step-{trained[-1]:08d}"
    monkeypatch.undo()
    assert Trainer.from_folder(stopped).step == trained[-1]


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_an_end_while_a_checkpoint_is_read(unbroken: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException) -> None:
    """It is not taken for damage."""

    def ending(*_: Any) -> Any:
        raise end

    monkeypatch.setattr(FileSystemReader, "read_data", ending)
    with pytest.raises(type(end)) as raised:
        load_checkpoint(unbroken)
    assert raised.value is end


def _index(numbers: Any) -> int:
    return numbers[0]


@pytest.mark.usefixtures("soon_noticed")
def test_a_worker_that_dies_is_noticed_where_data_are_asked_for() -> None:
    """Not in the middle of whatever the program does when the system tells of it."""
    next(iter(DataLoader([0], num_workers=1)))  # type: ignore[arg-type]  # PyTorch's handler is there from now on.
    batches = fetch_batches(_index, ([number] for number in itertools.count()), num_workers=1)
    assert next(batches) == 0
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
    time.sleep(0.3)  # in which a handler would raise
    with pytest.raises(ChildProcessError, match="a process that reads the data"):
        list(itertools.islice(batches, 10))


# A full disk


class Disk:
    """Full from the ``last``-th name on that is made under ``folder``; a hook of audits cannot be removed."""

    folder, last, made = "", 0, 0

    @classmethod
    def audit(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if not cls.folder or event not in ("open", "os.mkdir", "os.rename"):
            return
        path = arguments[1] if event == "os.rename" else arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.fsdecode(path).startswith(cls.folder):
            return
        writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes:
            cls.made += 1
            if cls.last and cls.made >= cls.last:
                raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def full_disk(folder: Path, last: int) -> Iterator[type[Disk]]:
    if not Disk.made:
        sys.addaudithook(Disk.audit)
    Disk.folder, Disk.last, Disk.made = str(folder), last, 0
    try:
        yield Disk
    finally:
        Disk.folder = ""


def filled(run: Path, last: int, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether the run of two more steps ended by it: in one line, with a checkpoint that is whole."""
    resume = ["train", "--resume", "--out", str(run), "--save-every", "1", "--sample-every", "1", "--tensorboard"]
    capsys.readouterr()
    with full_disk(run, last):
        status = main([*resume, "--sample-steps", "1", "--sample-images", "1"])
    if status == 0:
        return False
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("madformer train: error: ")
    assert "No space left on device" in message
    load_checkpoint(run)
    assert not list((run / "checkpoints").glob(".*"))
    return True


def test_a_full_disk(unbroken: Path, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with full_disk(stopped, 0) as disk:
        Trainer.from_folder(stopped).run()
    assert disk.made > 10
    for last in (1, disk.made // 2, disk.made - 2):
        shutil.rmtree(stopped)
        shutil.copytree(unbroken, stopped)
        shutil.rmtree(stopped / "checkpoints" / "step-00000006")
        assert filled(stopped, last, capsys)
    Trainer.from_folder(stopped).run()
    assert losses(stopped) == losses(unbroken)


@pytest.mark.slow
def test_a_disk_full_at_any_moment(unbroken: Path, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for last in itertools.count(1):
        shutil.rmtree(stopped)
        shutil.copytree(unbroken, stopped)
        shutil.rmtree(stopped / "checkpoints" / "step-00000006")
        if not filled(stopped, last, capsys):
            break
    assert last > 20
