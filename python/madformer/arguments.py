"""What a call is given, checked: one sentence that names the argument, its value and what is wanted.

All raise ``ValueError``.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 60


def shown(value: object) -> str:
    """A value as a sentence has room for it, in one line; an array by its shape."""
    if getattr(value, "shape", ()):
        return f"<{type(value).__name__} of the shape {tuple(value.shape)}>"  # type: ignore[attr-defined]
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def whole_number(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """One from ``low`` to ``high``, where they are given, also NumPy's or PyTorch's; neither True nor 2.0."""
    number = as_whole(value)
    if number is None:
        raise ValueError(f"{name}={shown(value)} must be a whole number")
    if low is not None and number < low:
        raise ValueError(f"{name}={number} must be at least {low}")
    if high is not None and number > high:
        raise ValueError(f"{name}={number} must be at most {high}")
    return number


def as_whole(value: Any) -> int | None:
    """The whole number that it is; None for anything else."""
    try:
        return None if _is_truth_value(value) else operator.index(value)
    except TypeError:
        return None


def number(name: str, value: Any, low: float = -math.inf) -> float:
    """A finite one from ``low`` on, also NumPy's or PyTorch's."""
    if not is_real(value):
        raise ValueError(f"{name}={shown(value)} must be a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}={float(value)} must be finite")
    if value < low:
        raise ValueError(f"{name}={float(value)} must be at least {low}")
    return float(value)


def interval(name: str, value: Any) -> tuple[float, float]:
    """The lower number, then the higher, either of which may be infinite."""
    pair = tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(pair) != 2 or not all(map(is_real, pair)) or any(map(math.isnan, pair)):
        raise ValueError(f"{name}={shown(value)} must be two numbers, the lower timestep, then the higher")
    if pair[0] > pair[1]:
        raise ValueError(f"{name}={shown(value)} must be the lower timestep, then the higher")
    return float(pair[0]), float(pair[1])


def is_real(value: Any) -> bool:
    """Whether it is a number, or an array without dimensions that holds one, but no truth value."""
    if isinstance(value, numbers.Real):
        return not _is_truth_value(value) and _has_float(value)
    return getattr(value, "shape", None) == () and not _is_truth_value(value) and _has_float(value)


def _has_float(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False
    return True


def _is_truth_value(value: Any) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def choice(name: str, value: Any, choices: Collection[str]) -> None:
    """One of several names."""
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name}={shown(value)} must be {', '.join(others)} or {last}")


def truth_value(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be True or False")


def function(name: str, value: Any) -> None:
    """Something that can be called, or None."""
    if value is not None and not callable(value):
        raise ValueError(f"{name} must be callable, got {shown(value)}")


def floats(name: str, value: Any, shape: Collection[int]) -> Tensor:
    """A dense tensor of floating-point numbers of that shape, on any device that holds them."""
    import torch

    wanted = tuple(shape)
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a torch.Tensor of the shape {wanted}, got {shown(value)}")
    if value.shape != wanted:
        raise ValueError(f"{name} must have the shape {wanted}, got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must hold floating-point numbers, got {value.dtype}")
    if value.is_meta or value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor with numbers in it, got {value.layout} on {value.device}")
    return value
