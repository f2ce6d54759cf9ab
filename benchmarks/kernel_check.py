"""Compiles every Triton kernel without a GPU, as its op would launch it, and fails where the result is bad.

Bad is: registers spilled, more shared memory than there is, matrix products that the assembler makes wait for one
another. The public functions are called on the shapes of ``benchmarks/ops`` with the launch replaced by a
compilation, so arguments, specialisations and launch settings are those a GPU would get. Run it as
``make kernel-check``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # Read when Triton is imported: here kernels are compiled.

import torch
import triton
from triton.backends.compiler import GPUTarget

from madformer.kernels.launch import Target, compiling_for
from ops.case import Case, every_case, leaves_of, tensors_of

TARGETS = {80: Target(80, num_sms=108), 90: Target(90, num_sms=132), 100: Target(100, num_sms=148)}
# What one program may use, from the CUDA programming guide's table of compute capabilities: 1 KiB less than the SM has.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one architecture with one set of settings."""

    op: str
    kernel: str
    settings: str
    capability: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    serialized: bool
    instructions: str

    @property
    def faults(self) -> list[str]:
        limit = SHARED_MEMORY[self.capability]
        too_much = [f"{self.shared_bytes} bytes of shared memory > {limit}"] if self.shared_bytes > limit else []
        spilled = [f"{self.spill_bytes} bytes spilled"] if self.spill_bytes else []
        return too_much + spilled + (["wgmma instructions wait for one another"] if self.serialized else [])


class OfflineDriver:
    """Stands in for Triton's CUDA driver as far as a compilation asks it: which target, which device."""

    def __init__(self) -> None:
        self.capability = 80

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by device.

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(case: Case, target: Target, compile_kernel: Callable[..., None]) -> None:
    """Calls the op forward and backward on uninitialised CPU tensors; every launch becomes a compilation."""
    with compiling_for(target, compile_kernel):
        inputs = case.inputs(torch.device("cpu"))
        outputs = tensors_of(case.run(*inputs, backend="triton"))
        if outputs and (leaves := leaves_of(inputs)):
            torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs], allow_unused=True)


def inspect(kernel: Any, compiled: Any, op: str, settings: dict[str, Any], capability: int) -> Compiled:
    """Registers and spills as the assembler reports them for the kernel's PTX."""
    ptx = compiled.asm["ptx"]
    architecture = re.search(r"\.target (sm_\w+)", ptx)
    assert architecture is not None
    assembler = NVIDIA_TOOLS / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        report = subprocess.run(
            [assembler, "-v", f"--gpu-name={architecture[1]}", source, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    found = ("wgmma", "tcgen05.mma", "mma.sync", "cp.async.bulk.tensor", "cp.async.cg")
    return Compiled(
        op=op,
        kernel=kernel.fn.__name__.strip("_"),
        settings=" ".join(f"{name}={value}" for name, value in settings.items()),
        capability=capability,
        registers=_number(r"Used (\d+) registers", report),
        spill_bytes=_number(r"(\d+) bytes spill stores", report) + _number(r"(\d+) bytes spill loads", report),
        shared_bytes=compiled.metadata.shared,
        # A warning of the assembler's, which then puts a wait behind every product: no spill, but far slower.
        serialized="Potential Performance Loss" in report,
        instructions=", ".join(name for name in found if name in ptx),
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, text
    return int(match[1])


def check(cases: list[Case], capabilities: list[int]) -> list[Compiled]:
    """Every distinct kernel, with its settings, of ``cases`` on each architecture."""
    driver = OfflineDriver()
    triton.runtime.driver.set_active(driver)
    results: dict[tuple, Compiled] = {}
    for capability in capabilities:
        driver.capability = capability
        for case in cases:

            def compile_kernel(kernel: Any, grid: tuple, *args: Any, case: Case = case, **settings: Any) -> None:
                compiled = kernel.warmup(*args, grid=grid, **settings)
                if (key := (compiled.hash, driver.capability)) not in results:
                    results[key] = inspect(kernel, compiled, case.op, settings, driver.capability)

            compile_case(case, TARGETS[capability], compile_kernel)
    return list(results.values())


def print_table(results: list[Compiled]) -> None:
    columns = [
        ("op", [r.op for r in results]),
        ("kernel", [r.kernel for r in results]),
        ("sm", [str(r.capability) for r in results]),
        ("registers", [str(r.registers) for r in results]),
        ("shared KiB", [f"{r.shared_bytes / 1024:.1f}" for r in results]),
        ("spills", [str(r.spill_bytes) for r in results]),
        ("instructions", [r.instructions for r in results]),
        ("settings", [r.settings for r in results]),
    ]
    widths = [max(map(len, [title, *values])) for title, values in columns]
    for row in zip(*([title, *values] for title, values in columns), strict=True):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--sm", type=int, action="append", choices=list(TARGETS), help="only this architecture")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    args = parser.parse_args()
    cases = [case for case in every_case() if not args.op or case.op in args.op]
    if not cases:
        parser.error(f"no case for --op {' '.join(args.op)}")
    results = check(cases, args.sm or list(TARGETS))
    if args.json:
        print(json.dumps([asdict(r) for r in results]))
    else:
        print_table(results)
    faults = [f"{r.op}: {r.kernel} on sm_{r.capability}: {fault}" for r in results for fault in r.faults]
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(results)} kernels compiled, no fault found", file=sys.stderr)


if __name__ == "__main__":
    main()
