"""A function that calls back, as an iterator over what it says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class _LeftError(Exception):
    """Nobody listens any more."""


def reports(work: Callable[[Callable[[T], None]], None]) -> Iterator[T]:
    """Run ``work(report)`` in a thread, and give what it reports; from there it goes on when the next is asked for.

    So work and the body of a loop over it take turns, and neither sees what the other leaves half done. Whoever leaves
    the iterator early ends the work at the report that it waits at.

    Raises:
        Whatever ``work`` raises, after its last report.
    """
    said, asked, left = threading.Semaphore(0), threading.Semaphore(0), threading.Event()
    items: list[T] = []
    errors: list[BaseException] = []

    def report(item: T) -> None:
        items.append(item)
        said.release()
        asked.acquire()
        if left.is_set():
            raise _LeftError

    def run() -> None:
        try:
            work(report)
        except BaseException as error:
            errors.append(error)
        finally:
            said.release()

    # a daemon: an iterator that nobody asks again does not keep the process
    thread = threading.Thread(target=run, name="report", daemon=True)
    thread.start()
    try:
        while said.acquire() and items:
            yield items.pop()
            asked.release()
        if errors:
            raise errors[0]
    finally:
        left.set()
        asked.release()
        thread.join()
