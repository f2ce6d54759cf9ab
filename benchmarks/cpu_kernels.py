"""How fast C++'s ops are on a processor, beside eager PyTorch and ``torch.compile``, and against a copy. No GPU.

Shapes are the demonstration model's, sampling one and sixteen images with guidance, whose tensors the caches hold, and
larger ones that no cache does: each as large as the machine's last one. glibc asks the system for memory of that size
anew at every call, and clearing its pages takes longer than an op, so run it with an allocator that keeps it. C++ and
eager PyTorch are called through the public functions, as a model does it, which is half of the time at one image;
``torch.compile`` is given the larger shapes alone. Figures are CPU time of the one thread, the least of many short runs
that take turns, so that other work on the machine shows little. The roof is ``copy_`` of as many bytes as a call reads
and writes; of maps that are normalised those are the maps twice and the result, as the kernel reads them twice.

    LD_PRELOAD=libtcmalloc_minimal.so.4 python -m benchmarks.cpu_kernels [--op swiglu] [--no-compile]
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.case import Case, leaves_of, tensors_of
from benchmarks.record import finish
from madformer.kernels import dispatch
from madformer.kernels.adaln import adaln, adaln_ref
from madformer.kernels.block_causal_attention import BlockLayout, block_causal_attention
from madformer.kernels.cached_attention import cached_attention
from madformer.kernels.conv3x3 import conv3x3, conv3x3_ref
from madformer.kernels.denoise_step import denoise_step, denoise_step_ref
from madformer.kernels.group_norm_silu import group_norm_silu, group_norm_silu_ref
from madformer.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from madformer.kernels.rms_norm import rms_norm, rms_norm_ref
from madformer.kernels.self_attention import self_attention, self_attention_ref
from madformer.kernels.swiglu import swiglu, swiglu_ref
from madformer.machine import environment

EPS = 1e-5
ROUNDS = 9
SECONDS_A_RUN = 0.02
BATCHES = {"batch 1": 2, "batch 16": 32}
"""Samples of a step with guidance."""
TOKENS, HIDDEN, HEADS, MLP = 16, 192, 3, 384
OURS_AND_EAGER = {"cpp": "cpp", "eager": "reference"}
CACHED, SEEN = 112, 96
"""Keys of a row of the cache, and how many of them are there."""
BLOCKS, TEXT = 4, 48
PIXEL_HEADS, PIXEL_HEAD_DIM = 8, 12
MAPS = ((48, 8), (96, 8), (96, 4), (192, 4))
"""Channels and sides of the demonstration model's maps."""


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def _rows_cases(label: str, shape: tuple[int, int, int], mlp: int, dtype: torch.dtype) -> Iterator[Case]:
    samples, tokens, columns = shape
    size, make = samples * tokens * columns * dtype.itemsize, functools.partial(_random, dtype=dtype)
    gated = samples * tokens * mlp * dtype.itemsize
    yield Case(
        "swiglu", f"{label}: {samples * tokens} x {mlp}",
        lambda _: (make(samples, tokens, mlp), make(samples, tokens, mlp)),
        swiglu, 3 * gated, 5 * gated, peers={"eager": swiglu_ref},
    )  # fmt: skip
    yield Case(
        "rms_norm", f"{label}: {samples * tokens} x {columns}, residual",
        lambda _: (make(*shape), make(columns), make(*shape)),
        lambda x, weight, residual, **how: rms_norm(x, weight, eps=EPS, residual=residual, **how),
        4 * size, 4 * size,
        peers={"eager": lambda x, weight, residual: rms_norm_ref(x, weight, eps=EPS, residual=residual)},
    )  # fmt: skip

    def modulated(op: Callable[..., Any], *tensors: Tensor, **backend: str) -> Any:
        x, shift, scale, weight, residual, gate = tensors
        return op(x, shift, scale, weight=weight, residual=residual, gate=gate, norm="rms", eps=EPS, **backend)

    yield Case(
        "adaln", f"{label}: {samples} x {tokens} x {columns}, gated residual",
        lambda _: (
            make(*shape), make(samples, columns), make(samples, columns), make(columns), make(*shape),
            make(samples, columns),
        ),
        functools.partial(modulated, adaln), 4 * size, 6 * size,
        peers={"eager": functools.partial(modulated, adaln_ref)},
    )  # fmt: skip


def _map_case(label: str, maps: int, channels: int, side: int, dtype: torch.dtype) -> Case:
    size, make = maps * channels * side**2 * dtype.itemsize, functools.partial(_random, dtype=dtype)

    def inputs(_: torch.device) -> tuple[Tensor, ...]:
        x = torch.randn(maps, channels, side, side).to(dtype, memory_format=torch.channels_last).requires_grad_()
        return x, make(channels), make(channels), make(maps, channels)

    def run(x: Tensor, weight: Tensor, bias: Tensor, temb: Tensor, **how: str) -> Tensor:
        return group_norm_silu(x, 8, weight, bias, eps=EPS, temb_NC=temb, **how)

    def eager(x: Tensor, weight: Tensor, bias: Tensor, temb: Tensor) -> Tensor:
        return group_norm_silu_ref(x, 8, weight, bias, eps=EPS, temb_NC=temb)

    name = f"{label}: {maps} x {channels} x {side} x {side}"
    return Case("group_norm_silu", name, inputs, run, 3 * size, 5 * size, peers={"eager": eager})


def _conv_case(label: str, maps: int, channels: int, side: int) -> Case:
    size, weights = 4 * maps * channels * side**2, 4 * 9 * channels**2

    def inputs(_: torch.device) -> tuple[Tensor, ...]:
        x = torch.randn(maps, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()
        return x, _random(channels, channels, 3, 3, dtype=torch.float32)

    name = f"{label}: {maps} x {channels} x {side} x {side}"
    return Case("conv3x3", name, inputs, conv3x3, 2 * size + weights, 3 * size + 2 * weights,
                peers={"eager": conv3x3_ref})  # fmt: skip


def _model_cases(label: str, samples: int, dtype: torch.dtype) -> Iterator[Case]:
    size = samples * TOKENS * HIDDEN * dtype.itemsize
    tables = [f(torch.randn(TOKENS, HIDDEN // HEADS)) for f in (torch.cos, torch.sin)]

    def heads(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, **how: str) -> Any:
            lists = [qkv], [q_weight], [k_weight], *([table] for table in tables)
            return function(*lists, num_heads=HEADS, axes=2, eps=EPS, **how)

        return run

    weights = functools.partial(_random, HIDDEN // HEADS, dtype=dtype)
    yield Case(
        "qk_norm_rope", f"{label}: {samples} x {TOKENS} x {HEADS} heads",
        lambda _: (_random(samples, TOKENS, 3 * HIDDEN, dtype=dtype), weights(), weights()),
        heads(qk_norm_rope), 6 * size, 9 * size, peers={"eager": heads(qk_norm_rope_ref)},
    )  # fmt: skip

    width, pixels = PIXEL_HEADS * PIXEL_HEAD_DIM, 16
    yield Case(
        "self_attention", f"{label}: {samples} x {pixels} pixels x {PIXEL_HEADS} heads of {PIXEL_HEAD_DIM}",
        lambda _: torch.randn(samples, pixels, 3 * width).to(dtype).chunk(3, dim=-1),
        lambda *qkv, **how: self_attention(*qkv, PIXEL_HEADS, **how),
        4 * samples * pixels * width * dtype.itemsize,
        peers={"eager": lambda *qkv: self_attention_ref(*qkv, PIXEL_HEADS)},
    )  # fmt: skip

    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, *, backend: str = "reference") -> Tensor:
        if backend == "reference":  # who knows the lengths on the host takes a slice
            return F.scaled_dot_product_attention(q, k_cache[:, :, :SEEN], v_cache[:, :, :SEEN])
        return cached_attention(q, k_cache, v_cache, torch.full((samples,), SEEN), backend=backend)

    head_dim = HIDDEN // HEADS
    yield Case(
        "cached_attention", f"{label}: {samples} x {TOKENS} to {SEEN} keys x {HEADS} heads of {head_dim}",
        lambda _: [torch.randn(samples, HEADS, length, head_dim).to(dtype) for length in (TOKENS, CACHED, CACHED)],
        attend, 2 * samples * (TOKENS + SEEN) * HIDDEN * dtype.itemsize, peers={"eager": attend},
    )  # fmt: skip

    layout = BlockLayout(TOKENS, BLOCKS, BLOCKS, text_length=TEXT)

    def train(*qkv: Tensor, backend: str = "reference") -> Tensor:
        return block_causal_attention(*qkv, layout, backend="sdpa" if backend == "reference" else backend)

    def streams(_: torch.device) -> list[Tensor]:
        lengths = layout.query_length, layout.key_length, layout.key_length
        made = (torch.randn(samples, length, HEADS, head_dim).to(dtype).transpose(1, 2) for length in lengths)
        return [x.requires_grad_() for x in made]

    num_bytes = 4 * samples * layout.key_length * HIDDEN * dtype.itemsize
    yield Case(
        "block_causal_attention", f"{label}: {samples} x {BLOCKS} blocks of {TOKENS} behind {TEXT}",
        streams, train, num_bytes, 2 * num_bytes, peers={"eager": train},
    )  # fmt: skip

    def step(*tensors: Tensor, **how: str) -> None:
        denoise_step(*tensors, **how)

    def plain(*tensors: Tensor) -> None:
        denoise_step_ref(*tensors)

    latents = samples // 2, 64 * 4
    yield Case(
        "denoise_step", f"{label}: {latents[0]} x {latents[1]}",
        lambda _: (
            torch.randn(latents), torch.randn(latents).to(dtype), torch.randn(latents), torch.randn(latents[0], 6) / 4,
        ),
        step, latents[0] * latents[1] * (16 + dtype.itemsize), peers={"eager": plain},
    )  # fmt: skip


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        for batch, samples in BATCHES.items():
            label = f"{batch}, {name}"
            yield from _rows_cases(label, (samples, TOKENS, HIDDEN), MLP, dtype)
            yield from (_map_case(label, samples, *shape, dtype) for shape in MAPS)
            yield from _model_cases(label, samples, dtype)
            if dtype == torch.float32:
                yield _conv_case(label, samples, 128, 16)
        large, many = f"beyond the caches, {name}", max(1, large_tensor() // 2**19 // dtype.itemsize)
        yield from _rows_cases(large, (2 * many, 256, 1024), 1024, dtype)
        yield _map_case(large, many, 512, 32, dtype)


def large_tensor() -> int:
    """Bytes of the processor's last cache, or of a usual one where the system does not say; gradients of eager PyTorch
    take some thirty times as much, so it is bounded by the machine's memory."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(size[:-1]) * 2**10 for file in files if (size := file.read_text().strip()).endswith("K")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(max(sizes, default=2**25), memory // 40)


def forward(run: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.inference_mode():
            return run(*inputs)

    return call


def backward(run: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[[], Any]:
    outputs, leaves = tensors_of(run(*inputs)), leaves_of(inputs)
    grads = [torch.randn_like(x) for x in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def copy_of(num_bytes: int) -> Callable[[], Any]:
    source, target = (torch.empty(num_bytes // 8).normal_() for _ in range(2))
    return lambda: target.copy_(source)


def least_seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Of each, taking turns."""
    count: dict[str, int] = {}
    for name, call in calls.items():
        call()
        started = time.process_time()
        call()
        count[name] = max(1, int(SECONDS_A_RUN / max(time.process_time() - started, 1e-6)))
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            started = time.process_time()
            for _ in range(count[name]):
                call()
            least[name] = min(least[name], (time.process_time() - started) / count[name])
    return least


def measure(ops: list[str] | None, *, with_compile: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.automatic_dynamic_shapes = False
    rows = []
    for case in cases():
        for direction in ("forward", "backward"):
            num_bytes = getattr(case, f"{direction}_bytes")
            if not num_bytes or (ops and case.op not in ops):
                continue
            runs = {name: functools.partial(case.run, backend=to) for name, to in OURS_AND_EAGER.items()}
            if with_compile and direction == "forward" and not case.label.startswith("batch 1,"):
                runs["compile"] = torch.compile(case.peers["eager"])
            prepare, inputs = {"forward": forward, "backward": backward}[direction], case.inputs(torch.device("cpu"))
            calls = {name: prepare(run, inputs) for name, run in runs.items()}
            seconds = least_seconds({**calls, "copy": copy_of(num_bytes)})
            row = {
                "op": case.op,
                "label": case.label,
                "direction": direction,
                "bytes": num_bytes,
                "us": {name: round(1e6 * value, 2) for name, value in seconds.items()},
                "share_of_copy": round(seconds["copy"] / seconds["cpp"], 3),
                "over_eager": round(seconds["eager"] / seconds["cpp"], 2),
            }
            rows.append(row)
            shown = "  ".join(f"{name} {value:.1f}" for name, value in row["us"].items())  # type: ignore[union-attr]
            print(f"{case.op:<16} {case.label:<52} {direction:<9} {shown} us, {row['share_of_copy']:.0%}", flush=True)
    large = [row for row in rows if row["label"].startswith("beyond") and row["direction"] == "forward"]
    return {
        **environment("cpu_kernels", torch.device("cpu"), []),
        "vectors": dispatch.VECTORS,
        "threads": 1,
        "rows": rows,
        "metrics": {
            "slowest_over_eager": min(row["over_eager"] for row in rows),
            **{f"{row['op']}, {row['label'].split(', ')[1].split(':')[0]}": row["share_of_copy"] for row in large},
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--out", type=Path, help="where to write the record")
    arguments = parser.parse_args()
    how = {"with_compile": not arguments.no_compile}
    return finish("cpu_kernels", lambda: measure(arguments.op, **how), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
