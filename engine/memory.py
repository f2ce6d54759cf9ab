"""Whether a plan fits on its device."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


class OutOfMemoryError(RuntimeError):
    """A batch does not fit; the message names the largest that does."""


def available(device: torch.device) -> int | None:
    """Bytes that could be allocated now; None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def largest_fit(make: Callable[[int], T], batch: int, bytes_per_image: int, device: torch.device) -> T:
    """``make(batch)``; where that does not fit, the largest batch that does is found and named.

    On a CPU by arithmetic, because a system that has run out of memory kills the process. On a GPU by trying.

    Args:
        bytes_per_image: what ``make`` allocates at least.

    Raises:
        OutOfMemoryError: it does not fit. Everything that was allocated is given back before.
    """
    room = available(device)
    most = batch if room is None else min(batch, room // bytes_per_image)
    if most < batch and device.type != "cuda":
        raise OutOfMemoryError(_message(batch, most, device))
    if most == batch:
        try:
            return make(batch)
        except torch.OutOfMemoryError:
            pass  # its traceback holds what was allocated: search after it is gone
    release(device)
    fits, too_large = 0, min(batch, most + 1)
    while too_large - fits > 1:
        trial = (fits + too_large) // 2
        fits, too_large = (trial, too_large) if _fits(make, trial, device) else (fits, trial)
    raise OutOfMemoryError(_message(batch, fits, device))


def _message(batch: int, fits: int, device: torch.device) -> str:
    hint = f"the largest batch that fits is {fits}" if fits else "not even a batch of 1 fits"
    return f"batch={batch} does not fit in the memory of {device}: {hint}"


def _fits(make: Callable[[int], T], batch: int, device: torch.device) -> bool:
    try:
        make(batch)
    except torch.OutOfMemoryError:
        return False
    finally:
        release(device)
    return True


def release(device: torch.device) -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
