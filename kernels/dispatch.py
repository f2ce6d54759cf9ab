"""Which implementations an op has, which of them this machine can run, and why not the others.

An op's file registers its implementations once, at import. Its public function then asks :func:`resolve` for
the one to call. A backend that is asked for by name is never replaced by another.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from madformer import kernels
from madformer.kernels import launch, optional

AUTO = "auto"
BACKENDS = ("triton", "cpp", "sdpa", "flex", "flash_attn", "xformers", "reference")
"""Every backend, in the order in which ``auto`` prefers them."""


_OURS = ("triton", "cpp")

UNSUPPORTED = {"mps": "Apple's GPUs are not supported, and no test has run on one; move the model to 'cpu'"}
"""Device types that no implementation is for, the reference included, and why."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name that cannot run here; the message says why, in one line."""


@dataclass(frozen=True)
class BackendStatus:
    """What ``madformer info`` prints about one backend.

    Attributes:
        backend: its name, as the ``backend`` argument of an op takes it.
        available: whether this machine can run it.
        reason: one line: what it is where it is available, else why it is not.
        ops: the ops that have an implementation in it, sorted.
    """

    backend: str
    available: bool
    reason: str
    ops: tuple[str, ...]


# Found out once, at import: ops are resolved inside compiled graphs, where nothing can be imported.
_UNAVAILABLE: dict[str, str] = {}
CUDA_ARCHITECTURES = ""
"""Those that ``madformer._C`` was compiled for, as ``"80 90a 100"``; empty where it was built without CUDA."""
VECTORS = ""
"""The instructions that the extension's kernels for CPUs use here, as ``"AVX2"``; empty where it has no vectors."""
try:
    _extension = importlib.import_module("madformer._C")  # Registers its ops.
    CUDA_ARCHITECTURES, VECTORS = _extension.cuda_architectures, getattr(_extension, "vectors", "")
except ModuleNotFoundError:
    _UNAVAILABLE["cpp"] = "madformer._C is not built; an install with MADFORMER_EXTENSION=require shows why"
except ImportError as _error:
    _UNAVAILABLE["cpp"] = f"madformer._C does not load: {' '.join(str(_error).split())}"
COMPILED_DEVICES = ("cpu", "cuda") if CUDA_ARCHITECTURES else ("cpu",)
"""Device types on which C++ runs those ops that it has for both."""
if not launch.HAS_TRITON:
    _UNAVAILABLE["triton"] = "Triton is not installed"
# Optional packages take seconds to import: they are when one is asked for by name, or a report is.
_OPTIONAL = ("flash_attn", "xformers")

_DESCRIPTION = {
    "triton": "our Triton kernels" + (", interpreted" if launch.INTERPRETED else ", on CUDA devices"),
    "cpp": f"C++ in madformer._C, built {f'for CUDA {CUDA_ARCHITECTURES}' if CUDA_ARCHITECTURES else 'without CUDA'}, "
    + (f"with vectors of {VECTORS}" if VECTORS else "without vectors (Highway was not there; Debian: libhwy-dev)"),
    "sdpa": "PyTorch's scaled_dot_product_attention, one dense call for each run of blocks",
    "flex": "PyTorch's FlexAttention with a BlockMask, compiled on CUDA, forward-only on the CPU",
    "flash_attn": "the flash-attn package",
    "xformers": "the xFormers package",
    "reference": "plain PyTorch, on any device",
}


@dataclass(frozen=True)
class _Implementation:
    """Device types that an implementation runs on, and those for which ``auto`` may choose it; None: all.

    ``is_built`` is whether the extension, if there is one, has it: it may have been built of older sources.
    """

    device_types: tuple[str, ...] | None
    auto: tuple[str, ...] | None
    is_built: bool


# op -> backend -> what it runs on
_REGISTRY: dict[str, dict[str, _Implementation]] = {}


def register(
    op: str,
    backend: str,
    device_types: Sequence[str] | None = None,
    *,
    auto: Sequence[str] | None = None,
    kernel: str | None = None,
) -> None:
    """Declares that ``op`` has an implementation in ``backend``.

    Args:
        device_types: those it runs on; None for all (Triton's own limits are :func:`launch.refusal`'s).
        auto: those for which ``auto`` may choose it; None for all that it runs on, an empty sequence for none.
        kernel: the op of ``madformer::`` that the extension has where it was built of these sources, for vectors:
            without them ``auto`` does not choose it.
    """
    assert backend in BACKENDS, backend
    if kernel is not None and not VECTORS:
        auto = ()
    is_built = kernel is None or torch._C._dispatch_has_kernel_for_dispatch_key(f"madformer::{kernel}", "CPU")
    implementation = _Implementation(
        None if device_types is None else tuple(device_types), None if auto is None else tuple(auto), is_built
    )
    _REGISTRY.setdefault(op, {})[backend] = implementation


@torch.compiler.assume_constant_result
def resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The name of the backend that runs ``op`` on tensors of ``device``.

    Args:
        op: an op that its file has registered.
        backend: ``"auto"`` for the best one here, or a name, which is then either returned or refused.
        device: where the tensors are.
        dtype: theirs, if ``auto`` shall pass over kernels that do not compute in it (which then refuse it by
            themselves when they are asked for by name).

    Raises:
        ValueError: the op has no implementation of that name.
        BackendUnavailableError: it has one, but not one that can run here on this device; the message says why.
    """
    registered = _REGISTRY[op]
    if device.type in UNSUPPORTED:
        raise BackendUnavailableError(f"{op} cannot run on {device.type}: {UNSUPPORTED[device.type]}")
    if backend == AUTO:
        ours_too = dtype is None or dtype in launch.DTYPES
        for name in BACKENDS:
            is_suitable = name in registered and (ours_too or name not in _OURS) and _is_auto(op, name, device)
            if is_suitable and _refusal(op, name, device) is None:
                return name
        raise AssertionError(f"{op} has no reference")
    if backend not in registered:
        names = [name for name in BACKENDS if name in registered]
        raise ValueError(f"backend={backend!r} must be one of {', '.join((AUTO, *names))} for {op}")
    if (why := _refusal(op, backend, device)) is not None:
        raise BackendUnavailableError(f"backend={backend!r} cannot run {op} on {device.type}: {why}")
    return backend


def has(op: str, backend: str) -> bool:
    """Whether ``op`` has an implementation of that name, be it for another machine."""
    return backend in _REGISTRY[op]


def _is_auto(op: str, backend: str, device: torch.device) -> bool:
    auto = _REGISTRY[op][backend].auto
    return auto is None or device.type in auto


def _refusal(op: str, backend: str, device: torch.device) -> str | None:
    if backend in _UNAVAILABLE:
        return _UNAVAILABLE[backend]
    if not _REGISTRY[op][backend].is_built:
        return "madformer._C was built of older sources, without it; `make install` builds it anew"
    if backend in _OPTIONAL and (why := optional.missing(backend)) is not None:
        return why
    device_types = _REGISTRY[op][backend].device_types
    if device_types is not None and device.type not in device_types:
        return f"it is for {', '.join(device_types)}"
    if backend in _OPTIONAL:
        return optional.refusal(backend)
    return launch.refusal(device) if backend == "triton" else None


def report() -> tuple[BackendStatus, ...]:
    """The state of every backend on this machine, in the order in which ``auto`` prefers them."""
    for module in pkgutil.iter_modules(kernels.__path__, "madformer.kernels."):
        importlib.import_module(module.name)  # An op is in the registry once its file has been imported.
    why_not = dict(_UNAVAILABLE)
    somewhere = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why_not |= {name: why for name in _OPTIONAL if (why := optional.refusal(name)) is not None}
    if "triton" not in why_not and (why := launch.refusal(somewhere)) is not None:
        why_not["triton"] = why
    return tuple(
        BackendStatus(
            backend=name,
            available=name not in why_not,
            reason=why_not.get(name, _DESCRIPTION[name]),
            ops=tuple(sorted(op for op, implementations in _REGISTRY.items() if name in implementations)),
        )
        for name in BACKENDS
    )
