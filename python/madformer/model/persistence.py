"""Files that appear whole or not at all, and state that is loaded with a complaint of one line."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
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

    Raises:
        OSError: the folder cannot be made or written; the message names it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OSError(f"cannot write to {path.parent}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock that the system releases when the process ends, however it ends.

    Raises:
        OSError: another process holds it and ``wait`` is off, or the file system has no locks.
    """
    import fcntl  # Unix has it; nothing else here needs Unix

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise OSError(f"another process is filling {path.parent}") from error
        yield


def umask() -> int:
    """What this process takes from the mode of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def resolve_folder(name: str | Path, revision: str | None = None) -> Path:
    """The local folder of that name, or the snapshot of the hub repository of that name.

    Raises:
        FileNotFoundError: neither exists; one line that says so.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise NotADirectoryError(f"{name} is a file; a model is a folder that holds {CONFIG_NAME}")
    try:
        return Path(snapshot_download(str(name), revision=revision))
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
