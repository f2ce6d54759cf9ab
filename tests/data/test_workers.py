"""A process of the loader that is gone is reported in one line."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import pytest

from madformer.data.workers import fetch_batches, lost_worker


def killed(items: Sequence[int]) -> int:
    if items[0] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return items[0]


def test_a_killed_worker() -> None:
    batches = fetch_batches(killed, [[number] for number in range(8)], num_workers=1)
    ended = r"a process that reads the data \(pid \d+\) (is killed by signal|exited unexpectedly)"
    with pytest.raises(ChildProcessError, match=ended) as caught:
        list(batches)
    assert "\n" not in str(caught.value)


def test_other_errors_are_left_alone() -> None:
    assert lost_worker(RuntimeError("CUDA error")) is None
    gone = lost_worker(RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"))
    assert str(gone) == "a process that reads the data (pid 12, 13) exited unexpectedly; was there too little memory?"
