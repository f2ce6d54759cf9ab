"""What ``auto`` means on a command line."""

from __future__ import annotations

import os


def device_of(name: str, *, elsewhere: bool = False) -> str:
    """A GPU where there is one, for ``auto``; under torchrun each process of a machine has a GPU of its own.

    Args:
        elsewhere: another machine will use it; this one need not be able to.

    Raises:
        ValueError: PyTorch cannot use that device.
    """
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if not elsewhere:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return device


def precision_of(name: str, device: str) -> str:
    """The faster of ``exact`` and ``default`` on this device, for ``auto``."""
    import torch

    from madformer.pipeline import default_dtype

    if name != "auto":
        return name
    return "default" if default_dtype(device) == torch.bfloat16 else "exact"
