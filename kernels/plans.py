"""What a call of an op costs in Python: what depends on the kind of its arguments is worked out once.

A GPU finishes a kernel of a small batch in the time that Python takes to choose its settings, to bind its forty
arguments in Triton, and to pass the op through PyTorch's dispatcher. So an implementation is written as a maker of
plans (:func:`planned`), which keeps a plan for each kind of arguments; a plan launches compiled kernels
(:class:`Launch`); and the public functions call implementations straight where nobody listens to the dispatcher
(:func:`eager`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, is_grad_enabled
from torch._C import (
    _AutoDispatchBelowAutograd,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack as _peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from madformer.kernels import dispatch, launch

MAX_PLANS = 256
"""Of one implementation; then it starts again. A plan is a few kilobytes."""

Implementation = Callable[..., Any]


class Kind:
    """One kind of arguments, equal to itself alone: what is kept for it is found without a look at them."""

    __slots__ = ()


MAX_KINDS = 4096
_kinds: dict[tuple[Any, ...], Kind] = {}


def kind_of(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """What a plan may depend on: of tensors everything but their numbers and addresses, of these the alignment."""
    kind: list[Any] = []
    for x in arguments:
        if isinstance(x, Tensor):
            kind.append((x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15))
        else:
            kind.append(kind_of(x) if isinstance(x, list) else x)
    return tuple(kind)


def planned(watched: Callable[[], Any] = lambda: None) -> Callable[[Callable[..., Implementation]], Implementation]:
    """Makes an implementation of a function from arguments to a plan, which is then called with them.

    A plan serves all arguments of one kind: tensors of the same shapes, strides, dtypes, devices and alignments to 16
    bytes, equal other values. So it may hold what follows from these, but no tensor. The types of what it takes stand
    with the function that makes it.

    Args:
        watched: what else plans depend on, as the function that chooses settings: plans that were made with another
            value are not used.
    """

    def decorate(make: Callable[..., Implementation]) -> Implementation:
        plans: dict[Any, Implementation] = {}

        def run_kind(kind: Kind | tuple[Any, ...], arguments: Sequence[Any]) -> Any:
            if launch.is_compiling():
                return make(*arguments)(*arguments)
            key = watched(), launch.state(), kind
            plan = plans.get(key)
            if plan is None:
                if len(plans) >= MAX_PLANS:
                    plans.clear()
                plan = plans[key] = make(*arguments)
            return plan(*arguments)

        @functools.wraps(make)
        def run(*arguments: Any) -> Any:
            return run_kind(kind_of(arguments), arguments)

        run.plans, run.run_kind = plans, run_kind  # type: ignore[attr-defined]
        return run

    return decorate


def itself(x: Any) -> Any:
    return x


def fresh(example: Tensor) -> Callable[[], Tensor]:
    """What makes tensors with the shape, strides, dtype and device of an example, and without values.

    It takes half the time of ``torch.empty``, which first has to work these out.
    """
    shape, strides = tuple(example.shape), example.stride()
    return functools.partial(torch.empty_strided, shape, strides, dtype=example.dtype, device=example.device)


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
        count, bits = len(self.descriptors), 0
        arguments = [self.descriptors[i](tensors[i]) for i in range(count)] if count else []
        for x in tensors[count:] if count else tensors:
            if x is None:
                arguments.append(None)
            else:
                address = x.data_ptr()
                bits |= address
                arguments.append(address)
        if self._start is not None and not bits & 15:
            self._start(*arguments)
            return
        given = (*arguments[:count], *tensors[count:], *self.numbers)
        compiled = launch.launch(self.kernel, self.grid, self.device, *given, **self.settings)
        if not bits & 15 and not launch.is_compiling():
            self._start = launch.prepared(compiled, self.kernel, self.grid, self.device, self.numbers, self.settings)


class Compiled:
    """An implementation in C++: an op that is called past autograd's place in the dispatcher, which is in Python."""

    def __init__(self, op: Callable[..., Any]) -> None:
        self._op = op

    def run_kind(self, kind: Kind, arguments: Sequence[Any]) -> Any:
        with _AutoDispatchBelowAutograd():
            return self._op(*arguments)


_short_way = True


@contextlib.contextmanager
def through_dispatcher() -> Iterator[None]:
    """Within it no op takes the short way, in any thread: for tests and benchmarks."""
    global _short_way
    before, _short_way = _short_way, False
    try:
        yield
    finally:
        _short_way = before


def plain_kind(arguments: Sequence[Any]) -> Kind | None:
    """The kind of arguments whose op means its implementation and, where a gradient is asked, its autograd function.

    None where they are traced or transformed, where a mode, a subclass or the profiler wants to see the op, and where
    an implementation is not for their device.
    """
    if (
        not _short_way
        or is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _profiler_enabled()
        or _peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return None
    described = _kind_of_plain(arguments)
    if described is None:
        return None
    kind = _kinds.get(described)
    if kind is None:
        if len(_kinds) >= MAX_KINDS:
            _kinds.clear()
        kind = _kinds.setdefault(described, Kind())  # Once: another thread may have met it.
    return kind


def _kind_of_plain(arguments: Sequence[Any]) -> tuple[Any, ...] | None:
    kind: list[Any] = []
    for x in arguments:
        of = type(x)
        if of is Tensor or of is Parameter:
            if not (x.is_cuda or x.is_cpu) or x.is_neg():
                return None
            kind.append((x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15))
        elif isinstance(x, Tensor):
            return None
        elif isinstance(x, list):
            nested = _kind_of_plain(x)
            if nested is None:
                return None
            kind.append(nested)
        else:
            kind.append(x)
    return tuple(kind)


Checks = TypeVar("Checks")


def once_a_kind(check: Callable[..., Checks]) -> Callable[..., Checks]:
    """A check of arguments that is not made again for a :func:`plain_kind` that it has passed, its first argument.

    Without a kind it is made. It may depend on what a kind tells of them, and return what depends on no more. So it is
    not for backends whose packages may come and go.
    """
    passed: dict[Any, Checks] = {}

    @functools.wraps(check)
    def checked(kind: Kind | None, *arguments: Any) -> Checks:
        if kind is None or launch.is_compiling():
            return check(*arguments)
        key = kind, launch.state(), launch.refusal, dispatch.resolve, tuple(dispatch._UNAVAILABLE)
        result: Any = passed.get(key, passed)  # Once: another thread may empty it in between.
        if result is passed:
            if len(passed) >= MAX_PLANS:
                passed.clear()
            result = passed[key] = check(*arguments)
        return result

    return checked


def _asks_gradient(values: Sequence[Any]) -> bool:
    for x in values:  # noqa: SIM110  A generator costs as much as the rest.
        if x.requires_grad if isinstance(x, Tensor) else isinstance(x, list) and _asks_gradient(x):
            return True
    return False


def eager(op: Callable[..., Any], implementation: Any, recorded: Any = None) -> Callable[..., Any]:
    """The op as a function that takes the short way where that is all that the op would do.

    The short way is ``implementation`` or, where a gradient is asked, ``recorded``, an autograd function of the same
    arguments and their kind; without that the op. A ``kind`` may be given that has been made of what the arguments were
    made of.
    """

    def call(*arguments: Any, kind: Kind | None = None) -> Any:
        kind = plain_kind(arguments) if kind is None else kind
        if kind is None:
            return op(*arguments)
        if is_grad_enabled() and _asks_gradient(arguments):
            return op(*arguments) if recorded is None else recorded(*arguments, kind)
        return implementation.run_kind(kind, arguments)

    return call


def recorded(
    implementation: Any, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """``implementation`` as an autograd function of arguments and their kind, without lists of tensors, made of what
    ``library.register_autograd`` takes."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:  # A setup_context of its own costs twice as much.
            *arguments, kind = given
            output = implementation.run_kind(kind, arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            given = backward(ctx, *gradients)
            return (*given, None) if isinstance(given, tuple) else (given, None)

    return short_apply(Function)


def short_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without the look for transforms, for arguments of a :func:`plain_kind`, which are in none."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]
