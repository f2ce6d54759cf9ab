"""A batch size and a step count made ready, and the run of a batch.

Shape legend: B batch, M blocks, L latents of a block, C channels, T rows of a schedule.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from madformer.arguments import floats
from madformer.conditioning.prompt import Prompt
from madformer.engine.following import Following
from madformer.engine.options import SamplingOptions
from madformer.engine.pool import PlanKey
from madformer.engine.progress import Change, FinishedBlock, Progress, stops
from madformer.engine.running import (
    NonFiniteInputError,
    check_latents,
    check_sound,
    computing,
    first_fault,
    places_to_draw,
)
from madformer.engine.schedule import Schedule
from madformer.engine.sharing import SharedPasses

if TYPE_CHECKING:
    from madformer.engine.sampler import Sampler

NoiseSource = Callable[[int], Tensor]
"""Gives a block's standard normal noise, ``(B, L, C)``."""
LOOKS = 5
"""How often a block's steps are reported at most where threads share the images: they meet for it."""


class Plan(Following):
    """A batch size and a step count made ready; :meth:`run` may be called again and again, one call at a time.

    Nothing that is made of the model's weights outlasts a run unless it is compared with them: every run begins by
    looking at the model, and so does the next pass after a callback was called, a block was handed out or noise was
    asked for. What was drawn and cached until then stays.

    On a GPU a run does no Python work for a step and waits for the device only to look for numbers that are not
    finite: its passes are captured once, and each block's steps are one launch where the driver allows it. They read
    the weights where they lie, and are captured anew where the model is built in another way. A model that may change
    without being seen (:func:`madformer.engine.structure.signature`) is not captured.
    """

    def __init__(self, sampler: Sampler, key: PlanKey, schedule: Schedule, options: SamplingOptions) -> None:
        super().__init__(sampler, key, schedule, options)
        self._drawn: list[int] = []
        self._steps_made = 0

    def run(
        self,
        noise: Tensor | NoiseSource,
        prompt: Prompt | None = None,
        *,
        given: Tensor | None = None,
        blocks: Collection[int] | None = None,
        order: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback: Callable[[Progress], object] | None = None,
        on_block: Callable[[int, Tensor], object] | None = None,
        progress: Callable[[int], object] | None = None,
        out: Tensor | None = None,
        check: bool = True,
    ) -> Tensor:
        """Draw ``batch`` images.

        Args:
            noise: standard normal, ``(B, M, L, C)`` by place; or called with each block's place, in order.
            prompt: what the images are to be of, for a model with text or classes.
            given: clean latents ``(B, M, L, C)`` of images to change. blocks: places of those that are drawn anew, from
                what is before them; the others stay as they are. All of them for None.
            order: places in the order to draw them in, for a model that was trained in every order; None for its own.
            generator: for the noise that a stochastic scheduler adds in its steps.
            callback: called after every step, which costs the single launch of a block's steps and a look at the model.
                It may give a :class:`Change`.
            on_block: called with the place of a block that was drawn and its latents ``(B, L, C)``. On a GPU the next
                one is mostly under way by then, and the call is made on another stream, which does not wait for it.
            progress: told how many steps were launched since it was called last: one where Python launches each, some
                of a block where threads share the images, else all of it. It must leave the model alone, and may give a
                :class:`Change` that stops there.
            out: fp32 ``(B, M, L, C)`` to write to; None for a new tensor.
            check: wait for the images and look for numbers that are not finite; without it call :meth:`check`.

        Returns:
            Clean latents ``(B, M, L, C)`` in fp32.

        Raises:
            NonFiniteError: the network gave numbers that are not finite, or ``noise`` or ``given`` holds some.
            InUseError: the plan is drawing already, in another thread or around this call.
            RuntimeError: a callback changed the model's configuration, dtype or device.
            ValueError: ``noise``, ``given``, ``out`` or the prompt is not what the plan was made for; guidance that
                begins in a callback; ``blocks`` that there are not, or with nothing given; an order that the model does
                not know; a model that cannot read what it did not draw.
        """
        drawing = self.blocks(
            noise,
            prompt,
            given=given,
            blocks=blocks,
            order=order,
            generator=generator,
            callback=callback,
            report=on_block is not None,
            progress=progress,
            out=out,
            check=check,
        )
        with contextlib.closing(drawing):
            while True:
                try:
                    finished = next(drawing)
                except StopIteration as end:
                    return end.value
                assert on_block is not None
                finished.report(on_block, self._reports)

    def blocks(
        self,
        noise: Tensor | NoiseSource,
        prompt: Prompt | None = None,
        *,
        given: Tensor | None = None,
        blocks: Collection[int] | None = None,
        order: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback: Callable[[Progress], object] | None = None,
        report: bool = True,
        progress: Callable[[int], object] | None = None,
        out: Tensor | None = None,
        check: bool = True,
    ) -> Generator[FinishedBlock, None, Tensor]:
        """:meth:`run`, as a generator that gives every block that was drawn (none without ``report``) and returns all.

        The plan is in use until the generator ends or is closed.
        """
        with self._alone, contextlib.ExitStack() as stack:
            device = self.key.kind.device
            with computing(device):
                prompt = prompt or Prompt()
                prompt.check(self.config, (self.batch,), guided=self.slots.branches > 1)
                places, drawn = places_to_draw(self.config, given, blocks, order)
                last = max(map(places.index, drawn))
                kept = [place for place in places if place not in drawn]
                for name, tensor, those in (("noise", noise, drawn), ("given", given, kept), ("out", out, ())):
                    absent = callable(tensor) if name == "noise" else tensor is None
                    if not absent:
                        check_latents(name, tensor, self.slots.canvas_RMLC.shape, those)
                self._follow()
                self._start(prompt, places)
                laid_out = callback is not None
                if laid_out:
                    self._lay_out(places, noise, given, drawn)
            stack.enter_context(self.passes.at_work())
            try:
                self._drawing = True
                finished: list[FinishedBlock] = []
                stopped = False
                for number, place in enumerate(places[: last + 1]):
                    with computing(device):
                        if place in drawn and not (laid_out and isinstance(noise, Tensor)):
                            self._draw(noise, place)
                        self._launch("next_block" if number else "first_block")
                        if place in drawn:
                            self._drawn.append(place)
                            stopped = self._denoise(place, generator, callback, progress)
                            if check and device.type == "cpu" and not self.launcher.captures:
                                self.check()
                        elif given is not None:
                            kept_BMLC = self.slots.canvas_RMLC if laid_out else given
                            self.slots.latents_RLC.copy_(kept_BMLC[:, place])
                        if report and place in drawn and not stopped:
                            finished.append(FinishedBlock.of(place, self.slots.latents_RLC))
                    # a GPU is waited for with one block under way at least, so that it stays busy
                    ends = number == last or stopped
                    while finished and (len(finished) > 1 or ends or not finished[0].is_under_way):
                        self._touched = True
                        yield finished.pop(0)
                    if stopped:
                        if not laid_out:
                            with computing(device):
                                self._lay_out(places[number + 1 :], noise, given, drawn)
                        break
                return self._finish(None if laid_out or stopped else given, places[last + 1 :], out, check=check)
            finally:
                self._drawing = False

    def _start(self, prompt: Prompt, places: list[int]) -> None:
        self._options = self.options
        self.slots.assign(self._rows(), self.model)
        self.slots.condition_on(prompt, self.model)
        if places != self._order:
            # only then: the copy waits for the device
            self.slots.order_RM.copy_(torch.tensor(places))
            self._order = places
        self.cache.reset()
        self._prompt, self._drawn, self._steps_made = prompt, [], 0

    def _lay_out(
        self, places: Sequence[int], noise: Tensor | NoiseSource, given: Tensor | None, drawn: Collection[int]
    ) -> None:
        """Let the canvas show blocks to come: given ones, and noise where it is there already."""
        for place in places:
            if place in drawn and isinstance(noise, Tensor):
                self._draw(noise, place)
            elif place not in drawn and given is not None:
                self.slots.canvas_RMLC[:, place] = given[:, place].to(self.slots.canvas_RMLC)
            else:
                self.slots.canvas_RMLC[:, place] = 0

    def _finish(self, given: Tensor | None, untouched: list[int], out: Tensor | None, *, check: bool) -> Tensor:
        # no inference tensor: one may train on it
        out = torch.empty(self.slots.canvas_RMLC.shape, device=self.key.kind.device) if out is None else out
        with computing(self.key.kind.device):
            self.slots.finish_block(None)
            out.copy_(self.slots.canvas_RMLC)
            if given is not None:
                out[:, untouched] = given[:, untouched].to(out)
            if check:
                self.check()
        return out

    def check(self) -> None:
        """Look for numbers that are not finite in the last run; waits for the device.

        Raises:
            NonFiniteError: there are.
        """
        check_sound(self.slots, self._drawn, len(self.timesteps), self._steps_made)

    def _draw(self, noise: Tensor | NoiseSource, place: int) -> None:
        """Put a block's noise where its pass finds it."""
        if isinstance(noise, Tensor):
            drawn = noise[:, place]
        else:
            drawn, self._touched = noise(place), True
            floats(f"noise of block {place}", drawn, self.slots.latents_RLC.shape)
            # on a GPU it would have to be waited for: there its block's first step is what is named
            if drawn.device.type == "cpu" and (fault := first_fault(drawn[:, None], [0])) is not None:
                raise NonFiniteInputError(f"noise is not finite: image {fault[0]}, block {place}")
        target = self.slots.canvas_RMLC[:, place]
        target.copy_(drawn, non_blocking=True)
        target *= self.schedule.init_noise_sigma

    def _launch(self, name: str, *arguments: int) -> None:
        """A pass, of the model as it is now."""
        if self._touched:
            self._follow()
        getattr(self.prepared, name)(*arguments)

    def _denoise(
        self,
        place: int,
        generator: torch.Generator | list[torch.Generator] | None,
        callback: Callable[[Progress], object] | None,
        progress: Callable[[int], object] | None,
    ) -> bool:
        """The step loop of one block; whether the callback wants it to be the last."""
        steps, done = len(self.timesteps), 0
        if self.schedule.table is not None and callback is None:
            at_once = self._steps_at_once(steps, told=progress is not None)
            while at_once:
                if self.launcher.captures:
                    self._launch("loop")
                else:
                    self._launch("steps", done, at_once)
                done += at_once
                self._steps_made += at_once
                if progress is not None and stops(progress(at_once)):
                    return True
                at_once = 0 if self.launcher.captures else min(at_once, steps - done)
        step = self._steps(generator)
        for index in range(done, steps):
            step(index)
            self._steps_made += 1
            ends = progress is not None and stops(progress(1))
            if callback is not None:
                self._touched = True
                change = callback(Progress(place, index, self.slots.latents_RLC, self.slots.canvas_RMLC))
                if isinstance(change, Change):
                    self._change(change, place)
                ends = ends or stops(change)
            if ends:
                return True
        return False

    def _steps_at_once(self, steps: int, *, told: bool) -> int:
        """After how many steps of a block Python looks again; 0: after each, launched one by one."""
        if self.launcher.captures:
            return steps - steps % self.key.refresh_every
        if not told:
            return steps
        shared = isinstance(self.passes, SharedPasses) and self.passes.is_at_work
        return math.ceil(steps / LOOKS) if shared else 0

    def _change(self, change: Change, place: int) -> None:
        """Go on as a callback wants it."""
        slots = self.slots
        if change.images_BMLC is not None:
            check_latents("images_BMLC", change.images_BMLC, slots.canvas_RMLC.shape)
            slots.canvas_RMLC.copy_(change.images_BMLC)
            slots.latents_RLC.copy_(slots.canvas_RMLC[:, place])
        if change.guidance is not None:
            if change.guidance != 1 and not self.key.guided:
                raise ValueError(f"guidance={change.guidance} cannot begin within a run that was begun without")
            # what is looked at before the next pass
            self._options = replace(self._options, guidance=change.guidance)

    def _steps(self, generator: torch.Generator | list[torch.Generator] | None) -> Callable[[int], None]:
        """The denoising step of an index, which the scheduler's own ``step`` ends where it is not tabulated."""
        if self.schedule.table is not None:
            return lambda index: self._launch("reuse" if index % self.key.refresh_every else "denoise")
        scheduler = self.schedule.start()

        def step(index: int) -> None:
            if self._touched:
                self._follow()
            refresh = index % self.key.refresh_every == 0
            self.passes.denoise_by(scheduler, self.timesteps[index], generator, refresh=refresh)
            # what is not diffusers' may do anything
            self._touched |= not type(scheduler).__module__.startswith("diffusers.")

        return step
