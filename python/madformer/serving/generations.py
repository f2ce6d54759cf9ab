"""A request from when it is admitted until nobody asks for it any more, and its images.

Shape legend: M blocks, L latents of a block, C channels.
"""

from __future__ import annotations

import asyncio
import base64
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from madformer.config import MADFormerConfig
from madformer.serving.drawing import Drawing
from madformer.serving.errors import ServingError
from madformer.serving.events import EventLog


@dataclass(eq=False)
class Picture:
    """One image of a request.

    Attributes:
        blocks: latents ``(L, C)`` of those that were drawn, by place; of the thread that draws.
        started, seconds: on the clock, and from then until the file was there.
    """

    generation: Generation
    index: int
    rank: int
    future: Future[Tensor] | None = None
    blocks: dict[int, Tensor] = field(default_factory=dict)
    started: float | None = None
    told: float = 0.0
    image_steps: int = 0
    file: bytes | None = None
    error: ServingError | None = None
    seconds: float = 0.0

    @property
    def seed(self) -> int:
        return self.generation.drawing.seed + self.index

    @property
    def is_over(self) -> bool:
        return self.file is not None or self.error is not None

    @property
    def b64_json(self) -> str:
        assert self.file is not None
        return base64.b64encode(self.file).decode()


@dataclass(eq=False)
class Generation:
    """A request that was admitted; ``over`` when there is nothing more to wait for."""

    id: str
    drawing: Drawing
    client: str
    streamed: bool
    size: tuple[int, int]
    created: int = field(default_factory=lambda: int(time.time()))
    admitted: float = field(default_factory=time.monotonic)
    ended: float | None = None
    pictures: list[Picture] = field(default_factory=list)
    log: EventLog = field(default_factory=EventLog)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    error: ServingError | None = None
    watchers: int = 0
    timers: list[asyncio.TimerHandle] = field(default_factory=list)

    @property
    def status(self) -> str:
        if self.ended is not None:
            return "done" if self.error is None else "cancelled" if self.error.code == "cancelled" else "failed"
        return "running" if any(picture.started is not None for picture in self.pictures) else "queued"

    @property
    def nbytes(self) -> int:
        return self.log.nbytes + sum(len(picture.file or b"") for picture in self.pictures)

    def publish(self, kind: str, *, last: bool = False, **values: Any) -> None:
        self.log.publish(kind, {"id": self.id, **values}, last=last)

    def raise_if_failed(self) -> None:
        if self.error is not None:
            raise self.error

    def described(self, picture: Picture) -> dict[str, Any]:
        """A finished image as the native API gives it."""
        return {
            "index": picture.index,
            "seed": picture.seed,
            "width": self.size[0],
            "height": self.size[1],
            "b64_json": picture.b64_json,
            "output_format": self.drawing.output_format,
        }


def compose(drawing: Drawing, blocks: dict[int, Tensor], config: MADFormerConfig) -> Tensor:
    """Latents ``(M, L, C)`` of a picture as far as it is: 0 in the blocks to come."""
    some = next(iter(blocks.values()))
    canvas_MLC = some.new_zeros(config.num_blocks, *some.shape)
    if drawing.given is not None:
        kept = [place for place in range(config.num_blocks) if place not in drawing.drawn]
        canvas_MLC[kept] = drawing.given[kept].to(canvas_MLC)
    for place, latents_LC in blocks.items():
        canvas_MLC[place] = latents_LC
    return canvas_MLC


def box_of(place: int, config: MADFormerConfig, size: tuple[int, int]) -> list[int]:
    """Left, top, width and height of a block in a picture of this width and height."""
    (rows, columns), (width, height) = config.grid, size
    row, column = divmod(place, columns)
    return [column * width // columns, row * height // rows, width // columns, height // rows]
