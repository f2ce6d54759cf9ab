"""What sampling costs: a row of measurements for each batch size and step count, held against this device's own rates.

How each figure is measured. All are medians over interleaved rounds, after one round to warm up.

* ``seconds``: wall time of ``plan.run`` on noise that lies on the device, with some prompt where the model needs
  one, and of the autoencoder if there is one, until the device is done. On a GPU the passes are captured before.
* ``ar``, ``denoise``: marks around every launch of that very run: those of ``first_block`` and ``next_block``, and of
  the step loops. Events in the stream on a GPU, the host's clock on a CPU, where a launch returns when it is done.
* ``unet``: the U-Net halves alone, ``model.embed`` and ``model.decode``, launched as often in a row as a block has
  steps and in the way that the plan launches its steps, times the blocks.
* ``transformer``: ``denoise`` less ``unet``; the scheduler's update and the slots' bookkeeping are in it.
* ``vae``: marks around the decoding of that run's latents.
* ``host``: what is left of ``seconds``: Python between launches, noise, checks; on a GPU the time between events.
* ``bare_seconds``: wall time of the passes of one block, autoregressive and denoising, of
  :class:`~madformer.measuring.bare.BareModel` over the same packed weights; on a GPU captured as well. ``overhead`` is
  what the plan's launches of a block take beyond that, as a fraction of it: updates, slots, schedule, the lengths of
  the prefixes. It is the median of the ratios of neighbouring pairs, each in both orders, because a hundredth of a
  second is less than what a shared machine adds to it. Where a plan draws in shares, bare passes are made in the same.
* ``operations_floor``: operations (:class:`~madformer.measuring.bare.Work`) over the rate of a large matrix product in
  the same dtype on the same device and threads. ``bytes_floor``: the weights of a denoising step, read once a step,
  over the rate of a large copy (bytes read and written). Both without the autoencoder.
* ``fraction_of_roof``: ``operations_floor`` over the time of the run without the autoencoder. In FP8 the roof is the
  bf16 product, in which half of the work still is.

Shape legend: B batch, M blocks, L latents of a block, C channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from madformer.conditioning.prompt import Prompt
from madformer.config import MADFormerConfig
from madformer.engine import memory
from madformer.engine.graphs import Launchable, Launcher, launcher_for
from madformer.engine.options import SamplingOptions
from madformer.engine.plan import Plan
from madformer.engine.sampler import Sampler
from madformer.machine import copy_rate, matmul_rate, seconds
from madformer.measuring.bare import BareModel, SharedBareModel, Work, bare_model
from madformer.measuring.timing import Spread, Stopwatch
from madformer.model.blocks import from_blocks
from madformer.vae import decode

LEAST_PAIRS, PAIRS_SECONDS = 3, 5.0
"""Blocks are compared with bare passes so often at least, and no longer than so many seconds."""
PARTS = ("ar", "transformer", "unet", "vae", "host")
"""What ``seconds`` is split into, in the order of a run."""


@dataclass(frozen=True)
class Roof:
    """Rates measured here: operations and bytes a second, of a large matrix product and a large copy."""

    matmul_flops: float
    copy_bytes: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Roof:
        return cls(matmul_rate(device, dtype), copy_rate(device))


@dataclass(frozen=True)
class Row:
    """One batch size and step count; the head of this file says how each figure is measured.

    Attributes:
        steps: denoising steps of a block.
        seconds: of a batch, pictures included.
        split: seconds by the names in :data:`PARTS`.
    """

    batch: int
    steps: int
    seconds: Spread
    split: dict[str, float]
    bare_seconds: Spread
    overhead: float
    operations_floor: float
    bytes_floor: float

    @property
    def images_per_second(self) -> float:
        return self.batch / self.seconds.median

    @property
    def fraction_of_roof(self) -> float:
        return self.operations_floor / (self.seconds.median - self.split["vae"])

    def to_dict(self) -> dict[str, Any]:
        derived = {"images_per_second": self.images_per_second, "fraction_of_roof": self.fraction_of_roof}
        return {**asdict(self), **derived}


@dataclass(frozen=True)
class Sweep:
    """What :func:`sweep` found.

    Attributes:
        rows: in the order of measurement.
        stopped: why a step count has no larger batches, one line each.
        not_measured: rows that there was no time for.
    """

    rows: list[Row]
    stopped: list[str]
    not_measured: list[str]


def sweep(
    sampler: Sampler,
    batch_sizes: Sequence[int],
    step_counts: Sequence[int],
    roof: Roof,
    *,
    vae: Any = None,
    repeats: int = 5,
    budget: float = float("inf"),
    on_row: Callable[[Row], None] = lambda row: None,
) -> Sweep:
    """Measure every batch size, from the smallest on, at every step count.

    A batch that does not fit ends its step count; the rows before it stay.

    Args:
        budget: seconds; no row is begun that would end later, were it as slow an image as the last one.
        on_row: called with every row as soon as it is there.

    Raises:
        ValueError: a number that makes no sense, or a scheduler that cannot be tabulated.
    """
    started, work = time.perf_counter(), Work.of(sampler.source)
    result = Sweep([], [], [])
    taken = 0.0  # seconds of an image of the last row
    for steps in sorted(set(step_counts)):
        for batch in sorted(set(batch_sizes)):
            begun = time.perf_counter()
            if begun - started + taken * batch > budget:
                result.not_measured.append(f"batch {batch}, {steps} steps")
                continue
            try:
                row = measure(sampler.plan(batch, SamplingOptions(steps)), roof, work, vae=vae, repeats=repeats)
            except (memory.OutOfMemoryError, torch.OutOfMemoryError) as error:
                result.stopped.append(f"{steps} steps: {_one_line(error, batch)}")
                break
            finally:
                memory.release(sampler.source.device)
            taken = (time.perf_counter() - begun) / batch
            result.rows.append(row)
            on_row(row)
    return result


def _one_line(error: RuntimeError, batch: int) -> str:
    if isinstance(error, memory.OutOfMemoryError):
        return str(error)
    return f"batch={batch}: {str(error).splitlines()[0]}"


def no_reset() -> None:
    """Of a launch that needs no state of its own."""


def measure(plan: Plan, roof: Roof, work: Work, *, vae: Any = None, repeats: int = 5) -> Row:
    """One row; see the head of this file.

    Raises:
        ValueError: the plan's scheduler cannot be tabulated: its steps are not launches that could be timed.
    """
    if plan.schedule.table is None:
        raise ValueError(
            f"a run under {type(plan.schedule.scheduler).__name__} has no step loop to time: it is not tabulated"
        )
    device, steps, blocks = plan.model.device, len(plan.timesteps), plan.config.num_blocks
    plan.warmup()
    noise = torch.randn(plan.slots.canvas_RMLC.shape, device=device)
    with torch.inference_mode():
        bare = bare_model(plan)
        unet = _loop(plan.launcher, "U-Net alone", bare.unet, partial(bare.unets, steps), steps)
        unet_watch, rounds = Stopwatch(device), []
        with plan.passes.at_work(), watched(plan, vae) as (watches, draw):
            for _ in range(repeats + 1):
                taken = {"total": seconds(lambda: draw(noise), device)}
                taken |= {name: watch.read() for name, watch in watches.items()}
                unet_watch.around(unet)()
                taken["unet"] = blocks * unet_watch.read()
                rounds.append(taken)
        pairs = block_pairs(plan, bare, repeats * blocks)
    return row_of(plan, rounds[1:], pairs, roof, work)


def row_of(plan: Plan, rounds: list[dict[str, float]], pairs: list[tuple[float, float]], roof: Roof, work: Work) -> Row:
    steps = len(plan.timesteps)
    middle = {name: median(taken[name] for taken in rounds) for name in rounds[0]}
    host = median(taken["total"] - taken["ar"] - taken["denoise"] - taken["vae"] for taken in rounds)
    parts = {"transformer": middle["denoise"] - middle["unet"], "host": host}
    return Row(
        batch=plan.batch,
        steps=plan.schedule.num_inference_steps,
        seconds=Spread.of([taken["total"] for taken in rounds]),
        split={part: parts.get(part, middle.get(part, 0.0)) for part in PARTS},
        bare_seconds=Spread.of([bare for _, bare in pairs]),
        overhead=median(ours / bare for ours, bare in pairs) - 1,
        operations_floor=plan.batch * work.flops(steps) / roof.matmul_flops,
        bytes_floor=work.weight_bytes(steps) / roof.copy_bytes,
    )


@contextmanager
def watched(plan: Plan, vae: Any = None) -> Iterator[tuple[dict[str, Stopwatch], Callable[[Tensor], Any]]]:
    """Within it the plan's launches are timed; gives the stopwatches and a function that draws from noise."""
    watches = {name: Stopwatch(plan.model.device) for name in ("ar", "denoise", "vae")}
    prepared = plan.prepared
    assert prepared is not None
    plan.prepared = replace(
        prepared,
        first_block=watches["ar"].around(prepared.first_block),
        next_block=watches["ar"].around(prepared.next_block),
        loop=watches["denoise"].around(prepared.loop),
    )
    prompt = any_prompt(plan.config, plan.batch)

    def draw(noise_BMLC: Tensor) -> None:
        latents = from_blocks(plan.run(noise_BMLC, prompt), plan.config)
        if vae is not None:
            watches["vae"].around(lambda: decode(vae, latents))()

    try:
        yield watches, draw
    finally:
        plan.prepared = prepared


def any_prompt(config: MADFormerConfig, *batch: int) -> Prompt:
    """What the model asks for, of ``batch`` images or of one: its first token again and again, its first class."""
    text = torch.zeros(*batch, config.text_length, dtype=torch.int64) if config.text is not None else None
    return Prompt(text, label=torch.zeros(batch, dtype=torch.int64) if config.num_classes else None)


def _loop(launcher: Launcher, name: str, step: Launchable, steps: Launchable, count: int) -> Launchable:
    """A launch of ``count`` of a step: of captured ones, or of ``steps``, which runs so many."""
    prepared = launcher.prepare(name, step, no_reset)
    return launcher.loop(prepared, count) if launcher.captures else steps


def block_pairs(plan: Plan, bare: BareModel | SharedBareModel, count: int) -> list[tuple[float, float]]:
    """Seconds of one block by the plan's launches and by the bare passes, ``count`` times at most."""
    device, block = plan.model.device, min(1, plan.config.num_blocks - 1)
    launcher = launcher_for(device)
    bare_ar = launcher.prepare("bare AR pass", partial(bare.ar, block), no_reset)
    steps = len(plan.timesteps)
    bare_loop = _loop(launcher, "bare step", partial(bare.denoise, block), partial(bare.steps, block, steps), steps)

    prepared = plan.prepared
    assert prepared is not None

    def ours() -> float:
        plan.passes.reset()
        if block:
            prepared.first_block()
        begin = prepared.next_block if block else prepared.first_block
        return seconds(lambda: (begin(), prepared.loop()), device)

    def without_engine() -> float:
        return seconds(lambda: (bare_ar(), bare_loop()), device)

    pairs: list[tuple[float, float]] = []
    with plan.passes.at_work():
        ours(), without_engine()
        started = time.perf_counter()
        for _ in range(count):
            if len(pairs) >= LEAST_PAIRS and time.perf_counter() - started > PAIRS_SECONDS:
                break
            first, second, third, fourth = ours(), without_engine(), without_engine(), ours()
            pairs.append(((first + fourth) / 2, (second + third) / 2))
    return pairs
