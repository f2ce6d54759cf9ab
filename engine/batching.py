"""In-flight batching: images at different blocks and steps share every denoising step, and join and leave between two.

A batch that is drawn as one keeps its slots until its slowest image is done, and whoever comes late waits for it.
Here each slot stands at a block and step of its own (:mod:`.slots`), so that a free one is filled at the next step.

Blocks of a given image that are kept take no steps: an image passes one of them at each step of the others.

Shape legend: M blocks, L latents of a block, C channels, R slots.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor

from madformer.arguments import floats, function, whole_number
from madformer.conditioning.prompt import Prompt, check_guidable
from madformer.engine import memory
from madformer.engine.cache import ConditioningCache
from madformer.engine.compiled import may_compile
from madformer.engine.compiled_rows import CompiledRows, sizes_to
from madformer.engine.graphs import Captured, launcher_for
from madformer.engine.jobs import Job, OnBlock, OnStep
from madformer.engine.options import SamplingOptions
from madformer.engine.packing import PackedWeights
from madformer.engine.running import Exclusive, NonFiniteError, check_latents, computing, places_to_draw
from madformer.engine.sampler import Sampler, bytes_per_image
from madformer.engine.schedule import ScheduleTable, tabulate
from madformer.engine.sharing import is_short, may_share, useful_shares
from madformer.engine.slots import ScheduleRows, Slots
from madformer.engine.structure import Signature, UnknownPartError, signature
from madformer.engine.ways import StepThreads
from madformer.model.madformer import MADFormer

logger = logging.getLogger("madformer.engine")


class QueueFullError(RuntimeError):
    """As many requests wait as were to be admitted."""


class InFlightBatcher:
    """Draws images as they are asked for, up to ``slots`` at once.

    :meth:`submit` may be called from any thread, and returns at once. One thread calls :meth:`step` again and again, or
    :meth:`run_until_idle`. An image is the one that a plan draws from the same noise alone: to rounding, because
    matrix products of another batch size may add up in another order.

    The model is looked at in every :meth:`step`, and in :meth:`run_until_idle` whenever an image is admitted or done:
    however it was changed by then, all images go on with what it is. Those that were begun before keep the blocks that
    are done, and what the model of that time cached of them; to draw each image with one model, change it while
    nothing runs. Whatever a step raises ends the images that have a slot: their futures raise it, too, and those that
    wait are drawn by the steps to come.

    Args:
        sampler: of a scheduler that can be tabulated: DDIM, DPM-Solver++, or those of flow matching.
        slots: R, images at once.
        max_steps: the most denoising steps of a block that a request may ask for.
        max_waiting: requests that may wait for a slot.
        guided: requests may ask for guidance, of any scale. Every image then takes the room and time of two.

    Raises:
        ValueError: the scheduler cannot be tabulated, or a number that makes no sense.
        madformer.engine.memory.OutOfMemoryError: so many slots do not fit; the message names how many do.
    """

    def __init__(
        self, sampler: Sampler, slots: int, *, max_steps: int = 250, max_waiting: int = 1024, guided: bool = False
    ) -> None:
        for name, value in (("slots", slots), ("max_steps", max_steps), ("max_waiting", max_waiting)):
            whole_number(name, value, 1)
        self.sampler, self.num_slots = sampler, slots
        self.max_steps, self.max_waiting, self.guided = max_steps, max_waiting, guided
        self.kind = sampler.kind()
        self.config, self.device = self.kind.config, self.kind.device
        self.launcher = sampler.launcher or launcher_for(self.device)
        self.clip = self._table(1).clip
        if guided:
            check_guidable(self.config)
        per_slot = bytes_per_image(sampler.source, max_steps, guided=guided, grid=sampler.grid)
        self.slots, self.cache = memory.largest_fit(self._allocate, slots, per_slot, self.device)
        self.packed = PackedWeights()
        with torch.inference_mode():
            passes: Any = partial(CompiledRows, self.kind) if may_compile(sampler, self.kind) else sampler.passes
            self.passes = passes(sampler.current_model(), self.cache, self.slots, self.clip, sampler.backend)
        # of passes that were captured, none where Python runs them
        self._launches: dict[tuple[str, int], Captured] = {}
        self._prepared_for: Signature | None = None
        self._touched, self._alone = True, Exclusive("this batcher is at a step already")
        self._trusting, self._shareable = False, False
        self._threads: StepThreads | None = None
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._lock, self._arrivals = threading.Lock(), itertools.count()

    @torch.inference_mode()
    def _allocate(self, slots: int) -> tuple[Slots, ConditioningCache]:
        rows = slots + self.launcher.captures  # what a captured batch is filled up with works on a row of its own
        return self.kind.allocate(rows, self.max_steps, guided=self.guided)

    def _table(self, num_steps: int, scheduler: Any = None) -> ScheduleTable:
        scheduler = self.sampler.scheduler if scheduler is None else scheduler
        # On the host: a request may come from a thread that must not wait for the device, nor disturb a capture.
        table = tabulate(scheduler, num_steps)
        if table is None:
            name = type(scheduler).__name__
            raise ValueError(f"in-flight batching needs a scheduler that can be tabulated, and this {name} cannot")
        return table

    # Requests

    def submit(
        self,
        noise_MLC: Tensor,
        options: SamplingOptions,
        prompt: Prompt | None = None,
        *,
        priority: int = 0,
        scheduler: Any = None,
        given: Tensor | None = None,
        blocks: Collection[int] | None = None,
        order: Sequence[int] | None = None,
        on_step: OnStep | None = None,
        on_block: OnBlock | None = None,
    ) -> Future[Tensor]:
        """Ask for an image.

        Args:
            noise_MLC: standard normal, ``(M, L, C)``; it is copied, as ``given`` and the prompt are.
            options: all but ``refresh_every``, which has no place among images at different steps.
            prompt: of one image, for a model with text or classes; where the batcher is guided, with a negative text
                whatever the scale.
            priority: lower goes first; requests of one priority go in the order in which they came.
            scheduler: to draw this image with, in place of the sampler's; one that clips as that does, if it clips.
            given: clean latents ``(M, L, C)`` of an image to change. blocks: places of those that are drawn anew.
                order: places in the order to pass them in. All as :meth:`madformer.engine.plan.Plan.run` has them.
            on_step: called with a block's place, and how many of its steps there were, after each of them. on_block:
                called with each :class:`~madformer.engine.progress.FinishedBlock` that was drawn, its latents
                ``(L, C)``. Both in the thread that steps, which waits for them: they are to take a note and return.
                What they raise ends this image, and no other.

        Returns:
            Clean latents ``(M, L, C)`` in fp32 on the model's device, to come. ``cancel()`` works until they are there,
            and frees the slot. The exception is :class:`~madformer.engine.running.NonFiniteError` where the network
            gave numbers that are not finite; the other images are not harmed.

        Raises:
            ValueError: noise or prompt of another kind or shape, a priority that is no whole number, options that the
                scheduler or this batcher does not have, or blocks, given latents or an order that the model cannot
                draw by.
            QueueFullError: ``max_waiting`` requests wait.
        """
        shape = tuple(self.slots.canvas_RMLC.shape[1:])
        floats("noise", noise_MLC, shape)
        SamplingOptions.check(options)
        if options.guided and not self.guided:
            raise ValueError(f"guidance={options.guidance} needs a batcher made with guided=True")
        if options.refresh_every != 1:
            raise ValueError(f"refresh_every={options.refresh_every} has no place in in-flight batching")
        prompt = prompt or Prompt()
        prompt.check(self.config, (), guided=self.guided)
        rank = whole_number("priority", priority)
        for name, callback in (("on_step", on_step), ("on_block", on_block)):
            function(name, callback)
        places, drawn = places_to_draw(self.config, given, blocks, order)
        kept = [place for place in places if place not in drawn]
        schedule, sigma = self._schedule(options, scheduler)
        canvas_MLC = noise_MLC.detach() * sigma
        if given is not None:
            floats("given", given, shape)
            check_latents("given", given[None], torch.Size((1, *shape)), kept)
            canvas_MLC[kept] = given.detach()[kept].to(canvas_MLC)
        drawn, prompt = sorted(drawn, key=places.index), prompt.clone()
        with self._lock:
            self._waiting = [job for job in self._waiting if not job.future.cancelled()]
            heapq.heapify(self._waiting)
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(f"{self.max_waiting} requests wait already")
            arrival = next(self._arrivals)
            job = Job(rank, arrival, canvas_MLC, places, drawn, schedule, Future(), prompt, on_step, on_block)
            heapq.heappush(self._waiting, job)
        return job.future

    def _schedule(self, options: SamplingOptions, scheduler: Any) -> tuple[ScheduleRows, float]:
        """What a slot is given, and the standard deviation of its noise."""
        table = self._table(options.steps, scheduler)
        if table.clip != self.clip:
            raise ValueError(f"scheduler: one that clips at {table.clip} has no place beside one at {self.clip}")
        if table.num_steps > self.max_steps:
            raise ValueError(f"num_inference_steps={table.num_steps} must be at most max_steps={self.max_steps}")
        rows = ScheduleRows.of(self.config, table.timesteps, table.coefficients, self.max_steps, options)
        return rows, table.init_noise_sigma

    @property
    def num_waiting(self) -> int:
        with self._lock:
            return sum(not job.future.cancelled() for job in self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    # The loop

    def step(self, *, unchanged: bool = False) -> int:
        """One denoising step of every image that has a slot, after others joined; those that are done then leave.

        Args:
            unchanged: nobody has touched the model since the last step or :meth:`warmup`, so it is not looked at.

        Returns:
            How many images took it; 0 where there is nothing to do.

        Raises:
            InUseError: it is called in another thread, or from a future's callback.
            RuntimeError: the model's configuration, dtype or device changed, which this batcher was made for.
        """
        with self._alone, computing(self.device):
            self._touched, self._trusting = True, unchanged
            return self._step()

    def between_steps(self, work: Callable[[], object]) -> None:
        """Do ``work``, by as many threads as are fastest; beside a step it would keep all of the step's threads."""
        if self._threads is None:
            work()
        else:
            self._threads.do(work)

    def run_until_idle(self) -> None:
        """:meth:`step` until nothing runs or waits."""
        with self._alone, computing(self.device):
            self._touched, self._trusting = True, False
            while self._step():
                pass

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Within it, on a processor, a step is computed by threads in the way that is best for its images:
        :mod:`.ways`.

        Which that is :meth:`warmup` measures, within it. Without, images are shared out among PyTorch's threads, and a
        single one, where its operators are short, is left to one of them. Where a model cannot be drawn so, steps are
        as without all this. The threads begin and end with it.
        """
        threads = torch.get_num_threads()
        if threads < 2 or self._threads is not None or not may_share(self.sampler, self.kind):
            yield
            return
        useful = useful_shares(self.sampler, self.kind, self.num_slots, guided=self.guided)
        short = is_short(self.sampler, self.kind, guided=self.guided)
        with StepThreads(min(threads, self.num_slots, useful), short=short) as self._threads:
            try:
                yield
            finally:
                self._threads = None

    def _step(self) -> int:
        joined: list[Job] = []
        try:
            self._leave()  # who was cancelled or failed in the meantime
            self._join(joined)
            images = self._advance(joined)
            self._leave()  # who is done: later, they would wait for the others' next step
            return images
        except BaseException as error:
            # their slots may be written to by half
            self._give_up([*self._running, *joined], error)
            raise

    def _advance(self, joined: list[Job]) -> int:
        if not self._trusting and (joined or (self._touched and self._running)):
            self._follow()
        between = [job for job in self._running if job.is_between]
        if between:
            self._launch("next_block", between)
            for job in between:
                job.block, job.step = job.block + 1, 0
        if joined:
            for job in joined:
                self._place(job)
            self._launch("first_block", joined)
            self._running += joined
        if drawing := [job for job in self._running if not job.is_between]:
            self._launch("denoise", drawing)
            for job in drawing:
                job.step += 1
                job.tell(self.slots.latents_RLC)
        return len(self._running)

    def _leave(self) -> None:
        """Images that are done, and requests that were cancelled or failed, give up their slots."""
        self._running = [job for job in self._running if not job.future.done()]
        for job in [job for job in self._running if job.is_done]:
            self.slots.finish_block(torch.tensor([job.row], device=self.slots.block_R.device))
            sound, steps = int(self.slots.sound_R[job.row]), job.schedule.num_steps
            image = self.slots.canvas_RMLC[job.row].clone()
            self._running.remove(job)
            if not job.future.set_running_or_notify_cancel():
                continue
            self._touched = True  # by whoever waits for it
            if sound < steps * len(job.drawn):
                where = f"from block {job.drawn[sound // steps]}, step {sound % steps} on"
                job.future.set_exception(NonFiniteError(f"the image is not finite {where}"))
            else:
                job.future.set_result(image)

    def _give_up(self, jobs: list[Job], error: BaseException) -> None:
        """Tell those who wait for these images that there will be none."""
        self._running = []
        if not isinstance(error, Exception):
            error = RuntimeError(f"the images were given up: {type(error).__name__}")
        for job in jobs:
            if not job.future.done() and job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)

    def _join(self, joined: list[Job]) -> None:
        """Give free slots to those who wait, in their order; they are added to ``joined``."""
        taken = {job.row for job in self._running}
        free = [row for row in range(self.num_slots) if row not in taken]
        with self._lock:
            while free and self._waiting:
                job = heapq.heappop(self._waiting)
                if not job.future.cancelled():
                    job.row = free.pop(0)
                    joined.append(job)

    def _place(self, job: Job) -> None:
        """Put a request's canvas, order and schedule into its slot."""
        self.slots.assign(job.schedule, self.passes.model, job.row)
        self.slots.condition_on(job.prompt, self.passes.model, job.row)
        self.slots.canvas_RMLC[job.row].copy_(job.canvas_MLC, non_blocking=True)
        self.slots.order_RM[job.row] = torch.tensor(job.order)

    # Launches

    def warmup(self) -> InFlightBatcher:
        """Make ready what the first steps would: pack weights, compile, capture each batch size.

        With a sampler's ``compile_step`` a program is made for every batch size that a step may have, in minutes, and
        kept for the next process. Within :meth:`at_work` steps of several sizes are then computed in each way, which
        takes seconds for a small model, and logged as ``madformer.engine``: what is fastest is how they are drawn.

        Raises:
            RuntimeError: images are being drawn, whose state it would overwrite.
        """
        with self._alone, computing(self.device):
            if self._running:
                raise RuntimeError(f"warmup() while {len(self._running)} images are being drawn")
            self._follow(try_out=True)
            if self._threads is not None and self._shareable:
                self._measure(self._threads)
        return self

    def _measure(self, threads: StepThreads) -> None:
        """Of slots that nobody has: an image that is given one finds nothing of this."""
        self.passes.reset()
        for size in self._sizes():
            rows = list(range(size))
            threads.run(self._work("first_block"), rows)
            threads.measure(self._work("denoise"), rows)
        self.passes.reset()

    def _follow(self, *, try_out: bool = False) -> None:
        """Make the passes those of the model as it is now."""
        sampler = self.sampler
        if (kind := sampler.kind()) != self.kind:
            raise RuntimeError(f"the model is not what this batcher was made for: {kind.difference(self.kind)}")
        self._touched = False
        built: Signature | None = None
        lasting = self.launcher.captures or sampler.compile_unet
        if lasting:
            try:
                built = signature(sampler.source)
            except UnknownPartError as unknown:
                logger.warning("not captured or compiled: %s", unknown)
        if built is not None and built == self._prepared_for:
            self._look_through(self.passes.model)
            return
        # capturing would overwrite what the images that run hold: they go on as Python runs the passes
        prepare = built is not None and not self._running
        model = sampler.lasting_model() if prepare else sampler.current_model(None if lasting else self.packed)
        self._look_through(model)
        if isinstance(self.passes, CompiledRows):
            self._look_for_programs(self.passes, try_out=try_out)
        self._launches = {}
        if prepare and self.launcher.captures:
            for size in self._sizes():
                for name in ("first_block", "denoise", "next_block"):
                    self._prepare(name, size)
        self._prepared_for = built if prepare else None

    def _look_through(self, model: MADFormer) -> None:
        self.passes.follow(model)
        self._shareable = self._threads is not None and may_share(self.sampler, self.kind)
        for job in self._running:
            self.slots.tabulate(job.schedule, model, job.row)
            self.slots.condition_on(job.prompt, model, job.row)

    def _look_for_programs(self, passes: CompiledRows, *, try_out: bool) -> None:
        model = self.sampler.current_model()
        threads = self._threads if self._shareable else None
        if threads is None:
            passes.look_at(model, 1, torch.get_num_threads(), try_out=try_out)
        else:
            passes.look_at(model, threads.count, threads.threads_each, lone=threads.lone, try_out=try_out)

    def _sizes(self) -> list[int]:
        """The batch sizes that are captured: powers of two, and all slots."""
        return sizes_to(self.num_slots)

    def _prepare(self, name: str, size: int) -> Captured:
        """A launch of a pass over ``size`` rows."""
        scratch = len(self.slots.block_R) - 1
        rows_B = torch.full((size,), scratch, device=self.slots.block_R.device)
        work: Callable[[Tensor], None] = getattr(self.passes, name)
        launch = self.launcher.prepare(f"{name}, {size} slots", lambda: work(rows_B), self.passes.reset)
        return self._launches.setdefault((name, size), Captured(launch, rows_B))

    def _launch(self, name: str, jobs: list[Job]) -> None:
        rows = [job.row for job in jobs]
        if not self._launches:
            threads, work = self._threads if self._shareable else None, self._work(name)
            if threads is None:
                work(rows)
            else:
                threads.run(work, rows, watched=name == "denoise")
            return
        size = next(size for size in self._sizes() if size >= len(rows))
        rows += [self.num_slots] * (size - len(rows))
        self._launches[name, size].run(rows)

    def _work(self, name: str) -> Callable[[list[int]], None]:
        """A pass of this name over some rows, in whichever thread."""
        work: Callable[[Tensor], None] = getattr(self.passes, name)

        def compute(rows: list[int]) -> None:
            with computing(self.device):
                work(torch.tensor(rows, device=self.device))

        return compute
