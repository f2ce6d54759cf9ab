"""What a call of every op costs in Python, outside graphs, beside Triton's own launch of the same kernels. No GPU.

The path is the real one, from the public function to Triton's launcher and its encoder of tensor maps, and ends in a
driver that launches nothing (``stub_driver/libcuda.c``). Tensors are on the CPU, whose allocator is told never to ask
the system for memory, as CUDA's caching one does not. Figures are CPU time of the one thread, the least of many short
runs, so that other work on the machine shows little.

    python -m benchmarks.launch_cost [--op swiglu] [--out benchmarks/results/<device>/launch_cost.json]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import ROOT

STUB = ROOT / "build" / "stub_driver"
CALLS, RUNS = 5, 1000
"""Calls of a run, and runs of which the fastest counts."""
WARM_UP = 20
COLUMNS = {
    **{"op": "<24", "direction": "<18", "launches": ">9", "us": ">8.1f", "autograd_us": ">13.1f"},
    **{"triton_us": ">11.1f", "ratio": ">7.2f", "through_dispatcher_us": ">23.1f"},
}
"""What is printed of a row, and how."""


def enter_stub_driver() -> None:
    """Starts this program again with the stub as the CUDA driver; returns where that was done."""
    if os.environ.get("TRITON_LIBCUDA_PATH") == str(STUB):
        return
    include = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__path__[0])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    STUB.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).parent / "stub_driver" / "libcuda.c"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O2", f"-I{include}/backends/nvidia/include"]
    subprocess.run([*command, str(source), "-o", str(STUB / "libcuda.so.1")], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "LD_LIBRARY_PATH": f"{STUB}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "TRITON_LIBCUDA_PATH": str(STUB),
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_TOP_PAD_": str(1 << 28),
        "OMP_NUM_THREADS": "1",
    }
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def microseconds(*calls: Callable[[], Any]) -> list[float]:
    """CPU time of one call of each, run by turns."""
    for call in calls * WARM_UP:
        call()
    best = [float("inf")] * len(calls)
    for _ in range(RUNS):
        for i, call in enumerate(calls):
            start = time.thread_time_ns()
            for _ in range(CALLS):
                call()
            best[i] = min(best[i], time.thread_time_ns() - start)
    return [nanoseconds / CALLS / 1e3 for nanoseconds in best]


class OfflineDriver:
    """Stands in for Triton's CUDA driver as far as a compilation asks it: which target, which device."""

    def __init__(self, capability: int, device: int = 0) -> None:
        self.capability, self.device = capability, device

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


class StubDriver(OfflineDriver):
    """Triton's own launcher and encoder, too, for a Hopper GPU."""

    def __init__(self) -> None:
        from triton.backends.nvidia import driver

        super().__init__(90)
        self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher


def launches_of(call: Callable[[], Any]) -> list[Callable[[], Any]]:
    """Triton's own launches of a call, each with its arguments made."""
    from madformer.kernels.launch import compiling_for

    recorded: list[Callable[[], Any]] = []

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
        recorded.append(lambda: kernel[grid](*args, **settings))

    with compiling_for(TARGET, record):
        call()
    return recorded


def rows_of(case: Any) -> list[dict[str, Any]]:
    """Forward for inference, forward and backward for training of one case."""
    import torch

    from benchmarks.ops.case import leaves_of, tensors_of

    inputs = case.inputs(torch.device("cpu"))

    def run() -> Any:
        return case.run(*inputs, backend="triton")

    with torch.no_grad():
        rows = [row(case, "forward", run)]
    if leaves := leaves_of(inputs):
        outputs = tensors_of(run())
        recorded, backward = autograd_alone(leaves, outputs)
        rows.append(row(case, "training forward", run, recorded))
        grads = [torch.empty_like(x) for x in outputs]
        rows.append(
            row(
                case,
                "backward",
                lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True),
                backward,
            )
        )
    return rows


def row(
    case: Any, direction: str, call: Callable[[], Any], autograd: Callable[[], Any] | None = None
) -> dict[str, Any]:
    """Our time less autograd's alone is held against Triton's."""
    from madformer.kernels import plans

    launches = launches_of(call)

    def triton() -> None:
        for launch in launches:
            launch()

    def dispatched() -> None:
        with plans.through_dispatcher():
            call()

    ours, own, through, *alone = microseconds(call, triton, dispatched, *([] if autograd is None else [autograd]))
    less = sum(alone)
    return {
        "op": case.op,
        "label": case.label,
        "direction": direction,
        "launches": len(launches),
        "us": ours,
        "triton_us": own,
        "autograd_us": less,
        "ratio": (ours - less) / own,
        "through_dispatcher_us": through,
    }


def autograd_alone(leaves: list[Any], outputs: list[Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Records an op of such inputs that makes its outputs and does nothing more, and runs such a one backward."""
    import torch

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: torch.Tensor) -> Any:
            ctx.save_for_backward(*inputs)
            return tuple([torch.empty_like(x) for x in outputs])

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return tuple([torch.empty_like(x) for x in ctx.saved_tensors])

    outputs = [x.detach() for x in outputs]
    recorded, grads = Nothing.apply(*leaves), [torch.empty_like(x) for x in outputs]
    return lambda: Nothing.apply(*leaves), lambda: torch.autograd.grad(recorded, leaves, grads, retain_graph=True)


def measure(ops: list[str] | None) -> dict[str, Any]:
    import torch
    import triton

    from benchmarks.ops.case import every_case
    from madformer.kernels.launch import standing_in
    from madformer.machine import environment

    triton.runtime.driver.set_active(StubDriver())
    first = {case.op: case for case in reversed(list(every_case())) if not case.op.endswith("variants")}
    print("".join(f"{name.replace('_', ' '):{form.partition('.')[0]}}" for name, form in COLUMNS.items()))
    rows = []
    with standing_in(TARGET):
        for op, case in sorted(first.items()):
            for entry in rows_of(case) if not ops or op in ops else ():
                rows.append(entry)
                print("".join(f"{entry[name]:{form}}" for name, form in COLUMNS.items()), flush=True)
    return {
        **environment("launch_cost", torch.device("cpu"), ["triton"]),
        "calls": CALLS,
        "runs": RUNS,
        "rows": rows,
        "metrics": {"worst_ratio": max(entry["ratio"] for entry in rows)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="only this op; may be repeated")
    parser.add_argument("--out", type=Path, help="where to write the record")
    arguments = parser.parse_args()
    enter_stub_driver()
    global TARGET
    from benchmarks.record import finish
    from madformer.kernels.launch import Target

    TARGET = Target(90, num_sms=132)
    return finish("launch_cost", lambda: measure(arguments.op), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
