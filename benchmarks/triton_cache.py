"""Fills a Triton cache with what our kernels are launched with on a Hopper GPU. No GPU: the launches end in a stub.

The path is the real one, so the keys are those that the GPU's process asks for: they depend on the kernels' sources, on
Triton, on target and arguments, and not on where any of them lies. What a launch reads is kept, the binary and its
description; what the compiler passed through on the way is not, a fifth of the size.

    TRITON_CACHE_DIR=FOLDER python -m benchmarks.triton_cache [--op swiglu]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.launch_cost import StubDriver, enter_stub_driver

KEPT = (".json", ".cubin", ".so")


def fill(ops: Sequence[str] | None, seconds: float) -> int:
    """Launch forward and backward of the cases, in the order of their worth; how many there was time for."""
    import triton

    from benchmarks.gpu_stages import cases, is_few
    from benchmarks.ops.case import launch_both_ways
    from madformer.kernels.launch import Target, standing_in

    triton.runtime.driver.set_active(StubDriver())
    started, done = time.monotonic(), 0
    with standing_in(Target(90, num_sms=132)):
        for case in cases():
            if time.monotonic() - started > seconds:
                break
            if case.op == "layer" or not is_few(case) or (ops and case.op not in ops):
                continue
            launch_both_ways(case)
            done += 1
    return done


def slim(folder: Path) -> int:
    """Removes what no launch reads; bytes that are left."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in KEPT:
            path.unlink()
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--op", nargs="*", metavar="OP", help="only these")
    parser.add_argument("--seconds", type=float, default=600, help="begin no case after these (600)")
    options = parser.parse_args(arguments)
    if "TRITON_CACHE_DIR" not in os.environ:
        parser.error("TRITON_CACHE_DIR must name the folder to fill")
    enter_stub_driver()
    count = fill(options.op, options.seconds)
    print(f"triton-cache: {count} cases, {slim(Path(os.environ['TRITON_CACHE_DIR'])) / (1 << 20):.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
