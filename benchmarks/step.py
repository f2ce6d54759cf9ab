"""What a denoising step costs on a processor: by Python or compiled, by one thread or in shares.

    python -m benchmarks.step [--model assets/emoji64] [--batch-sizes 1,16] [--steps 25] [--guidance 3] [--threads 2]
        [--dtype float32]

Whole runs (``plan.run``, to latents), each way once in every round: what else the machine does slows them alike.

* ``whole``: one thread draws the batch. ``operators``: PyTorch's threads share every operator of it.
* ``shares``: each thread draws some of the images (:mod:`madformer.engine.sharing`).
* ``compiled whole``, ``compiled shares``: a step's network is one program (:mod:`madformer.engine.compiled`), unless
  ``--no-compile`` is given.

Wall time and processor time of a run are the least of all rounds: on a machine that others use the first says nothing,
and the second little of what threads gain. ``operators`` counts the calls of a step that reach PyTorch's dispatcher
from Python, and those below them. No speed is reported where two ways draw different images.

The last line on stdout is the metrics as JSON. Exit status 1: bad options, or images that disagree.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.record import CannotCompare, environment, finish
from benchmarks.released import relative_error
from madformer import MADFormerPipeline
from madformer.engine.options import SamplingOptions
from madformer.engine.plan import Plan
from madformer.engine.running import computing
from madformer.engine.sampler import Sampler
from madformer.measuring.sampling import any_prompt

MAX_ERROR = {"float32": 1e-3, "bfloat16": 5e-2}
"""Relative, of latents: what other sums and other programs round, over all steps, by what is computed in."""


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_operators(plan: Plan) -> dict[str, int]:
    """Calls of a step by name."""
    with computing(plan.model.device):
        plan.passes.reset()
        plan.passes.first_block(None)
        with _Counting() as counting:
            plan.passes.denoise(None)
    return dict(counting.calls.most_common())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    pipeline = MADFormerPipeline.from_pretrained(str(options.model), dtype=getattr(torch, options.dtype))
    sampling = SamplingOptions(options.steps, guidance=options.guidance)
    rows = [_row(pipeline, batch, sampling, options) for batch in options.batch_sizes]
    metrics: dict[str, float] = {}
    for row in rows:
        wall = {name: took["wall"] for name, took in row["ways"].items()}
        for name, seconds in wall.items():
            metrics[f"batch_{row['batch']}_{name.replace(' ', '_')}"] = wall["whole"] / seconds
    return {**environment("step", torch.device("cpu")), "dtype": options.dtype, "rows": rows, "metrics": metrics}


def _row(
    pipeline: MADFormerPipeline, batch: int, sampling: SamplingOptions, options: argparse.Namespace
) -> dict[str, Any]:
    model, config = pipeline.transformer, pipeline.transformer.config
    prompt = any_prompt(config, batch)
    if sampling.guided and prompt.text is not None:
        prompt = type(prompt)(prompt.text, prompt.text + 1, prompt.label)
    size = (batch, config.num_blocks, config.latents_per_block, config.latent_channels)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0))
    ways: dict[str, tuple[Plan, int]] = {}
    for compiled in (False, True) if options.compile else (False,):
        name = "compiled " if compiled else ""
        for way, threads, shares in (
            ("whole", 1, 1), ("operators", options.threads, 1), ("shares", options.threads, options.threads)
        ):  # fmt: skip
            if way == "whole" or (threads > 1 and shares <= batch and not (compiled and way == "operators")):
                torch.set_num_threads(threads)
                sampler = Sampler(model, pipeline.scheduler, compile_step=compiled, shares=shares)
                ways[name + way] = sampler.plan(batch, sampling).warmup(), threads
    images: dict[str, Tensor] = {}
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(options.repeats + 1):
        for name, (plan, threads) in ways.items():
            torch.set_num_threads(threads)
            wall, processor = time.perf_counter(), time.process_time()
            images[name] = plan.run(noise, prompt)
            took[name].append((time.perf_counter() - wall, time.process_time() - processor))
    for name, drawn in images.items():
        if (error := relative_error(images["whole"], drawn)) > MAX_ERROR[options.dtype]:
            raise CannotCompare(f"batch {batch}, {name}: {error:.1e} from the images of one thread")
    torch.set_num_threads(1)
    operators = {name: count_operators(plan) for name, (plan, _) in ways.items() if name.endswith("whole")}
    row = {"batch": batch, "operators": operators, "ways": {}}
    for name, rounds in took.items():
        wall, processor = (min(column) for column in zip(*rounds[1:], strict=True))
        row["ways"][name] = {"wall": wall, "processor": processor}
        called = f", {sum(operators[name].values())} operators a step" if name in operators else ""
        print(f"batch {batch:3}, {name:18}: wall {wall:.3f} s, processor {processor:.3f} s{called}", flush=True)
    return row


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("assets/emoji64"))
    parser.add_argument("--batch-sizes", type=lambda text: [int(word) for word in text.split(",")], default=[1, 16])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=tuple(MAX_ERROR), default="float32", help="of the weights (float32)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(words)
    return finish("step", lambda: measure(options), options.out)


if __name__ == "__main__":
    sys.exit(main())
