"""Models by name: a local folder, or a repository of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

CONFIG_NAME = "config.json"


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
