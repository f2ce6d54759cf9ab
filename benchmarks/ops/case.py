"""What a kernel is checked and timed on: one op at one shape, with its work counted."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Operation = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: its name, under which the record's metrics stand.
        label: the shape in words.
        inputs: makes the arguments of ``run`` on a device; those that require a gradient are differentiated.
        run: ``run(*inputs, backend=...)``: the public function; returns a tensor or a tuple of tensors.
        forward_bytes, backward_bytes: the least that must move through device memory (each input read once, each
            output written once); 0 where the op is bound by arithmetic or has no backward.
        forward_flops, backward_flops: the arithmetic that must be done; 0 where the op is bound by memory.
        peers: other implementations of the same, by name, called as ``peer(*inputs)``.
    """

    op: str
    label: str
    inputs: Callable[[torch.device], tuple[Any, ...]]
    run: Operation
    forward_bytes: int = 0
    backward_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    peers: Mapping[str, Operation] = field(default_factory=dict)


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors of a result that a gradient can flow into."""
    results = result if isinstance(result, (tuple, list)) else (result,)
    return [x for x in results if isinstance(x, Tensor) and x.requires_grad]


def leaves_of(inputs: tuple[Any, ...]) -> list[Tensor]:
    """The inputs that a gradient is asked of; lists of tensors are looked into."""
    flat = [x for entry in inputs for x in (entry if isinstance(entry, (list, tuple)) else (entry,))]
    return [x for x in flat if isinstance(x, Tensor) and x.requires_grad]


def launch_both_ways(case: Case) -> None:
    """Calls the op forward and backward on uninitialised tensors of the CPU, for what becomes of its launches."""
    inputs = case.inputs(torch.device("cpu"))
    outputs = tensors_of(case.run(*inputs, backend="triton"))
    if outputs and (leaves := leaves_of(inputs)):
        torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs], allow_unused=True)


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> Tensor:
    """A standard normal leaf; uninitialised on a CPU, where kernels are compiled but not run."""
    make = torch.empty if device.type == "cpu" else torch.randn
    return make(shape, device=device, dtype=dtype, requires_grad=grad)


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The case with ``dtype`` in place of bfloat16, for compiling: its numbers are uninitialised."""

    def converted(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(converted, value))
        if not (isinstance(value, Tensor) and value.dtype == torch.bfloat16):
            return value
        like = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=value.device)
        return like.requires_grad_(value.requires_grad)

    def inputs(device: torch.device) -> tuple[Any, ...]:
        return tuple(converted(value) for value in case.inputs(device))

    name = {torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    return replace(case, label=case.label.replace("bf16", name), inputs=inputs)


def every_case() -> Iterator[Case]:
    """The cases of all files beside this one that have some."""
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        yield from getattr(importlib.import_module(f"benchmarks.ops.{info.name}"), "cases", list)()
