"""The thread that draws: it steps in-flight batchers, each of one kind of requests, and does nothing else.

Requests that differ in what a batch has in common, the AR:diffusion split and whether there is guidance, are in
different batchers; these take a step in turn. Callbacks that the batchers make are of this thread: they take notes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from madformer.conditioning.prompt import Prompt
from madformer.config import MADFormerConfig
from madformer.engine.batching import InFlightBatcher
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.engine.structure import over_the_same
from madformer.model import MADFormer
from madformer.serving.drawing import Drawing, Kind, kinds_of

logger = logging.getLogger("madformer.serving")

REMEMBERED = 512
"""Steps that rates are measured by."""
LONGEST_REMEMBERED = 30.0
"""Seconds, likewise."""


@dataclass(frozen=True)
class Step:
    """When it ended, seconds that it took with what was decoded after it, and how many images took it."""

    end: float
    seconds: float
    images: int


class Stepper:
    """Draws what is submitted, in a thread of its own between :meth:`start` and :meth:`stop`.

    Args:
        model: what every batcher computes with; nobody changes it.
        between_steps: called, by that thread or for it, whenever a step has ended.
        compile_step: as :class:`~madformer.engine.sampler.Sampler` has it; it is ready when all are compiled.
        on_death: called, in that thread, when something ended it that was not :meth:`stop`.

    Raises:
        ValueError: a scheduler that cannot be tabulated. OutOfMemoryError: so many slots do not fit.
    """

    def __init__(
        self,
        model: MADFormer,
        scheduler: Any,
        *,
        slots: int,
        compile_step: bool = False,
        max_steps: int,
        max_waiting: int,
        on_death: Callable[[BaseException], object],
        between_steps: Callable[[], object] | None = None,
    ) -> None:
        self.between_steps = between_steps
        self.num_slots, self.on_death = slots, on_death
        self.batchers: Mapping[Kind, InFlightBatcher] = {
            kind: InFlightBatcher(
                Sampler(with_split(model, kind.diffusion_layers), scheduler, compile_step=compile_step),
                slots,
                max_steps=max_steps,
                max_waiting=max_waiting,
                guided=kind.guided,
            )
            for kind in kinds_of(model.config)
        }
        self.steps: deque[Step] = deque(maxlen=REMEMBERED)
        self.num_steps = self.num_image_steps = self.num_faults = 0
        self.ready = threading.Event()
        self._news = threading.Condition()
        self._woken = self._stopping = False
        self._thread = threading.Thread(target=self._live, name="madformer-steps", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step at hand; what it was drawing is given up."""
        with self._news:
            self._stopping = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, drawing: Drawing, index: int, rank: int, **callbacks: Any) -> Future[Tensor]:
        """Ask for image ``index`` of a drawing; lower ranks go first. Raises what ``InFlightBatcher.submit`` does."""
        batcher = self.batchers[drawing.kind]
        future = batcher.submit(
            drawing.noise(index, batcher.config),
            drawing.options,
            drawing.prompt(index),
            priority=rank,
            scheduler=drawing.scheduler,
            given=drawing.given,
            blocks=drawing.blocks,
            order=drawing.order,
            **callbacks,
        )
        with self._news:
            self._woken = True
            self._news.notify()
        return future

    @property
    def num_waiting(self) -> int:
        return sum(batcher.num_waiting for batcher in self.batchers.values())

    @property
    def num_running(self) -> int:
        return sum(batcher.num_running for batcher in self.batchers.values())

    def recent(self) -> list[Step]:
        """Steps of the last seconds."""
        since = time.monotonic() - LONGEST_REMEMBERED
        return [step for step in tuple(self.steps) if step.end > since]

    def steps_per_second(self) -> float:
        """Denoising steps of an image, over all images; 0 while nothing is drawn."""
        steps = self.recent()
        if not steps or not self.num_running:
            return 0.0
        return sum(step.images for step in steps) / sum(step.seconds for step in steps)

    def batch_fill(self) -> float:
        """Share of the slots that a step had images for."""
        steps = self.recent()
        return sum(step.images for step in steps) / (len(steps) * self.num_slots) if steps else 0.0

    def seconds_per_image_step(self) -> float:
        """By which an image's step keeps others waiting, its share of a full one; measured last, whenever that was."""
        steps = tuple(self.steps)
        images = sum(step.images for step in steps)
        return sum(step.seconds for step in steps) / images if images else 0.0

    def step_seconds(self) -> float:
        """In which an image gets on by a step, the mean over images of the last seconds: a full step counts for all of
        its images. Steps of another kind that are taken in turn with its own are not in it."""
        steps = self.recent()
        images = sum(step.images for step in steps)
        return sum(step.images * step.seconds for step in steps) / images if images else 0.0

    # The thread

    def _live(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                for batcher in self.batchers.values():
                    stack.enter_context(batcher.at_work())
                self._warm_up()
                self.ready.set()
                while self._wait():
                    for batcher in self.batchers.values():
                        if batcher.num_running or batcher.num_waiting:
                            self._step(batcher, self.between_steps)
        except BaseException as error:
            self.ready.clear()
            logger.critical("the thread that draws ended", exc_info=error)
            self.on_death(error)

    def _wait(self) -> bool:
        """For something to do; False where it is to end."""
        with self._news:
            while not (self._stopping or self._woken or self.num_running or self.num_waiting):
                self._news.wait()
            self._woken = False
            return not self._stopping

    def _step(self, batcher: InFlightBatcher, between_steps: Callable[[], object] | None = None) -> None:
        started, images = time.monotonic(), 0
        try:
            images = batcher.step(unchanged=True)
        except Exception as error:
            # the images that had a slot were told; those that wait are drawn
            self.num_faults += 1
            logger.error("a step failed", exc_info=error)
        if between_steps is not None:
            batcher.between_steps(between_steps)
        if images:
            end = time.monotonic()
            self.num_steps += 1
            self.num_image_steps += images
            self.steps.append(Step(end, end - started, images))

    def _warm_up(self) -> None:
        """Draw an image of each kind in two steps: packs, captures, and measures a step."""
        for batcher in self.batchers.values():
            batcher.warmup()
            config = batcher.config
            shape = (config.num_blocks, config.latents_per_block, config.latent_channels)
            noise, options = torch.zeros(shape), SamplingOptions(2, 2.0 if batcher.guided else 1.0)
            batcher.submit(noise, options, _any_prompt(config, guided=batcher.guided))
            while batcher.num_waiting or batcher.num_running:
                if self._stopping:
                    return
                self._step(batcher)


def with_split(model: MADFormer, diffusion_layers: int) -> MADFormer:
    """The model with another split, over the same tensors."""
    if diffusion_layers == model.config.diffusion_layers:
        return model
    return over_the_same(model).set_split(diffusion_layers)


def _any_prompt(config: MADFormerConfig, *, guided: bool) -> Prompt:
    """The first token again and again, and the first class."""
    text = None if config.text is None else torch.zeros(config.text.length, dtype=torch.int64)
    label = torch.tensor(0) if config.num_classes else None
    return Prompt(text, text if guided else None, label)
