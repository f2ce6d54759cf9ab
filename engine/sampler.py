"""Block-by-block sampling with every key and value computed once.

A *plan* holds what depends on batch size, step count and scheduler: cache, slots, schedule, and on a GPU the captured
passes. Running it costs, for each block, one pass of the clean predecessor through the layers that read it, one pass of
the condition through the autoregressive layers, and for each step the diffusion layers on the noisy tokens alone.

Shape legend: B batch, M blocks, L latents of a block, C channels.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from madformer.engine import memory
from madformer.engine.cache import ConditioningCache
from madformer.engine.graphs import EagerLauncher, Launcher, Work, launcher_for
from madformer.engine.packing import can_pack, packed, shared_copy
from madformer.engine.passes import Passes
from madformer.engine.prompts import Prompt, check_guidable
from madformer.engine.schedule import ScheduleTable, tabulate
from madformer.engine.slots import Guidance, ScheduleRows, Slots
from madformer.model.blocks import block_order, check_blocks, check_order
from madformer.model.madformer import MADFormer

logger = logging.getLogger("madformer.engine")

NoiseSource = Callable[[int], Tensor]
"""Gives a block's standard normal noise, ``(B, L, C)``."""


class NonFiniteError(FloatingPointError):
    """Latents that are not finite; the message says from which block and step on."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the place of the ``block`` and the ``step`` count from 0.

    ``latents_BLC`` is the block after that step, in the memory that the next step overwrites.
    """

    block: int
    step: int
    latents_BLC: Tensor


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

    def report(self, on_block: Callable[[int, Tensor], None], stream: torch.cuda.Stream | None) -> None:
        """Wait for it, and hand it out; on a GPU on a stream beside the blocks that follow."""
        if self.end is not None:
            self.end.synchronize()
        with torch.cuda.stream(stream):
            on_block(self.place, self.latents_BLC)
        if stream is not None:
            # the allocator may give the latents' memory away, and not before this stream is done with it
            self.latents_BLC.record_stream(stream)


class Sampler:
    """Samples ``model`` under ``scheduler``.

    Args:
        model: in eval mode, on the device and in the dtype to compute in.
        scheduler: any diffusers scheduler; it is copied. DDIM and DPM-Solver++ (orders 1 and 2) are tabulated and
            applied by the fused kernel, every other runs through its own ``step``.
        backend: of the fused update; see :func:`madformer.kernels.denoise_step.denoise_step`.
        pack_weights: on a CPU, compute with a second copy of the weights in oneDNN's layout where that is possible
            (:mod:`madformer.engine.packing`).
        compile_unet: run the U-Net's halves through ``torch.compile``, which takes minutes at the first run.
        launcher: how passes are launched; None for CUDA graphs on a GPU, else Python.
        passes: what is launched; a subclass computes something else.
    """

    def __init__(
        self,
        model: MADFormer,
        scheduler: Any,
        *,
        backend: str = "auto",
        pack_weights: bool = True,
        compile_unet: bool = False,
        launcher: Launcher | None = None,
        passes: type[Passes] = Passes,
    ) -> None:
        self.source = model
        self.passes = passes
        self.compile_unet = compile_unet
        self.pack_weights = pack_weights and not compile_unet and can_pack(model)
        self.scheduler = copy.deepcopy(scheduler)
        self.backend = backend
        self.launcher = launcher

    def prepare_model(self) -> MADFormer:
        """The model as passes run it: over the same weights, packed or compiled as asked for."""
        if self.pack_weights:
            return packed(self.source)
        if not self.compile_unet:
            return self.source
        model = shared_copy(self.source)
        for half in (model.downsampler, model.upsampler):
            half.compile(fullgraph=True, dynamic=False)
        return model

    def plan(
        self,
        batch: int,
        num_inference_steps: int,
        *,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        refresh_every: int = 1,
        dtype: torch.dtype | None = None,
    ) -> Plan:
        """Allocate and tabulate for ``batch`` images of ``num_inference_steps`` steps a block.

        Args:
            guidance: scale of classifier-free guidance; 1 is none. guidance_interval: first and last timestep at which
                it applies (arXiv:2404.07724).
            refresh_every: run the diffusion layers in every so many steps of a block. In the steps between, what they
                added to the tokens is added again, and the U-Net alone sees the noise of the step (as DeepCache,
                arXiv:2312.00858, has it for U-Nets). Faster, and not the same image.
            dtype: compute in a copy of the model in this dtype; None for the model as it is.

        Raises:
            ValueError: a step count that the scheduler does not have, an empty batch, or guidance of a model that has
                no condition to leave out.
            OutOfMemoryError: the batch does not fit; the message names the largest one that does.
        """
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        if refresh_every < 1:
            raise ValueError(f"refresh_every={refresh_every} must be at least 1")
        guided = Guidance(guidance, guidance_interval) if guidance != 1.0 else None
        if guided is not None:
            check_guidable(self.source.config)
        sampler = self
        if dtype not in (None, self.source.dtype):
            sampler = copy.copy(self)
            sampler.source = copy.deepcopy(self.source).to(dtype)
            sampler.pack_weights = self.pack_weights and can_pack(sampler.source)

        table = tabulate(self.scheduler, num_inference_steps, self.source.device)

        def make(size: int) -> Plan:
            plan = Plan(sampler, size, num_inference_steps, table, guided, refresh_every)
            if self.source.device.type == "cuda":
                plan.try_passes()
            return plan

        per_image = bytes_per_image(
            sampler.source, num_inference_steps, guided=guided is not None, refresh_every=refresh_every
        )
        return memory.largest_fit(make, batch, per_image, self.source.device)


def bytes_per_image(model: MADFormer, num_steps: int, *, guided: bool = False, refresh_every: int = 1) -> int:
    """Of the state that outlasts a pass; what a pass needs besides is not in it."""
    meta = torch.device("meta")
    slots = Slots(model.config, 1, num_steps, meta, guided=guided)
    cache = ConditioningCache(model.config, slots.branches, dtype=model.dtype, device=meta, backend="reference")
    added = cache.condition_RLC.nbytes if refresh_every > 1 else 0
    return cache.nbytes + slots.nbytes + added


class Plan:
    """A batch size and a step count made ready; :meth:`run` may be called again and again.

    On a GPU a run does no Python work for a step and waits for the device only to look for numbers that are not
    finite: its passes are captured once, and each block's steps are one launch where the driver allows it.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch: int,
        num_inference_steps: int,
        table: ScheduleTable | None,
        guidance: Guidance | None = None,
        refresh_every: int = 1,
    ) -> None:
        model, scheduler = sampler.source, sampler.scheduler
        self.sampler, self.model = sampler, model
        self.config, self.batch = model.config, batch
        self.num_inference_steps = num_inference_steps
        self.table, self.scheduler = table, scheduler
        if table is None:
            scheduler.set_timesteps(num_inference_steps, device=model.device)
        self.timesteps = (scheduler.timesteps if table is None else table.timesteps).to(model.device)
        self.refresh_every = min(refresh_every, len(self.timesteps))
        coefficients = None if table is None else table.coefficients
        # of one kind with what passes make, or a compiled one would be compiled for both
        with torch.inference_mode():
            num_steps = len(self.timesteps)
            self.schedule = ScheduleRows.of(model.config, self.timesteps, coefficients, num_steps, guidance)
            self.slots = Slots(model.config, batch, num_steps, model.device, guided=guidance is not None)
            rows = batch * self.slots.branches
            self.cache = ConditioningCache(
                model.config, rows, dtype=model.dtype, device=model.device, backend=model.backend
            )
        # oneDNN and cuDNN convolve channels-last fastest, and blocks of latents arrive so
        model.downsampler.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.upsampler.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # what a scheduler's own step needs of the host is not in a graph
        self.launcher = sampler.launcher or launcher_for(model.device) if self.table is not None else EagerLauncher()
        self.prepared_for: Any = None
        self._drawn: list[int] = []
        self._order = block_order(self.config)
        self._reports = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None

    @torch.inference_mode()
    def warmup(self) -> Plan:
        """Make ready what the first run would: compile, pack, capture. Logged with its times as ``madformer.engine``.

        Nothing happens where all is ready. It is not where the weights were replaced or, if packed, written to.
        """
        signature = memory.fingerprint(self.sampler.source, versions=self.sampler.pack_weights)
        if signature == self.prepared_for:
            return self
        started = time.perf_counter()
        passes = self._make_passes()

        def prepare(name: str, work: Callable[[None], None]) -> Work:
            return self.launcher.prepare(f"{name}, batch {self.batch}", lambda: work(None), passes.reset)

        self.first_block = prepare("first block", passes.first_block)
        self.denoise = prepare("denoising step", passes.denoise)
        self.next_block = prepare("next block", passes.next_block) if self.config.num_blocks > 1 else self.first_block
        steps, every = len(self.timesteps), self.refresh_every
        self.reuse, step_round = self.denoise, self.denoise
        if every > 1:
            self.reuse = prepare("step without layers", functools.partial(passes.denoise, refresh=False))
            step_round = prepare("round of steps", passes.denoise_round)
        self.loop = self.launcher.loop(step_round, steps // every)
        self.prepared_for = signature
        logger.info("plan for batch %d ready in %.2f s", self.batch, time.perf_counter() - started)
        return self

    @torch.inference_mode()
    def try_passes(self) -> None:
        """Run every pass once, which shows whether its scratch memory is there."""
        passes = self._make_passes()
        passes.reset()
        passes.first_block(None)
        passes.denoise(None)
        if self.config.num_blocks > 1:
            passes.next_block(None)

    def _make_passes(self) -> Passes:
        self.model = self.sampler.prepare_model()
        clip = self.table.clip if self.table is not None else None
        options = (self.sampler.backend, self.refresh_every)
        self.passes = self.sampler.passes(self.model, self.cache, self.slots, clip, *options)
        self.slots.assign(self.schedule, self.model)
        return self.passes

    @torch.inference_mode()
    def run(
        self,
        noise: Tensor | NoiseSource,
        prompt: Prompt | None = None,
        *,
        given: Tensor | None = None,
        blocks: Collection[int] | None = None,
        order: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback: Callable[[Progress], None] | None = None,
        on_block: Callable[[int, Tensor], None] | None = None,
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
            callback: called after every step, which costs the single launch of a block's steps.
            on_block: called with the place of a block that was drawn and its latents ``(B, L, C)``. On a GPU the next
                one is mostly under way by then, and the call is made on another stream, which does not wait for it.
            out: fp32 ``(B, M, L, C)`` to write to; None for a new tensor.
            check: wait for the images and look for numbers that are not finite; without it call :meth:`check`.

        Returns:
            Clean latents ``(B, M, L, C)`` in fp32, made in inference mode.

        Raises:
            NonFiniteError: the network gave numbers that are not finite.
            ValueError: ``noise``, ``given``, ``out`` or the prompt is not what the plan was made for; ``blocks`` that
                there are not, or with nothing given; an order that the model does not know; a model that cannot read
                what it did not draw.
        """
        prompt = prompt or Prompt()
        prompt.check(self.config, (self.batch,), guided=self.slots.branches > 1)
        self._check_shapes(noise=noise, given=given, out=out)
        drawn = self._check_blocks(given, blocks)
        if order is not None:
            check_order(order, self.config)
        places = list(order or block_order(self.config))
        last = max(map(places.index, drawn))
        self.warmup()
        self.slots.condition_on(prompt, self.model)
        self.slots.assign(self.schedule, self.model)
        if places != self._order:
            # only then: the copy waits for the device
            self.slots.order_RM.copy_(torch.tensor(places))
            self._order = places
        self.cache.reset()
        finished: list[FinishedBlock] = []
        self._drawn = []
        for number, place in enumerate(places[: last + 1]):
            if place in drawn:
                self._draw(noise, place)
            (self.next_block if number else self.first_block)()
            if place in drawn:
                self._drawn.append(place)
                self._denoise(place, generator, callback)
                if check and self.cache.on_host:
                    self.check()
            elif given is not None:
                self.slots.latents_RLC.copy_(given[:, place])
            if on_block is not None:
                if place in drawn:
                    finished.append(FinishedBlock.of(place, self.slots.latents_RLC))
                # a GPU is waited for with one block under way at least, so that it stays busy
                while finished and (len(finished) > 1 or number == last or not finished[0].is_under_way):
                    finished.pop(0).report(on_block, self._reports)
        self.slots.finish_block(None)
        out = torch.empty_like(self.slots.canvas_RMLC) if out is None else out
        out.copy_(self.slots.canvas_RMLC)
        if given is not None:
            untouched = places[last + 1 :]
            out[:, untouched] = given[:, untouched].to(out)
        if check:
            self.check()
        return out

    def check(self) -> None:
        """Look for numbers that are not finite in the last run; waits for the device.

        Raises:
            NonFiniteError: there are.
        """
        if self.table is None:
            return
        steps = len(self.timesteps)
        for image, sound in enumerate(self.slots.sound_R.tolist()):
            if sound < steps * len(self._drawn):
                block, step = self._drawn[sound // steps], sound % steps
                raise NonFiniteError(f"image {image} of the batch is not finite from block {block}, step {step} on")

    def _check_blocks(self, given: Tensor | None, blocks: Collection[int] | None) -> Collection[int]:
        """The blocks to draw."""
        if blocks is None:
            return range(self.config.num_blocks)
        check_blocks(blocks, self.config)
        if given is None:
            raise ValueError(f"blocks={list(blocks)}: what the others hold must be given")
        if not self.config.has_clean_stream:
            raise ValueError(f"context={self.config.context!r} reads blocks as it drew them, so none can be given")
        return blocks

    def _check_shapes(self, **tensors: Any) -> None:
        shape = self.slots.canvas_RMLC.shape
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and tensor.shape != shape:
                raise ValueError(f"{name} must have the plan's shape {tuple(shape)}, got {tuple(tensor.shape)}")

    def _draw(self, noise: Tensor | NoiseSource, place: int) -> None:
        """Put a block's noise where its pass finds it."""
        drawn = noise[:, place] if isinstance(noise, Tensor) else noise(place)
        target = self.slots.canvas_RMLC[:, place]
        target.copy_(drawn, non_blocking=True)
        target *= self._init_noise_sigma()

    def _init_noise_sigma(self) -> float:
        return self.table.init_noise_sigma if self.table is not None else float(self.scheduler.init_noise_sigma)

    def _denoise(
        self,
        place: int,
        generator: torch.Generator | list[torch.Generator] | None,
        callback: Callable[[Progress], None] | None,
    ) -> None:
        """The step loop of one block."""
        steps, done = len(self.timesteps), 0
        if self.table is not None and callback is None:
            self.loop()
            # steps that make no whole round
            done = steps - steps % self.refresh_every
        step = self._scheduler_step(generator) if self.table is None else self._step
        for index in range(done, steps):
            step(index)
            if callback is not None:
                callback(Progress(place, index, self.slots.latents_RLC))

    def _step(self, index: int) -> None:
        (self.reuse if index % self.refresh_every else self.denoise)()

    def _scheduler_step(self, generator: torch.Generator | list[torch.Generator] | None) -> Callable[[int], None]:
        """A denoising step that the scheduler's own ``step`` ends."""
        # a fresh state for every block: multistep schedulers remember the last one's predictions
        self.scheduler.set_timesteps(self.num_inference_steps, device=self.model.device)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        keywords = {"generator": generator} if takes_generator else {}

        def step(index: int) -> None:
            timestep = self.timesteps[index]
            # a copy: schedulers of several stages keep the sample that they were given
            latents = self.slots.latents_RLC.clone()
            *time, guidance_B1, _ = self.slots.schedule(None)
            scaled = self.scheduler.scale_model_input(latents, timestep)
            outputs = self.passes.predict(None, scaled, *time, refresh=index % self.refresh_every == 0)
            output, *unconditional = (x.float() for x in outputs)
            for other in unconditional:
                output = other + guidance_B1[:, None] * (output - other)
            stepped = self.scheduler.step(output, timestep, latents, **keywords).prev_sample
            self.slots.finish_step(None, stepped, self.slots.previous_RLC)

        return step
