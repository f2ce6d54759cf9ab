"""Batches made by processes beside this one: a ``DataLoader`` whose errors and interrupts are those of its user."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

__all__ = ["fetch_batches"]

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
    """
    loader: DataLoader[Batch | Exception] = DataLoader(
        _Fetching(fetch),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupts,
    )
    for fetched in loader:
        if isinstance(fetched, Exception):
            try:
                raise fetched
            finally:
                # or it would be in a cycle: its traceback holds this frame
                del fetched
        yield fetched


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
