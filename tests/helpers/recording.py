"""CUDA graphs on the CPU, as far as they can be had: what a pass dispatches is recorded once and replayed.

A replay runs the same operators on the same memory, with every number that the host supplied as it was at the capture.
Like a graph it knows nothing of Python: a pass whose work depends on a block, step or length that the host reads is
right where it was recorded and wrong elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
}


class HostReadError(AssertionError):
    """A pass looked at a value, which a capture on a GPU does not survive."""


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_READS:
            raise HostReadError(str(func))
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, recorded in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordingLauncher:
    """In place of :class:`madformer.engine.graphs.GraphLauncher`; ``replays`` counts by name."""

    captures = True

    def __init__(self) -> None:
        self.prepared: list[str] = []
        self.replays = 0

    def prepare(self, name: str, work: Callable[[], None], reset: Callable[[], None]) -> Callable[[], None]:
        reset()
        with Recorder() as recorder:
            work()
        self.prepared.append(name)

        @torch.inference_mode()
        def launch() -> None:
            self.replays += 1
            recorder.replay()

        return launch

    def loop(self, step: Callable[[], None], num_steps: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(num_steps):
                step()

        return run
