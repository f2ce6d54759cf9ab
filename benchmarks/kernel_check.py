"""Compiles every Triton kernel without a GPU, as its op would launch it, and fails where the result is bad.

Bad is: registers spilled, more shared memory than there is, matrix products that the assembler makes wait for one
another, and more instructions or fewer programs on an SM than the record that is kept
(``benchmarks/results/static/kernel_check.json``). The public functions are called on the shapes of ``benchmarks/ops``
with the launch replaced by a compilation, so arguments, specialisations and launch settings are those a GPU would get;
in bfloat16 all shapes, in the other dtypes those whose settings differ. Run it as ``make kernel-check``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # Read when Triton is imported: here kernels are compiled.

import torch
import triton
from triton import knobs

from benchmarks import ROOT, static_model
from benchmarks.launch_cost import OfflineDriver
from benchmarks.ops.case import Case, every_case, in_dtype, launch_both_ways
from madformer.kernels.launch import Target, compiling_for

RECORD = ROOT / "benchmarks" / "results" / "static" / "kernel_check.json"
REPORTS = ROOT / "build" / "kernel_check"
"""What the assembler said of compiled kernels, by Triton's hash of them."""
TARGETS = {80: Target(80, num_sms=108), 90: Target(90, num_sms=132), 100: Target(100, num_sms=148)}
# What one program may use, from the CUDA programming guide's table of compute capabilities: 1 KiB less than the SM has.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SLACK = 1.03
"""By how much a kernel's main loop may grow beyond the record's: the same source compiles a little differently."""


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one architecture with one set of settings."""

    op: str
    label: str
    kernel: str
    settings: str
    capability: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    serialized: bool
    instructions: str
    occupancy: int
    counts: static_model.Counts
    bound: static_model.Bound

    @property
    def key(self) -> tuple[Any, ...]:
        """What the record knows it by."""
        return self.op, self.label, self.kernel, self.settings, self.capability

    @property
    def faults(self) -> list[str]:
        limit = SHARED_MEMORY[self.capability]
        too_much = [f"{self.shared_bytes} bytes of shared memory > {limit}"] if self.shared_bytes > limit else []
        spilled = [f"{self.spill_bytes} bytes spilled"] if self.spill_bytes else []
        return too_much + spilled + (["wgmma instructions wait for one another"] if self.serialized else [])


def compiled_with_log(kernel: Any, grid: Any, args: Any, settings: dict[str, Any]) -> tuple[Any, str]:
    """What Triton makes of a kernel, and what its assembler said; nothing where Triton had it already."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = kernel.warmup(*args, grid=grid, **settings)
    return compiled, log.getvalue()


def assembled(kernel: Any, grid: Any, args: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A compiled kernel with what the assembler reported, which is kept beside Triton's own cache."""
    knobs.nvidia.dump_ptxas_log = True
    compiled, log = compiled_with_log(kernel, grid, args, settings)
    kept = REPORTS / f"{compiled.hash}.json"
    if "Used" not in log and kept.exists():
        return compiled, json.loads(kept.read_text())
    if "Used" not in log:
        # In Triton's cache since before: once more, to hear the assembler.
        kernel.device_caches.clear()
        knobs.compilation.always_compile = True
        compiled, log = compiled_with_log(kernel, grid, args, settings)
        knobs.compilation.always_compile = False
    report = {
        "registers": _number(r"Used (\d+) registers", log),
        "spill_bytes": _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        # A warning of the assembler's, which then puts a wait behind every product: no spill, but far slower.
        "serialized": "Potential Performance Loss" in log,
    }
    REPORTS.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(report))
    temporary.replace(kept)
    return compiled, report


def inspect(compiled: Any, report: dict[str, Any], capability: int) -> dict[str, Any]:
    """What there is to say about a kernel that was :func:`assembled`."""
    ptx, num_warps = compiled.asm["ptx"], compiled.metadata.num_warps
    counts = static_model.count(_disassembly(compiled.asm["cubin"]))
    programs = static_model.occupancy(report["registers"], compiled.metadata.shared, num_warps, capability)
    flops = static_model.tensor_memory_flops(compiled.asm["ttgir"]) if "tcgen05.mma" in ptx else None
    found = ("wgmma", "tcgen05.mma", "mma.sync", "cp.async.bulk.tensor", "cp.async.cg")
    return {
        **report,
        "shared_bytes": compiled.metadata.shared,
        "instructions": ", ".join(name for name in found if name in ptx),
        "occupancy": programs,
        "counts": counts,
        "bound": static_model.bound(counts, num_warps, capability, programs, flops),
    }


def _disassembly(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [NVIDIA_TOOLS / "nvdisasm", "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, text
    return int(match[1])


def check_op(op: str, dtype: str, capability: int) -> list[tuple[str, Compiled]]:
    """Every distinct kernel, with its settings, that an op launches on one architecture, with Triton's hash of it."""
    # Triton keeps compiled kernels by device.
    triton.runtime.driver.set_active(OfflineDriver(capability, device=capability))
    results: dict[str, Compiled] = {}
    for case in cases_in(op, dtype):

        def compile_kernel(kernel: Any, grid: tuple, *args: Any, case: Case = case, **settings: Any) -> None:
            compiled, report = assembled(kernel, grid, args, settings)
            if compiled.hash not in results:
                results[compiled.hash] = Compiled(
                    op=case.op,
                    label=case.label,
                    kernel=kernel.fn.__name__.strip("_"),
                    settings=" ".join(f"{name}={value}" for name, value in settings.items()),
                    capability=capability,
                    **inspect(compiled, report, capability),
                )

        with compiling_for(TARGETS[capability], compile_kernel):
            launch_both_ways(case)
    return list(results.items())


def cases_in(op: str, dtype: str) -> Iterator[Case]:
    """An op's cases in bfloat16; in another dtype the first, and of attention, whose settings depend on it, all widths
    of a head."""
    cases = [case for case in every_case() if case.op == op]
    if dtype == "bf16":
        yield from cases
    else:
        for case in cases if op.endswith("variants") else cases[:1]:
            yield in_dtype(case, {"fp16": torch.float16, "fp32": torch.float32}[dtype])


DTYPES = ("bf16", "fp16", "fp32")
# Of nothing else do settings depend on the dtype; the rest compiles to the same but for its loads and stores.
SLOWEST_FIRST = ("block_causal_attention_variants", "block_causal_attention", "adaln", "rms_norm", "cached_attention")


def check(ops: Sequence[str], capabilities: Sequence[int], jobs: int, dtypes: Sequence[str] = DTYPES) -> list[Compiled]:
    """Every distinct kernel of the ops on each architecture, in several processes."""
    ops = sorted(ops, key=lambda op: SLOWEST_FIRST.index(op) if op in SLOWEST_FIRST else len(SLOWEST_FIRST))
    tasks = [(op, dtype, capability) for op in ops for dtype in dtypes for capability in capabilities]
    if jobs == 1 or len(tasks) == 1:
        found = [check_op(*task) for task in tasks]
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(check_op, *zip(*tasks, strict=True)))
    distinct = {(key, result.capability): result for results in reversed(found) for key, result in reversed(results)}
    # of several that the record cannot tell apart, which differ by how an argument is aligned, the slowest
    worst: dict[tuple[Any, ...], Compiled] = {}
    for result in sorted(distinct.values(), key=lambda result: (result.counts.issue, -result.occupancy)):
        worst[result.key] = result
    order = {op: place for place, op in enumerate(dict.fromkeys(case.op for case in every_case()))}
    return sorted(worst.values(), key=lambda r: (order[r.op], r.capability, r.key))


def regressions(results: Sequence[Compiled], record: dict[str, Any]) -> list[str]:
    """Where a kernel got worse than the record says; nothing where another Triton made that."""
    if record["versions"]["triton"] != triton.__version__:
        return []
    before = {tuple(row["key"]): row for row in record["rows"]}
    found = []
    for result in results:
        row = before.get(result.key)
        if row is None:
            continue
        name = f"{result.op}: {result.kernel} on sm_{result.capability} ({result.label})"
        if result.counts.issue > SLACK * row["counts"]["issue"]:
            found.append(
                f"{name}: {result.counts.issue} instructions in the main loop, {row['counts']['issue']} before"
            )
        if result.occupancy < row["occupancy"]:
            found.append(f"{name}: {result.occupancy} programs on an SM, {row['occupancy']} before")
    return found


def print_table(results: list[Compiled]) -> None:
    columns = [
        ("op", [r.op for r in results]),
        ("kernel", [r.kernel for r in results]),
        ("dtype", [_dtype(r.label) for r in results]),
        ("sm", [str(r.capability) for r in results]),
        ("registers", [str(r.registers) for r in results]),
        ("shared KiB", [f"{r.shared_bytes / 1024:.1f}" for r in results]),
        ("spills", [str(r.spill_bytes) for r in results]),
        ("programs/SM", [str(r.occupancy) for r in results]),
        ("issue", [str(r.counts.issue) for r in results]),
        ("matrix", [str(r.counts.matrix) for r in results]),
        ("special", [str(r.counts.special) for r in results]),
        ("ld/st", [str(r.counts.memory) for r in results]),
        ("cycles i/m/s/l/chain", [_cycles(r.bound) for r in results]),
        ("bound", [_bound(r.bound) for r in results]),
        ("instructions", [r.instructions for r in results]),
        ("settings", [r.settings for r in results]),
    ]
    widths = [max(map(len, [title, *values])) for title, values in columns]
    for row in zip(*([title, *values] for title, values in columns), strict=True):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _dtype(label: str) -> str:
    return next((name for name in DTYPES if name in label), "")


def _cycles(bound: static_model.Bound) -> str:
    return "/".join(f"{cycles:.0f}" for cycles in (bound.issue, bound.matrix, bound.special, bound.memory, bound.chain))


def _bound(bound: static_model.Bound) -> str:
    if bound.tflops:
        return f"{bound.tflops:.0f} TFLOP/s ({bound.by})"
    return f"{100 * bound.share_of_copy:.0f} % of copy ({bound.by})"


def save(results: Sequence[Compiled], path: Path) -> None:
    from benchmarks.record import environment, write_json  # Not at the top: the check itself needs no model.

    rows = [{"key": result.key, **asdict(result)} for result in results]
    if path.exists():
        # What was not compiled this time stays.
        now = {(r.op, _dtype(r.label), r.capability) for r in results}
        kept = json.loads(path.read_text())["rows"]
        rows += [row for row in kept if (row["op"], _dtype(row["label"]), row["capability"]) not in now]
        rows.sort(key=lambda row: (row["op"], _dtype(row["label"]), row["capability"]))
    head = environment("kernel_check", torch.device("cpu"), ["triton"])
    machines = {str(capability): asdict(machine) for capability, machine in static_model.MACHINES.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**head, "machines": machines, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--sm", type=int, action="append", choices=list(TARGETS), help="only this architecture")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this dtype")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--record", nargs="?", const=RECORD, type=Path, help="keep the counts as what is compared with")
    parser.add_argument("--against", default=RECORD, type=Path, help="the record to compare with")
    args = parser.parse_args()
    every_op = list(dict.fromkeys(case.op for case in every_case()))
    ops = [op for op in every_op if not args.op or op in args.op]
    if not ops:
        parser.error(f"no case for --op {' '.join(args.op)}")
    results = check(ops, args.sm or list(TARGETS), args.jobs, args.dtype or DTYPES)
    if args.json:
        print(json.dumps([asdict(r) for r in results]))
    else:
        print_table(results)
    faults = [f"{r.op}: {r.kernel} on sm_{r.capability}: {fault}" for r in results for fault in r.faults]
    if args.record is not None:
        save(results, args.record)
    elif args.against.exists():
        faults += regressions(results, json.loads(args.against.read_text()))
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(results)} kernels compiled, no fault found", file=sys.stderr)


if __name__ == "__main__":
    main()
