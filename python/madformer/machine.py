"""The machine at hand: the device and precision that suit it, the processes of a run, its description and its rates."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# PyTorch takes seconds to import, and a command line may only want to know which process it is


def cache_folder(name: str) -> Path:
    """Where what can be made again is kept: ``madformer/NAME`` in the user's cache (``$XDG_CACHE_HOME``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "madformer" / name


def device_of(name: str, *, elsewhere: bool = False) -> str:
    """A GPU where there is one, for ``auto``; under torchrun each process of a machine has a GPU of its own.

    Args:
        elsewhere: another machine will use it; this one need not be able to.

    Raises:
        ValueError: PyTorch cannot use that device.
    """
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if device.partition(":")[0] == "mps":
        raise ValueError(f"--device {device}: Apple's GPUs are not supported; --device cpu runs on their machines")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if not elsewhere:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return device


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 on a GPU and on processors that multiply bf16 matrices in hardware, else fp32."""
    import torch

    if torch.device(device).type == "cuda" or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


def precision_of(name: str, device: torch.device | str) -> str:
    """The faster of ``exact`` and ``default`` on this device, for ``auto``."""
    if name != "auto":
        return name
    import torch

    return "default" if default_dtype(device) == torch.bfloat16 else "exact"


def this_process() -> tuple[int, int]:
    """Which of how many processes this is, as torchrun says; ``(0, 1)`` without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def git_commit(folder: Path) -> str:
    """HEAD of the repository, with ``+dirty`` where the work tree differs; ``unknown`` outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: torch.device) -> str:
    import torch

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
    import torch

    # where it was installed by copy, this is no clone
    root = Path(__file__).resolve().parents[2]
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    versions["cuda"] = torch.version.cuda
    for name in packages:
        versions[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    # an allocator of memory, which short operators take a good part of their time for
    preloaded = [Path(name).name for name in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()]
    return {
        "benchmark": benchmark,
        "commit": git_commit(root) if (root / "python" / "madformer").is_dir() else "unknown",
        "device": device_name(device),
        "driver": driver_version(device),
        "threads": torch.get_num_threads(),
        "versions": versions,
        **({"preloaded": preloaded} if preloaded else {}),
    }


def synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product here, median of 5."""
    import torch

    # on a processor that has no bf16 six products of 2048 take two minutes
    size, calls = (8192, 8) if device.type == "cuda" else (1024, 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _per_call(lambda: torch.mm(a, b), calls, device)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a large copy here, median of 5."""
    import torch

    numbers, calls = (1 << 30, 8) if device.type == "cuda" else (1 << 26, 1)
    source = torch.ones(numbers, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _per_call(lambda: target.copy_(source), calls, device)


def _per_call(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    def several() -> None:
        for _ in range(calls):
            run()

    several()
    return statistics.median(seconds(several, device) for _ in range(5)) / calls
