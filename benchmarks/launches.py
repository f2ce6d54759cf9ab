"""How a block's steps are launched: what it costs to launch them, when the device idles, and what a step is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.released import CannotCompare, Shape, check, make_scheduler, relative_error, sample_ours
from madformer.engine.graphs import EagerLauncher, GraphLauncher, Launcher, loop_refusal
from madformer.engine.options import SamplingOptions
from madformer.engine.plan import Plan
from madformer.engine.precision import apply
from madformer.engine.sampler import Sampler
from madformer.machine import synchronize
from madformer.measuring.timing import Run, Spread, Stopwatch, interleaved
from madformer.model import MADFormer


def refusals(device: torch.device) -> dict[str, str]:
    """Why some ways of launching cannot be had here."""
    if device.type != "cuda":
        return dict.fromkeys(("replays", "one launch"), "it needs CUDA")
    return {"one launch": why} if (why := loop_refusal()) else {}


MAX_LAUNCH_ERROR = 0.03
"""Relative, of latents that were launched otherwise: what rounding to bf16 makes of them, whatever the depth."""


@dataclass(frozen=True)
class Launches:
    """Drawing by every way of launching that can be had.

    Attributes:
        differences: from the eager latents, relative; ``eager again`` is a second eager run of the same plan.
        reason: what explains a difference that is not 0; empty where all are the same bits.
    """

    seconds: dict[str, Spread]
    differences: dict[str, float]
    reason: str


def time_launches(model: MADFormer, shape: Shape, repeats: int) -> Launches:
    """Raises :class:`CannotCompare` where a way of launching is further from the eager one than rounding is."""
    ways: dict[str, Launcher] = {"eager": EagerLauncher()}
    refused = refusals(model.device)
    if "replays" not in refused:
        ways["replays"] = GraphLauncher(model.device, one_launch=False)
    if "one launch" not in refused:
        ways["one launch"] = GraphLauncher(model.device, one_launch=True)
    plans = {
        name: Sampler(model, make_scheduler(), launcher=way).plan(shape.batch, SamplingOptions(shape.steps))
        for name, way in ways.items()
    }
    drawn = {name: sample_ours(plan, shape) for name, plan in plans.items()}
    drawn["eager again"] = sample_ours(plans["eager"], shape)
    differences = {name: relative_error([x], [drawn["eager"]]) for name, x in drawn.items() if name != "eager"}
    check(differences, MAX_LAUNCH_ERROR)
    runs: dict[str, Run] = {name: lambda plan=plan: sample_ours(plan, shape) for name, plan in plans.items()}  # type: ignore[misc]
    return Launches(interleaved(runs, repeats, model.device), differences, reason_for(differences))


def reason_for(differences: Mapping[str, float]) -> str:
    """Where results of launches differ: whether Python's own do, or a library chose otherwise under capture."""
    if not any(differences.values()):
        return ""
    if differences["eager again"]:
        return "two eager runs of one plan differ: an algorithm adds up in no fixed order"
    return "eager runs agree: a library took another algorithm for the captured pass than outside of a capture"


@torch.inference_mode()
def time_loops(plans: Mapping[str, Plan], repeats: int) -> dict[str, Spread]:
    """A block's whole loop of each plan, interleaved, by the device's clock."""
    watches = {name: Stopwatch(plan.model.device) for name, plan in plans.items()}
    for plan in plans.values():
        plan.warmup().run(torch.randn(plan.slots.canvas_RMLC.shape, device=plan.model.device))
    times: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(repeats):
        for name, plan in plans.items():
            watches[name].around(plan.prepared.loop)()
            times[name].append(watches[name].read())
    return {name: Spread.of(values) for name, values in times.items()}


@torch.inference_mode()
def idle(plan: Plan, repeats: int) -> dict[str, float]:
    """What of a block's loop no kernel runs in.

    The loop is timed by events, without the profiler. The kernels' time is the profiler's, over as many replays of the
    same captured step: whether it records what a conditional node launches depends on the driver.
    """
    loop = time_loops({"loop": plan}, repeats)["loop"].median
    step = plan.warmup().prepared.denoise
    spans = kernel_spans(EagerLauncher().loop(step, len(plan.timesteps)), plan.model.device)
    if not spans:
        raise CannotCompare("the profiler recorded no kernels")
    busy = busy_time(spans)
    return {"loop_seconds": loop, "kernel_seconds": busy, "kernels": len(spans), "idle_fraction": 1 - busy / loop}


def kernel_spans(run: Run, device: torch.device) -> list[tuple[float, float]]:
    """Start and end, in seconds, of all that the device did during ``run``."""
    with profile(activities=[ProfilerActivity.CUDA]) as records:
        run()
        synchronize(device)
    events = [event for event in records.events() or () if event.device_type == DeviceType.CUDA]
    return [(event.time_range.start / 1e6, event.time_range.end / 1e6) for event in events]


def busy_time(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def time_unets(model: MADFormer, batch: int, steps: int, repeats: int) -> dict[str, float]:
    """Seconds of a captured step with the U-Net halves as they are, and compiled."""
    ways = {"channels-last, cuDNN": False, "torch.compile": True}
    samplers = {name: Sampler(model, make_scheduler(), compile_unet=compiled) for name, compiled in ways.items()}
    return _time_steps(samplers, batch, steps, repeats)


def time_mlps(exact: MADFormer, batch: int, steps: int, repeats: int) -> dict[str, float]:
    """Seconds of a captured step with gate and up as one product and as two (:mod:`madformer.engine.joined`)."""
    ways = {"one product": True, "two products": False}
    samplers = {
        name: Sampler(apply(exact, "default", join_mlp=join_mlp), make_scheduler()) for name, join_mlp in ways.items()
    }
    return _time_steps(samplers, batch, steps, repeats)


def _time_steps(samplers: Mapping[str, Sampler], batch: int, steps: int, repeats: int) -> dict[str, float]:
    plans = {name: sampler.plan(batch, SamplingOptions(steps)) for name, sampler in samplers.items()}
    return {name: spread.median / steps for name, spread in time_loops(plans, repeats).items()}
