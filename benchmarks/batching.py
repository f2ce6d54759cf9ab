"""How long requests wait under Poisson arrivals: in-flight batching against batches that start full.

    python -m benchmarks.batching [--model FOLDER | --preset NAME] [--slots 8] [--steps 10] [--requests 200]

The same requests come to the same engine three times: to :class:`~madformer.engine.batching.InFlightBatcher`; to a plan
for as many images that starts when it is idle and that many wait; and to the same plan when it starts as soon as it is
idle and anyone waits, its batch filled up with noise of nobody's. They come at random times, at a given share of what
the plan draws a second when it is always full; what the in-flight batcher draws when it is always full stands beside.

The clock is virtual: it advances by the measured time of every piece of work, and jumps to the next arrival where there
is nothing to do. So nothing is modelled but the arrivals, and nobody waits for a wait. A request's latency is from its
arrival until its latents are there, its future's callback for the batcher.

No speed is reported where the three give different images: each image's distance from the one that an fp32 plan draws
may be twice that of the plan in the precision at hand.

The last line on stdout is the metrics as JSON. Exit status 1: bad options, or images that disagree.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks import ROOT
from benchmarks.record import CannotCompare, finish, results_folder
from benchmarks.released import relative_error
from madformer.conditioning.prompt import Prompt
from madformer.config import preset
from madformer.engine.batching import InFlightBatcher
from madformer.engine.options import SamplingOptions
from madformer.engine.plan import Plan
from madformer.engine.precision import PRECISIONS, apply
from madformer.engine.sampler import Sampler
from madformer.engine.schedulers import default_scheduler
from madformer.machine import default_dtype, environment, seconds, synchronize
from madformer.measuring.sampling import any_prompt
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from madformer.seeds import generator_of

LIMIT_FP32 = 1e-3
"""Relative error that rounding alone may make between batches of different sizes."""
CHECKED = 4


@dataclass(frozen=True)
class Latency:
    """Seconds from arrival to latents, of all requests."""

    mean: float
    median: float
    percentile_95: float

    @classmethod
    def of(cls, latencies: Sequence[float]) -> Latency:
        cuts = quantiles(latencies, n=20, method="inclusive")
        return cls(fmean(latencies), cuts[9], cuts[18])


@dataclass(frozen=True)
class Served:
    """What a policy made of the requests.

    Attributes:
        latencies: of every request, in the order of arrival.
        finished: the virtual time at which the last one was served.
        busy: seconds of work.
    """

    latencies: list[float]
    finished: float
    busy: float
    images: list[Tensor]


def arrivals(count: int, rate: float, seed: int = 0) -> list[float]:
    """Times of a Poisson process with ``rate`` requests a second."""
    generator, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += generator.expovariate(rate)
        times.append(now)
    return times


class Noise:
    """Each request's own noise, made when it is asked for, and a prompt where the model needs one."""

    def __init__(self, plan: Plan, seed: int = 0) -> None:
        self.config = plan.config
        self.shape, self.device, self.seed = plan.slots.canvas_RMLC.shape[1:], plan.model.device, seed

    def __getitem__(self, request: int) -> Tensor:
        return torch.randn(self.shape, generator=generator_of(self.seed + request)).to(self.device)

    def prompt(self, *batch: int) -> Prompt:
        return any_prompt(self.config, *batch)


def serve_in_flight(batcher: InFlightBatcher, times: Sequence[float], steps: int, noise: Noise) -> Served:
    """Requests join and leave between steps."""
    device = batcher.sampler.source.device
    waiting = list(enumerate(times))
    latencies, images = [0.0] * len(times), [torch.empty(0)] * len(times)
    now = busy = step_started = 0.0

    def finish(request: int, future: Future[Tensor]) -> None:
        latencies[request] = now + time.perf_counter() - step_started - times[request]
        images[request] = future.result()

    while waiting or batcher.num_waiting or batcher.num_running:
        if not (batcher.num_waiting or batcher.num_running):
            now = max(now, waiting[0][1])
        while waiting and waiting[0][1] <= now:
            request, _ = waiting.pop(0)
            future = batcher.submit(noise[request], SamplingOptions(steps), noise.prompt())
            future.add_done_callback(lambda done, request=request: finish(request, done))  # type: ignore[misc]
        step_started = time.perf_counter()
        batcher.step()
        synchronize(device)
        taken = time.perf_counter() - step_started
        now, busy = now + taken, busy + taken
    return Served(latencies, now, busy, images)


def serve_batches(plan: Plan, times: Sequence[float], noise: Noise, *, wait_until_full: bool) -> Served:
    """A batch starts when the plan is idle and enough wait: as many as it draws, or anyone."""
    size, latencies, images = plan.batch, [0.0] * len(times), [torch.empty(0)] * len(times)
    now, busy, first = 0.0, 0.0, 0
    while first < len(times):
        enough = min(first + size if wait_until_full else first + 1, len(times))
        now = max(now, times[enough - 1])
        last = first
        while last < min(first + size, len(times)) and times[last] <= now:
            last += 1
        batch = torch.stack([noise[first + index] for index in range(size)])
        drawn: list[Tensor] = []
        run = functools.partial(plan.run, batch, noise.prompt(size))
        taken = seconds(lambda run=run, drawn=drawn: drawn.append(run()), plan.model.device)  # type: ignore[misc]
        now, busy = now + taken, busy + taken
        for request in range(first, last):
            latencies[request] = now - times[request]
            images[request] = drawn[0][request - first]
        first = last
    return Served(latencies, now, busy, images)


def check(served: dict[str, Served], exact: Sequence[Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Each policy's distance from the images that an fp32 plan draws.

    Raises:
        CannotCompare: the batcher is further from them than twice the plan is, or anything is not finite.
    """
    errors = {name: relative_error(one.images[: len(exact)], exact) for name, one in served.items()}
    limit = LIMIT_FP32 if dtype == torch.float32 else 2 * errors["full batches"] + LIMIT_FP32
    for name, error in errors.items():
        if not error <= limit:
            raise CannotCompare(f"no speeds: images of {name} are {error:.1e} from fp32 ones, more than {limit:.1e}")
    return errors


def exact_images(model: MADFormer, scheduler: Any, steps: int, noise: Noise, count: int) -> list[Tensor]:
    """What a plan of the fp32 model draws of the first requests, one by one."""
    plan = Sampler(model, scheduler).plan(1, SamplingOptions(steps))
    return [plan.run(noise[request][None], noise.prompt(1))[0] for request in range(count)]


def capacity(plan: Plan, noise: Noise, repeats: int = 3) -> float:
    """Images a second of a plan that is always full: of the median run."""
    batch = torch.stack([noise[index] for index in range(plan.batch)])
    run = functools.partial(plan.run, batch, noise.prompt(plan.batch))
    run()
    return plan.batch / sorted(seconds(run, plan.model.device) for _ in range(repeats))[repeats // 2]


def compare(
    model: MADFormer, scheduler: Any, *, exact_model: MADFormer, slots: int, steps: int, requests: int, load: float
) -> dict[str, Any]:
    """Serve the same requests under each policy; the figures of a record.

    Raises:
        CannotCompare: the policies' images disagree.
    """
    sampler = Sampler(model, scheduler)
    plan = sampler.plan(slots, SamplingOptions(steps))
    noise = Noise(plan)
    exact = exact_images(exact_model, scheduler, steps, noise, min(CHECKED, requests))
    batcher = InFlightBatcher(sampler, slots, max_steps=len(plan.timesteps), max_waiting=max(requests, 3 * slots))
    serve_in_flight(batcher, [0.0] * slots, steps, noise)  # warms up
    full = capacity(plan, noise)
    in_flight_full = serve_in_flight(batcher, [0.0] * (3 * slots), steps, noise)
    times = arrivals(requests, load * full)
    policies: dict[str, Callable[[], Served]] = {
        "in flight": lambda: serve_in_flight(batcher, times, steps, noise),
        "full batches": lambda: serve_batches(plan, times, noise, wait_until_full=True),
        "batches of those who wait": lambda: serve_batches(plan, times, noise, wait_until_full=False),
    }
    served = {}
    for name, serve in policies.items():
        served[name] = serve()
        latency = Latency.of(served[name].latencies)
        print(f"{name:<27}{latency.mean:>9.3g}{latency.median:>9.3g}{latency.percentile_95:>9.3g} s", flush=True)
    errors = check(served, exact, model.dtype)
    latencies = {name: Latency.of(one.latencies) for name, one in served.items()}
    alone = seconds(lambda: serve_in_flight(batcher, [0.0], steps, noise), model.device)
    return {
        "slots": slots,
        "steps": steps,
        "requests": requests,
        "load": load,
        "capacity_images_per_second": full,
        "in_flight_capacity_images_per_second": 3 * slots / in_flight_full.busy,
        "seconds_alone": alone,
        "arrivals_per_second": load * full,
        "relative_errors": errors,
        "latency": {name: vars(latency) for name, latency in latencies.items()},
        "busy_fraction": {name: one.busy / one.finished for name, one in served.items()},
        "metrics": metrics(latencies),
    }


def metrics(latencies: dict[str, Latency]) -> dict[str, float]:
    own = latencies["in flight"]
    return {
        "inflight_latency_gain": latencies["full batches"].mean / own.mean,
        "inflight_median_gain": latencies["full batches"].median / own.median,
        "inflight_percentile_95_gain": latencies["full batches"].percentile_95 / own.percentile_95,
        "inflight_latency_gain_over_eager_batches": latencies["batches of those who wait"].mean / own.mean,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Load, serve, compare; returns the record.

    Raises:
        CannotCompare, ValueError, OSError: see the message.
    """
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CannotCompare("--device cuda: this PyTorch sees no CUDA device")
    precision = options.precision
    if precision == "auto":
        precision = "default" if default_dtype(device) == torch.bfloat16 else "exact"
    if options.preset:
        torch.manual_seed(0)
        exact = MADFormer(preset(options.preset)).to(device)
        scheduler: Any = default_scheduler(exact.config.prediction_type)
    else:
        pipeline = MADFormerPipeline.from_pretrained(options.model, dtype=torch.float32, device=device)
        exact, scheduler = pipeline.transformer, pipeline.scheduler
    model = apply(exact, precision)
    assert model.dtype == PRECISIONS[precision].dtype
    print(f"{'':<27}{'mean':>9}{'median':>9}{'95 %':>9}")
    figures = compare(
        model,
        scheduler,
        exact_model=exact,
        slots=options.slots,
        steps=options.steps,
        requests=options.requests,
        load=options.load,
    )
    print(
        f"{options.requests} requests, {figures['arrivals_per_second']:.3g} a second: {options.load:.0%} of what full "
        f"batches of {options.slots} draw; an image alone takes {figures['seconds_alone']:.3g} s"
    )
    head = environment("batching", device, ("diffusers", "triton"))
    return {**head, "model": options.preset or Path(options.model).name, "precision": precision, **figures}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "assets" / "emoji64"), help="model folder (assets/emoji64)")
    parser.add_argument("--preset", help="in its place: a configuration with random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--slots", type=int, default=8, help="images at once (8)")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of a block (10)")
    parser.add_argument("--requests", type=int, default=200, help="how many; a multiple of --slots (200)")
    parser.add_argument("--load", type=float, default=0.6, help="share of the capacity of full batches (0.6)")
    parser.add_argument("--out", type=Path, metavar="RECORD.json", help="in place of benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    if options.slots < 1 or options.requests < 2 or options.requests % options.slots:
        parser.error(f"--requests {options.requests} must be a multiple of --slots {options.slots}, and at least 2")
    if not 0 < options.load < 1:
        parser.error(f"--load {options.load} must lie between 0 and 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    out = options.out or results_folder(torch.device(options.device)) / "batching.json"
    return finish("batching", lambda: run(options), out, errors=(CannotCompare, ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
