"""Folders that several processes fill together, which may be stopped at any moment and gone on with by any number.

One file in the folder says what the folder is of. The work is numbered, and dealt to processes by number; which files
are there says what is done. Pictures drawn in bulk and encoded latents are both kept so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from madformer.files.atomic import check_writable, locked

T = TypeVar("T")

LOCK = ".lock"
"""Held while what is in the folder is looked at and put in order; a process holds its own, ``.lock-0``, throughout."""


@contextmanager
def taken(folder: Path, rank: int, settle: Callable[[], T]) -> Iterator[T]:
    """Hold a folder for one process of a run; gives what ``settle`` returned.

    Args:
        rank: of the process among those of the run.
        settle: puts the folder in order; one process at a time does.

    Raises:
        OSError: the folder cannot be written, or a process of this rank is at work in it.
    """
    check_writable(folder)
    with locked(folder / f"{LOCK}-{rank}", wait=False):
        with locked(folder / LOCK):
            settled = settle()
        yield settled


def goes_on(
    folder: Path, description: str, found: str | None, difference: Callable[[], str | None], advice: str
) -> bool:
    """Whether a folder is gone on with; if not, it is new, and ``description`` is to be written.

    Args:
        description: name of the file that says what the folder is of.
        found: a file in it that a run made. A run that ended before its first one binds nobody.
        difference: what :func:`first_difference` says of the description that is there and the one at hand.
        advice: what to do where it is refused.

    Raises:
        ValueError: it is of another run, or of something else; one line.
    """
    if not (folder / description).exists():
        if found:
            raise ValueError(f"{folder} holds {found} but no {description}: {advice}")
        return False
    if why := difference():
        if found:
            raise ValueError(f"{folder} is of a run with {why}: {advice}")
        return False
    return True


def first_difference(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The first entry in which they differ, however deep, as ``name=what is stored, not what is given``; or None."""
    theirs, ours = flat(stored), flat(given)
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if name not in ours or name not in theirs or ours[name] != theirs[name]:
            return f"{name}={theirs.get(name, 'absent')!r}, not {ours.get(name, 'absent')!r}"
    return None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Without nesting: a value by the names and places that lead to it, with points between them."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            value = {str(index): entry for index, entry in enumerate(value)}
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def dealt(count: int, rank: int, world_size: int) -> range:
    """The numbers below ``count`` that a process is dealt."""
    return range(rank, count, world_size)


def span(number: int, size: int, total: int) -> range:
    """What belongs to a piece of ``size`` of a whole of ``total``; the last piece may have less."""
    return range(number * size, min((number + 1) * size, total))
