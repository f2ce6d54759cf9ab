"""The speed and memory of a training step at full size, against the released loop: one run on one GPU.

    python benchmarks/training.py --released PATH [--device cuda] [--out RECORD.json]

``PATH`` is a clone of the released code. ``--device cpu --tiny`` tries the script out. A step is all that a loop does
for a batch that lies on the device: noise, forward and backward under bf16 autocast, clipping, AdamW, moving average.
The contenders:

* *released*: its model with its own attention (compiled FlexAttention; on a CPU, where that cannot train, the same mask
  as a dense tensor), AdamW as its script makes it, its average parameter by parameter.
* *ours*: the native model with the released quirks and the same weights, as ``madformer.training`` runs it; and the
  same with every layer compiled.

They are measured one after the other, each alone on the device, at batches that double until one does not fit: seconds
(medians, after two steps to warm up), images a second, peak memory. MFU is the operations of our step (forward and
backward, nothing recomputed counted) a second, over the rate of a large bf16 product measured here. Nothing is reported
unless losses and gradients agree in fp32.

The last line on stdout is the metrics as JSON. Exit status 1: something is missing, or the results disagree.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from compare_released import HIDDEN_WEIGHT, Batch, gradients, native_step, released_step
from madformer.benchmark.timing import Spread, matmul_rate, seconds
from madformer.model.blocks import to_maps
from madformer.training.config import TrainingConfig
from madformer.training.costs import Costs, costs_of
from madformer.training.losses import LossWeights, training_losses
from madformer.training.optimization import MovingAverages, StepGuard
from record import CannotCompare, environment, finish, git_commit, results_folder
from released import (
    FFHQ_1024,
    TINY,
    Models,
    Shape,
    check,
    dense_mask,
    load_released,
    make_models,
    positive,
    relative_error,
    tf32,
)

RELEASED, OURS, COMPILED = "released", "ours", "ours, layers compiled"
LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP, DECAY = 3e-4, 0.05, (0.9, 0.95), 1.0, 0.9999

Step = Callable[[Batch], object]


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


def our_loop(model: Any, unread: frozenset[str], device: torch.device) -> Step:
    """What :class:`madformer.training.trainer.Trainer` does."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in unread)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS, fused=True)
    guard, averages = StepGuard(optimizer, device, explosion=100.0), MovingAverages(model, (DECAY,))
    scheduler, weights = DDPMScheduler(), LossWeights(hidden=HIDDEN_WEIGHT)

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            losses = training_losses(model, batch.clean, batch.noise, batch.timestep, scheduler, weights)
        losses.total.backward()
        guard.step(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.zero_grad(set_to_none=True)
        averages.update(0)

    return step


# Measuring


def make_contender(name: str, models: Models, costs: Costs, device: torch.device) -> Step:
    if name == RELEASED:
        model = copy.deepcopy(models.released).to(device)
        if device.type == "cpu":
            model.flex_attnmask = dense_mask(model, device)
        return released_loop(model, device)
    native = copy.deepcopy(models.native).to(device)
    if name == COMPILED:
        for layer in native.layers:
            layer.compile()
    return our_loop(native, costs.unread, device)


def sweep(
    name: str, models: Models, shape: Shape, costs: Costs, roof: float, batches: Sequence[int], repeats: int,
    device: torch.device,
) -> list[Row]:  # fmt: skip
    """Rows of one contender, up to the largest batch that fits."""
    rows: list[Row] = []
    step = make_contender(name, models, costs, device)
    for size in batches:
        once = functools.partial(step, Batch.draw(replace(shape, batch=size), device))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            for _ in range(2):
                once()
            times = Spread.of([seconds(once, device) for _ in range(repeats)])
        except torch.OutOfMemoryError:
            print(f"  {name}: batch {size} does not fit", flush=True)
            break
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        rows.append(Row(name, size, times, peak, size * costs.flops / times.median / roof))
        print(line(rows[-1]), flush=True)
    return rows


def agreement(models: Models, shape: Shape, device: torch.device) -> dict[str, float]:
    """Relative errors of loss and gradients in fp32, at the released script's batch."""
    batch = Batch.draw(shape, device)
    released, native = (copy.deepcopy(model).to(device) for model in (models.released, models.compat))
    if device.type == "cpu":
        released.flex_attnmask = dense_mask(released, device)
    with tf32(matmul=False, convolution=False):
        expected, actual = released_step(released, batch)[0], native_step(native.to_native(), batch)
        return {
            "loss": relative_error([actual], [expected]),
            "gradients": relative_error(gradients(native), gradients(released)),
        }


# The record


def line(row: Row) -> str:
    memory = f"{row.peak_bytes / 1e9:>10.1f}" if row.peak_bytes is not None else f"{'':>10}"
    return (
        f"{row.name:<24}{row.batch:>6}{row.seconds.median:>10.4f}{row.images_per_second:>11.3f}{memory}{row.mfu:>8.1%}"
    )


def metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Ours is the faster of the two ways at each batch."""
    released = {row.batch: row for row in rows if row.name == RELEASED}
    ours: dict[int, Row] = {}
    for row in rows:
        if row.name != RELEASED and (row.batch not in ours or row.seconds.median < ours[row.batch].seconds.median):
            ours[row.batch] = row
    best = max(ours.values(), key=lambda row: row.images_per_second)
    values = {"training_mfu": best.mfu, "training_images_per_second": best.images_per_second}
    if not released:
        return values
    values["training_best_vs_released"] = best.images_per_second / max(r.images_per_second for r in released.values())
    if 1 in ours and 1 in released:
        values["training_b1_vs_released"] = released[1].seconds.median / ours[1].seconds.median
    largest = released[max(released)]
    if largest.batch in ours and largest.peak_bytes:
        own = [row.peak_bytes or 0 for row in rows if row.name != RELEASED and row.batch == largest.batch]
        values["training_memory_vs_released"] = min(own) / largest.peak_bytes
    return values


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Check, measure, print; returns the record.

    Raises:
        CannotCompare, OSError: see the message.
    """
    started, device = time.perf_counter(), torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CannotCompare("--device cuda: this PyTorch sees no CUDA device")
    shape = replace(TINY if options.tiny else FFHQ_1024, batch=1)
    # on the CPU, so that each contender is alone on the device
    models = make_models(load_released(options.released, options.device), shape, torch.device("cpu"))
    errors = agreement(models, shape, device)
    print(f"fp32: largest relative error {check(errors):.1e}", flush=True)
    costs = costs_of(TrainingConfig(model=models.native.config))
    roof = matmul_rate(device, torch.bfloat16)
    print(f"an image: {costs.flops / 1e12:.4g} TFLOP; matrix products {roof / 1e12:.3g} TFLOP/s")
    print(f"{'':<24}{'batch':>6}{'seconds':>10}{'images/s':>11}{'peak GB':>10}{'MFU':>8}")
    rows: list[Row] = []
    for name in (RELEASED, OURS, COMPILED):
        rows += sweep(name, models, shape, costs, roof, options.batches, options.repeats, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        **environment("training", device, ("diffusers", "transformers", "triton")),
        "released_commit": git_commit(options.released),
        "shape": asdict(shape),
        "repeats": options.repeats,
        "seconds": time.perf_counter() - started,
        "relative_errors": errors,
        "flops_per_image": costs.flops,
        "matmul_flops": roof,
        "rows": [asdict(row) for row in rows],
        "metrics": metrics(rows),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--released", type=Path, required=True, metavar="PATH", help="clone of the released code")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 2, 4, 8, 16, 32], help="1 2 4 8 16 32")
    parser.add_argument("--repeats", type=positive, default=5, help="timed steps (5)")
    parser.add_argument("--tiny", action="store_true", help="a toy geometry, to try the script out")
    parser.add_argument("--out", type=Path, metavar="RECORD.json", help="in place of benchmarks/results/<device>")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    out = options.out
    if out is None and not options.tiny:
        out = results_folder(torch.device(options.device)) / "training.json"
    return finish("training", lambda: run(options), out)


if __name__ == "__main__":
    sys.exit(main())
