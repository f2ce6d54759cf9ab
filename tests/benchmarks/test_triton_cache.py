"""The carried Triton cache: filled in one folder, used in another, from sources that lie elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import triton_cache
from tests.helpers.testing import needs_triton

ROOT = Path(triton_cache.__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler")


def test_what_no_launch_reads_is_removed(tmp_path: Path) -> None:
    for name in ("k.json", "__grp__k.json", "k.cubin", "k.ptx", "k.ttir", "k.source", "launcher.so"):
        (tmp_path / "KEY").mkdir(exist_ok=True)
        (tmp_path / "KEY" / name).write_text("12345")
    assert triton_cache.slim(tmp_path) == 20
    kept = sorted(path.name for path in (tmp_path / "KEY").iterdir())
    assert kept == ["__grp__k.json", "k.cubin", "k.json", "launcher.so"]


def fill(sources: Path, cache: Path) -> set[str]:
    """The keys in the cache after all launches of an op by these sources."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(sources / "build" / "package")}
    command = [sys.executable, "-m", "benchmarks.triton_cache", "--op", "swiglu"]
    subprocess.run(command, cwd=sources, env=environment, check=True, capture_output=True)
    return {path.name for path in cache.iterdir()}


@needs_triton
@needs_compiler
@pytest.mark.slow
def test_keys_are_the_same_elsewhere(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for folder in ("kernels", "engine", "python", "benchmarks"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    package = tree / "build" / "package" / "madformer"
    package.mkdir(parents=True)
    for path in (*(tree / "python" / "madformer").iterdir(), tree / "kernels", tree / "engine"):
        (package / path.name).symlink_to(path)
    keys = fill(tree, tmp_path / "here")
    compiled = {path.name for path in (tmp_path / "here").rglob("*.cubin")}
    assert compiled == {"_forward_kernel.cubin", "_backward_kernel.cubin"}
    assert len(keys) > len(compiled)  # and what Triton compiles to launch them
    shutil.copytree(tmp_path / "here", tmp_path / "carried")
    shutil.move(tree, tmp_path / "other")
    for link in (tmp_path / "other" / "build" / "package" / "madformer").iterdir():
        target = Path(os.readlink(link))
        link.unlink()
        link.symlink_to(tmp_path / "other" / target.relative_to(tree))
    assert fill(tmp_path / "other", tmp_path / "carried") == keys
