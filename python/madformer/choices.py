"""What words on a command line mean."""

from __future__ import annotations

import argparse
import os
import re
from typing import TypeVar

Number = TypeVar("Number", int, float)


def numbers(kind: type[Number], text: str) -> tuple[Number, ...]:
    """``1,2`` or ``1x2``, for an option's ``type``.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    try:
        return tuple(kind(part) for part in re.split("[,x]", text))
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise argparse.ArgumentTypeError(f"{text!r} must be {what} with commas between them") from error


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
