"""A training step on a pretended GPU: forward, backward, clipping, AdamW behind the guard, averages; nothing waits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import environment

FOLDER = Path(__file__).parent
COMPILER = next(filter(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")), None)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is preloaded as the driver: autograd's engine, which is C++, asks how many devices there are."""
    if COMPILER is None or not sys.platform.startswith("linux"):
        pytest.skip("the library that is preloaded as the driver needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("stub") / "libcuda-stub.so"
    options = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([COMPILER, *options, "-o", library, FOLDER / "stub.c"], check=True)
    return library


def run(stub: Path, *models: str) -> list[dict[str, object]]:
    command = [sys.executable, FOLDER / "training_steps.py", *models]
    result = subprocess.run(command, env=environment(LD_PRELOAD=str(stub)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(stub: Path, *models: str) -> None:
    results = run(stub, *models)
    assert [result["model"] for result in results] == list(models)
    for result in results:
        assert result["found"] == {}, result["model"]
        assert result["wrong gradients"] == [], result["model"]


def test_a_step_waits_for_nothing(stub: Path) -> None:
    check(stub, "ffhq1024", "text and classes")


@pytest.mark.slow
def test_a_step_of_every_other_kind(stub: Path) -> None:
    check(stub, "both", "clean only", "condition only", "block-local", "one block", "ACDiT", "any order", "patches")


def test_what_waits_in_a_step_is_seen(stub: Path) -> None:
    """``planted`` reads the loss and draws its noise on the host."""
    (result,) = run(stub, "planted")
    found = " ".join(result["found"])  # type: ignore[call-overload]
    assert "_local_scalar_dense" in found
    assert "_to_copy" in found
