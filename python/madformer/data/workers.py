"""Batches made by processes beside this one: a ``DataLoader`` whose errors and interrupts are those of its user."""

from __future__ import annotations

import pickle
import re
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Generic, TypeVar

from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.signal_handling import _remove_worker_pids as remove_worker_pids

__all__ = ["fetch_batches", "lost_worker"]

Item = TypeVar("Item")
Batch = TypeVar("Batch")


def fetch_batches(
    fetch: Callable[[Sequence[Item]], Batch],
    batches: Iterable[Sequence[Item]],
    *,
    num_workers: int,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """``map(fetch, batches)``, in order, run ahead by ``num_workers`` processes; by this one if there are none.

    The processes end with the generator. Let none of its arguments refer to it: a ``DataLoader`` that is collected in a
    cycle waits 5 s for each worker.

    Args:
        fetch: picklable. pin_memory: copy tensors to pinned memory, also those of a batch with a method of that name.

    Raises:
        ValueError, OSError: as ``fetch`` raised it; a ``DataLoader`` would put the worker's traceback in its message.
        ChildProcessError: one of the processes was killed, by the system for want of memory, say.
    """
    loader: DataLoader[Batch | Exception] = DataLoader(
        _Fetching(fetch),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupts,
    )
    for fetched in _named_losses(loader):
        if isinstance(fetched, Exception):
            try:
                raise fetched
            finally:
                # or it would be in a cycle: its traceback holds this frame
                del fetched
        yield fetched


def lost_worker(error: RuntimeError) -> ChildProcessError | None:
    """What to raise in place of PyTorch's error about a process of its ``DataLoader`` that is gone; else None."""
    found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", str(error))
    if found is None:
        return None
    return _loss(found[1], found[2].strip().rstrip("."))


def _loss(pids: str, reason: str) -> ChildProcessError:
    return ChildProcessError(f"a process that reads the data (pid {pids}) {reason}; was there too little memory?")


def _lost_sender(batches: Iterator[Batch]) -> ChildProcessError | None:
    """The same for a process that was killed as it sent a batch, which breaks off before the process counts as dead."""
    processes = getattr(batches, "_workers", ())
    dead = wait([process.sentinel for process in processes], timeout=1)
    pids = ", ".join(str(process.pid) for process in processes if process.sentinel in dead)
    return _loss(pids, "ended within a batch") if dead else None


def _named_losses(loader: DataLoader[Batch]) -> Iterator[Batch]:
    batches = iter(loader)
    _leave_unwatched(batches)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            # None of them is fetch's own ValueError or OSError, which comes as a batch.
            raise (isinstance(error, RuntimeError) and lost_worker(error)) or _lost_sender(batches) or error from error
        yield batch


def _leave_unwatched(batches: Iterator[Batch]) -> None:
    """Keep PyTorch from raising wherever the program is when a worker dies: within an optimiser's step, say.

    One handler of SIGCHLD raises for the workers of every ``DataLoader`` in the program, for ours too where somebody
    else made one before. Without it a dead worker is found, within seconds, by the next request for a batch.
    """
    if getattr(batches, "_worker_pids_set", False):
        remove_worker_pids(id(batches))
        batches._worker_pids_set = False  # type: ignore[attr-defined]


class _Fetching(Dataset[Batch], Generic[Item, Batch]):
    """Asked for a batch at a time."""

    def __init__(self, fetch: Callable[[Sequence[Item]], Batch]) -> None:
        self.fetch = fetch

    def __getitems__(self, items: Sequence[Item]) -> Batch | Exception:
        try:
            return self.fetch(items)
        except (ValueError, OSError) as error:
            return error


def _unchanged(fetched: Batch) -> Batch:
    return fetched


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches the whole group: a run that then saves what it has still needs its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
