"""The speed of sampling at full size, and against the released sampler: one run of under ten minutes on an H200.

    python -m benchmarks.sampling --device cuda [--released PATH] [--out RECORD.json]

The FFHQ-1024 configuration with random weights, latents only. ``PATH`` is a clone of the released code; without it what
compares with it is left out, by name. So is what needs CUDA where there is none (``--device cpu --tiny`` tries the
script out), and what there is no time for. The questions, in the order in which they are asked:

* *Agreement*: in fp32 without TF32 ours is the released sampler's result, and in bf16 no further from that than twice
  the released one under autocast is. No speed is reported otherwise.
* *Against the released sampler*: at batch 1, as shipped (fp32, PyTorch's own TF32 defaults) and under bf16 autocast,
  where its attention is SDPA as well; at batch 16 the latter. Interleaved, at a few steps.
* *Confirmed*: the same figures, once, at the steps that the table asks for, and the best batch.
* *Sweep*: batch sizes, with the split of the time and the floors, as ``madformer bench`` measures them.
* *Launches*: a block's steps as one launch, as replays of a captured step, and without capture.
* *Idle*: what of a block's loop no kernel runs in: one less the kernels' time, by PyTorch's profiler over replays of
  the same step, over the time of the loop by events, without the profiler.
* *In flight*: the latency of Poisson arrivals; see ``batching.py``.
* *U-Net*: a captured step with the U-Net halves as they are (channels-last, cuDNN) and compiled by ``torch.compile``.

Beside every figure stand its floors: the operations over the rate of a large matrix product, and the weights, read once
a pass, over the rate of a large copy, both measured here.

The last line on stdout is the metrics as JSON. Exit status 1: something is missing. The record
is written after every question.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import batching, launches
from benchmarks.record import CannotCompare, environment, finish, git_commit, results_folder, save
from benchmarks.released import (
    FFHQ_1024,
    MAX_RELATIVE_ERROR,
    SMALL,
    TINY,
    Shape,
    check,
    load_released,
    make_models,
    make_scheduler,
    positive,
    relative_error,
    sample_ours,
    sample_released,
    tf32,
)
from madformer.config import ffhq1024, tiny
from madformer.engine.memory import OutOfMemoryError
from madformer.engine.options import SamplingOptions
from madformer.engine.plan import Plan
from madformer.engine.precision import apply
from madformer.engine.sampler import Sampler
from madformer.machine import seconds
from madformer.measuring import report
from madformer.measuring.bare import Work
from madformer.measuring.sampling import Roof, Row, sweep
from madformer.measuring.timing import Run, Spread, interleaved
from madformer.model import MADFormer

EXPECTED = (OutOfMemoryError, torch.OutOfMemoryError, CannotCompare)
COMPILING = 90.0
"""Seconds that a question is not asked without which compiles the U-Net."""
OURS, RELEASED_FP32, RELEASED_BF16 = "ours, bf16", "released, fp32", "released, bf16 autocast"


@dataclass(frozen=True)
class Scale:
    """How much of everything: the geometry, and steps, batches and requests that fit the time."""

    shape: Shape
    steps: int
    confirmed_steps: int
    large_batch: int
    batch_sizes: tuple[int, ...]
    slots: int
    in_flight_steps: int
    requests: int


FULL = Scale(FFHQ_1024, 25, 250, 16, (1, 4, 16, 32, 64), slots=8, in_flight_steps=10, requests=96)
LAPTOP = Scale(SMALL, 3, 10, 4, (1, 4), slots=4, in_flight_steps=3, requests=16)
TRIAL = Scale(TINY, 1, 2, 2, (1, 2), slots=2, in_flight_steps=1, requests=4)


@dataclass(frozen=True)
class Figure:
    """Seconds of a batch."""

    name: str
    batch: int
    steps: int
    seconds: Spread
    operations_floor: float
    bytes_floor: float


@dataclass
class Bench:
    """What all questions share, and the answers so far."""

    device: torch.device
    scale: Scale
    repeats: int
    deadline: float
    model: MADFormer
    exact: MADFormer
    released: Any
    roof: Roof
    work: Work
    figures: list[Figure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)
    save: Callable[[Bench], None] = lambda bench: None

    def ask(self, name: str, question: Callable[[Bench], Any], *, expected: float = 0, needs: str = "") -> None:
        """Answer a question, unless it ``needs`` what is not here or would end after the deadline; save what is known.

        An error is that question's alone.
        """
        late = time.perf_counter() + expected > self.deadline
        reason = needs or (f"no time left for the {expected:.0f} s that it takes" if late else "")
        if not reason:
            print(f"\n{name}", flush=True)
            try:
                self.answers[name] = question(self)
            except Exception as error:
                kind = "" if isinstance(error, EXPECTED) else f"{type(error).__name__}: "
                reason = kind + (str(error).splitlines() or [""])[0]
        if reason:
            self.left_out.append(f"{name}: {reason}")
            print(f"\nleft out: {self.left_out[-1]}", flush=True)
        self.save(self)

    def plan(self, batch: int, steps: int) -> Plan:
        return Sampler(self.model, make_scheduler()).plan(batch, SamplingOptions(steps))

    def add(self, name: str, batch: int, steps: int, spread: Spread) -> None:
        operations = batch * self.work.flops(steps) / self.roof.matmul_flops
        floor = self.work.weight_bytes(steps) / self.roof.copy_bytes
        self.figures.append(Figure(name, batch, steps, spread, operations, floor))
        print(
            f"{name:<26}batch {batch:<4}{steps:>4} steps{spread.median:>10.4g} s{batch / spread.median:>10.4g} images/s"
            f"   floors {operations:.3g} s operations, {floor:.3g} s bytes",
            flush=True,
        )

    def figure(self, name: str, batch: int, steps: int | None = None) -> Figure | None:
        """The one with most steps."""
        found = [f for f in self.figures if (f.name, f.batch) == (name, batch) and steps in (None, f.steps)]
        return max(found, key=lambda figure: figure.steps, default=None)


# Against the released sampler


def samplers(bench: Bench, batch: int, steps: int) -> dict[str, Run]:
    """Ours and, where it is there, the released one in both ways; as shipped at batch 1 only."""
    shape = replace(bench.scale.shape, batch=batch, steps=steps)
    plan = bench.plan(batch, steps)
    runs: dict[str, Run] = {OURS: lambda: sample_ours(plan, shape)}
    if bench.released is None:
        return runs

    def released(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Run:
        def run() -> Tensor:
            with context():
                return sample_released(bench.released, shape)

        return run

    runs[RELEASED_BF16] = released(lambda: torch.autocast(bench.device.type, torch.bfloat16))
    if batch == 1:
        runs[RELEASED_FP32] = released(lambda: tf32(matmul=False, convolution=True))
    return runs


def agreement(bench: Bench, steps: int = 2) -> dict[str, float]:
    """Relative errors against the released sampler in fp32.

    Raises:
        CannotCompare: one is too large, or not a number.
    """
    shape = replace(bench.scale.shape, batch=1, steps=steps)
    with tf32(matmul=False, convolution=False):
        expected = sample_released(bench.released, shape)
        plan = Sampler(bench.exact, make_scheduler()).plan(1, SamplingOptions(steps))
        errors = {"ours, fp32": relative_error([sample_ours(plan, shape)], [expected])}
        check(errors)
        runs = samplers(bench, 1, steps)
        errors |= {name: relative_error([runs[name]()], [expected]) for name in (OURS, RELEASED_BF16)}
    check({OURS: errors[OURS]}, 2 * errors[RELEASED_BF16] + MAX_RELATIVE_ERROR)
    print("  ".join(f"{name} {error:.1e}" for name, error in errors.items()), flush=True)
    return errors


def time_samplers(bench: Bench, batch: int) -> None:
    steps = bench.scale.steps
    spreads = interleaved(samplers(bench, batch, steps), bench.repeats, bench.device)
    for name, spread in spreads.items():
        bench.add(name, batch, steps, spread)


def confirm(bench: Bench, name: str, batch: int) -> None:
    """Once, at the steps that the table asks for."""
    steps = bench.scale.confirmed_steps
    runs = samplers(bench, batch, steps)
    if name == OURS:
        runs[name]()  # captures; the released sampler has been warmed up
    bench.add(name, batch, steps, Spread.of([seconds(runs[name], bench.device)]))


def ask_to_confirm(bench: Bench, name: str, batch: int) -> None:
    """Unless it has been, or was never measured at fewer steps."""
    few, many = bench.scale.steps, bench.scale.confirmed_steps
    known = bench.figure(name, batch, few) or (bench.figure("sweep", batch, few) if name == OURS else None)
    if known is not None and bench.figure(name, batch, many) is None:
        expected = known.seconds.median * many / few * (2 if name == OURS else 1)
        title = f"confirmed: {name}, batch {batch}"
        bench.ask(title, lambda own: confirm(own, name, batch), expected=expected)


# Ours alone


def sweep_batches(bench: Bench) -> dict[str, Any]:
    """Rows as ``madformer bench`` makes them."""
    print(report.heading())

    def show(row: Row) -> None:
        print(report.line(row), flush=True)
        bench.figures.append(Figure("sweep", row.batch, row.steps, row.seconds, row.operations_floor, row.bytes_floor))

    sampler = Sampler(bench.model, make_scheduler())
    left = bench.deadline - time.perf_counter()
    sizes, steps = bench.scale.batch_sizes, [bench.scale.steps]
    result = sweep(sampler, sizes, steps, bench.roof, repeats=bench.repeats - 1 or 1, budget=left / 2, on_row=show)
    rows = [row.to_dict() for row in result.rows]
    return {"rows": rows, "stopped": result.stopped, "not_measured": result.not_measured}


def best_batch(bench: Bench) -> int | None:
    rows = [figure for figure in bench.figures if figure.name == "sweep"]
    return max(rows, key=lambda row: row.batch / row.seconds.median).batch if rows else None


def ask_for_launches(bench: Bench) -> dict[str, Any]:
    shape = replace(bench.scale.shape, batch=1, steps=bench.scale.steps)
    bench.left_out += [f"launches, {name}: {why}" for name, why in launches.refusals(bench.device).items()]
    found = launches.time_launches(bench.model, shape, bench.repeats)
    for name, spread in found.seconds.items():
        bench.add(name, 1, shape.steps, spread)
    if found.reason:
        print(f"not the same bits ({found.differences}): {found.reason}", flush=True)
    return asdict(found)


def idle(bench: Bench) -> dict[str, float]:
    figures = launches.idle(bench.plan(1, bench.scale.steps), bench.repeats)
    print(", ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
    return figures


def in_flight(bench: Bench) -> dict[str, Any]:
    scale = bench.scale
    return batching.compare(
        bench.model,
        make_scheduler(),
        exact_model=bench.exact,
        slots=scale.slots,
        steps=scale.in_flight_steps,
        requests=scale.requests,
        load=0.6,
    )


def mlp_options(bench: Bench) -> dict[str, float]:
    return _told(launches.time_mlps(bench.exact, 1, bench.scale.steps, bench.repeats))


def unet_options(bench: Bench, batch: int) -> dict[str, float]:
    return _told(launches.time_unets(bench.model, batch, bench.scale.steps, bench.repeats))


def _told(taken: dict[str, float]) -> dict[str, float]:
    print(", ".join(f"{name} {value * 1e3:.3f} ms a step" for name, value in taken.items()), flush=True)
    return taken


# The record


def metrics(bench: Bench) -> dict[str, float]:
    """Ratios and times at the most steps that both sides were measured at; what was not measured is not there."""
    values: dict[str, float] = {"matmul_flops": bench.roof.matmul_flops, "copy_bytes_per_second": bench.roof.copy_bytes}
    scale = bench.scale
    for name, peer, batch in (
        ("sampling_b1_vs_released_fp32", RELEASED_FP32, 1),
        ("sampling_b1_vs_released_bf16", RELEASED_BF16, 1),
        (f"sampling_b{scale.large_batch}_vs_released_bf16", RELEASED_BF16, scale.large_batch),
    ):
        for steps in (scale.steps, scale.confirmed_steps):
            theirs, ours = bench.figure(peer, batch, steps), bench.figure(OURS, batch, steps)
            if theirs is not None and ours is not None:
                values[name] = theirs.seconds.median / ours.seconds.median
    if (ours := bench.figure(OURS, 1, scale.confirmed_steps)) is not None:
        values["seconds_per_image_b1"] = ours.seconds.median
    if (batch := best_batch(bench)) is not None:
        best = bench.figure(OURS, batch, scale.confirmed_steps)
        if best is not None:
            values["images_per_second_best"] = batch / best.seconds.median
        best = best or bench.figure("sweep", batch)
        assert best is not None
        flops = best.steps * best.batch * bench.work.step_flops
        values["sampling_fraction_of_roof"] = flops / best.seconds.median / bench.roof.matmul_flops
        values["best_batch"] = batch
    if "idle" in bench.answers:
        values["loop_idle_fraction"] = bench.answers["idle"]["idle_fraction"]
    return values | bench.answers.get("in flight", {}).get("metrics", {})


def make_bench(options: argparse.Namespace, device: torch.device, started: float) -> Bench:
    """Models with equal random weights, and this device's rates."""
    scale = TRIAL if options.tiny else FULL if device.type == "cuda" else LAPTOP
    released = None
    if options.released is not None:
        models = make_models(load_released(options.released, options.device), scale.shape, device)
        released, exact = models.released.eval(), models.native.eval()
    else:
        torch.manual_seed(0)
        exact = MADFormer(tiny() if options.tiny else ffhq1024()).to(device).eval()
    model = apply(exact, "default")
    return Bench(
        device=device,
        scale=scale,
        repeats=options.repeats,
        deadline=started + options.budget,
        model=model,
        exact=exact,
        released=released,
        roof=Roof.measure(device, model.dtype),
        work=Work.of(model),
    )


def run(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None] = lambda record: None) -> dict[str, Any]:
    """Ask everything; returns the record, and keeps after every question what there is of it.

    Raises:
        CannotCompare, OSError: see the message.
    """
    started, device = time.perf_counter(), torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CannotCompare("--device cuda: this PyTorch sees no CUDA device")
    bench = make_bench(options, device, started)
    work, roof = bench.work, bench.roof
    step, unet = (flops / work.num_blocks / 1e9 for flops in (work.step_flops, work.unet_flops))
    print(f"a step of one image: {step:.4g} GFLOP on average over the blocks, {unet:.4g} of them in the U-Net")
    print(f"matrix products {roof.matmul_flops / 1e12:.3g} TFLOP/s, copies {roof.copy_bytes / 1e9:.4g} GB/s")
    bench.save = lambda own: keep(record_of(own, options, device, started))
    ask_all(bench, options.questions)
    return record_of(bench, options, device, started)


def ask_all(bench: Bench, questions: str) -> None:
    """The ``headline`` at batch 1 and at the large one, the ``rest``, or ``all``."""
    large = bench.scale.large_batch
    if questions in ("headline", "all"):
        if bench.released is None:
            bench.left_out.append("all that compares with the released sampler: --released was not given")
        else:
            bench.ask("agreement", agreement)
            if "agreement" not in bench.answers:
                bench.left_out.append("all that compares with the released sampler: there is no agreement")
                bench.released = None
        for batch in (1, large):
            bench.ask(f"batch {batch}", lambda own, batch=batch: time_samplers(own, batch))
        for name in (OURS, RELEASED_FP32, RELEASED_BF16):
            ask_to_confirm(bench, name, 1)
    if questions in ("rest", "all"):
        ask_the_rest(bench)


def ask_the_rest(bench: Bench) -> None:
    no_cuda = "" if bench.device.type == "cuda" else "it needs CUDA"
    large = bench.scale.large_batch
    bench.ask("idle", idle, needs=no_cuda)
    bench.ask("launches", ask_for_launches)
    bench.ask("sweep", sweep_batches)
    bench.ask("in flight", in_flight)
    if (best := best_batch(bench)) is not None:
        ask_to_confirm(bench, OURS, best)
    bench.ask("MLP, batch 1", mlp_options, needs=no_cuda)
    for batch in (1, large):
        unet = functools.partial(unet_options, batch=batch)
        bench.ask(f"U-Net, batch {batch}", unet, needs=no_cuda, expected=COMPILING)
    for name in (OURS, RELEASED_BF16):
        ask_to_confirm(bench, name, large)


def record_of(bench: Bench, options: argparse.Namespace, device: torch.device, started: float) -> dict[str, Any]:
    return {
        **environment("sampling", device, ("diffusers", "transformers", "triton")),
        "released_commit": git_commit(options.released) if options.released else None,
        "scale": asdict(bench.scale),
        "repeats": options.repeats,
        "seconds": time.perf_counter() - started,
        "roof": asdict(bench.roof),
        "work_per_image": asdict(bench.work),
        "figures": [asdict(figure) for figure in bench.figures],
        "answers": {name: value for name, value in bench.answers.items() if value is not None},
        "left_out": bench.left_out,
        "metrics": metrics(bench),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--released", type=Path, metavar="PATH", help="clone of the released code")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--repeats", type=positive, default=3, help="timed rounds (3)")
    parser.add_argument("--questions", choices=("headline", "rest", "all"), default="all", help="which (all)")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="seconds in all (540)")
    parser.add_argument("--tiny", action="store_true", help="a toy geometry, to try the script out")
    parser.add_argument("--out", type=Path, metavar="RECORD.json", help="in place of benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    out = options.out
    if out is None and not options.tiny:
        out = results_folder(torch.device(options.device)) / "sampling.json"
    return finish("sampling", lambda: run(options, lambda record: None if out is None else save(record, out)), out)


if __name__ == "__main__":
    sys.exit(main())
