"""Our speed against the released implementation's, on the same machine, with the same weights and seeds.

    python -m benchmarks.compare_released --released PATH [--device cuda] [--out RECORD.json]

``PATH`` is your own clone of ``Junhaoo-Chen/MADFormer`` (branch ``main``); running it needs ``pip install transformers
einops``. Nothing is timed before both implementations agree on samples, outputs, losses and gradients in fp32.

What is timed, interleaved in one process:

* sampling: the released ``sample`` in fp32, in which its ``sample.py`` runs it; our engine in fp32, and with bf16
  weights, each with steps that Python calls and, on a CPU with a compiler, with compiled ones (``Sampler(...,
  compile_step=True)``), which are those of the metrics. Our plan is made and used once outside the timed region; what a
  first call and compiling take is reported by itself, and so is what the engine takes beyond the network's passes
  called directly (madformer.measuring.sampling says how).
* a training step (forward, image loss + 0.1 hidden loss, backward) in fp32: the released model; our drop-in class,
  which computes all that the released one does; our native model with the released quirks, as our trainer runs it,
  which leaves out what no loss reads. That one in bf16 as well, by autocast over fp32 weights, unless a step would take
  minutes here: then ``left_out`` of the record says so. On a CPU both once more with layers and U-Net passed through
  ``torch.compile``, as ``madformer train --compile`` does. ``training_vs_released_fp32`` and ``_bf16`` are those of the
  native model without.
* large matrix products, the roof. ``sampling_fraction_of_roof_bf16`` is our model's own operations a second over
  theirs in bf16, or in fp32 where these are faster: a processor without bf16 units computes in fp32.

What is changed in the released code so that it can run here, ``released.py`` says. Each side runs with the attention
backend that is fastest for it.

The last line on stdout is the record as JSON. Exit status 1: something is missing, or the results disagree.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from benchmarks import released
from benchmarks.record import CannotCompare, environment, finish, git_commit
from benchmarks.released_attention import Context, attention_backends, released_backends, with_best_attention
from benchmarks.timing import Run, Spread, interleaved, seconds
from madformer.engine.options import SamplingOptions
from madformer.engine.plan import Plan
from madformer.engine.sampler import Sampler
from madformer.engine.sharing import SharedPasses
from madformer.files.atomic import check_writable
from madformer.machine import matmul_rate
from madformer.measuring.bare import BareModel, Work
from madformer.measuring.sampling import block_pairs
from madformer.model.blocks import to_maps
from madformer.training.config import TrainingConfig
from madformer.training.costs import costs_of
from madformer.training.losses import Batch as LossBatch
from madformer.training.losses import LossWeights, training_losses

HIDDEN_WEIGHT = 0.1
MOST_SECONDS = 60.0
"""Of a training step in bf16: where it would take longer by this machine's products, it is left out."""
MAX_BF16_ERROR = 0.02
"""Relative, of the loss of a step in bf16: rounding makes a thousandth."""


@dataclass(frozen=True)
class Batch:
    """Latents ``(images, blocks, latents, channels)`` and what ``training_losses`` draws for them from ``SEED``."""

    clean: Tensor
    noise: Tensor
    noisy: Tensor
    timestep: Tensor

    @classmethod
    def draw(cls, shape: released.Shape, device: torch.device) -> Batch:
        clean = torch.randn(shape.latents, generator=torch.Generator().manual_seed(released.SEED + 1))
        generator, scheduler = torch.Generator().manual_seed(released.SEED), DDPMScheduler()
        noise = torch.randn(shape.latents, generator=generator)
        limit = scheduler.config.num_train_timesteps
        timestep = torch.randint(0, limit, shape.latents[:2], generator=generator)
        noisy = scheduler.add_noise(clean.flatten(0, 1), noise.flatten(0, 1), timestep.flatten())
        tensors = (clean, noise, noisy.unflatten(0, shape.latents[:2]), timestep)
        return cls(*(tensor.to(device) for tensor in tensors))


def released_step(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """Loss and outputs of a training step of the released class or of our drop-in; gradients are left behind."""
    model.zero_grad(set_to_none=True)
    outputs = model(batch.clean, batch.noisy, batch.timestep)
    image = F.mse_loss(outputs[0], to_maps(batch.noise))
    loss = image + HIDDEN_WEIGHT * F.mse_loss(outputs[1], to_maps(batch.clean))
    loss.backward()
    return (loss.detach(), *(output.detach() for output in outputs))


def native_step(model: nn.Module, batch: Batch) -> Tensor:
    """Loss of a training step as our trainer makes it: it also adds the noise."""
    model.zero_grad(set_to_none=True)
    weights = LossWeights(hidden=HIDDEN_WEIGHT)
    losses = training_losses(model, LossBatch(batch.clean, batch.noise, batch.timestep), DDPMScheduler(), weights)
    losses.total.backward()
    return losses.total.detach()


# The gate


def gradients(model: nn.Module) -> list[Tensor]:
    """Sorted by name, in which both models agree; zeros where a parameter was not used."""
    named = sorted(model.named_parameters())
    return [torch.zeros_like(p) if p.grad is None else p.grad for _, p in named]


def compare(models: released.Models, plan: Plan, batch: Batch, shape: released.Shape) -> dict[str, float]:
    """Relative errors of everything that is timed in fp32, by name."""
    expected = released_step(models.released, batch)
    actual = released_step(models.compat, batch)
    errors = {
        name: released.relative_error([a], [e])
        for name, a, e in zip(("loss", "prediction", "condition", "clean_tower"), actual, expected, strict=True)
    }
    errors["gradients"] = released.relative_error(gradients(models.compat), gradients(models.released))
    errors["native_loss"] = released.relative_error([native_step(models.native, batch)], [expected[0]])
    errors["native_gradients"] = released.relative_error(gradients(models.compat), gradients(models.released))
    for model in (models.released, models.compat):
        model.zero_grad(set_to_none=True)
    errors["samples"] = released.relative_error(
        [released.sample_ours(plan, shape)], [released.sample_released(models.released, shape)]
    )
    return errors


# Timing


def compiled_plan(model: nn.Module, shape: released.Shape) -> tuple[Plan | None, float]:
    """One whose steps are compiled, and the seconds that took; None where they are not (the log says why)."""
    sampler = Sampler(model, released.make_scheduler(), compile_step=True)
    plan = sampler.plan(shape.batch, SamplingOptions(shape.steps))
    started = time.perf_counter()
    plan.warmup()
    passes = plan.passes.parts if isinstance(plan.passes, SharedPasses) else (plan.passes,)
    made = all(getattr(part, "program", None) is not None for part in passes)
    return (plan if made else None), time.perf_counter() - started


def time_sampling(
    models: released.Models, plan: Plan, shape: released.Shape, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Sampling of all by name, and what a first call, compiling and half precision cost: seconds and relative error."""
    half = copy.deepcopy(models.native).to(torch.bfloat16)
    half_plan = Sampler(half, released.make_scheduler()).plan(shape.batch, SamplingOptions(shape.steps))
    plans = {"ours fp32": plan, "ours bf16": half_plan}
    compile_seconds: dict[str, float] = {}
    for name, model in (("ours fp32", models.native), ("ours bf16", half)) if device.type == "cpu" else ():
        compiled, compile_seconds[name] = compiled_plan(model, shape)
        if compiled is not None:
            plans[f"{name}, compiled"] = compiled
    runs: dict[str, Run] = {"released fp32": lambda: released.sample_released(models.released, shape)}
    runs |= {name: functools.partial(released.sample_ours, each, shape) for name, each in plans.items()}
    samples = {name: run() for name, run in runs.items() if name != "released fp32"}
    exact = samples.pop("ours fp32")
    errors = {name: released.relative_error([drawn], [exact]) for name, drawn in samples.items()}
    released.check({name: error for name, error in errors.items() if "bf16" not in name} or {"ours fp32": 0.0})
    released.check({name: error for name, error in errors.items() if "bf16" in name}, 2 * errors["ours bf16"])
    return {
        "spreads": interleaved(runs, repeats, device),
        "first_call_seconds": seconds(
            lambda: released.sample_ours(
                Sampler(models.native, released.make_scheduler()).plan(shape.batch, SamplingOptions(shape.steps)), shape
            ),
            device,
        ),
        "compile_seconds": compile_seconds,
        "errors_from_ours_fp32": errors,
        "overhead": {"fp32": overhead(plan, repeats), "bf16": overhead(half_plan, repeats)},
    }


def way_of(spreads: Mapping[str, Spread], name: str) -> str:
    """The run of ours that stands for it: with compiled steps, where there is one."""
    return f"{name}, compiled" if f"{name}, compiled" in spreads else name


@torch.inference_mode()
def overhead(plan: Plan, repeats: int) -> float:
    """What a block takes beyond the network's passes called directly, as a fraction of those."""
    pairs = block_pairs(plan, BareModel(plan.model, plan.cache), 2 * repeats)
    return statistics.median(ours / bare for ours, bare in pairs) - 1


def measure_roof(device: torch.device) -> dict[str, float]:
    """Operations a second of a large matrix product, by what is computed in."""
    return {"fp32": matmul_rate(device, torch.float32), "bf16": matmul_rate(device, torch.bfloat16)}


def fractions_of_roof(
    model: Any, shape: released.Shape, spreads: Mapping[str, Spread], roof: Mapping[str, float]
) -> dict[str, float]:
    """Of our sampling: the model's own operations a second over those of large products."""
    flops = shape.batch * Work.of(model).flops(shape.steps)
    highest = {"fp32": roof["fp32"], "bf16": max(roof.values())}
    medians = {name: spreads[way_of(spreads, f"ours {name}")].median for name in highest}
    return {name: flops / medians[name] / rate for name, rate in highest.items()}


def too_slow_in_bf16(model: Any, shape: released.Shape, roof: Mapping[str, float]) -> str | None:
    """Why a training step in bf16 is not timed, or None."""
    flops = shape.batch * costs_of(TrainingConfig(model=model.config)).flops
    if (expected := flops / roof["bf16"]) <= MOST_SECONDS:
        return None
    return f"a step would take {expected:.0f} s: products in bf16 run at {roof['bf16'] / 1e9:.3g} GFLOP/s here"


def bf16_step(model: nn.Module, batch: Batch) -> Tensor:
    """:func:`native_step` with products in bf16, as our trainer's ``precision="bf16"`` makes it."""
    with torch.autocast(batch.clean.device.type, torch.bfloat16):
        return native_step(model, batch)


def compiled_copy(model: nn.Module, batch: Batch) -> nn.Module | None:
    """A copy whose parts are compiled as the trainer does it on a processor, which has passed a step; or None."""
    copied: Any = copy.deepcopy(model)
    for part in (*copied.layers, copied.downsampler, copied.upsampler):
        part.compile()
    try:
        native_step(copied, batch)
    except RuntimeError as error:  # Dynamo's and Inductor's, of a machine without a compiler for one
        print(f"  a training step is not compiled: {str(error).partition(chr(10))[0]}")
        return None
    return copied


def time_training(
    models: released.Models, batch: Batch, repeats: int, device: torch.device, *, bf16: bool
) -> dict[str, Any]:
    """Training steps of all by name, and the attention backend of each; in bf16 where that is asked for.

    Raises:
        CannotCompare: the loss in bf16 is another one.
    """
    ours = attention_backends(device)
    candidates: dict[str, tuple[Run, dict[str, Context]]] = {
        "released fp32": (
            lambda: released_step(models.released, batch),
            released_backends(models.released, device),
        ),
        "ours fp32, drop-in": (lambda: released_step(models.compat, batch), ours),
        "ours fp32, native": (lambda: native_step(models.native, batch), ours),
    }
    if bf16:
        candidates["ours bf16, native"] = (lambda: bf16_step(models.native, batch), ours)
    # As the released train.py sets it; a CPU does not care, but what is compiled under one setting is for that alone.
    with released.tf32(matmul=True, convolution=True):
        started = time.perf_counter()
        compiled = compiled_copy(models.native, batch) if device.type == "cpu" else None
        if compiled is not None:
            default: dict[str, Context] = {"fused": contextlib.nullcontext}
            candidates["ours fp32, native, compiled"] = (lambda: native_step(compiled, batch), default)
            if bf16:
                candidates["ours bf16, native, compiled"] = (lambda: bf16_step(compiled, batch), default)
        losses = {name: run() for name, (run, _) in candidates.items() if "native" in name}
        compile_seconds = time.perf_counter() - started
        exact = losses.pop("ours fp32, native")
        errors = {f"loss of {name}": released.relative_error([loss], [exact]) for name, loss in losses.items()}
        if compiled is not None:
            for model in (compiled, models.native):
                native_step(model, batch)
            errors["gradients of ours fp32, native, compiled"] = released.relative_error(
                gradients(compiled), gradients(models.native)
            )
        for name, error in errors.items():
            released.check({name: error}, MAX_BF16_ERROR if "bf16" in name else released.MAX_RELATIVE_ERROR)
        best = {name: with_best_attention(run, backends, device) for name, (run, backends) in candidates.items()}
        spreads = interleaved({name: run for name, (_, run) in best.items()}, repeats, device)
    return {
        "spreads": spreads,
        "attention": {name: backend for name, (backend, _) in best.items()},
        "loss_errors": errors,
        "compile_seconds": compile_seconds if compiled is not None else None,
    }


# The record


def metrics(sampling: Mapping[str, Any], training: Mapping[str, Any], error: float) -> dict[str, float]:
    """Of what :func:`time_sampling`, with the fractions of the roof, and :func:`time_training` gave."""

    def gains(spreads: Mapping[str, Spread], names: Mapping[str, str]) -> dict[str, float]:
        reference = spreads["released fp32"].median
        return {metric: reference / spreads[name].median for metric, name in names.items() if name in spreads}

    return {
        **{f"engine_overhead_{dtype}": value for dtype, value in sampling["overhead"].items()},
        "max_relative_error": error,
        "training_compat_vs_released_fp32": gains(training["spreads"], {"": "ours fp32, drop-in"})[""],
        **gains(
            sampling["spreads"],
            {f"sampling_vs_released_{name}": way_of(sampling["spreads"], f"ours {name}") for name in ("bf16", "fp32")},
        ),
        "sampling_fraction_of_roof_bf16": sampling["fractions_of_roof"]["bf16"],
        **gains(
            training["spreads"],
            {
                "training_vs_released_fp32": "ours fp32, native",
                "training_vs_released_bf16": "ours bf16, native",
            },
        ),
    }


def table(title: str, spreads: Mapping[str, Spread], attention: Mapping[str, str] | None = None) -> str:
    rows = [f"{title:<30}{'median s':>10}{'quartiles':>20}{'speed':>8}"]
    for name, spread in spreads.items():
        quartiles = f"{spread.first_quartile:.3f} - {spread.third_quartile:.3f}"
        gain = f"{spreads['released fp32'].median / spread.median:.2f}x"
        backend = f"  {attention[name]} attention" if attention else ""
        rows.append(f"  {name:<28}{spread.median:>10.3f}{quartiles:>20}{gain:>8}{backend}")
    return "\n".join(rows)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Check, time, print the tables; returns the record.

    Raises:
        CannotCompare, OSError: see the message.
    """
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CannotCompare("--device cuda: this PyTorch sees no CUDA device")
    if options.out is not None:
        check_writable(options.out.parent)
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = released.TINY if options.tiny else released.FFHQ_1024 if device.type == "cuda" else released.SMALL
    shape = replace(shape, steps=options.steps or shape.steps)

    models = released.make_models(released.load_released(options.released, options.device), shape, device)
    if device.type == "cpu":
        models.released.flex_attnmask = released.dense_mask(models.released, device)
    batch = Batch.draw(shape, device)
    plan = Sampler(models.native, released.make_scheduler()).plan(shape.batch, SamplingOptions(shape.steps))
    with released.tf32(matmul=False, convolution=False):
        errors = compare(models, plan, batch, shape)
    max_error = released.check(errors)
    print(f"fp32: largest relative error {max_error:.1e} (limit {released.MAX_RELATIVE_ERROR:g})", flush=True)

    sampling = time_sampling(models, plan, shape, options.repeats, device)
    print(table(f"sampling, {shape.steps} steps", sampling["spreads"]))
    print(f"  our first call, plan and packed weights included, takes {sampling['first_call_seconds']:.3f} s;", end=" ")
    print(f"bf16 samples differ by {sampling['errors_from_ours_fp32']['ours bf16']:.1e};")
    for name, taken in sampling["compile_seconds"].items():
        print(f"  steps of {name} took {taken:.0f} s to compile, or to load;")
    beyond = ", ".join(f"{value:+.1%} in {dtype}" for dtype, value in sampling["overhead"].items())
    print(f"  the engine takes beyond the network's passes: {beyond}", flush=True)
    roof = measure_roof(device)
    sampling["fractions_of_roof"] = fractions_of_roof(models.native, shape, sampling["spreads"], roof)
    shares = ", ".join(f"{value:.0%} in {dtype}" for dtype, value in sampling["fractions_of_roof"].items())
    print(f"  of the roof, which is large products: {shares}", flush=True)
    too_slow = too_slow_in_bf16(models.native, shape, roof)
    training = time_training(models, batch, options.repeats, device, bf16=too_slow is None)
    print(table("training step", training["spreads"], training["attention"]))
    print(f"  in bf16: {too_slow}" if too_slow else "", end="\n" if too_slow else "", flush=True)
    return {
        **environment("compare_released", device, ("diffusers", "transformers")),
        "released_commit": git_commit(options.released),
        "shape": asdict(shape),
        "repeats": options.repeats,
        "relative_errors": errors,
        "matmul_flops": roof,
        "sampling": serializable(sampling),
        "training": serializable(training),
        "left_out": {"training_vs_released_bf16": too_slow} if too_slow else {},
        "metrics": metrics(sampling, training, max_error),
    }


def serializable(timed: Mapping[str, Any]) -> dict[str, Any]:
    return {**timed, "spreads": {name: asdict(spread) for name, spread in timed["spreads"].items()}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--released", type=Path, required=True, metavar="PATH", help="clone of the released code")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=released.positive, help="sampling steps of a block (10 on a CPU, 20 on a GPU)")
    parser.add_argument("--repeats", type=released.positive, default=3, help="timed rounds")
    parser.add_argument("--threads", type=released.positive, help="CPU threads (PyTorch's choice)")
    parser.add_argument("--tiny", action="store_true", help="a toy geometry, to try the script out")
    parser.add_argument("--out", type=Path, metavar="RECORD.json", help="also write the record there")
    options = parser.parse_args(arguments)
    return finish("compare_released", lambda: run(options), options.out, shown=None)


if __name__ == "__main__":
    sys.exit(main())
