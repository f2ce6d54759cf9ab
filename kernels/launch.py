"""Launching Triton kernels: the one place that knows Triton, the GPU, and whether either is there.

A kernel file takes ``jit`` and ``tl`` from here, so that it imports where Triton is not installed. Its launchers ask
:func:`target` what they launch on and call :func:`launch`. ``benchmarks/kernel_check.py`` replaces the launch with a
compilation (:func:`compiling_for`), so what it checks is what a GPU would be given, argument for argument.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter, on any device; Triton reads the variable when it is imported."""

TRITON_VERSION = (0, 0)
"""Major and minor; zeros where Triton is not installed."""

if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton import jit

    TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))  # type: ignore[assignment]

    if INTERPRETED:
        from madformer.kernels import interpreter

        interpreter.install()
else:
    tl = None

    def jit(function: Callable[..., Any]) -> Any:
        """Leaves the kernel a plain function, which no launcher will call: the dispatcher refuses first."""
        return function


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take; they convert to float32 after a load."""

_KNOWN_LAUNCHERS = ((3, 6), (3, 7), (3, 8))
"""Versions of Triton whose launcher takes the arguments that :func:`_started` gives it."""

MIN_CAPABILITY = 80
"""Compute capability that the kernels need, times ten: bf16 matrix units and asynchronous copies."""


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below ``number``, for tiles, which have no other sizes; 1 for 0."""
    return 1 << max(0, number - 1).bit_length()


@dataclass(frozen=True)
class Target:
    """What a launch heuristic may look at.

    Attributes:
        capability: compute capability times ten, so 90 for Hopper.
        num_sms: streaming multiprocessors.
    """

    capability: int
    num_sms: int


# The interpreter takes any settings. Few SMs keep split reductions short and still split.
_INTERPRETER = Target(capability=MIN_CAPABILITY, num_sms=4)
_compiler: tuple[Target, Callable[..., None]] | None = None
_stand_in: Target | None = None


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(properties.major * 10 + properties.minor, properties.multi_processor_count)


def target(device: torch.device) -> Target:
    """What a kernel launched for tensors on ``device`` runs on."""
    if _compiler is not None:
        return _compiler[0]
    if _stand_in is not None:
        return _stand_in
    if device.type != "cuda" or INTERPRETED:
        return _INTERPRETER
    return _device_target(torch.cuda.current_device() if device.index is None else device.index)


def refusal(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of ``device``, in one line; None where they can."""
    if _compiler is not None or _stand_in is not None or INTERPRETED:
        return None
    if device.type != "cuda":
        return "it needs a CUDA device (TRITON_INTERPRET=1 runs it slowly on any)"
    capability = target(device).capability
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability / 10} is below {MIN_CAPABILITY / 10}"
    return None


class Descriptor:
    """What a kernel loads blocks of a tensor through by the copy engine (TMA, from capability 90 on).

    It is checked and described once, and called with each tensor of the shape, strides and dtype of the first. The last
    dimension must be contiguous, the addresses and the other strides multiples of 16 bytes.
    """

    def __init__(self, like: torch.Tensor, block: list[int]) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        made = TensorDescriptor(like, list(like.shape), list(like.stride()), block)
        self._type, self._fields = TensorDescriptor, {**vars(made), "base": None}

    def __call__(self, tensor: torch.Tensor) -> Any:
        made = object.__new__(self._type)
        vars(made).update(self._fields, base=tensor)
        return made


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **settings: Any) -> Any:
    """Runs ``kernel`` over ``grid`` on the device of its tensors; an empty grid is no launch.

    Args:
        args: the kernel's arguments in order.
        settings: its ``constexpr`` arguments by name, ``num_warps`` and ``num_stages``.

    Returns:
        For :func:`prepared` what Triton compiled, where it did.
    """
    if 0 in grid:
        return None
    if _compiler is not None:
        return _compiler[1](kernel, grid, *args, **settings)
    if device.type == "cuda" and not INTERPRETED:
        with torch.cuda.device(device):  # Triton launches on the current device, whatever the tensors'.
            return kernel[grid](*args, **settings)
    return kernel[grid](*args, **settings)


def prepared(
    compiled: Any, kernel: Any, grid: tuple[int, ...], device: torch.device, numbers: tuple[Any, ...], settings: Any
) -> Callable[..., None] | None:
    """What starts a compiled kernel on the current stream of ``device``, given its tensors, addresses or descriptors.

    Args:
        compiled: what :func:`launch` returned.
        numbers, settings: the other arguments that it was launched with.

    Returns:
        None where nothing was compiled: in the interpreter.
    """
    if compiled is None:
        return None
    start = _started(compiled, (*grid, 1, 1)[:3])
    rest = (*numbers, *(settings[parameter.name] for parameter in kernel.params if parameter.is_constexpr))
    if device.type != "cuda":
        return lambda *tensors: start(0, *tensors, *rest)
    index, current_device = device.index, torch._C._cuda_getDevice
    current_stream = torch._C._cuda_getCurrentRawStream

    def on_device(*tensors: Any) -> None:
        if current_device() == index:
            start(current_stream(index), *tensors, *rest)
        else:
            with torch.cuda.device(device):
                start(current_stream(index), *tensors, *rest)

    return on_device


def _started(compiled: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """What starts a compiled kernel on a stream, given all of its arguments.

    Triton describes each launch for hooks, such as a profiler's, and calls them. Where there are none, this passes that
    by, which is half the time of a launch.
    """
    described = compiled[grid]
    runtime = triton.knobs.runtime if TRITON_VERSION in _KNOWN_LAUNCHERS else None
    if runtime is None or not isinstance(compiled, triton.compiler.CompiledKernel):
        return lambda stream, *arguments: described(*arguments, stream=stream)
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata

    def start(stream: int, *arguments: Any) -> None:
        if _is_empty(runtime.launch_enter_hook) and _is_empty(runtime.launch_exit_hook):
            run(*grid, stream, function, packed, None, None, None, *arguments)
        else:
            described(*arguments, stream=stream)

    return start


def _is_empty(hook: Any) -> bool:
    return hook is None or getattr(hook, "calls", True) == []


def is_compiling() -> bool:
    """Whether launches are compilations: within :func:`compiling_for`."""
    return _compiler is not None


def state() -> Any:
    """What launches depend on that may change within a process, for tests and benchmarks alone."""
    return INTERPRETED, _stand_in


@contextlib.contextmanager
def standing_in(stand_in: Target) -> Iterator[None]:
    """Within it, launches for tensors on the CPU go to Triton's driver, which the caller has replaced by one that runs
    nothing; settings are chosen for ``stand_in``."""
    global _stand_in
    assert _stand_in is None
    assert not INTERPRETED
    _stand_in = stand_in
    try:
        yield
    finally:
        _stand_in = None


@contextlib.contextmanager
def compiling_for(compile_target: Target, compile_kernel: Callable[..., None]) -> Iterator[None]:
    """Within it, launches call ``compile_kernel(kernel, grid, *args, **settings)`` and run nothing.

    Results of the ops are then whatever memory held. Tensors may be on the CPU.
    """
    global _compiler
    assert _compiler is None, "does not nest"
    _compiler = (compile_target, compile_kernel)
    try:
        yield
    finally:
        _compiler = None
