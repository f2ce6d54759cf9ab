"""Where the time of a denoising step goes on a processor, and what products of int8 would save of it.

    python -m benchmarks.step_kinds [--dtype bfloat16] [--threads 2] [--repeats 30] [--out RECORD.json]

The model is that of ``benchmarks.compare_released`` with weights drawn at random, at its last block: two images. Steps
are called from Python and compiled, in turn; ``torch.profiler`` says what the operators of each take by themselves, by
kinds, and ``between operators`` is what is left of the step's own time without it. Beside it the same products as large
as a processor likes them (:func:`madformer.machine.matmul_rate`), which is the roof.

``int8``: products of the sizes of the step's linear layers by ``torch._int_mm``, by packed weights of bf16, and what it
takes PyTorch to bring the activations to int8 with a scale for each row.

The last line on stdout is the metrics as JSON: milliseconds. Exit status 1: the record cannot be written.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import released
from benchmarks.record import environment, finish
from madformer.compat.madformer_ffhq import MADFormer as CompatMADFormer
from madformer.engine.options import SamplingOptions
from madformer.engine.packing import linear
from madformer.engine.plan import Plan
from madformer.engine.running import computing
from madformer.engine.sampler import Sampler
from madformer.machine import matmul_rate
from madformer.measuring.bare import Work

KINDS = {
    "linear layers": ("linear", "addmm", "aten::mm", "matmul", "bmm"),
    "convolutions": ("convolution",),
    "attention": ("attention",),
    "group norm": ("group_norm",),
    "norms and activations of the Transformer": ("adaln", "rms_norm", "swiglu", "qk_norm"),
    "copies": ("copy_", "cat", "clone", "contiguous", "index_select", "reorder", "empty"),
}
"""Parts of operators' names, by what they are for; of several the first."""
OTHERS, BETWEEN = "other operators", "between operators"
PRODUCTS = ((128, 512, 1536), (128, 512, 3072), (128, 1536, 512), (1024, 512, 3072), (1024, 1536, 512))
"""Rows, inputs, outputs of the linear layers, for two images and for sixteen."""


def model_of(shape: released.Shape) -> Any:
    """The native model of a comparison, its weights as they are initialised."""
    torch.manual_seed(released.SEED)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        path.write_text(json.dumps(shape.model_config()))
        return CompatMADFormer(**shape.constructor_arguments(), model_config_path=str(path)).to_native().eval()


def kind_of(operator: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), OTHERS)


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    work()
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def by_kinds(step: Callable[[], object], repeats: int) -> dict[str, float]:
    """Milliseconds of a step: the whole of it, and what each kind of operators takes by itself."""
    whole = milliseconds(step, repeats)
    with profile(activities=[ProfilerActivity.CPU]) as records:
        for _ in range(repeats):
            step()
    found = dict.fromkeys((*KINDS, OTHERS), 0.0)
    for event in records.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e3 / repeats
    # an operator takes longer while it is watched, so that nothing may be left
    return {"step": whole, **found, BETWEEN: max(0.0, whole - sum(found.values()))}


def at_the_last_block(plan: Plan) -> None:
    plan.slots.latents_RLC.normal_()
    plan.passes.reset()
    plan.passes.first_block(None)
    for _ in range(plan.config.num_blocks - 1):
        plan.passes.next_block(None)


def int8(rows: int, inputs: int, outputs: int, repeats: int) -> dict[str, float]:
    x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def quantized(tensor: Tensor) -> Tensor:
        return (tensor * (127 / tensor.abs().amax(1, keepdim=True))).round_().to(torch.int8)

    x_int8, weight_int8 = quantized(x), quantized(weight)
    return {
        "bf16": milliseconds(lambda: linear(x, packed, None), repeats),
        "int8": milliseconds(lambda: torch._int_mm(x_int8, weight_int8.t()), repeats),
        "activations to int8": milliseconds(lambda: quantized(x), repeats),
    }


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    dtype, shape = getattr(torch, options.dtype), released.TINY if options.tiny else released.SMALL
    model, device = copy.deepcopy(model_of(shape)).to(dtype), torch.device("cpu")
    ways: dict[str, dict[str, float]] = {}
    for name, compiles in (("called", False), ("compiled", True)) if options.compile else (("called", False),):
        sampler = Sampler(model, released.make_scheduler(), compile_step=compiles, shares=1)
        plan = sampler.plan(shape.batch, SamplingOptions(shape.steps)).warmup()
        with computing(device):
            at_the_last_block(plan)
            ways[name] = by_kinds(lambda plan=plan: plan.passes.denoise(None), options.repeats)  # type: ignore[misc]
    products = {"x".join(map(str, size)): int8(*size, options.repeats) for size in (PRODUCTS if options.int8 else ())}
    work, rate = Work.of(model), matmul_rate(device, dtype)
    roof = 1e3 * shape.batch * work.step_flops / work.num_blocks / rate
    metrics = {f"{name}_{kind.replace(' ', '_')}": value for name, own in ways.items() for kind, value in own.items()}
    for kind in ("step", *KINDS, OTHERS, BETWEEN):
        print(f"{kind:42}" + "".join(f"{own[kind]:9.2f} ms {name}" for name, own in ways.items()))
    print(f"{'as large products':42}{roof:9.2f} ms")
    for size, own in products.items():
        print(f"{size:42}" + "".join(f"{1e3 * value:9.0f} us {name}" for name, value in own.items()))
    return {
        **environment("step_kinds", device), "threads": options.threads, "dtype": options.dtype, "ways": ways,
        "products": products, "metrics": metrics | {"as_large_products": roof},
    }  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--int8", action=argparse.BooleanOptionalAction, default=True, help="products of int8 too")
    parser.add_argument("--tiny", action="store_true", help="a toy geometry, to try the script out")
    parser.add_argument("--out", type=Path, metavar="RECORD.json")
    options = parser.parse_args(words)
    if min(options.threads, options.repeats) < 1:
        parser.error("--threads and --repeats must be positive")
    return finish("step_kinds", lambda: measure(options), options.out)


if __name__ == "__main__":
    sys.exit(main())
