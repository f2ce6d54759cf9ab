"""Files that appear whole or not at all, and state that is loaded with a complaint of one line."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn

CONFIG_NAME = "config.json"


def check_writable(folder: str | Path) -> None:
    """Make a folder and try it, so that hours of work do not end in an error.

    Raises:
        OSError: it cannot be made or written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}") from error


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes ``path`` when the block ends without an error.

    Until then it is locked, so that :func:`remove_leftovers` can tell it from what a killed process left.

    Raises:
        OSError: the folder cannot be made or written; the message names it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _locked_temporary(path)
    except OSError as error:
        raise OSError(f"cannot write to {path.parent}: {error.strerror}") from error
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
    import fcntl

    with contextlib.suppress(OSError), path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock that the system releases when the process ends, however it ends.

    Raises:
        OSError: another process holds it and ``wait`` is off, or the file system has no locks.
    """
    import fcntl  # Unix has it; nothing else here needs Unix

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
    import fcntl

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


def resolve_folder(name: str | Path, revision: str | None = None, **options: Any) -> Path:
    """The local folder of that name, or the snapshot of the hub repository of that name.

    Raises:
        FileNotFoundError: neither exists; one line that says so.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise NotADirectoryError(f"{name} is a file; a model is a folder that holds {CONFIG_NAME}")
    try:
        return Path(snapshot_download(str(name), revision=revision, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"no folder {name}, and no such repository on the hub could be read") from error


def fingerprint(module: nn.Module, config: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of SHA-256 over configuration and all weights, wherever they were loaded from.

    It reads every byte: about a second for a gigabyte.
    """
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], *, origin: str | Path, assign: bool = False) -> None:
    """``load_state_dict`` whose complaint is one line.

    Raises:
        ValueError: missing, unexpected or misshapen tensors; names the first ones.
    """
    if why := misfit(model, {name: tuple(tensor.shape) for name, tensor in state.items()}):
        raise ValueError(f"{origin} does not fit the configuration: {why}")
    model.load_state_dict(state, assign=assign)


def misfit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why tensors of these names and shapes are not a model's state, naming the first ones; None where they are."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, unexpected = sorted(own.keys() - shapes.keys()), sorted(shapes.keys() - own.keys())
    misshapen = sorted(name for name in own.keys() & shapes.keys() if own[name] != shapes[name])
    complaints = []
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)):
        if names:
            complaints.append(f"{len(names)} tensors {what} ({', '.join(names[:2])}{', ...' if names[2:] else ''})")
    return "; ".join(complaints) or None
