"""What a run tells while it draws, and what it can be told in turn.

Shape legend: B batch, M blocks, L latents of a block, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the place of the ``block`` and the ``step`` count from 0.

    ``latents_BLC`` is the block after that step, in the memory that the next step overwrites. ``canvas_BMLC`` is memory
    of the images, in which this block is as it began.
    """

    block: int
    step: int
    latents_BLC: Tensor
    canvas_BMLC: Tensor

    def images(self) -> Tensor:
        """``(B, M, L, C)`` as they are: clean blocks, the one at hand, and noise in those to come."""
        images_BMLC = self.canvas_BMLC.clone()
        images_BMLC[:, self.block] = self.latents_BLC
        return images_BMLC


@dataclass(frozen=True)
class Change:
    """What a callback gives to have it otherwise from the next step on.

    Attributes:
        images_BMLC: in place of :meth:`Progress.images`. What was made of finished blocks stays in the cache: blocks to
            come are drawn after these as they were, but for the last one.
        guidance: the scale, 1 for none. stop: draw no further, and leave the blocks to come as noise.
    """

    images_BMLC: Tensor | None = None
    guidance: float | None = None
    stop: bool = False


def stops(change: object) -> bool:
    return isinstance(change, Change) and change.stop


@dataclass(frozen=True)
class FinishedBlock:
    """A copy of a block's latents, and on a GPU when they will be there."""

    place: int
    latents_BLC: Tensor
    end: torch.cuda.Event | None

    @classmethod
    def of(cls, place: int, latents_BLC: Tensor) -> FinishedBlock:
        end = torch.cuda.Event() if latents_BLC.is_cuda else None
        copied = latents_BLC.clone()
        if end is not None:
            end.record()
        return cls(place, copied, end)

    @property
    def is_under_way(self) -> bool:
        return self.end is not None and not self.end.query()

    def report(self, on_block: Callable[[int, Tensor], object], stream: torch.cuda.Stream | None) -> None:
        """Wait for it, and hand it out; on a GPU on a stream beside the blocks that follow."""
        if self.end is not None:
            self.end.synchronize()
        with torch.cuda.stream(stream):
            on_block(self.place, self.latents_BLC)
        if stream is not None:
            # the allocator may give the latents' memory away, and not before this stream is done with it
            self.latents_BLC.record_stream(stream)
