"""A sweep from beginning to end, by one process or several, going on where it stopped."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from madformer import cluster
from madformer.arguments import whole_number
from madformer.evaluation import default_cache
from madformer.machine import device_of, this_process
from madformer.sweeps.checking import check_cells
from madformer.sweeps.config import Cell, Sweep
from madformer.sweeps.costs import threads as computing_with
from madformer.sweeps.folder import SweepFolder, pyarrow_or_why_not
from madformer.sweeps.pool import Job, run_jobs
from madformer.sweeps.work import Setup, encoding_of

if TYPE_CHECKING:
    import pyarrow

__all__ = ["run_sweep"]

EVERY = 10.0
"""Seconds between two tables: each is made of all rows."""


def run_sweep(
    sweep: Sweep,
    out: str | Path,
    *,
    workers: int | None = None,
    threads: int = 1,
    device: str = "auto",
    cache: str | Path | None = None,
    ray: bool = False,
    progress: bool = True,
) -> pyarrow.Table:
    """Train what is not trained, sample and judge what is not judged, and give the table of all cells.

    Args:
        out: the sweep's folder. Stopped at any moment, the same call goes on, and loses at most the cells at hand.
        workers: processes; on GPUs they take them in turn. With one, as unless given, this process does all of it.
            They import the program that calls, so a script calls under ``if __name__ == "__main__":``.
        threads: of a worker on a CPU. Pictures depend on it by rounding, so it is not taken from the machine.
        device: as ``madformer sample --device``.
        cache: where features of the reference are kept; unless given, :func:`madformer.evaluation.default_cache`.
        ray: have ``workers`` actors of a Ray cluster do it, each with a GPU of its own unless ``device`` is ``"cpu"``;
            unless given, one for every GPU, or one. The cluster is the one that ``RAY_ADDRESS`` names, else one on this
            machine. All machines see ``out``, ``cache`` and what the sweep names under the same paths.
        progress: show a bar over the cells.

    Raises:
        ValueError: the folder is of another sweep, or what a model, its scheduler, the reference or the data are
            refused for, which is told before anything is done as far as it is known by then; one line.
        OSError: a file cannot be read or written, or another sweep is at work in the folder.
        ImportError: a package is missing.
    """
    if workers is not None:
        whole_number("workers", workers, 1)
    whole_number("threads", threads, 1)
    if this_process()[1] > 1:
        raise ValueError("a sweep deals the work itself: run it without torchrun, and give it workers")
    pyarrow_or_why_not()
    device = device_of(device, elsewhere=ray)
    # other machines have another working directory
    out, cache = (Path(path).resolve() for path in (out, cache or default_cache()))
    folder = SweepFolder(out, sweep)
    check_cells(folder, folder.missing(), device, elsewhere=ray)
    setup = Setup(out, sweep.to_dict(), _devices(device, workers, ray=ray), threads, cache, progress)
    with folder.opened(), contextlib.ExitStack() as within:
        folder.rows()
        missing = folder.missing()
        if ray and missing:
            within.enter_context(cluster.joined())
            from madformer.sweeps import ray_pool

            share = cluster.share_of(workers, on_gpu=device.startswith("cuda"))
            workers, do = share.workers, functools.partial(ray_pool.run_jobs, share=share)
        else:
            workers = workers or 1
            do = functools.partial(run_jobs, workers=workers)
        jobs = jobs_of(folder, workers)
        within.enter_context(computing_with(threads))
        within.enter_context(_without_bars(workers > 1))
        total, done = len(sweep.cells), len(sweep.cells) - len(missing)
        with tqdm(total=total, initial=done, desc="cells", unit="cell", disable=not progress) as bar:
            written = time.monotonic()
            for job in do(jobs, setup) if jobs else ():
                if job.kind == "cell":
                    bar.update()
                    if time.monotonic() - written > EVERY:
                        folder.write_table()
                        written = time.monotonic()
        return folder.write_table()


def jobs_of(folder: SweepFolder, workers: int = 1) -> list[Job]:
    """What a sweep still has to do, with what each waits for."""
    missing = folder.missing()
    if not missing:
        return []
    check, reference = Job("check", ""), ("reference", "")
    # it is looked at together
    looks = [Job("look", f"{share} of {workers}", [check.key]) for share in range(workers if workers > 1 else 0)]
    found = Job(*reference, [check.key, *(look.key for look in looks)])
    jobs = {job.key: job for job in (check, *looks, found)}
    for model in {cell.model.id: cell.model for cell in missing}.values():
        if not folder.is_there(model):
            assert model.config is not None
            before = [check.key]
            if (encoding := encoding_of(model.config)) is not None:
                before.append(("encode", encoding))
                jobs.setdefault(before[1], Job("encode", encoding, before[:1]))
            jobs["train", model.id] = Job("train", model.id, before)
    for cell in missing if workers == 1 else _longest_first(missing):
        before = [reference]
        if ("train", cell.model.id) in jobs:
            before.append(("train", cell.model.id))
        if cell.guidance is None:
            jobs.setdefault(("tune", cell.tuning_id), Job("tune", cell.tuning_id, list(before)))
            before.append(("tune", cell.tuning_id))
        jobs["cell", cell.id] = Job("cell", cell.id, before)
    return list(jobs.values())


def _longest_first(cells: Sequence[Cell]) -> list[Cell]:
    """Those of a model by what they take, so that workers end together; models, which are loaded, stay together."""
    models = list(dict.fromkeys(cell.model.id for cell in cells))
    return sorted(cells, key=lambda cell: (models.index(cell.model.id), -cell.steps * (1 + (cell.guidance != 1))))


def _devices(device: str, workers: int | None, *, ray: bool) -> tuple[str, ...]:
    if ray:  # an actor has a GPU of its own
        return (device.partition(":")[0],)
    if device == "cuda" and (workers or 1) > 1:
        return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))
    return (device,)


@contextlib.contextmanager
def _without_bars(hidden: bool) -> Iterator[None]:
    """Have processes that are begun within it show no bars: those of several would be one on another."""
    name = "TQDM_DISABLE"
    before = os.environ.get(name)
    if hidden:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if hidden and before is None:
            del os.environ[name]
        elif hidden and before is not None:
            os.environ[name] = before
