"""The jobs of a sweep done by actors of a Ray cluster, whose machines share a file system."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import ray
from tqdm import tqdm

from madformer.cluster import Share
from madformer.sweeps.pool import Job, Make, Work, next_of

__all__ = ["run_jobs"]

RETRIES = 3
"""Times that a job is begun anew whose actor was lost with its machine: what it had done is in the folder."""


class _Actor:
    """Holds a worker, which is made by its first job."""

    def __init__(self, make: Make, number: int) -> None:
        # Ray asks an actor to end by SIGTERM, and a training run answers it with a checkpoint
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        tqdm.set_lock(threading.RLock())
        self.make, self.number = make, number
        self.work: Work | None = None

    def do(self, kind: str, name: str) -> None:
        self.work = self.work or self.make(self.number)
        self.work(kind, name)


def run_jobs(jobs: list[Job], make: Make, share: Share) -> Iterator[Job]:
    """As :func:`madformer.sweeps.pool.run_jobs`, by actors of the cluster that was joined.

    Args:
        share: of the cluster, as :func:`madformer.cluster.share_of` gives it.

    Raises:
        Whatever a job raised, under an error of Ray's. ChildProcessError: an actor was lost again and again.
    """
    kind = ray.remote(_Actor).options(
        num_cpus=share.num_cpus, num_gpus=share.num_gpus, max_restarts=RETRIES, max_task_retries=RETRIES
    )
    idle = [kind.remote(make, number) for number in range(min(share.workers, len(jobs)))]
    busy: dict[Any, tuple[Job, Any]] = {}
    waiting, done = list(jobs), set[tuple[str, str]]()
    try:
        while waiting or busy:
            while idle and (job := next_of(waiting, done)) is not None:
                actor = idle.pop()
                busy[actor.do.remote(*job.key)] = job, actor
            assert busy, "jobs wait for one another"
            for answer in ray.wait(list(busy))[0]:
                job, actor = busy.pop(answer)
                try:
                    ray.get(answer)
                except ray.exceptions.RayActorError:
                    raise ChildProcessError(
                        f"an actor was lost {RETRIES + 1} times at {job.kind} {job.name}: if memory ran out, take fewer"
                    ) from None
                idle.append(actor)
                done.add(job.key)
                yield job
    finally:
        for actor in (*idle, *(actor for _, actor in busy.values())):
            ray.kill(actor)
