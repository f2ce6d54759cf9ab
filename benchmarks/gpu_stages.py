"""What the stages of ``gpu_check.py`` do on the GPU; each run is one stage, in a process of its own.

python -m benchmarks.gpu_stages canaries|kernels|peers|tiles
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from benchmarks import kernel_speed, layer
from benchmarks.kernel_record import line, source_of
from benchmarks.ops.case import Case, every_case
from benchmarks.record import environment
from benchmarks.visit import Entry, emit, known, seconds_left
from madformer.kernels import dispatch

PACKAGES = ("triton", "numpy", "diffusers", "flash-attn", "flash-attn-4", "xformers", "liger-kernel")
# Six rows of the hundred and more of cached attention say what it does; the others are for the last stage.
FEW = ("batch 1, prefix 0,", "batch 1, prefix 3840,", "batch 16, prefix 2304,", "batch 64, prefix 3840,")

Key = tuple[str, str, str]


def cases() -> list[Case]:
    """In the order of their worth: what a training step and a sampling step spend most time in first."""
    order = ("block_causal_attention", "cached_attention", "qk_norm_rope_cached", "rms_norm", "swiglu")
    rank = {op: index for index, op in enumerate(order)}
    return sorted((*every_case(), *layer.cases()), key=lambda case: rank.get(case.op, len(order)))


def is_few(case: Case) -> bool:
    return case.op != "cached_attention" or any(case.label.startswith(start) for start in FEW)


def key(case: Case, what: str) -> Key:
    return case.op, case.label, what


class Progress:
    """What has been found, and what was begun and never ended: it is left for the end."""

    def __init__(self, kind: str) -> None:
        self.kind, self.started = kind, time.monotonic()
        entries = [entry for entry in known() if entry.get("source") == source_of(entry.get("op", ""))]
        self.done = {self._key(entry) for entry in entries if entry["kind"] == kind}
        self.begun = {self._key(entry) for entry in entries if entry["kind"] == f"{kind} begun"} - self.done

    @staticmethod
    def _key(entry: Entry) -> Key:
        return entry["op"], entry["label"], entry.get("direction", "check")

    def todo(self, work: Sequence[tuple[Case, str]]) -> Iterator[tuple[Case, str]]:
        """What is not done, while there is time."""
        left = [(case, what) for case, what in work if key(case, what) not in self.done]
        for case, what in sorted(left, key=lambda pair: key(*pair) in self.begun):
            if seconds_left(self.started) < 2:
                return
            head = {"op": case.op, "label": case.label, "source": source_of(case.op)}
            emit({"kind": f"{self.kind} begun", **head, "direction": what})
            yield case, what


def roof_of(device: torch.device) -> dict[str, float]:
    """Measured once a visit."""
    found = next((entry["roof"] for entry in reversed(known()) if entry["kind"] == "roof"), None)
    if found is None:
        found = kernel_speed.roofs(device)
        emit({"kind": "roof", "roof": found})
    return found


def check_all(device: torch.device, chosen: Sequence[Case]) -> set[str]:
    """Checks what has no check yet; the ops that have failed one."""
    progress = Progress("check")
    for case, _ in progress.todo([(case, "check") for case in chosen]):
        result = kernel_speed.check(case, device)
        emit({"kind": "check", **result})
        print(f"{'right' if result['ok'] else 'WRONG':<6}{case.op}, {case.label}: {result.get('why', '')}", flush=True)
    entries = [entry for entry in known() if entry["kind"] == "check" and not entry["ok"]]
    return {entry["op"] for entry in entries if entry["source"] == source_of(entry["op"])}


def canaries(device: torch.device) -> None:
    """The environment; one case of every op against its reference; a plan by every way of launching."""
    print(*(f"{status.backend}: {status.reason}" for status in dispatch.report()), sep="\n", flush=True)
    backends = [dataclasses.asdict(status) for status in dispatch.report()]
    emit({"kind": "environment", **environment("kernels", device, PACKAGES), "backends": backends})
    chosen = cases()
    first = list({case.op: case for case in reversed(chosen)}.values())
    check_all(device, first)
    _launches(device)


def _launches(device: torch.device) -> None:
    from benchmarks import launches
    from benchmarks.released import FFHQ_1024
    from madformer.config import ffhq1024
    from madformer.engine.precision import apply
    from madformer.model import MADFormer

    torch.manual_seed(0)
    model = apply(MADFormer(ffhq1024()).to(device).eval(), "default")
    shape = dataclasses.replace(FFHQ_1024, batch=1, steps=3)
    result = launches.time_launches(model, shape, 3)
    emit({"kind": "launches", "refused": launches.refusals(device), **dataclasses.asdict(result)})


def _rows(device: torch.device, chosen: Sequence[Case], *, peers: bool) -> None:
    roof = roof_of(device)
    red = check_all(device, chosen)
    work = [(case, direction) for case in chosen for direction in kernel_speed.directions(case) if case.op not in red]
    kind = "row with peers" if peers else "row"
    progress = Progress(kind)
    if not peers:
        progress.done |= Progress("row with peers").done
    for case, direction in progress.todo(work):
        row = kernel_speed.measure(case, direction, device, peers=peers)
        emit({**row, "kind": kind})
        print(line(row, roof) if "ours" in row["seconds"] else f"{case.op}, {case.label}: {row['failed']}", flush=True)


def kernels(device: torch.device) -> None:
    """Ours, without peers."""
    _rows(device, [case for case in cases() if is_few(case)], peers=False)


def peers(device: torch.device) -> None:
    """Ours and its peers, interleaved."""
    _rows(device, [case for case in cases() if is_few(case)], peers=True)


def others(device: torch.device) -> None:
    """The other rows of cached attention."""
    _rows(device, [case for case in cases() if not is_few(case)], peers=True)


def tiles(device: torch.device) -> None:
    """Settings that ops might choose in place of theirs: GroupNorm's backward without ``keep``, attention's tiles."""
    started = time.monotonic()
    for case, direction, settings, module, choose in (*_group_norm_variants(), *_attention_variants()):
        source = source_of(case.op)
        done = {entry["settings"] for entry in known() if entry["kind"] == "tile" and entry["source"] == source}
        if settings in done or seconds_left(started) < 5:
            continue
        head = {"kind": "tile", "source": source, "settings": settings}
        with mock.patch.object(module, "choose_settings", choose):
            result = kernel_speed.check(case, device)
            if result["ok"]:
                result |= kernel_speed.measure(case, direction, device, peers=False)
        emit({**result, **head})
        seconds = result.get("seconds", {}).get("ours", {}).get("median")
        print(f"{settings}: {seconds * 1e6:.1f} us" if seconds else f"{settings}: {result.get('why')}", flush=True)


Variant = tuple[Case, str, str, Any, Callable[..., Any]]
"""A case, its direction, the settings in words, and what the module shall choose them by."""


def _group_norm_variants() -> Iterator[Variant]:
    module: Any = importlib.import_module("madformer.kernels.group_norm_silu")
    chosen = module.choose_settings
    shapes = ("16 x 512", "64 x 1024")
    for case in cases():
        if case.op == "group_norm_silu" and case.label.startswith(shapes):
            for keep in (True, False):
                yield (
                    case,
                    "backward",
                    f"{case.label}, keep={keep}",
                    module,
                    lambda *args, keep=keep, **how: dataclasses.replace(chosen(*args, **how), keep=keep),
                )


def _attention_variants() -> Iterator[Variant]:
    from benchmarks.ops.block_causal_attention import FFHQ_1024 as FFHQ_LAYOUT
    from madformer.kernels.block_causal_attention import op
    from madformer.kernels.block_causal_attention.forward import Tile

    case = next(case for case in cases() if case.op == "block_causal_attention")
    chosen = op.choose_settings(64, torch.bfloat16, FFHQ_LAYOUT, 90)
    sizes = itertools.product((128, 64), (64, 128), (4, 8), (2, 3, 4))
    variants = [("forward", Tile(*size)) for size in sizes]
    variants += [("dq", Tile(rows, 64, warps, 3)) for rows in (64, 128) for warps in (4, 8)]
    variants += [("dkdv", Tile(rows, cols, warps, 3)) for rows in (64, 128) for cols in (32, 64) for warps in (4, 8)]
    # Registers for one program more on an SM.
    variants += [("dq", Tile(128, 64, 4, 3, 168)), ("dkdv", Tile(64, 64, 4, 3, 168)), ("dkdv", Tile(64, 64, 4, 2, 168))]
    for name, tile in variants:
        direction = "forward" if name == "forward" else "backward"
        settings = dataclasses.replace(chosen, **{name: tile})
        yield case, direction, f"{name} {tile}", op, lambda *_, settings=settings: settings


STAGES: dict[str, Callable[[torch.device], None]] = {
    function.__name__: function for function in (canaries, kernels, peers, others, tiles)
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stage", choices=list(STAGES))
    options: Any = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check: PyTorch sees no CUDA device", file=sys.stderr)
        return 1
    kernel_speed.prepare_process()
    STAGES[options.stage](torch.device("cuda", torch.cuda.current_device()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
