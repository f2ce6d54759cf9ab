"""A process of the loader that is gone is reported in one line."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from typing import Any

import pytest
from torch.utils.data import dataloader

from madformer.data.workers import fetch_batches, lost_worker


def killed(items: Sequence[int]) -> int:
    if items[0] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return items[0]


@pytest.mark.usefixtures("soon_noticed")
def test_a_killed_worker() -> None:
    batches = fetch_batches(killed, [[number] for number in range(8)], num_workers=1)
    ended = r"a process that reads the data \(pid \d+\) (is killed by signal|exited unexpectedly)"
    with pytest.raises(ChildProcessError, match=ended) as caught:
        list(batches)
    assert "\n" not in str(caught.value)


def number(items: Sequence[int]) -> int:
    return items[0]


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset"), EOFError(), RuntimeError("no ancdata")], ids=repr
)
@pytest.mark.parametrize("dead", [True, False])
def test_a_batch_that_breaks_off(error: Exception, dead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that sent it is dead a moment later; an error with all of them alive stays what it is."""

    def broken(loader: Any) -> None:
        if dead:
            os.kill(loader._workers[0].pid, signal.SIGKILL)
        raise error

    batches = fetch_batches(number, [[0], [1]], num_workers=1)
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter, "_next_data", broken)
    with pytest.raises(ChildProcessError if dead else type(error)) as caught:
        next(batches)
    if dead:
        assert re.fullmatch(r"a process that reads the data \(pid \d+\) ended within a batch; .*", str(caught.value))
    else:
        assert caught.value is error


def test_other_errors_are_left_alone() -> None:
    assert lost_worker(RuntimeError("CUDA error")) is None
    gone = lost_worker(RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"))
    assert str(gone) == "a process that reads the data (pid 12, 13) exited unexpectedly; was there too little memory?"
