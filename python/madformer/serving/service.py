"""A model being served: its parts, put together, started and ended; and what there is to say of it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from madformer.engine.options import SamplingOptions
from madformer.engine.sharing import in_new_thread, kept_to, leave_room
from madformer.model.blocks import block_order
from madformer.serving.desk import Desk
from madformer.serving.drawing import FORMATS, Asked, Drawing, Reader
from madformer.serving.errors import ServingError
from madformer.serving.finishing import Finisher
from madformer.serving.metrics import Metrics
from madformer.serving.settings import ServerSettings
from madformer.serving.stepping import Stepper

if TYPE_CHECKING:
    from madformer.bulk.settings import Settings
    from madformer.pipeline import MADFormerPipeline


@dataclass(frozen=True)
class File:
    """A picture that has an address of its own for a while."""

    data: bytes
    media_type: str
    expires: float


class Service:
    """A pipeline, prepared as it is to draw, and everything between it and HTTP.

    Raises:
        ValueError: a pipeline without an autoencoder, or a scheduler that cannot be tabulated.
    """

    desk: Desk

    def __init__(
        self,
        pipeline: MADFormerPipeline,
        settings: ServerSettings,
        defaults: SamplingOptions,
        name: str,
        recorded: Settings | None = None,
    ) -> None:
        if pipeline.vae is None:
            raise ValueError("a server draws pictures, and this pipeline has no autoencoder")
        self.pipeline, self.settings, self.defaults, self.name = pipeline, settings, defaults, name
        self.created = int(time.time())
        self.config = pipeline.transformer.config
        self.reader = Reader(pipeline, settings, defaults, recorded)
        self.metrics = Metrics()
        self.files: OrderedDict[str, File] = OrderedDict()
        self._reading = ThreadPoolExecutor(1, "madformer-read", initializer=leave_room)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Threads that draw and finish, within it."""
        loop = asyncio.get_running_loop()

        def died(error: BaseException) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self.desk.fail, error)

        settings, finisher = self.settings, Finisher(self.pipeline.vae, self.config)
        make = functools.partial(
            Stepper,
            self.pipeline.transformer,
            self.pipeline.scheduler,
            slots=settings.slots,
            compile_step=settings.compile,
            max_steps=settings.max_steps,
            # the desk refuses long before
            max_waiting=2 * (settings.slots + settings.max_waiting),
            on_death=died,
            between_steps=None if finisher.beside else finisher.finish_waiting,
        )
        # the cores are for the thread that draws: operators that this one shares, or what a stepper allocates, would
        # leave threads behind
        with kept_to(1):
            stepper = in_new_thread(make)
            self.desk = Desk(stepper, finisher, self.config, self.reader.size, settings, self.metrics)
            self._measure(stepper)
            finisher.start()
            stepper.start()
            try:
                yield
            finally:
                await self.desk.drain(0)
                await asyncio.to_thread(stepper.stop)
                await asyncio.to_thread(finisher.stop)
                self._reading.shutdown()

    async def read(self, asked: Asked) -> Drawing:
        """Of the reader, in a thread: a picture is encoded, which takes a while."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, self.reader.read, asked)

    async def in_thread(self, work: Any, *arguments: Any, **options: Any) -> Any:
        """The same for other work on what a client sent."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, lambda: work(*arguments, **options))

    def _measure(self, stepper: Stepper) -> None:
        gauge = self.metrics.gauge
        gauge("waiting", "images that wait for a slot", lambda: stepper.num_waiting)
        gauge("running", "images that have a slot", lambda: stepper.num_running)
        gauge("active", "images that wait, are drawn or are decoded", lambda: len(self.desk.active))
        gauge("slots", "images that can be drawn at once", lambda: stepper.num_slots)
        gauge("batch_fill", "share of the slots in use, over the last steps", stepper.batch_fill)
        gauge("steps_per_second", "denoising steps of an image, over all images", stepper.steps_per_second)
        gauge("step_seconds", "seconds in which an image gets on by a step", stepper.step_seconds)
        gauge("step_faults", "steps that raised an error", lambda: stepper.num_faults)
        gauge("ready", "whether requests are admitted", lambda: self.desk.is_ready)

    # What there is to say

    def model(self) -> dict[str, Any]:
        """What the model is, and what may be asked of it."""
        config, settings, defaults = self.config, self.settings, self.defaults
        splits = sorted({config.diffusion_layers, *config.elastic_diffusion_layers})
        width, height = self.reader.size
        kinds = {"text": config.text is not None, "class": config.num_classes > 0}
        return {
            "name": self.name,
            "image_size": [width, height],
            "num_blocks": config.num_blocks,
            "block_grid": list(config.grid),
            "block_order": block_order(config),
            "conditioning": [kind for kind, there in kinds.items() if there] or ["none"],
            "num_classes": config.num_classes,
            "class_names": list(self.pipeline.config.class_names or []),
            "default_steps": defaults.steps,
            "max_steps": settings.max_steps,
            "default_guidance_scale": defaults.guidance if config.can_be_guided else 1.0,
            "max_images": settings.max_images,
            "max_prompt": settings.max_prompt,
            "schedulers": self.reader.schedulers,
            "guidance": config.can_be_guided,
            "editing": config.has_clean_stream,
            "elastic": splits if len(splits) > 1 else None,
            "diffusion_layers": config.diffusion_layers,
            "num_layers": config.num_layers,
            "formats": list(FORMATS),
        }

    def status(self) -> dict[str, Any]:
        """How it goes."""
        desk, stepper = self.desk, self.desk.stepper
        return {
            "ready": desk.is_ready,
            "draining": desk.draining,
            "waiting": stepper.num_waiting,
            "running": stepper.num_running,
            "slots": stepper.num_slots,
            "steps_per_second": round(stepper.steps_per_second(), 2),
            "step_seconds": round(stepper.step_seconds(), 6),
            "batch_fill": round(stepper.batch_fill(), 4),
            "images_done": desk.images_done,
            "seconds_per_image": round(desk.seconds_per_image, 4),
        }

    # Pictures with an address

    def publish_file(self, data: bytes, output_format: str) -> str:
        """Keep a picture for a while; its token, which nobody can guess."""
        now, token = time.monotonic(), secrets.token_urlsafe(32)
        self.files[token] = File(data, FORMATS[output_format], now + self.settings.url_lifetime)
        total = sum(len(file.data) for file in self.files.values())
        while self.files and (total > self.settings.keep_bytes or next(iter(self.files.values())).expires < now):
            total -= len(self.files.popitem(last=False)[1].data)
        return token

    def file(self, token: str) -> File:
        """Raises ``ServingError``: there is none, or no longer."""
        file = self.files.get(token)
        if file is None or file.expires < time.monotonic():
            raise ServingError(404, "there is no such picture, or no longer", "not_found")
        return file
