"""Data sets of images, and the emoji that the demonstration model learns."""

from madformer.data.images import open_dataset

__all__ = ["open_dataset"]
