"""Jobs for tests of workers, light to import; and, as a program, two workers that are busy.

python -m tests.helpers.jobs FOLDER
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from madformer.sweeps.pool import Job, Work, run_jobs


class OddError(Exception):
    """One that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("a lambda's own error")
        self.own = lambda: None


def writer(folder: Path, number: int) -> Work:
    """Writes the number of the process; by name it fails in a way of its own."""

    def work(kind: str, name: str) -> None:
        first = not (folder / f"{kind}-{name}").exists()
        (folder / f"{kind}-{name}").write_text(str(os.getpid()))
        if name == "sleep":
            time.sleep(3600)
        if name == "refuse":
            raise ValueError("no such thing")
        if name == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if name == "odd":
            raise OddError
        if name == "die" or (name == "die once" and first):
            os.kill(os.getpid(), signal.SIGKILL)

    return work


if __name__ == "__main__":
    list(run_jobs([Job("a", "sleep"), Job("b", "sleep")], partial(writer, Path(sys.argv[1])), 2))
