"""Files that appear whole or not at all, and locks that end with their process."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def check_writable(folder: str | Path) -> None:
    """Make a folder and try it, so that hours of work do not end in an error.

    Raises:
        OSError: it cannot be made or written.
    """
    with naming(f"to {folder}"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say in an ``OSError`` what cannot be written: who writes through an open file does not know its name."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {what}: {error.strerror or error}") from error


def made(folder: str | Path) -> Path:
    """The folder, which is there then; raises ``OSError`` that names it."""
    with naming(f"to {folder}"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def file_locks() -> Any:
    """The module ``fcntl``.

    Raises:
        OSError: this is no Unix.
    """
    try:
        return importlib.import_module("fcntl")
    except ImportError as error:
        raise OSError(
            f"files are written under locks of Linux and macOS, and {platform.system() or 'this system'} has no fcntl; "
            "on Windows use WSL"
        ) from error


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes ``path`` when the block ends without an error.

    Until then it is locked, so that :func:`remove_leftovers` can tell it from what a killed process left.

    Raises:
        OSError: the folder cannot be made or written; the message names it.
    """
    path = Path(path)
    file_locks()
    with naming(f"to {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _locked_temporary(path)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    except OSError as error:
        # what writes through an open file does not know its name
        if error.filename is None and error.strerror is not None:
            raise OSError(f"cannot write {path}: {error.strerror}") from error
        raise
    finally:
        if handle in _held:
            temporary.unlink(missing_ok=True)
        _release(handle)


def remove_leftovers(folder: str | Path, *names: str) -> None:
    """Remove what :func:`atomic_path` had begun for processes that are no more.

    Args:
        folder: with all that is in it. names: patterns of the files' names there, as ``fnmatch`` has them.
    """
    for path in Path(folder).glob("**/.*"):
        begun = _TEMPORARY.fullmatch(path.name)
        if begun is not None and not path.is_dir() and any(fnmatchcase(begun[1], name) for name in names):
            remove_leftover(path)


def remove_leftovers_of(path: Path) -> None:
    """Remove what :func:`atomic_path` had begun of one file; its folder need not exist."""
    with contextlib.suppress(FileNotFoundError), os.scandir(path.parent) as entries:
        for entry in entries:
            begun = _TEMPORARY.fullmatch(entry.name)
            if begun is not None and begun[1] == path.name and entry.is_file(follow_symlinks=False):
                remove_leftover(path.parent / entry.name)


def remove_leftover(path: Path) -> None:
    """Remove a temporary file of :func:`atomic_path`, if its process is no more."""
    fcntl = file_locks()
    with contextlib.suppress(OSError), path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock that the system releases when the process ends, however it ends.

    Raises:
        OSError: another process holds it and ``wait`` is off, or the file system has no locks.
    """
    fcntl = file_locks()
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise OSError(f"another process is filling {path.parent}") from error
        except OSError as error:
            raise OSError(f"cannot lock {path}: {error.strerror}") from error
        yield
    finally:
        _release(handle)


def check_unlocked(path: Path) -> None:
    """Raise what :func:`locked` would without waiting; nothing is held or made."""
    if path.exists():
        with locked(path, wait=False):
            pass


# how `atomic_path` names what it has not finished: with eight characters of `tempfile`'s
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")
_held: set[int] = set()


def _release(handle: int) -> None:
    if handle in _held:
        _held.remove(handle)
        os.close(handle)


def _release_all() -> None:
    for handle in list(_held):
        _release(handle)


# a lock belongs to every process that inherits its file: a loader's worker would hold it for a run that was killed
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_all)


def _locked_temporary(path: Path) -> tuple[int, Path]:
    fcntl = file_locks()
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        _held.add(handle)
        # a file system without locks: then nothing is taken for a leftover, either
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        # `remove_leftovers` of another process came between
        _release(handle)


def umask() -> int:
    """What this process takes from the mode of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, values: Any) -> None:
    """Write it whole or not at all, as :func:`atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
