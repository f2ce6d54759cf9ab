"""What CONTRIBUTING.md tells somebody to write works as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = re.compile(r'^```python title="([^"]+)"\n(.*?)^```$', re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_op_of_the_example_passes_its_three_proofs(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: the example's kernels are NOT tested here")
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for folder in ("kernels", "benchmarks", "tests/kernels", "tests/helpers"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for name in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    package = tmp_path / "package" / "madformer"
    package.mkdir(parents=True)
    for source in (*(ROOT / "python" / "madformer").iterdir(), tmp_path / "kernels", ROOT / "engine"):
        (package / source.name).symlink_to(source)

    files = dict(FILES.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert {Path(name).parent.as_posix() for name in files} == {"kernels", "tests/kernels", "benchmarks/ops"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")

    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    record = ROOT / "benchmarks" / "results" / "static" / "kernel_check.json"
    check = ("-m", "benchmarks.kernel_check", "--op", "squared_relu", "--sm", "90", "--dtype", "bf16")
    for command, said in (
        (("-m", "ruff", "check", *files), "All checks passed"),
        (("-m", "ruff", "format", "--check", *files), "already formatted"),
        (("-m", "pytest", "-p", "no:cacheprovider", "tests/kernels/test_squared_relu.py"), "15 passed"),
        ((*check, "--against", str(record)), "2 kernels compiled, no fault found"),
    ):
        run = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        assert said in run.stdout + run.stderr, run.stdout + run.stderr
