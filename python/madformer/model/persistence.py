"""``save_pretrained`` and ``from_pretrained``: a folder with ``config.json`` and safetensors, as diffusers has it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from madformer.config import MADFormerConfig

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


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
        os.chmod(temporary, 0o666 & ~_umask())
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


def _umask() -> int:
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


class PretrainedMixin:
    """Persistence for a module that is made from a :class:`MADFormerConfig`."""

    config: MADFormerConfig

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and the weights, cast to ``dtype`` where given. Each file appears whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        assert isinstance(self, nn.Module)
        state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        config = {"_class_name": type(self).__name__, **self.config.to_dict()}
        with atomic_path(Path(folder) / WEIGHTS_NAME) as path:
            save_file(state, path, metadata={"format": "pt"})
        with atomic_path(Path(folder) / CONFIG_NAME) as path:
            path.write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        subfolder: str = "",
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        **overrides: Any,
    ) -> Self:
        """Load what :meth:`save_pretrained` wrote, from a local folder or a repository on the hub, in eval mode.

        Args:
            name: folder or hub id; ``subfolder`` names a part of it.
            dtype: cast the weights; None keeps the stored dtype.
            overrides: configuration fields to change.

        Raises:
            FileNotFoundError: nothing there. ValueError: a file that is damaged, or weights that do not fit.
        """
        folder = resolve_folder(name, revision) / subfolder
        for file in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder} holds no {file}; a model folder is what save_pretrained writes")
        config = MADFormerConfig.from_file(folder / CONFIG_NAME).replace(**overrides)
        try:
            state = load_file(folder / WEIGHTS_NAME, device=str(device))
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS_NAME} is damaged or truncated: {error}") from error
        with torch.device("meta"):
            model = cls(config)  # type: ignore[call-arg]
        assert isinstance(model, nn.Module)
        load_weights(model, state, origin=folder / WEIGHTS_NAME, assign=True)
        model.to(device=device, dtype=dtype)
        return model.eval()


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], *, origin: str | Path, assign: bool = False) -> None:
    """``load_state_dict`` whose complaint is one line.

    Raises:
        ValueError: missing, unexpected or misshapen tensors; names the first ones.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misshapen = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    complaints = []
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)):
        if names:
            complaints.append(f"{len(names)} tensors {what} ({', '.join(names[:2])}{', ...' if names[2:] else ''})")
    if complaints:
        raise ValueError(f"{origin} does not fit the configuration: {'; '.join(complaints)}")
    model.load_state_dict(state, assign=assign)
