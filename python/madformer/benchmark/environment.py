"""What every record says about where it was made, and how it is written."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from madformer.model.persistence import atomic_path


def git_commit(folder: Path) -> str:
    """HEAD of the repository, with ``+dirty`` where the work tree differs; ``unknown`` outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def own_commit() -> str:
    """Of the clone that this package runs from; ``unknown`` where it was installed by copy."""
    root = Path(__file__).resolve().parents[3]
    return git_commit(root) if (root / "python" / "madformer").is_dir() else "unknown"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def driver_version(device: torch.device) -> str | None:
    """The NVIDIA driver's, None on a CPU or where nobody tells."""
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    return None


def environment(benchmark: str, device: torch.device, packages: Sequence[str] = ()) -> dict[str, Any]:
    """The head of a record; ``packages`` that are not installed are None."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    versions["cuda"] = torch.version.cuda
    for name in packages:
        versions[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "benchmark": benchmark,
        "commit": own_commit(),
        "device": device_name(device),
        "driver": driver_version(device),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def write(record: dict[str, Any], path: Path) -> None:
    """Writes the record whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
