"""The best of a function's values in an interval, by golden section."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["golden_section"]

_SHARE = (math.sqrt(5) - 1) / 2


def golden_section(
    function: Callable[[float], float], low: float, high: float, evaluations: int, *, digits: int = 3
) -> tuple[float, float]:
    """Where a function that falls and then rises is least, and its value there (Kiefer 1953).

    Every evaluation but the first two leaves ``0.618`` of the interval. Of a function that does not fall and then rise,
    or that is noisy, the best of what was looked at is given.

    Args:
        function: of a number from ``low`` to ``high``, rounded to ``digits`` behind the point.
        evaluations: how often it is called at most, twice at least.

    Raises:
        ValueError: fewer than two evaluations, or an interval that does not rise.
    """
    if evaluations < 2 or not low < high:
        raise ValueError(f"golden section takes two evaluations and low < high, got {evaluations}, {low} and {high}")
    found: dict[float, float] = {}

    def at(place: float) -> float:
        if place not in found:
            found[place] = function(place)
        return found[place]

    left, right = (round(end, digits) for end in (high - _SHARE * (high - low), low + _SHARE * (high - low)))
    for calls in range(2, evaluations + 1):
        if at(left) <= at(right):
            high, right, left = right, left, round(right - _SHARE * (right - low), digits)
            following = left
        else:
            low, left, right = left, right, round(left + _SHARE * (high - left), digits)
            following = right
        if calls == evaluations or not low < left < right < high:
            break
        at(following)
    return min(found.items(), key=lambda one: (one[1], one[0]))
