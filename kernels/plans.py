"""What a call of an op costs in Python: what depends on the kind of its arguments is worked out once.

A GPU finishes a kernel of a small batch in the time that Python takes to choose its settings, to bind its forty
arguments in Triton, and to pass the op through PyTorch's dispatcher. So an implementation is written as a maker of
plans (:func:`planned`), which keeps a plan for each kind of arguments; a plan launches compiled kernels
(:class:`Launch`); and the public functions call implementations straight where nobody listens to the dispatcher
(:func:`eager`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from madformer.kernels import launch

MAX_PLANS = 256
"""Of one implementation; then it starts again. A plan is a few kilobytes."""

Implementation = Callable[..., Any]


def _kind(value: Any) -> Any:
    """What a plan may depend on: of a tensor everything but its numbers and its address, of that its alignment."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.data_ptr() & 15
    return tuple(map(_kind, value)) if isinstance(value, list) else value


def planned(watched: Callable[[], Any] = lambda: None) -> Callable[[Callable[..., Implementation]], Implementation]:
    """Makes an implementation of a function from arguments to a plan, which is then called with them.

    A plan serves all arguments of one kind: tensors of the same shapes, strides, dtypes, devices and alignments to 16
    bytes, equal other values. So it may hold what follows from these, but no tensor.

    Args:
        watched: what else plans depend on, as the function that chooses settings: plans that were made with another
            value are not used.
    """

    def decorate(make: Callable[..., Implementation]) -> Implementation:
        plans: dict[Any, Implementation] = {}

        @functools.wraps(make)
        def run(*arguments: Any) -> Any:
            if launch.is_compiling():
                return make(*arguments)(*arguments)
            key = watched(), launch.state(), tuple(map(_kind, arguments))
            plan = plans.get(key)
            if plan is None:
                if len(plans) >= MAX_PLANS:
                    plans.clear()
                plan = plans[key] = make(*arguments)
            return plan(*arguments)

        run.plans = plans  # type: ignore[attr-defined]
        return run

    return decorate


def itself(x: Any) -> Any:
    return x


def taken_as(view: Callable[[Tensor], Tensor], example: Tensor | None) -> Callable[[Any], Any]:
    """How a plan takes tensors of the kind of ``example``: by ``view``, or, where that copies nothing, as they are.

    A kernel is given an address, so a view of another shape at the same address is not worth making.
    """
    return itself if example is None or view(example).data_ptr() == example.data_ptr() else view


class Launch:
    """A kernel with its grid and all of its arguments but the tensors, which come first; called with these.

    The first call compiles it as Triton does. Later ones start what was compiled, past the part of Triton that looks
    at every argument to find it: for a tensor that is its dtype, which the plan that owns this fixes, and whether 16
    divides its address, which is looked at here. An empty grid is no launch.

    Args:
        descriptors: of the first tensors, which the copy engine loads.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        numbers: Sequence[Any] = (),
        descriptors: Sequence[launch.Descriptor] = (),
        **settings: Any,
    ) -> None:
        self.kernel, self.grid, self.device = kernel, grid, device
        self.numbers, self.settings, self.descriptors = tuple(numbers), settings, tuple(descriptors)
        self._is_empty = 0 in grid
        self._start: Callable[..., None] | None = None

    def __call__(self, *tensors: Any) -> None:
        if self._is_empty:
            return
        arguments: list[Any] = [describe(x) for describe, x in zip(self.descriptors, tensors, strict=False)]
        bits = 0
        for x in tensors[len(arguments) :]:
            if x is None:
                arguments.append(None)
            else:
                address = x.data_ptr()
                bits |= address
                arguments.append(address)
        if self._start is not None and not bits & 15:
            self._start(*arguments)
            return
        count = len(self.descriptors)
        given = (*arguments[:count], *tensors[count:], *self.numbers)
        compiled = launch.launch(self.kernel, self.grid, self.device, *given, **self.settings)
        if not bits & 15 and not launch.is_compiling():
            self._start = launch.prepared(compiled, self.kernel, self.grid, self.device, self.numbers, self.settings)


_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(arguments: Sequence[Any]) -> bool:
    """Whether an op of these means its implementation and, where a gradient is asked, its autograd function.

    Not where they are traced or transformed, where a mode, a subclass or the profiler wants to see the op, nor where
    an implementation is not for their device.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    return _are_plain(arguments)


def _are_plain(values: Sequence[Any]) -> bool:
    for x in values:
        if isinstance(x, Tensor):
            if type(x) not in _PLAIN or not (x.is_cuda or x.is_cpu) or x.is_neg():
                return False
        elif isinstance(x, list) and not _are_plain(x):
            return False
    return True


def _asks_gradient(values: Sequence[Any]) -> bool:
    return any(x.requires_grad if isinstance(x, Tensor) else isinstance(x, list) and _asks_gradient(x) for x in values)


def eager(op: Callable[..., Any], implementation: Callable[..., Any], recorded: Any = None) -> Callable[..., Any]:
    """The op as a function that takes the short way where that is all that the op would do.

    The short way is ``implementation`` or, where a gradient is asked, ``recorded``, an autograd function of the same
    arguments; without that the op.
    """

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not is_plain(arguments):
            return op(*arguments)
        if torch.is_grad_enabled() and _asks_gradient(arguments):
            return op(*arguments) if recorded is None else recorded(*arguments)
        return implementation(*arguments)

    return call


def recorded(
    implementation: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """``implementation`` as an autograd function, of what ``library.register_autograd`` takes; no lists of tensors."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:  # A setup_context of its own costs twice as much.
            output = implementation(*arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    return Function.apply
