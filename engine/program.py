"""A program that Inductor compiled ahead of time, called without Python's lock.

What PyTorch loads a package with (``torch._inductor.aoti_load_package``) holds the lock for as long as a program runs,
so that threads would take turns. Here the library in the package is called through AOTInductor's C interface
(``torch/csrc/inductor/aoti_runtime/interface.h``) by ctypes, which lets go of the lock.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
import weakref
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_FUNCTIONS = "CreateWithDevice", "Delete", "GetNumConstants", "GetNumInputs", "GetNumOutputs", "RunSingleThreaded"
# PyTorch's own, between its tensors and the handles of AOTInductor
_GIVE, _TAKE = "unsafe_alloc_void_ptrs_from_tensors", "alloc_tensors_by_stealing_from_void_ptrs"
# prototypes of its own: those of ctypes.pythonapi are the whole process's
_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class Program:
    """A compiled module whose result is one tensor. For one thread at a time; several programs may share a package.

    Args:
        path: of a package, ``.pt2``.

    Raises:
        OSError: it is no package, or its library does not load.
        RuntimeError: it needs what only PyTorch's own loader has.
    """

    def __init__(self, path: Path) -> None:
        self._library = _library(path)
        self._container = ctypes.c_void_p()
        self._call("CreateWithDevice", ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", None)
        end = weakref.finalize(self, self._library.AOTInductorModelContainerDelete, self._container)
        end.atexit = False  # a thread may be inside by then, and the system takes it all
        if self._count("Constants"):
            raise RuntimeError("it holds tensors of its own")
        if self._count("Outputs") != 1:
            raise RuntimeError("it does not give one tensor")
        self._num_inputs = self._count("Inputs")

    def __call__(self, weights: dict[str, Tensor], *inputs: Any) -> Tensor:
        """The module's result.

        Args:
            weights, inputs: as it was exported with; inputs are tensors and lists of them. Shapes are not looked at.

        Raises:
            ValueError: another number of tensors.
            RuntimeError: the program failed.
        """
        tensors = [*weights.values(), *tree_leaves(inputs)]
        if len(tensors) != self._num_inputs:
            raise ValueError(f"a compiled program of {self._num_inputs} tensors was given {len(tensors)}")
        handles = _handles(tensors)
        taken, result = (ctypes.c_void_p * len(handles))(*handles), ctypes.c_void_p()
        counts = ctypes.c_size_t(len(handles)), ctypes.c_size_t(1)
        self._call("RunSingleThreaded", self._container, taken, counts[0], ctypes.byref(result), counts[1], None, None)
        assert result.value is not None
        return _tensor(result.value)

    def _count(self, what: str) -> int:
        count = ctypes.c_size_t()
        self._call(f"GetNum{what}", self._container, ctypes.byref(count))
        return count.value

    def _call(self, function: str, *arguments: Any) -> None:
        if getattr(self._library, f"AOTInductorModelContainer{function}")(*arguments):
            raise RuntimeError(f"{function} of a compiled program failed: {_last_error(self._library)}")


def _library(path: Path) -> ctypes.CDLL:
    """The library of a package, once for each state of the file: what is loaded stays for the life of a process."""
    state = path.stat()
    return _loaded_library(path, state.st_ino, state.st_mtime_ns, state.st_size)


@functools.cache
def _loaded_library(path: Path, *_: int) -> ctypes.CDLL:
    try:
        with zipfile.ZipFile(path) as package, tempfile.TemporaryDirectory(prefix="madformer-") as folder:
            names = [name for name in package.namelist() if "/aotinductor/" in name]
            libraries = [name for name in names if name.endswith(".so")]
            if len(libraries) != 1:
                raise RuntimeError("it has no library for this system")
            if any(name.endswith(".json") and not name.endswith("_metadata.json") for name in names):
                raise RuntimeError("it calls operators that only PyTorch's loader can call")
            library = ctypes.CDLL(package.extract(libraries[0], folder))
    except (zipfile.BadZipFile, zlib.error) as error:
        raise OSError(str(error)) from None
    missing = [name for name in _FUNCTIONS if not hasattr(library, f"AOTInductorModelContainer{name}")]
    missing += [name for name in (_GIVE, _TAKE) if not hasattr(getattr(torch._C, "_aoti", None), name)]
    if missing:
        raise RuntimeError(f"AOTInductor of this PyTorch has no {missing[0]}")
    return library


def _handles(tensors: list[Tensor]) -> list[int]:
    """New references to tensors, each of which somebody has to take over."""
    return [_address(capsule, None) for capsule in getattr(torch._C._aoti, _GIVE)(tensors)]


def _tensor(handle: int) -> Tensor:
    """The tensor of a reference, which is taken over."""
    # PyTorch's function for a single handle does not take its reference over, which would leak it
    return getattr(torch._C._aoti, _TAKE)([_capsule(handle, None, None)])[0]


def _last_error(library: ctypes.CDLL) -> str:
    text = ctypes.c_char_p()
    if hasattr(library, "AOTInductorGetLastError") and not library.AOTInductorGetLastError(ctypes.byref(text)):
        return (text.value or b"").decode(errors="replace").strip() or "it does not say why"
    return "standard error says why"
