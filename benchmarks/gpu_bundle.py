"""What a GPU machine without a network lacks, in one folder: ``make gpu-bundle`` fills it, ``make gpu-check`` uses it.

    python -m benchmarks.gpu_bundle make   # with the Python and PyTorch of the GPU machine
    python -m benchmarks.gpu_bundle use    # there; exit status 1: the extension has to be compiled

It holds wheels, of which ``use`` unpacks those that are missing; the extension, which it takes where Python, PyTorch
and sources are those it was compiled from; a Triton cache; and the released implementation's source, if
``MADFORMER_RELEASED`` names a clone. xFormers and flash-attn are not in it: the wheels of the one are of an older
PyTorch than any that is supported, version 2 of the other is compiled for an hour, version 4 needs 90 MiB of libraries.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT

BUNDLE = ROOT / "build" / "gpu-bundle"
SITE = ROOT / "build" / "gpu-site"
"""Where wheels are unpacked; ``make gpu-check`` puts it on the path behind all that is installed."""
PACKAGE = ROOT / "build" / "package" / "madformer"
LIMIT = 50 << 20
"""Bytes of all files: what can be carried along."""
WHEELS = (
    *("diffusers", "importlib_metadata", "zipp", "lazy-importer"),
    *("pytest", "pytest-xdist", "execnet", "iniconfig", "pluggy", "pygments"),
    *("pybind11", "einops"),
)
"""diffusers and what it needs that a machine with PyTorch may lack; what tests, a build and the released code need."""


def kind(root: Path = ROOT) -> dict[str, str]:
    """What a compiled extension depends on: it loads nowhere else, or is not of these sources."""
    sources = hashlib.sha256()
    for path in sorted([*(root / "csrc").iterdir(), root / "CMakeLists.txt"]):
        sources.update(path.name.encode() + path.read_bytes())
    return {
        "python": str(sys.implementation.cache_tag),
        "torch": importlib.metadata.version("torch"),
        "sources": sources.hexdigest(),
    }


# On the machine with a network


def make(bundle: Path = BUNDLE, released: Path | None = None, seconds: float = 900) -> None:
    """Fill the folder anew; Triton's cache for so many seconds.

    Raises:
        subprocess.CalledProcessError: of pip or the build. RuntimeError: there is more than can be carried.
    """
    shutil.rmtree(bundle, ignore_errors=True)
    (bundle / "wheels").mkdir(parents=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*download, "--only-binary=:all:", "--dest", str(bundle / "wheels"), *WHEELS], check=True)
    environment = {"MADFORMER_EXTENSION": "require", **os.environ}
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(bundle / "extension")]
    subprocess.run(build, cwd=ROOT, env=environment, check=True)
    (library,) = (bundle / "extension").rglob("_C.*so")
    library.rename(bundle / library.name)
    shutil.rmtree(bundle / "extension")
    fill_cache(bundle / "triton", seconds)
    manifest: dict[str, Any] = {"extension": library.name, "kind": kind()}
    if released is not None:
        copy_sources(released, bundle / "released")
    (bundle / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    if (size := sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())) > LIMIT:
        raise RuntimeError(f"{bundle} holds {size >> 20} MiB, more than the {LIMIT >> 20} that can be carried")
    print(
        f"gpu-bundle: {size / (1 << 20):.1f} MiB in {bundle.relative_to(ROOT)}, for {manifest['kind']['python']}, ",
        end="",
    )
    print(f"PyTorch {manifest['kind']['torch']}")


def fill_cache(folder: Path, seconds: float) -> None:
    """What our kernels are compiled to for the GPU: a machine with other versions finds none of it, and compiles."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "benchmarks.triton_cache", "--seconds", str(seconds)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def copy_sources(released: Path, into: Path) -> None:
    """The programs and configurations of a clone; no pictures, weights or history.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not released.is_dir():
        raise FileNotFoundError(f"MADFORMER_RELEASED={released} is no folder")
    for path in released.rglob("*"):
        inside = path.relative_to(released)
        if path.suffix in (".py", ".json", ".yaml", ".yml", ".txt") and not inside.parts[0].startswith("."):
            (into / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, into / inside)


# On the machine with the GPU


def use(bundle: Path = BUNDLE, package: Path = PACKAGE, site: Path = SITE) -> str:
    """Take from the bundle what is missing here; why the extension has to be compiled, or an empty string."""
    if not (bundle / "manifest.json").is_file():
        return f"there is no bundle in {bundle}"
    for wheel in sorted((bundle / "wheels").glob("*.whl")):
        unpack_missing(wheel, site)
    manifest = json.loads((bundle / "manifest.json").read_text())
    here = kind()
    for name, value in manifest["kind"].items():
        if here[name] != value:
            return f"the bundle's is of other {name}: {value[:12]}, and here it is {here[name][:12]}"
    target = package / manifest["extension"]
    target.parent.mkdir(parents=True, exist_ok=True)
    for library in package.glob("_C.*so"):
        library.unlink()  # a link, perhaps, to what must not be overwritten; one for this Python alone would go first
    shutil.copyfile(bundle / manifest["extension"], target)
    return loads(target)


def loads(library: Path) -> str:
    """Why it does not, in one line; it is then removed. In a process of its own, which it may end."""
    program = (
        "import importlib.util, sys, torch\n"
        "spec = importlib.util.spec_from_file_location('madformer._C', sys.argv[1])\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))"
    )
    result = subprocess.run([sys.executable, "-c", program, str(library)], capture_output=True, text=True)
    if result.returncode == 0:
        return ""
    library.unlink()
    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
    return f"the bundle's does not load: {lines[-1]}"


def unpack_missing(wheel: Path, site: Path) -> bool:
    """Whether the wheel's distribution was not there; it is unpacked then. One that is damaged is said, and left."""
    name = wheel.name.split("-")[0]
    try:
        importlib.metadata.distribution(name)
        return False
    except importlib.metadata.PackageNotFoundError:
        pass
    if list(site.glob(f"{name}-*.dist-info")):
        return False
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    except (OSError, zipfile.BadZipFile) as error:
        print(f"gpu-bundle: {wheel.name} is left out: {error}", file=sys.stderr)
        return False
    print(f"gpu-bundle: {wheel.name} unpacked")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["make", "use"])
    parser.add_argument("--seconds", type=float, default=900, help="to fill Triton's cache in (900)")
    options = parser.parse_args(arguments)
    if options.what == "use":
        why = use()
        print(f"gpu-bundle: the extension is compiled here: {why}" if why else "gpu-bundle: its extension is used")
        return int(bool(why))
    released = os.environ.get("MADFORMER_RELEASED")
    try:
        make(released=Path(released) if released else None, seconds=options.seconds)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"gpu-bundle: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
