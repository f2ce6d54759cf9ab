"""What of a module tree another one may stand in for, and how a change of it is seen.

A module may be replaced by something faster, or captured, only as long as calling it is running its class's
``forward`` on its tensors. Hooks, a ``forward`` of the instance's own, parametrizations, tensors of a quantising
library and classes that are not known here can each do something else, and at any time: such a module is called as it
stands.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_KNOWN = ("torch.nn.modules.", "diffusers.", "madformer.")
_KNOWN_TOO = ("builtins", "collections", "torch", "torch.nn.functional")
# what runs where nothing has been put in its place, for the whole process
_ORIGINALS = ((nn.Linear, "forward"), (nn.Conv2d, "forward"), (nn.Conv2d, "_conv_forward"), (nn.Module, "__call__"))
_CLASSES = tuple(getattr(cls, name) for cls, name in _ORIGINALS)
_FUNCTIONS = F.linear, F.conv2d
_PLAIN = frozenset((nn.Parameter, Tensor, type(None), nn.Buffer))
_SIMPLE = (bool, int, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, torch.memory_format)

# of nn.Module, and without a part in what a call computes
_BOOKKEEPING = frozenset(vars(nn.Module()))
_SEEN = ("training", "_parameters", "_buffers")

M = TypeVar("M", bound=nn.Module)
Signature = tuple[Hashable, ...]


class Placed(NamedTuple):
    """A tensor in a signature."""

    address: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def plain(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's ``forward`` on plain tensors, and nothing else."""
    attributes = vars(module)
    return not (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or "forward" in attributes
        or attributes.get("_compiled_call_impl") is not None
        # in the place of a parameter
        or any(isinstance(attributes.get(name), Tensor) for name in ("weight", "bias"))
    ) and _PLAIN.issuperset(map(type, (*attributes["_parameters"].values(), *attributes["_buffers"].values())))


def process_is_plain() -> bool:
    """Whether no hook on every module, and no other linear layer or convolution, was put into the process."""
    hooks = torch.nn.modules.module
    return (
        tuple(getattr(cls, name) for cls, name in _ORIGINALS) == _CLASSES
        and (F.linear, F.conv2d) == _FUNCTIONS
        and not hooks._global_forward_hooks
        and not hooks._global_forward_pre_hooks
    )


def all_plain(model: nn.Module) -> bool:
    """Whether everything in the tree is :func:`plain` and of a class that is known here, as is the process."""
    return process_is_plain() and all(
        plain(module) and (_known(module) or type(module).__module__.startswith("peft.")) for module in model.modules()
    )


def _known(value: object) -> bool:
    """Whether it is of a library whose objects keep what they do in simple attributes."""
    if isinstance(value, (type, types.FunctionType)):
        return _known_name(value.__module__)
    return _known_name(type(value).__module__)


@functools.cache
def _known_name(module: str | None) -> bool:
    return module is not None and (module.startswith(_KNOWN) or module in _KNOWN_TOO)


def _all_known(module: nn.Module) -> bool:
    """Whether the module and all of its own attributes are."""
    attributes = vars(module)
    return _known(module) and all(_known(attributes[name]) for name in attributes.keys() - _BOOKKEEPING)


def rebuilt(model: M, stand_in: Callable[[str, nn.Module], nn.Module | None]) -> M:
    """A tree of its own over the same tensors, hooks and attributes, with some modules replaced.

    Modules above none that is replaced stay the very ones of ``model``, as do those that are not plain or of a class
    that is not known, with all that is below: what those keep of a call is found where its owner looks for it.

    Args:
        stand_in: called with name and module; what takes its place, or None.
    """
    return _rebuilt(model, "", stand_in, {})  # type: ignore[return-value]


def _rebuilt(
    module: nn.Module,
    name: str,
    stand_in: Callable[[str, nn.Module], nn.Module | None],
    done: dict[nn.Module, nn.Module],
) -> nn.Module:
    if module in done:
        return done[module]
    result = module
    if plain(module):
        if (other := stand_in(name, module)) is not None:
            result = other
        elif module._modules and _all_known(module):
            children = {
                child_name: None if child is None else _rebuilt(child, f"{name}.{child_name}", stand_in, done)
                for child_name, child in module._modules.items()
            }
            if any(child is not module._modules[child_name] for child_name, child in children.items()):
                result = over_the_same(module, children)
    done[module] = result
    return result


def over_the_same(module: M, children: dict[str, nn.Module | None] | None = None) -> M:
    """Another module of the same class that shares all but its children, and shares these too where none are given."""
    other = object.__new__(type(module))
    other.__dict__ = vars(module) | {"_modules": dict(module._modules) if children is None else children}
    return other


class UnknownPartError(Exception):
    """Something in a module tree may change without being seen; the message says what."""


def signature(model: nn.Module) -> Signature:
    """Changes with all that a captured pass has of the model: where its tensors are, and how it is built.

    Values of tensors are not in it: what is captured reads them when it runs.

    Raises:
        UnknownPartError: there may be more to the model than can be seen.
    """
    if not process_is_plain():
        raise UnknownPartError("hooks or other layers for the whole process")
    parts: list[Hashable] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not plain(module):
            raise UnknownPartError(f"{name or 'the model'} has hooks, a forward of its own or tensors of another kind")
        if not (_known(module) or type(module).__module__.startswith("peft.")):
            kind = type(module)
            raise UnknownPartError(f"{name or 'the model'} is a {kind.__module__}.{kind.__qualname__}")
        attributes = {key: value for key, value in vars(module).items() if key not in _BOOKKEEPING or key in _SEEN}
        parts.append((name, type(module), _frozen(attributes, name)))
    return tuple(parts)


def _frozen(value: Any, name: str) -> Hashable:
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, float):
        return repr(value)  # NaN is not itself
    if type(value) in _PLAIN:
        return Placed(value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, dict):
        return tuple((_frozen(key, name), _frozen(item, f"{name}.{key}")) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), *(_frozen(item, name) for item in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(_frozen(item, name) for item in value)
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        if isinstance(value, types.FunctionType) and (value.__closure__ or not _known(value)):
            raise UnknownPartError(f"{name} is a function, which may look at anything")
        return value
    if _known(value) and not isinstance(value, nn.Module):
        if dataclasses.is_dataclass(value):
            return type(value), repr(value)
        return type(value), _frozen(getattr(value, "__dict__", {}), name)
    raise UnknownPartError(f"{name} is a {type(value).__module__}.{type(value).__qualname__}")


def unwrapped(model: Any) -> Any:
    """The network in what ``torch.compile``, adapters of a library or data parallelism put around it.

    Sampling calls its parts and not the whole, which is all that such a module would run.
    """
    while isinstance(model, nn.Module):
        inner = model._modules.get("_orig_mod")
        if inner is None and type(model).__module__.startswith("peft."):
            base: Any = model
            inner = base.get_base_model()
        if inner is None and type(model).__module__.startswith("torch.nn.parallel."):
            inner = model._modules.get("module")
        if inner is None:
            return model
        model = inner
    return model


def around_the_whole(model: nn.Module) -> str | None:
    """What somebody put around the call of a model, but for what moves and casts its weights; None for nothing."""
    if any(map(_is_foreign, [*model._forward_hooks.values(), *model._forward_pre_hooks.values()])):
        return "a hook"
    own = vars(model).get("forward")
    return "a forward of its own" if own is not None and _is_foreign(own) else None


def _is_foreign(call: Any) -> bool:
    for name in ("func", "__func__"):  # of a partial and of a method
        call = getattr(call, name, call)
    # not its `__module__`, which is that of a function that it wraps
    where = getattr(call, "__globals__", {}).get("__name__") or type(call).__module__
    return where.partition(".")[0] not in ("torch", "accelerate", "diffusers", "peft", "madformer")


def dtype_and_device(model: Any) -> tuple[torch.dtype, torch.device]:
    """What the model computes in and where: ``model.dtype`` and ``model.device``.

    diffusers looks for hooks that cast or move weights in the call, which takes milliseconds where there are none.
    """
    modules, seen = [model], set()
    while modules:
        module = modules.pop()
        attributes = vars(module)
        if "_diffusers_hook" in attributes:
            return model.dtype, model.device
        seen.add(module)
        modules += [child for child in attributes["_modules"].values() if child is not None and child not in seen]
    first = next(model.parameters())
    return (first.dtype if first.is_floating_point() else model.dtype), first.device
