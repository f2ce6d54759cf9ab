"""Some rows of a tensor, or all of them without a copy: ``rows_B`` is None for all, in order."""

from __future__ import annotations

from torch import Tensor


def take(tensor_R: Tensor, rows_B: Tensor | None) -> Tensor:
    """The rows as ``(B, ...)``; the tensor itself for all."""
    return tensor_R if rows_B is None else tensor_R.index_select(0, rows_B)


def put(tensor_R: Tensor, rows_B: Tensor | None, values_B: Tensor) -> None:
    """Write the rows back; nothing to do for a tensor that was changed in place."""
    if rows_B is not None:
        tensor_R.index_copy_(0, rows_B, values_B)
    elif values_B is not tensor_R:
        tensor_R.copy_(values_B)
