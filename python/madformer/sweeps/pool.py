"""Jobs that wait for one another, done by one process or by several, and what became of each.

A worker is a process of its own that is sent a job whenever it has none. It ends when the process that started it does,
however that ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from tqdm import tqdm

__all__ = ["Job", "Make", "Work", "run_jobs"]

PATIENCE = 60.0
"""Seconds that a worker has to end a training run in good order before it is killed."""

Work = Callable[[str, str], object]
"""Does the job of a kind and a name."""
Make = Callable[[int], Work]
"""Makes a worker of a number; it can be pickled."""


@dataclass(frozen=True)
class Job:
    """Something to do.

    Attributes:
        kind, name: say what it is. after: jobs that must be done before.
    """

    kind: str
    name: str
    after: Collection[tuple[str, str]] = field(default_factory=tuple)

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.name


def run_jobs(jobs: Sequence[Job], make: Make, workers: int = 1) -> Iterator[Job]:
    """Do all jobs, as early in their order as what they wait for allows; gives each when it is done.

    Args:
        make: called for each worker, in its own process; with one worker, in this one.

    Raises:
        Whatever a job raised; the others that were begun are stopped. ChildProcessError: a worker was killed.
    """
    if workers == 1:
        work = make(0)
        done = set[tuple[str, str]]()
        waiting = list(jobs)
        while waiting:
            job = next_of(waiting, done)
            assert job is not None
            work(*job.key)
            done.add(job.key)
            yield job
        return
    with contextlib.ExitStack() as stopping:
        pool = _Pool(make, min(workers, len(jobs)))
        stopping.callback(pool.stop)
        yield from pool.run(list(jobs))


def next_of(waiting: list[Job], done: Collection[tuple[str, str]]) -> Job | None:
    """Take the first that waits for nothing, if there is one."""
    for index, job in enumerate(waiting):
        if all(other in done for other in job.after):
            return waiting.pop(index)
    return None


class _Pool:
    def __init__(self, make: Make, workers: int) -> None:
        # a process that has computed is not to be forked: its threads would be missing
        context = multiprocessing.get_context("spawn")
        self.processes: dict[Connection, Any] = {}
        self.busy: dict[Connection, Job] = {}
        for number in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make, number), name=f"sweep-{number}")
            process.start()
            theirs.close()
            self.processes[ours] = process

    def run(self, waiting: list[Job]) -> Iterator[Job]:
        done = set[tuple[str, str]]()
        while waiting or self.busy:
            for connection in [one for one in self.processes if one not in self.busy]:
                if (job := next_of(waiting, done)) is None:
                    break
                # one that has died is found out about below
                with contextlib.suppress(OSError):
                    connection.send(job.key)
                self.busy[connection] = job
            assert self.busy, "jobs wait for one another"
            for connection in [one for one in wait(list(self.busy)) if isinstance(one, Connection)]:
                job = self.busy.pop(connection)
                try:
                    error = connection.recv()
                except (EOFError, OSError):
                    process = self.processes[connection]
                    process.join(PATIENCE)
                    raise ChildProcessError(
                        f"a worker ended with status {process.exitcode} at {job.kind} {job.name}: if memory ran out, "
                        "take fewer workers"
                    ) from None
                if error is not None:
                    raise error
                done.add(job.key)
                yield job

    def stop(self) -> None:
        """End all of them; a training run saves a checkpoint first."""
        for connection, process in self.processes.items():
            # one that is idle ends by itself, and SIGTERM would be told as a failure
            if connection in self.busy:
                process.terminate()
            connection.close()
        for process in self.processes.values():
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(connection: Connection, make: Make, number: int) -> None:
    """Of a worker: do jobs until there are no more."""
    # Ctrl-C goes to all processes of a terminal, and the first one says what becomes of the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # its own is the system's, and would be reported as lost where a worker is killed
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work: Work | None = None
    while True:
        try:
            key = connection.recv()
        except (EOFError, OSError):
            return
        error: BaseException | None = None
        try:
            work = work or make(number)
            work(*key)
        except Exception as raised:
            error = raised
        with contextlib.suppress(BrokenPipeError):
            _send(connection, error)


def _send(connection: Connection, error: BaseException | None) -> None:
    if error is not None:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # of any type, where an error cannot be pickled
            error = RuntimeError("".join(traceback.format_exception(error)))
    connection.send(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
