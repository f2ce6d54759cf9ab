"""What is asked of an in-flight batcher: a request, and while it has a slot, where it stands.

Shape legend: M blocks, L latents of a block, C channels, R slots.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from madformer.conditioning.prompt import Prompt
from madformer.engine.progress import FinishedBlock
from madformer.engine.slots import ScheduleRows

OnStep = Callable[[int, int], object]
"""Told of a block's place, and how many of its denoising steps were launched."""
OnBlock = Callable[[FinishedBlock], object]
"""Given a block that was drawn."""


@dataclass(order=True)
class Job:
    """A request and, while it has a slot, where it stands; ordered by who goes first.

    Attributes:
        canvas_MLC: the noise of the blocks that are drawn, and the others as they are given.
        order: places of all blocks. drawn: of those that are drawn, in order. block: counts through ``order``.
    """

    priority: int
    arrival: int
    canvas_MLC: Tensor = field(compare=False)
    order: list[int] = field(compare=False)
    drawn: list[int] = field(compare=False)
    schedule: ScheduleRows = field(compare=False)
    future: Future[Tensor] = field(compare=False)
    prompt: Prompt = field(compare=False)
    on_step: OnStep | None = field(compare=False, default=None)
    on_block: OnBlock | None = field(compare=False, default=None)
    row: int = field(compare=False, default=-1)
    block: int = field(compare=False, default=0)
    step: int = field(compare=False, default=0)

    @property
    def place(self) -> int:
        return self.order[self.block]

    @property
    def is_between(self) -> bool:
        """Whether the block at hand is clean: drawn, or kept."""
        return self.step == self.schedule.num_steps or self.place not in self.drawn

    @property
    def is_done(self) -> bool:
        return self.place == self.drawn[-1] and self.is_between

    def tell(self, latents_RLC: Tensor) -> None:
        """Call back after a step; whatever that raises ends this image alone."""
        try:
            if self.on_step is not None:
                self.on_step(self.place, self.step)
            if self.on_block is not None and self.is_between:
                self.on_block(FinishedBlock.of(self.place, latents_RLC[self.row]))
        except Exception as error:
            if not self.future.done() and self.future.set_running_or_notify_cancel():
                self.future.set_exception(error)
