"""What is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

import madformer

ROOT = Path(__file__).parents[1]
MAPPED = {"python/madformer": "madformer", "kernels": "madformer/kernels", "engine": "madformer/engine"}


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    """Runs it as a user's process: neither the root nor ``tests`` is on its path."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")


@pytest.mark.parametrize("name", ["kernels", "engine"])
def test_no_bare_package_is_installed(name: str) -> None:
    run = run_python(f"import importlib.util, madformer; print(importlib.util.find_spec({name!r}))")
    assert run.stdout == "None\n", run.stdout + run.stderr


def test_version_stands_in_one_place_and_the_citation_has_it() -> None:
    """Setuptools reads it from the package; that the wheel has it, the wheel's test says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "madformer.__version__"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == madformer.__version__
    assert citation["license"] == project["project"]["license"]


def test_forms_ask_for_what_runs_there_and_the_workflow_runs_ci() -> None:
    for form in ("fault", "idea"):
        body = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text())["body"]
        (field,) = (field["attributes"] for field in body if field["id"] == "info")
        assert field["label"] == "`madformer info --json`"
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert [step["run"] for step in jobs["ci"]["steps"] if "run" in step][-1] == ".ci/run"


def test_wheel_without_the_extension_holds_every_source_file_and_nothing_else(tmp_path: Path) -> None:
    """A folder without ``__init__.py`` would be left out, and an editable install would not show it."""
    copy = tmp_path / "source"  # setuptools would add what earlier builds have left in the root.
    for folder in MAPPED:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "."]
    environment = {**os.environ, "MADFORMER_EXTENSION": "off"}
    run = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path)], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob(f"madformer-{madformer.__version__}-py3-none-any.whl")
    installed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in MAPPED.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix == ".py" or (path.parent.name == "page" and path.is_file())
    }
    assert installed == {*sources, "madformer/py.typed"}


@pytest.mark.slow
def test_wheel_of_the_source_distribution_samples_in_a_clean_environment(tmp_path: Path) -> None:
    """Beside this environment's packages, of which an editable install is none: their folder alone is on the path."""
    source, dist, venv = tmp_path / "source", tmp_path / "dist", tmp_path / "venv"
    for folder in (*MAPPED, "csrc"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, source)

    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        arguments = list(map(str, command))
        done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    build = f"from setuptools import build_meta; build_meta.build_sdist({str(dist)!r})"
    run(sys.executable, "-c", build, cwd=source)
    (archive,) = dist.iterdir()
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", dist, archive)
    (wheel,) = dist.glob("*.whl")

    run(sys.executable, "-m", "venv", "--without-pip", venv)
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    run(*pip, "--python", venv / "bin" / "python", "install", "--no-deps", "--no-index", wheel)

    record = json.loads(run(venv / "bin" / "madformer", "info", "--json"))
    assert record["versions"]["madformer"] == madformer.__version__
    assert str(venv) in run(venv / "bin" / "python", "-c", "import madformer; print(madformer.__file__)")
    cpp = next(status for status in record["backends"] if status["backend"] == "cpp")
    assert cpp["available"] == any("/_C." in name for name in zipfile.ZipFile(wheel).namelist()), cpp
    model, picture = ROOT / "assets" / "emoji64", tmp_path / "apple.png"
    options = ("--steps", "2", "--num-images", "1", "--grid", picture)
    run(venv / "bin" / "madformer", "sample", "--model", model, "red apple", *options)
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 100
