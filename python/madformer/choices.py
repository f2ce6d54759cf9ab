"""What words on a command line mean."""

from __future__ import annotations

import argparse
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
