"""Jobs and what they wait for, in this process and in others, which end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from madformer.sweeps.pool import Job, run_jobs
from tests.helpers import environment, jobs

JOBS = [
    Job("b", "2", [("a", "1")]), Job("a", "1"), Job("c", "3", [("a", "1"), ("b", "2")]), Job("a", "4")
]  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_are_done_after_what_they_wait_for(workers: int, tmp_path: Path) -> None:
    done = [job.key for job in run_jobs(JOBS, partial(jobs.writer, tmp_path), workers)]
    assert sorted(done) == [("a", "1"), ("a", "4"), ("b", "2"), ("c", "3")]
    assert done.index(("a", "1")) < done.index(("b", "2")) < done.index(("c", "3"))
    written = [path.read_text() for path in sorted(tmp_path.iterdir())]
    assert len(written) == 4
    assert (str(os.getpid()) in written) == (workers == 1)


def test_an_error_of_a_worker_is_its_own(tmp_path: Path) -> None:
    for name, kind, message in (
        ("refuse", ValueError, "^no such thing$"),
        ("full", OSError, "No space left on device"),
        ("odd", RuntimeError, "a lambda's own error"),
        ("die", ChildProcessError, "ended with status -9 at a die: if memory ran out, take fewer workers"),
    ):
        # the other would take an hour
        with pytest.raises(kind, match=message):
            list(run_jobs([Job("a", "sleep"), Job("a", name)], partial(jobs.writer, tmp_path), 2))


@pytest.mark.slow
def test_actors_do_jobs_after_what_they_wait_for(tmp_path: Path) -> None:
    """Those of Ray; one that is lost once is replaced, and what a job raises is its own."""
    ray = pytest.importorskip("ray")
    from madformer import cluster
    from madformer.sweeps import ray_pool

    def run(*jobs_to_do: Job) -> list[tuple[str, str]]:
        with cluster.joined():
            share = cluster.share_of(2, on_gpu=False)
            return [job.key for job in ray_pool.run_jobs(list(jobs_to_do), partial(jobs.writer, tmp_path), share)]

    with ray.init(log_to_driver=False, num_cpus=2):
        done = run(*JOBS, Job("a", "die once"))
        assert sorted(done) == [("a", "1"), ("a", "4"), ("a", "die once"), ("b", "2"), ("c", "3")]
        assert done.index(("a", "1")) < done.index(("b", "2")) < done.index(("c", "3"))
        for name, kind, message in (
            ("refuse", ValueError, "^no such thing$"),
            ("full", OSError, "No space left on device"),
            ("die", ChildProcessError, "an actor was lost 4 times at a die: if memory ran out, take fewer"),
        ):
            with pytest.raises(kind, match=message):
                run(Job("a", "sleep"), Job("a", name))


@pytest.mark.slow
def test_workers_end_with_the_process_that_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-m", "tests.helpers.jobs", str(tmp_path)], env=environment())
    deadline = time.monotonic() + 60
    while not (pids := [int(path.read_text()) for path in tmp_path.glob("*-sleep") if path.stat().st_size]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
