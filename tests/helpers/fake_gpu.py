"""A pretended GPU: tensors on ``cuda:0`` that have shapes, dtypes and layouts and no memory, where there is no GPU.

What would run on a GPU runs here as far as Python and PyTorch's own checks go: devices, dtypes, layouts, and which ops
are called. Nothing is computed. It needs a PyTorch that is built with CUDA; no driver.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch._subclasses.fake_tensor as fake_tensor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from madformer.config import MADFormerConfig
from madformer.engine import structure
from madformer.engine.schedule import Schedule, ScheduleTable
from madformer.model import MADFormer

GPU = torch.device("cuda", 0)
REFUSAL = (
    "PyTorch is built without CUDA"
    if torch.version.cuda is None
    else "there is a GPU: its own tests say more"
    if torch.cuda.is_available()
    else ""
)
"""Why there is nothing to pretend; empty where there is."""

H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 << 30,
    L2_cache_size=60 << 20,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
)

READS_FOR_THE_HOST = (
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique",
    "equal.default",
    "repeat_interleave.Tensor",
    "_pin_memory",
)
"""Ops that wait for the device, by a part of their name: a capture does not allow them, and any other pass stalls."""


class Watch(TorchDispatchMode):
    """Notes which ops of tensors on the GPU read for the host, or have tensors of two devices; a capture forgives
    neither. Enter it within the fake mode.

    Attributes:
        found: how often, by op and the devices and shapes of its tensors. ops: how often each op was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()
        self.ops: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.ops[name] += 1
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        reads = any(part in name for part in READS_FOR_THE_HOST) or _indexes_by_mask(name, args)
        if reads and any(x.is_cuda for x in tensors):
            self._note(name, tensors)
        result = func(*args, **(kwargs or {}))
        tensors += [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if name == "aten.fill_.Tensor":
            return result  # by a number, as in x[0] = 1
        if len({x.device.type for x in tensors} - {"meta"}) > 1:
            self._note(name, tensors)
        return result

    def _note(self, name: str, tensors: list[Tensor]) -> None:
        described = ", ".join(f"{x.device.type} {tuple(x.shape)}" for x in tensors)
        self.found[f"{name}: {described}"] += 1


def _indexes_by_mask(name: str, args: Any) -> bool:
    if not name.startswith(("aten.index.", "aten.index_put", "aten._index_put", "aten._unsafe_index")):
        return False
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]))


class _Stream:
    """Of a device that does nothing; also its context."""

    cuda_stream = stream_id = device_index = 0
    device = GPU

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def _nowhere(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "_lazy_init": lambda: None,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda _: None,
    "get_device_properties": lambda *_: H200,
    "get_device_capability": lambda *_: (H200.major, H200.minor),
    "get_device_name": lambda *_: H200.name,
    "is_bf16_supported": lambda *_, **__: True,
    "is_current_stream_capturing": lambda: False,
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "mem_get_info": lambda *_: (139 << 30, H200.total_memory),
    "memory_reserved": lambda *_: 0,
    "memory_allocated": lambda *_: 0,
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda *_: None,
    "Stream": _Stream,
    "Event": _Event,
    "current_stream": lambda *_: _Stream(),
    "stream": _nowhere,
    "device": _nowhere,
}


@contextlib.contextmanager
def pretended_gpu() -> Iterator[FakeTensorMode]:
    """The mode in which tensors are made; PyTorch says meanwhile that the process has an H200."""
    with contextlib.ExitStack() as held:
        for name, stand_in in _CUDA.items():
            held.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        held.enter_context(mock.patch.object(torch.cuda.graphs, "is_current_stream_capturing", return_value=False))
        held.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", return_value=None))
        # values of single numbers are computed along otherwise, on a device that there is not
        held.enter_context(mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", -1))
        held.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", property(lambda _: True)))
        held.enter_context(mock.patch.object(Schedule, "of", _schedule))
        # a fake tensor is the plain one here, also as a parameter
        held.enter_context(mock.patch.object(structure, "_PLAIN", structure._PLAIN | {fake_tensor.FakeTensor}))
        yield held.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


_schedule_of = Schedule.of


def _schedule(scheduler: Any, num_steps: int, device: torch.device) -> Schedule:
    """Made of numbers, which fake tensors do not have, and then moved."""
    with unset_fake_temporarily():
        real = type(scheduler).from_config(scheduler.config)
        schedule = _schedule_of(real, num_steps, torch.device("cpu"))
    table = schedule.table
    if table is not None:
        table = ScheduleTable(**{name: fake(value) for name, value in vars(table).items()})
    return dataclasses.replace(schedule, table=table, timesteps=fake(schedule.timesteps))


def fake(value: Any) -> Any:
    """A tensor of the CPU as a fake one on the GPU; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)


def make_model(config: MADFormerConfig, dtype: torch.dtype, *, trained: bool = False) -> MADFormer:
    """On the pretended GPU."""
    with GPU:
        model = MADFormer(config)
    for module in model.modules():  # Module.to swaps tensors, which fake ones do not allow
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=trained)
        for name, buffer in module._buffers.items():
            module._buffers[name] = fake(buffer)
    return model.train(trained)
