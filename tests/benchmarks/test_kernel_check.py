"""The offline compilation: what it reports, and that it fails on the faults it is there for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: kernels are NOT compiled here")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_check.py"

# Compiled, not interpreted: in a process of its own.
FAULTY = """
import sys
sys.path.insert(0, {folder!r})
import kernel_check
import torch
from madformer.kernels.launch import launch
from ops.case import Case
import triton, triton.language as tl

@triton.jit
def too_wide(x_ptr, y_ptr, SIZE: tl.constexpr):
    rows = tl.arange(0, 128)[:, None] * SIZE
    total = tl.zeros((128, 256), tl.float32)
    for k in range(0, SIZE, 64):
        a = tl.load(x_ptr + rows + k + tl.arange(0, 64)[None, :])
        b = tl.load(y_ptr + (k + tl.arange(0, 64)[:, None]) * 256 + tl.arange(0, 256)[None, :])
        total = tl.dot(a, b, total)
    tl.store(x_ptr + rows + tl.arange(0, 256)[None, :], total.to(tl.bfloat16))

def run(x, y, backend):
    launch(too_wide, (1,), x.device, x, y, SIZE=4096, num_warps={num_warps}, num_stages={num_stages})

case = Case("faulty", "", lambda device: (torch.empty(128, 4096).bfloat16(), torch.empty(4096, 256).bfloat16()), run)
kernel_check.every_case = lambda: [case]
sys.argv = ["kernel_check", "--sm", "80", "--dtype", "bf16"]
kernel_check.main()
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def test_kernels_are_compiled_as_they_are_launched() -> None:
    result = run(str(SCRIPT), "--op", "swiglu", "--sm", "90", "--dtype", "bf16", "--json")
    assert result.returncode == 0, result.stderr
    compiled = json.loads(result.stdout)
    assert {entry["kernel"] for entry in compiled} == {"forward_kernel", "backward_kernel"}
    assert all(entry["registers"] > 0 and entry["capability"] == 90 for entry in compiled)


@pytest.mark.parametrize(
    ("num_warps", "num_stages", "fault"),
    [(8, 5, "bytes of shared memory > 166912"), (1, 2, "bytes spilled")],
    ids=["shared memory", "spills"],
)
def test_faults_are_found(num_warps: int, num_stages: int, fault: str, tmp_path: Path) -> None:
    script = tmp_path / "faulty.py"  # A file: Triton reads the source of its kernels.
    script.write_text(FAULTY.format(folder=str(SCRIPT.parent), num_warps=num_warps, num_stages=num_stages))
    result = run(str(script))
    assert result.returncode == 1
    assert "faulty: too_wide on sm_80: " in result.stderr
    assert fault in result.stderr


def test_unknown_op_is_one_line() -> None:
    result = run(str(SCRIPT), "--op", "nothing")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("no case for --op nothing")
