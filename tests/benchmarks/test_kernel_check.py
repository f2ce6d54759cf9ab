"""The offline compilation: what it reports, and that it fails on the faults it is there for."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers import environment

pytest.importorskip("triton", reason="Triton is not installed: kernels are NOT compiled here")

# `make kernel-check`, which continuous integration runs, compiles them all: here are the faults that it has to find.
pytestmark = pytest.mark.slow

# Compiled, not interpreted, so in a process of its own; in one, since starting takes longer than compiling. A file:
# Triton reads the source of its kernels.
PROGRAM = """
import contextlib, io, json, sys
from benchmarks import kernel_check
import torch
from madformer.kernels.launch import launch
from benchmarks.ops.case import Case
import triton, triton.language as tl

@triton.jit
def too_wide(x_ptr, y_ptr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.arange(0, 128)[:, None] * SIZE
    total = tl.zeros((128, WIDTH), tl.float32)
    for k in range(0, SIZE, 64):
        a = tl.load(x_ptr + rows + k + tl.arange(0, 64)[None, :])
        b = tl.load(y_ptr + (k + tl.arange(0, 64)[:, None]) * WIDTH + tl.arange(0, WIDTH)[None, :])
        total = tl.dot(a, b, total)
    tl.store(x_ptr + rows + tl.arange(0, WIDTH)[None, :], total.to(tl.bfloat16))

def case(name, width, num_warps, num_stages):
    def run(x, y, backend):
        options = dict(num_warps=num_warps, num_stages=num_stages)
        launch(too_wide, (1,), x.device, x, y, SIZE=4096, WIDTH=width, **options)

    return Case(name, "", lambda device: (torch.empty(128, 4096).bfloat16(), torch.empty(4096, width).bfloat16()), run)

def call(*arguments):
    sys.argv = ["kernel_check", "--jobs", "1", *arguments]
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            kernel_check.main()
            status = 0
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), error.getvalue()

results = dict(
    unknown=call("--op", "nothing"), swiglu=call("--op", "swiglu", "--sm", "90", "--dtype", "bf16", "--json")
)
kernel_check.every_case = lambda: [case("memory", 256, 8, 5), case("spills", 64, 1, 2)]
results["faulty"] = call("--sm", "80", "--dtype", "bf16")
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, str, str]]:
    """Exit status (or message), stdout and stderr of each call."""
    script = tmp_path_factory.mktemp("program") / "faulty.py"
    script.write_text(PROGRAM)
    own = environment()
    own.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, str(script)], env=own, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    parsed: dict[str, tuple[Any, str, str]] = json.loads(run.stdout.splitlines()[-1])
    return parsed


def test_kernels_are_compiled_as_they_are_launched(results: dict[str, tuple[Any, str, str]]) -> None:
    status, out, error = results["swiglu"]
    assert status == 0, error
    compiled = json.loads(out)
    assert {entry["kernel"] for entry in compiled} == {"forward_kernel", "backward_kernel"}
    assert all(entry["registers"] > 0 and entry["capability"] == 90 for entry in compiled)


def test_faults_are_found(results: dict[str, tuple[Any, str, str]]) -> None:
    faults = results["faulty"][0].splitlines()
    assert any("memory: too_wide on sm_80: " in line and "bytes of shared memory > 166912" in line for line in faults)
    assert any("spills: too_wide on sm_80: " in line and "bytes spilled" in line for line in faults)


def test_unknown_op_is_one_line(results: dict[str, tuple[Any, str, str]]) -> None:
    status, _, error = results["unknown"]
    assert status == 2
    assert error.splitlines()[-1].endswith("no case for --op nothing")
