"""Where requests are admitted, drawn, told of and given up.

Everything here is of the server's event loop. What the threads that draw and finish have to tell they post to it, and
go on: nothing that a client does or leaves can keep them.

Shape legend: M blocks, L latents of a block, C channels.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from madformer.config import MADFormerConfig
from madformer.engine.progress import FinishedBlock
from madformer.serving import errors
from madformer.serving.drawing import Drawing
from madformer.serving.errors import ServingError
from madformer.serving.fairness import FairRanks
from madformer.serving.finishing import Finisher, Work
from madformer.serving.generations import Generation, Picture, box_of, compose
from madformer.serving.metrics import Metrics
from madformer.serving.settings import ServerSettings
from madformer.serving.stepping import Stepper

logger = logging.getLogger("madformer.serving")

STEP_INTERVAL = 0.1
"""Seconds between two steps of an image that are told."""


class Desk:
    """Admits requests, has them drawn, and tells how they go.

    Args:
        config: of the model. size: width and height of its pictures.
    """

    def __init__(
        self,
        stepper: Stepper,
        finisher: Finisher,
        config: MADFormerConfig,
        size: tuple[int, int],
        settings: ServerSettings,
        metrics: Metrics,
    ) -> None:
        self.stepper, self.finisher, self.settings, self.metrics = stepper, finisher, settings, metrics
        self.config, self.size = config, size
        self.loop = asyncio.get_running_loop()
        self.ranks = FairRanks()
        self.generations: dict[str, Generation] = {}
        # the oldest first, with their bytes
        self.ended: dict[Generation, int] = {}
        self.kept_bytes = 0
        self.active: set[Picture] = set()
        self.by_client: Counter[str] = Counter()
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()
        self.images_done, self.seconds_per_image = 0, 0.0

    @property
    def is_ready(self) -> bool:
        return self.stepper.ready.is_set() and self.stepper.is_alive and not self.draining

    # What is asked for

    def check_room(self, count: int, client: str) -> None:
        """Raises ``ServingError`` where there is none for so many images: 503, or 429 with the time to try again."""
        settings = self.settings
        count = min(count, settings.max_images)  # more are refused for good
        if self.draining:
            raise errors.ending()
        if not self.is_ready:
            code = "warming_up" if self.stepper.is_alive else "not_drawing"
            raise ServingError.unavailable("the server does not draw yet" if self.stepper.is_alive else
                                           "the server does not draw any more", code)  # fmt: skip
        room = settings.slots + settings.max_waiting - len(self.active)
        if count > room:
            self.metrics.refused.labels("queue_full").inc()
            message = f"{len(self.active)} images are drawn or wait, and there is no room for {count} more"
            raise ServingError.busy(message, self.seconds_for(count - max(0, room)))
        if self.by_client[client] + count > settings.max_per_client:
            self.metrics.refused.labels("client_limit").inc()
            most = settings.max_per_client
            message = f"{self.by_client[client]} images of this client are drawn or wait, and there may be {most}"
            raise ServingError.busy(message, self.seconds_for(count), "client_limit")

    def seconds_for(self, count: int) -> float:
        """In which so many of the images that are here get done, by what steps take now."""
        left = sum(map(self._steps_left, self.active)) / max(1, len(self.active))
        return count * left * self.stepper.seconds_per_image_step()

    def submit(self, drawing: Drawing, client: str, *, streamed: bool) -> Generation:
        """Have it drawn.

        Args:
            streamed: steps and blocks are to be told.

        Raises:
            ServingError: no room, or the engine refuses it.
        """
        self.check_room(drawing.count, client)
        generation = Generation(secrets.token_hex(12), drawing, client, streamed, self.size)
        cost = self._cost(drawing)
        try:
            for index in range(drawing.count):
                picture = Picture(generation, index, self.ranks.rank(client, drawing.priority, cost))
                picture.future = self._submitted(picture)
                generation.pictures.append(picture)
        except ValueError as error:
            self._give_up(generation)
            raise ServingError.refused(str(error)) from error
        self.generations[generation.id] = generation
        self.active.update(generation.pictures)
        self.idle.clear()
        self.by_client[client] += drawing.count
        first = generation.pictures[0]
        ahead = [
            p for p in self.active if p.started is None and p.generation is not generation and p.rank <= first.rank
        ]
        running = [p for p in self.active if p.started is not None]
        work = sum(map(self._steps_left, (*ahead, *running, *generation.pictures)))
        seconds = round(work * self.stepper.seconds_per_image_step(), 3)
        generation.publish("queued", position=len(ahead), estimated_seconds=seconds)
        if drawing.deadline is not None:
            passed = errors.deadline_passed(drawing.deadline)
            left = drawing.deadline - (time.monotonic() - generation.admitted)
            generation.timers.append(self.loop.call_later(max(0.0, left), self.end, generation, passed))
        return generation

    def _cost(self, drawing: Drawing) -> int:
        return len(drawing.drawn) * drawing.options.steps * (2 if drawing.kind.guided else 1)

    def _steps_left(self, picture: Picture) -> int:
        drawing = picture.generation.drawing
        return max(0, len(drawing.drawn) * drawing.options.steps - picture.image_steps)

    def _submitted(self, picture: Picture) -> Future[Tensor]:
        drawing, streamed = picture.generation.drawing, picture.generation.streamed

        # both of the thread that draws

        def on_step(place: int, step: int) -> None:
            picture.image_steps += 1
            now = time.monotonic()
            if picture.started is None:
                picture.started = now
                self._post(self._started, picture)
            if streamed and now - picture.told >= STEP_INTERVAL:
                picture.told = now
                self._post(self._stepped, picture, place, step, picture.image_steps)

        def on_block(finished: FinishedBlock) -> None:
            order = len(picture.blocks)
            picture.blocks[finished.place] = finished.latents_BLC
            # the last block's picture is the finished one
            if order in drawing.previews and order < len(drawing.drawn) - 1:
                blocks = dict(picture.blocks)
                self._finish(
                    lambda: compose(drawing, blocks, self.config),
                    drawing,
                    lambda made: self._post(self._drew_block, picture, finished.place, order, made),
                    preview=True,
                )

        future = self.stepper.submit(
            drawing, picture.index, picture.rank, on_step=on_step, on_block=on_block if drawing.previews else None
        )
        future.add_done_callback(lambda done: self._drawn(picture, done))
        return future

    def _finish(
        self,
        latents: Callable[[], Tensor],
        drawing: Drawing,
        deliver: Callable[[Any], object],
        record: Mapping[str, Any] | None = None,
        *,
        preview: bool = False,
    ) -> None:
        self.finisher.put(Work(latents, drawing.output_format, drawing.quality, deliver, record, preview))

    def _drawn(self, picture: Picture, done: Future[Tensor]) -> None:
        """Of the thread that draws, or of whoever cancelled."""
        if done.cancelled():
            return
        if (error := done.exception()) is not None:
            self._post(self._finished, picture, error)
            return
        latents_MLC, drawing = done.result(), picture.generation.drawing
        self._finish(
            lambda: latents_MLC,
            drawing,
            lambda made: self._post(self._finished, picture, made),
            drawing.record(picture.index),
        )

    def _post(self, tell: Callable[..., object], *values: Any) -> None:
        # a loop that is closed has nobody to tell
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(tell, *values)

    # What the threads have told

    def _started(self, picture: Picture) -> None:
        self.ranks.begun(picture.rank)
        generation = picture.generation
        if generation.ended is None:
            assert picture.started is not None
            self.metrics.wait.observe(picture.started - generation.admitted)
            generation.publish("started", index=picture.index)

    def _stepped(self, picture: Picture, place: int, step: int, image_steps: int) -> None:
        generation, drawing = picture.generation, picture.generation.drawing
        if generation.ended is None and not picture.is_over:
            steps = drawing.options.steps
            fraction = min(1.0, round(image_steps / (steps * len(drawing.drawn)), 4))
            generation.publish("step", index=picture.index, block=place, step=step, num_steps=steps, fraction=fraction)

    def _drew_block(self, picture: Picture, place: int, order: int, made: bytes | Exception) -> None:
        # what is not finite is told when the image ends
        if picture.generation.ended is None and not picture.is_over and isinstance(made, bytes):
            self._tell_block(picture, place, order, made)

    def _tell_block(self, picture: Picture, place: int, order: int, file: bytes) -> None:
        generation, drawing = picture.generation, picture.generation.drawing
        if order == 0:
            self.metrics.first_block.observe(time.monotonic() - generation.admitted)
        generation.publish(
            "block",
            index=picture.index,
            block=place,
            order=order,
            num_blocks=len(drawing.drawn),
            box=box_of(place, self.config, self.size),
            b64_json=base64.b64encode(file).decode(),
            output_format=drawing.output_format,
        )

    def _finished(self, picture: Picture, made: bytes | BaseException) -> None:
        generation = picture.generation
        self._release(picture)
        if generation.ended is not None or picture.is_over:
            return
        now = time.monotonic()
        picture.blocks.clear()
        if isinstance(made, bytes):
            drawing, last = generation.drawing, len(generation.drawing.drawn) - 1
            picture.file = made
            picture.seconds = now - (picture.started or generation.admitted)
            self._count(picture.seconds, now - generation.admitted)
            if last in drawing.previews:
                self._tell_block(picture, drawing.drawn[last], last, made)
            generation.publish("finished", **generation.described(picture))
        else:
            picture.error = ServingError.of(made)
            self.metrics.failures.labels(picture.error.code).inc()
            logger.error("an image failed: %s", picture.error.message, extra={"generation": generation.id})
            if len(generation.pictures) > 1:
                generation.publish("error", index=picture.index, error=picture.error.error)
        if all(other.is_over for other in generation.pictures):
            failed = [other.error for other in generation.pictures if other.file is None]
            self.end(generation, failed[0] if len(failed) == len(generation.pictures) else None)

    def _count(self, seconds: float, since_request: float) -> None:
        self.images_done += 1
        self.metrics.images.inc()
        self.metrics.image.observe(since_request)
        weight = 1 / min(self.images_done, 20)
        self.seconds_per_image += weight * (seconds - self.seconds_per_image)

    def _release(self, picture: Picture) -> None:
        """What it took of the server is there for others."""
        if picture in self.active:
            self.active.remove(picture)
            client = picture.generation.client
            self.by_client[client] -= 1
            if not self.by_client[client]:
                del self.by_client[client]
        if not self.active:
            self.ranks.forget()
            self.idle.set()

    # Ends

    def end(self, generation: Generation, error: ServingError | None = None) -> None:
        """It is done, or ``error`` says why it is not."""
        if generation.ended is not None:
            return
        generation.ended, generation.error = time.monotonic(), error
        for timer in generation.timers:
            timer.cancel()
        self._give_up(generation)
        if error is None:
            generation.publish("done", last=True, seconds=round(generation.ended - generation.admitted, 3))
        else:
            self.metrics.ended.labels(error.code).inc()
            generation.publish("error", last=True, error=error.error)
        generation.over.set()
        self._keep(generation)

    def _give_up(self, generation: Generation) -> None:
        for picture in generation.pictures:
            if picture.future is not None and picture.future.cancel():
                self._release(picture)

    def _keep(self, generation: Generation) -> None:
        """For a while, and as long as those that ended since leave room."""
        self.ended[generation] = generation.nbytes
        self.kept_bytes += generation.nbytes
        generation.timers.append(self.loop.call_later(self.settings.keep, self._forget, generation))
        while self.kept_bytes > self.settings.keep_bytes and len(self.ended) > 1:
            self._forget(next(iter(self.ended)))

    def _forget(self, generation: Generation) -> None:
        self.kept_bytes -= self.ended.pop(generation, 0)
        self.generations.pop(generation.id, None)
        # a timer holds it; and Python looks for cycles so rarely, with PyTorch's objects among its own, that thousands
        # would pile up
        for timer in generation.timers:
            timer.cancel()
        for picture in generation.pictures:
            picture.future = None
        # whoever waits for it may not have been told yet that it ended, and is to have its pictures
        if not generation.watchers:
            generation.pictures.clear()

    def fail(self, error: BaseException) -> None:
        """Nothing is drawn any more."""
        for generation in [one for one in self.generations.values() if one.ended is None]:
            self.end(generation, ServingError.of(error))

    async def drain(self, grace: float) -> None:
        """Admit nothing more, and give what is here so many seconds; the rest is handed back unfinished."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.idle.wait(), grace)
        for generation in [one for one in self.generations.values() if one.ended is None]:
            self.end(generation, errors.ending())

    # Who listens

    @contextlib.asynccontextmanager
    async def watching(self, generation: Generation) -> AsyncIterator[None]:
        """Somebody waits for it within; where nobody does any more, and nobody comes back, it is cancelled."""
        generation.watchers += 1
        try:
            yield
        finally:
            generation.watchers -= 1
            if not generation.watchers and generation.ended is None:
                timer = self.loop.call_later(self.settings.reconnect, self._abandon, generation)
                generation.timers.append(timer)

    def _abandon(self, generation: Generation) -> None:
        if not generation.watchers:
            self.end(generation, errors.cancelled())

    def find(self, name: str, client: str) -> Generation:
        """Raises ``ServingError``: there is none, any more or of this client."""
        generation = self.generations.get(name)
        if generation is None or generation.client != client:
            raise ServingError(404, f"there is no request {name[:64]!r}, or no longer", "not_found", param="id")
        return generation
