"""Every kernel on a GPU: first right, then how fast, as one record. Run it as ``make gpu-check``.

The test suites that run kernels come first, on the compiled kernels; on a red test nothing is timed. Then every case
of ``benchmarks/ops`` is compared with its reference at the real shape and timed against its peers: interleaved replays
of captured calls, each on inputs that are no longer in the cache. The record goes to
``benchmarks/results/<device>/kernels.json``; its ``metrics`` are what ``benchmarks/report.py`` shows.

The last line on stdout is the metrics as JSON. Exit status 1: no GPU, a red test, or a wrong result.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import layer
from ops.case import Case, every_case, leaves_of, tensors_of
from record import ROOT, environment, results_folder, write
from timing import Captured, calls_for, capture, rounds

GATE = ("tests/csrc", "tests/kernels", "tests/engine", "tests/model")
PACKAGES = ("triton", "diffusers", "flash-attn", "flash-attn-4", "xformers", "liger-kernel")
OURS = "triton"
SECONDS_A_ROW = 0.4


class RedError(Exception):
    """Why no speed is reported, in one line."""


def run_tests() -> dict[str, Any]:
    """The kernels' tests on the GPU; raises :class:`RedError` unless all pass."""
    started = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", *GATE, "-m", "not slow", "-x"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]  # Compiling takes longer than running.
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(result.stdout[-4000:], flush=True)
    if result.returncode:
        raise RedError("a test failed: no speed is reported")
    summary = result.stdout.strip().splitlines()[-1]
    return {"summary": summary.strip("= "), "seconds": time.perf_counter() - started}


def roofs(device: torch.device) -> dict[str, float]:
    """The rates that everything is held against, measured here: a copy counts bytes read and written."""
    source, target = (torch.randn(1 << 30, device=device).to(torch.bfloat16) for _ in range(2))
    a, b = (torch.randn(8192, 8192, device=device).to(torch.bfloat16) for _ in range(2))
    captured = {
        "copy": capture(lambda: lambda: target.copy_(source), 4),
        "matmul": capture(lambda: lambda: a @ b, 4),
    }
    spreads = rounds(captured, 1.0)
    return {
        "copy_tb_per_s": 2 * source.nbytes / spreads["copy"].median / 1e12,
        "matmul_tflops": 2 * 8192**3 / spreads["matmul"].median / 1e12,
    }


def variants(case: Case) -> dict[str, Callable[..., Any]]:
    """Ours and its peers, as they are called on the inputs."""

    def ours(*inputs: Any) -> Any:
        return case.run(*inputs, backend=OURS)

    return {"ours": ours, **case.peers}


def forward(run: Callable[..., Any], case: Case, device: torch.device) -> Callable[[], Any]:
    inputs = case.inputs(device)

    def call() -> Any:
        with torch.no_grad():
            return run(*inputs)

    return call


def backward(run: Callable[..., Any], case: Case, device: torch.device) -> Callable[[], Any]:
    inputs = case.inputs(device)
    outputs, leaves = tensors_of(run(*inputs)), leaves_of(inputs)
    grads = [torch.randn_like(x) for x in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)


def input_bytes(case: Case, device: torch.device) -> int:
    flat = [x for entry in case.inputs(device) for x in (entry if isinstance(entry, (list, tuple)) else [entry])]
    return sum(x.nbytes for x in flat if isinstance(x, Tensor))


def measure(case: Case, direction: str, device: torch.device) -> dict[str, Any]:
    """One row of the record: every variant's spread in seconds, or why it has none."""
    prepare = {"forward": forward, "backward": backward}[direction]
    calls = calls_for(input_bytes(case, device))
    captured: dict[str, Captured] = {}
    failed: dict[str, str] = {}
    for name, run in variants(case).items():
        try:
            captured[name] = capture(lambda run=run: prepare(run, case, device), calls)  # type: ignore[misc]
        except Exception as error:
            if name == "ours":
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    spreads = rounds(captured, SECONDS_A_ROW)
    torch.cuda.empty_cache()
    return {
        "op": case.op,
        "label": case.label,
        "direction": direction,
        "bytes": getattr(case, f"{direction}_bytes"),
        "flops": getattr(case, f"{direction}_flops"),
        "calls": calls,
        "seconds": {name: asdict(spread) for name, spread in spreads.items()},
        "failed": failed,
    }


def check(case: Case, device: torch.device) -> float:
    """How far ours is from the reference in float32, as a multiple of what the reference in bf16 is; raises on > 2."""
    inputs = case.inputs(device)
    exact = tuple(map(_upcast, inputs))
    errors = {
        backend: _error(_results(case, inputs, backend), expected)
        for expected in [_results(case, exact, "reference")]
        for backend in (OURS, "reference")
    }
    budget = 2 * errors["reference"] + torch.finfo(torch.bfloat16).eps / 2
    if not errors[OURS] <= budget:
        raise RedError(f"{case.op}, {case.label}: error {errors[OURS]:.2e} > {budget:.2e}: no speed is reported")
    return errors[OURS]


def _upcast(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_upcast, value))
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        return value.detach().float().requires_grad_(value.requires_grad)
    return value


def _results(case: Case, inputs: tuple[Any, ...], backend: str) -> list[Tensor]:
    """Results and gradients; of an op that works in place, the tensors that it was given, copied first."""
    copies = tuple(x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs)
    result = case.run(*copies, backend=backend)
    if result is None:
        return [x for x in copies if isinstance(x, Tensor)]
    outputs = [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, Tensor)]
    leaves, differentiable = leaves_of(copies), tensors_of(result)
    if not (leaves and differentiable):
        return outputs
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    grads = [torch.randn(x.shape, device=x.device, generator=generator).bfloat16().to(x) for x in differentiable]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(differentiable, leaves, grads))


def _error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of the relative errors of the tensors."""
    return max(
        ((a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30)).item()
        for a, e in zip(actual, expected, strict=True)
    )


# The metrics


def metrics(rows: Sequence[Mapping[str, Any]], roof: Mapping[str, float]) -> dict[str, float]:
    """The flat figures of a record; where an op has several shapes, the worst."""
    values = dict(roof)

    def worst(name: str, figures: Iterator[float]) -> None:
        if (known := list(figures)) != []:
            values[name] = min(known)

    def of(op: str, direction: str) -> list[Mapping[str, Any]]:
        return [row for row in rows if (row["op"], row["direction"]) == (op, direction)]

    for op, direction in sorted({(row["op"], row["direction"]) for row in rows}):
        short = {"block_causal_attention": "attention"}.get(op, op)
        chosen = of(op, direction)
        if op == "layer":
            continue
        if chosen[0]["flops"] and op != "cached_attention":
            worst(f"{short}_{direction}_tflops", (r["flops"] / median(r, "ours") / 1e12 for r in chosen))
        elif chosen[0]["bytes"]:
            bandwidth = roof["copy_tb_per_s"] * 1e12
            worst(
                f"{short}_{direction}_bandwidth_fraction", (r["bytes"] / median(r, "ours") / bandwidth for r in chosen)
            )
        for peer in sorted({name for row in chosen for name in row["seconds"]} - {"ours"}):
            worst(f"{short}_{direction}_vs_{peer}", (gain(r, peer) for r in chosen if peer in r["seconds"]))
    single = [gain(r, "sdpa") for r in of("cached_attention", "forward") if re.search(r"batch 1\b", r["label"])]
    if single:
        values["cached_attention_vs_sdpa_b1"] = sum(single) / len(single)
    pairs = [
        (f, b)
        for f, b in itertools.product(of("layer", "forward"), of("layer", "backward"))
        if f["label"] == b["label"]
    ]
    worst(
        "layer_vs_compile",
        ((median(f, "compile") + median(b, "compile")) / (median(f, "ours") + median(b, "ours")) for f, b in pairs),
    )
    return values


def median(row: Mapping[str, Any], variant: str) -> float:
    return row["seconds"][variant]["median"]


def gain(row: Mapping[str, Any], peer: str) -> float:
    """How many times as fast as the peer ours is."""
    return median(row, peer) / median(row, "ours")


def print_row(row: Mapping[str, Any], roof: Mapping[str, float]) -> None:
    own = median(row, "ours")
    rate = f"{row['flops'] / own / 1e12:7.0f} TFLOP/s" if row["flops"] else ""
    if row["bytes"]:
        rate += (
            f" {row['bytes'] / own / 1e9:7.0f} GB/s {row['bytes'] / own / roof['copy_tb_per_s'] / 1e10:4.0f} % of copy"
        )
    peers = ", ".join(f"{gain(row, name):.2f}x {name}" for name in row["seconds"] if name != "ours")
    print(f"{row['op']:<24}{row['direction']:<9}{row['label']:<44}{own * 1e6:>10.1f} us{rate}  {peers}", flush=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Tests, checks, times; returns the record.

    Raises:
        RedError: there is nothing to report.
    """
    if not torch.cuda.is_available():
        raise RedError("PyTorch sees no CUDA device")
    started = time.perf_counter()
    device = torch.device("cuda", torch.cuda.current_device())
    tests = None if options.no_tests else run_tests()
    # Shapes change from case to case: a peer compiled for any shape would be a slower peer.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    roof = roofs(device)
    print("  ".join(f"{name} {value:.2f}" for name, value in roof.items()), flush=True)
    cases = [case for case in (*every_case(), *layer.cases()) if not options.op or case.op in options.op]
    cases.sort(key=lambda case: case.op == "cached_attention")  # Over a hundred rows: last, should time run out.
    first = {case.op: case for case in reversed(cases)}
    errors = {op: check(case, device) for op, case in first.items()}
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for case, direction in itertools.product(cases, ("forward", "backward")):
        if not (getattr(case, f"{direction}_bytes") or getattr(case, f"{direction}_flops")):
            continue
        if time.perf_counter() - started > options.budget:
            left_out.append(f"{case.op} {direction}, {case.label}")
            continue
        rows.append(measure(case, direction, device))
        print_row(rows[-1], roof)
    for row in left_out:
        print(f"out of time, not measured: {row}")
    return {
        **environment("kernels", device, PACKAGES),
        "seconds": time.perf_counter() - started,
        "tests": tests,
        "errors": errors,
        "rows": rows,
        "not_measured": left_out,
        "metrics": metrics(rows, roof),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--no-tests", action="store_true", help="time without testing first; writes no record")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="start no row after this long")
    parser.add_argument("--out", type=Path, metavar="RECORD.json", help="in place of benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    try:
        record = run(options)
    except RedError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 1
    if not (options.no_tests or options.op):
        path = options.out or results_folder(torch.device("cuda")) / "kernels.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(record, path)
    print(json.dumps(record["metrics"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
