"""Maps three source folders into one namespace and builds ``madformer._C`` where that is possible.

``MADFORMER_EXTENSION`` is the one switch: ``auto`` (the default) installs without the extension when it
cannot be built, ``require`` fails instead, ``off`` does not try.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# A fixed folder: in setuptools' temporary one every install would compile everything again. One for each Python.
BUILD_FOLDER = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
# The oldest CUDA toolkit that compiles for all architectures of CMakeLists.txt.
OLDEST_NVCC = (12, 8)
FOLDERS = {"madformer": "python/madformer", "madformer.kernels": "kernels", "madformer.engine": "engine"}
MODE = os.environ.get("MADFORMER_EXTENSION", "auto")


def packages() -> list[str]:
    found: list[str] = []
    for package, folder in FOLDERS.items():
        found += [package, *(f"{package}.{name}" for name in find_packages(folder))]
    return found


def find_tool(name: str) -> str | None:
    """The path of a program, looked for beside this Python first: pip puts cmake and ninja there."""
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    return shutil.which(name, path=os.pathsep.join(folders))


def missing_tools() -> list[str]:
    missing = [name for name in ("cmake", "ninja") if find_tool(name) is None]
    if not any(find_tool(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        missing.append("a C++ compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("Python.h (python3-dev)")
    missing += [
        f"{name} (install it first, then use --no-build-isolation)"
        for name in ("torch", "pybind11")
        if importlib.util.find_spec(name) is None
    ]
    return missing


def can_compile_cuda() -> bool:
    """Whether torch was built with CUDA and a recent enough nvcc is there; says so where an nvcc is too old."""
    import torch

    nvcc = find_tool("nvcc")
    if torch.version.cuda is None or nvcc is None:
        return False
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is not None and (int(release[1]), int(release[2])) >= OLDEST_NVCC:
        return True
    oldest = ".".join(map(str, OLDEST_NVCC))
    print(f"madformer: the extension is built without CUDA: {nvcc} is older than {oldest}", file=sys.stderr)
    return False


def remove_libraries(folder: Path) -> None:
    """An earlier build must not be mistaken for this one, nor outlive it under another name."""
    for library in folder.glob("_C.*so"):
        library.unlink()


class CMakeBuild(build_ext):
    """Builds the one extension with CMake and Ninja; without it where the mode allows."""

    def run(self) -> None:
        missing, inplace = missing_tools(), self.inplace
        try:
            if missing:
                raise RuntimeError(f"{', '.join(missing)} not found")
            super().run()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if MODE == "require":
                raise
            print(f"madformer: installing without the compiled extension: {error}", file=sys.stderr)
            self.inplace = inplace  # setuptools clears it for the build and a failure leaves it so.
            for extension in self.extensions:
                remove_libraries(self.target(extension).parent)
            self.extensions = []

    def build_extension(self, ext: Extension) -> None:
        configure = [
            *("-S", str(ROOT), "-B", str(BUILD_FOLDER), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        if can_compile_cuda():
            configure += ["-DMADFORMER_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={find_tool('nvcc')}"]
        else:
            configure += ["-DMADFORMER_CUDA=OFF"]
        cmake = str(find_tool("cmake"))
        subprocess.run([cmake, *configure], check=True)
        subprocess.run([cmake, "--build", str(BUILD_FOLDER)], check=True)
        target = self.target(ext)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_libraries(target.parent)
        shutil.copy2(BUILD_FOLDER / target.name, target)

    def target(self, extension: Extension) -> Path:
        return Path(self.get_ext_fullpath(extension.name))


if MODE not in ("auto", "off", "require"):
    sys.exit(f"MADFORMER_EXTENSION={MODE} must be auto, off or require")
if MODE == "off":
    remove_libraries(ROOT / FOLDERS["madformer"])  # Of an earlier editable install.
setup(
    packages=packages(),
    package_dir=FOLDERS,
    package_data={"madformer": ["py.typed"], "madformer.serving": ["page/*"]},
    ext_modules=[] if MODE == "off" else [Extension("madformer._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
