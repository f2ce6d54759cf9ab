"""The speed and memory of a training step at full size, against the released loop: one run on one GPU.

    python -m benchmarks.training --released PATH [--device cuda] [--out RECORD.json]

``PATH`` is a clone of the released code. ``--device cpu --tiny`` tries the script out. A step is all that a loop does
for a batch that lies on the device: noise, forward and backward under bf16 autocast, clipping, AdamW, moving average.
The contenders:

* *ours*: the native model with the released quirks and the same weights, as ``madformer.training`` runs it.
* *released*: its model with its own attention (compiled FlexAttention; on a CPU, where that cannot train, the same mask
  as a dense tensor), AdamW as its script makes it, its average parameter by parameter.
* *ours, layers compiled*: later, since compiling may take longer than there is time; on a CPU, traced but not compiled.
* *ours, layers captured*: compiled, and captured as CUDA graphs by PyTorch (``compile_mode="reduce-overhead"``).

They are measured one after the other, each alone on the device, at growing batches until one does not fit: seconds
(medians, after two steps to warm up), images a second, peak memory. MFU is the operations of our step (forward and
backward, nothing recomputed counted) a second, over the rate of a large bf16 product measured here.

Nothing is timed unless losses and gradients agree in fp32, and no contender whose own, as it is timed, are not near
those. What ends one contender, be it memory, an error or its share of ``--budget``, ends no other: the record, written
anew after each, says what it was.

The last line on stdout is the metrics as JSON. Exit status 1: something is missing, or the results disagree.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from benchmarks import released
from benchmarks.compare_released import HIDDEN_WEIGHT, Batch, gradients, native_step, released_step
from benchmarks.record import CannotCompare, environment, finish, git_commit, results_folder, save
from madformer.machine import matmul_rate, seconds
from madformer.measuring.timing import Spread
from madformer.model.blocks import to_maps
from madformer.training.config import TrainingConfig
from madformer.training.costs import Costs, costs_of
from madformer.training.losses import Batch as LossBatch
from madformer.training.losses import LossWeights, training_losses
from madformer.training.optimization import MovingAverages, StepGuard

RELEASED, OURS, COMPILED = "released", "ours", "ours, layers compiled"
CAPTURED = "ours, layers captured"
LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP, DECAY = 3e-4, 0.05, (0.9, 0.95), 1.0, 0.9999
MAX_BF16_ERROR = 0.1
"""Relative, of a :class:`Pass` under autocast: rounding makes 0.03 at most, whatever the depth, a wrong mask 0.3."""

Step = Callable[[Batch], object]


@dataclass(frozen=True)
class Pass:
    """What is compared of a forward and backward pass in bf16.

    Gradients of the layers' norms and biases: they take little room, and depend on who attends to whom as the loss and
    the far larger gradients of the U-Net hardly do.
    """

    loss: Tensor
    gradients: list[Tensor]

    @classmethod
    def of(cls, loss: Tensor, model: Any) -> Pass:
        return cls(loss, [gradient for gradient in gradients(model.blocks) if gradient.dim() == 1])

    def errors(self, expected: Pass) -> dict[str, float]:
        return {
            "loss": released.relative_error([self.loss], [expected.loss]),
            "gradients": released.relative_error(self.gradients, expected.gradients),
        }


@dataclass(frozen=True)
class Row:
    """One contender at one batch size. ``peak_bytes`` is what the device had allocated at most; None on a CPU."""

    name: str
    batch: int
    seconds: Spread
    peak_bytes: int | None
    mfu: float

    @property
    def images_per_second(self) -> float:
        return self.batch / self.seconds.median


# The loops


def released_loop(model: nn.Module, device: torch.device) -> Step:
    """What the released script does between two batches."""
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS)
    scheduler = DDPMScheduler()

    def step(batch: Batch) -> None:
        shape = batch.clean.shape[:2]
        noisy = scheduler.add_noise(batch.clean.flatten(0, 1), batch.noise.flatten(0, 1), batch.timestep.flatten())
        with torch.autocast(device.type, torch.bfloat16):
            outputs = model(batch.clean, noisy.unflatten(0, shape), batch.timestep)
            loss = F.mse_loss(outputs[0], to_maps(batch.noise))
            loss = loss + HIDDEN_WEIGHT * F.mse_loss(outputs[1], to_maps(batch.clean))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for kept, parameter in zip(average.parameters(), model.parameters(), strict=True):
                kept.mul_(DECAY).add_(parameter, alpha=1 - DECAY)

    return step


def our_loop(model: nn.Module, device: torch.device, captured: bool) -> Step:
    """What :class:`madformer.training.trainer.Trainer` does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS, fused=True)
    guard, averages = StepGuard(optimizer, device, explosion=100.0), MovingAverages(model, (DECAY,))
    scheduler, weights = DDPMScheduler(), LossWeights(hidden=HIDDEN_WEIGHT)

    def step(batch: Batch) -> None:
        if captured:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device.type, torch.bfloat16):
            losses = training_losses(model, LossBatch(batch.clean, batch.noise, batch.timestep), scheduler, weights)
        losses.total.backward()
        guard.step(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.zero_grad(set_to_none=True)
        averages.update(0)

    return step


# Bounds


class OutOfTime(BaseException):
    """No Exception: what compiles catches those, and goes on."""


@contextlib.contextmanager
def at_most(limit: float) -> Iterator[None]:
    """Raises :class:`OutOfTime` in what runs for more seconds, also in the middle of compiling it."""

    def ring(*_: Any) -> None:
        raise OutOfTime(f"its {limit:.3g} s are over")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def release(device: torch.device) -> None:
    """Give back what nobody names any more: cycles, compiled code, the allocator's blocks."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Measuring


@dataclass(frozen=True)
class Course:
    """What every contender runs.

    Attributes:
        module: the released one.
        batches: in ascending order.
        expected: at the first batch, in fp32.
        roof: operations a second.
    """

    module: ModuleType
    shape: released.Shape
    device: torch.device
    batches: Sequence[int]
    repeats: int
    expected: Pass
    costs: Costs
    roof: float

    def draw(self, size: int) -> Batch:
        return Batch.draw(replace(self.shape, batch=size), self.device)


@dataclass(frozen=True)
class Sweep:
    """Rows of one contender; how far it is from fp32; what ended it before the last batch."""

    rows: list[Row]
    errors: dict[str, float]
    ended: str | None


def build(module: ModuleType, shape: released.Shape, device: torch.device) -> released.Models:
    """The same weights at every call, drawn where they stay: a processor takes minutes."""
    with device:
        models = released.make_models(module, shape, device)
    # where its script leaves them
    models.released.position_ids_precompute = models.released.position_ids_precompute.cpu()
    return models


def agreement(models: released.Models, batch: Batch, device: torch.device) -> tuple[dict[str, float], Pass]:
    """Relative errors of loss and gradients in fp32; and the released pass.

    With the dense mask: FlexAttention is checked in bf16, in which it is timed.
    """
    models.released.flex_attnmask = released.dense_mask(models.released, device)
    with released.tf32(matmul=False, convolution=False):
        expected, actual = released_step(models.released, batch)[0], native_step(models.native, batch)
    errors = {
        "loss": released.relative_error([actual], [expected]),
        "gradients": released.relative_error(gradients(models.compat), gradients(models.released)),
    }
    return errors, Pass.of(expected, models.released)


def prepare(name: str, models: released.Models, unread: frozenset[str], device: torch.device) -> None:
    """Make the contender's model what its loop trains."""
    if name == RELEASED:
        if device.type == "cpu":
            models.released.flex_attnmask = released.dense_mask(models.released, device)
        return
    for parameter_name, parameter in models.native.named_parameters():
        parameter.requires_grad_(parameter_name not in unread)
    if name in (COMPILED, CAPTURED):
        for layer in models.native.layers:
            if device.type == "cuda":
                layer.compile(mode="reduce-overhead" if name == CAPTURED else "default")
            else:
                layer.compile(backend="aot_eager")  # Inductor's C++ takes minutes.


def autocast_pass(name: str, models: released.Models, batch: Batch) -> Pass:
    """The contender's, as its loop makes it."""
    with torch.autocast(batch.clean.device.type, torch.bfloat16):
        if name == RELEASED:
            passed = Pass.of(released_step(models.released, batch)[0], models.released)
        else:
            passed = Pass.of(native_step(models.native, batch), models.compat)
    for model in (models.released, models.compat):
        model.zero_grad(set_to_none=True)
    return passed


def make_contender(name: str, course: Course) -> tuple[Step, dict[str, float]]:
    """Its step, and how far its gradients are from fp32.

    Raises:
        CannotCompare: too far.
    """
    models = build(course.module, course.shape, course.device)
    prepare(name, models, course.costs.unread, course.device)
    errors = autocast_pass(name, models, course.draw(course.batches[0])).errors(course.expected)
    released.check(errors, MAX_BF16_ERROR)
    if name == RELEASED:
        return released_loop(models.released, course.device), errors
    return our_loop(models.native, course.device, name == CAPTURED), errors


def sweep(name: str, course: Course, limit: float) -> Sweep:
    """One contender at one batch after the other, until one fails, or for ``limit`` seconds."""
    rows: list[Row] = []
    errors: dict[str, float] = {}
    size, device = 0, course.device
    try:
        release(device)
        # as the released train.py sets them, and as they are
        with at_most(limit), released.tf32(matmul=name == RELEASED, convolution=True):
            step, errors = make_contender(name, course)
            gc.collect()  # the other model
            for size in course.batches:
                once = functools.partial(step, course.draw(size))
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                for _ in range(2):
                    once()
                times = Spread.of([seconds(once, device) for _ in range(course.repeats)])
                peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
                rows.append(Row(name, size, times, peak, size * course.costs.flops / times.median / course.roof))
                print(line(rows[-1]), flush=True)
    except (Exception, OutOfTime) as error:
        ended = f"batch {size}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        print(f"  {name}, {ended}", flush=True)
        return Sweep(rows, errors, ended)
    return Sweep(rows, errors, None)


# The record


def line(row: Row) -> str:
    memory = f"{row.peak_bytes / 1e9:>10.1f}" if row.peak_bytes is not None else f"{'':>10}"
    return (
        f"{row.name:<24}{row.batch:>6}{row.seconds.median:>10.4f}{row.images_per_second:>11.3f}{memory}{row.mfu:>8.1%}"
    )


def metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Ours is the fastest of its ways at each batch."""
    theirs = {row.batch: row for row in rows if row.name == RELEASED}
    ours: dict[int, Row] = {}
    for row in rows:
        if row.name != RELEASED and (row.batch not in ours or row.seconds.median < ours[row.batch].seconds.median):
            ours[row.batch] = row
    if not ours:
        return {}
    best = max(ours.values(), key=lambda row: row.images_per_second)
    values = {"training_mfu": best.mfu, "training_images_per_second": best.images_per_second}
    if not theirs:
        return values
    values["training_best_vs_released"] = best.images_per_second / max(r.images_per_second for r in theirs.values())
    if 1 in ours and 1 in theirs:
        values["training_b1_vs_released"] = theirs[1].seconds.median / ours[1].seconds.median
    largest = theirs[max(theirs)]
    if largest.batch in ours and largest.peak_bytes:
        own = [row.peak_bytes or 0 for row in rows if row.name != RELEASED and row.batch == largest.batch]
        values["training_memory_vs_released"] = min(own) / largest.peak_bytes
    return values


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Check, measure, print; returns the record, and writes after every contender what there is of it.

    Raises:
        CannotCompare, OSError: see the message.
    """
    started, device = time.perf_counter(), torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CannotCompare("--device cuda: this PyTorch sees no CUDA device")
    out = options.out or (None if options.tiny else results_folder(device) / "training.json")
    batches = sorted(set(options.batches))
    shape = replace(released.TINY if options.tiny else released.FFHQ_1024, batch=batches[0])
    module = released.load_released(options.released, options.device)
    models = build(module, shape, device)
    errors, expected = agreement(models, Batch.draw(shape, device), device)
    print(f"fp32: largest relative error {released.check(errors):.1e}", flush=True)
    costs = costs_of(TrainingConfig(model=models.native.config))
    del models
    roof = matmul_rate(device, torch.bfloat16)
    print(f"an image: {costs.flops / 1e12:.4g} TFLOP; matrix products {roof / 1e12:.3g} TFLOP/s")
    print(f"{'':<24}{'batch':>6}{'seconds':>10}{'images/s':>11}{'peak GB':>10}{'MFU':>8}", flush=True)
    course = Course(module, shape, device, batches, options.repeats, expected, costs, roof)
    record = {
        **environment("training", device, ("diffusers", "transformers", "triton")),
        "released_commit": git_commit(options.released),
        "shape": asdict(shape),
        "repeats": options.repeats,
        "relative_errors": errors,
        "flops_per_image": costs.flops,
        "matmul_flops": roof,
    }
    sweeps: dict[str, Sweep] = {}
    # Every batch is compiled for itself, as it would be for a run.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):
        contenders = (OURS, RELEASED, COMPILED) + ((CAPTURED,) if device.type == "cuda" else ())
        for done, name in enumerate(contenders):
            share = (options.budget - (time.perf_counter() - started)) / (len(contenders) - done)
            sweeps[name] = sweep(name, course, max(share, 1e-3))
            rows = [row for swept in sweeps.values() for row in swept.rows]
            record |= {
                "seconds": time.perf_counter() - started,
                "bf16_errors": {name: swept.errors for name, swept in sweeps.items()},
                "ended": {name: swept.ended for name, swept in sweeps.items()},
                "rows": [asdict(row) for row in rows],
                "metrics": metrics(rows),
            }
            if out is not None and rows:
                save(record, out)
    if not rows:
        raise CannotCompare("nothing was measured: " + "; ".join(f"{name}, {record['ended'][name]}" for name in sweeps))
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--released", type=Path, required=True, metavar="PATH", help="clone of the released code")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    batches = [1, 2, 3, 4, 6, 8, 12, 16, 24]
    parser.add_argument(
        "--batches", type=released.positive, nargs="+", default=batches, help=" ".join(map(str, batches))
    )
    parser.add_argument("--repeats", type=released.positive, default=5, help="timed steps (5)")
    parser.add_argument("--budget", type=float, default=500, metavar="SECONDS", help="of all that is done (500)")
    parser.add_argument("--tiny", action="store_true", help="a toy geometry, to try the script out")
    parser.add_argument("--out", type=Path, metavar="RECORD.json", help="in place of benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    return finish("training", functools.partial(run, options), out=None)


if __name__ == "__main__":
    sys.exit(main())
