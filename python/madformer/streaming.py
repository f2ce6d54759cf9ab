"""A function that calls back, as an iterator over what it says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class _LeftError(Exception):
    """Nobody listens any more."""


def reports(work: Callable[[Callable[[T], None]], None]) -> Iterator[T]:
    """Run ``work(report)`` in a thread, and give what it reports, as soon as it does.

    Whoever leaves the iterator early ends the work at its next report.

    Raises:
        Whatever ``work`` raises, after its last report.
    """
    said: SimpleQueue[tuple[T] | None] = SimpleQueue()
    left = threading.Event()

    def report(item: T) -> None:
        if left.is_set():
            raise _LeftError
        said.put((item,))

    with ThreadPoolExecutor(1, "report") as thread:
        future = thread.submit(work, report)
        future.add_done_callback(lambda _: said.put(None))
        try:
            while (item := said.get()) is not None:
                yield item[0]
            future.result()
        finally:
            left.set()
