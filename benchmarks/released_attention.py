"""Which of PyTorch's attentions a training step is fastest with, of the released model and of ours."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import released
from benchmarks.timing import Run, interleaved

Context = Callable[[], contextlib.AbstractContextManager[Any]]


def attention_backends(device: torch.device) -> dict[str, Context]:
    """Those of PyTorch's SDPA that could be the fastest in training."""
    backends: dict[str, Context] = {"fused": contextlib.nullcontext}
    if device.type == "cpu":
        # Not on a GPU, where it keeps all scores of all layers: 130 GB for a step at full size.
        backends["math"] = functools.partial(sdpa_kernel, SDPBackend.MATH)
    return backends


def released_backends(model: Any, device: torch.device) -> dict[str, Context]:
    """The same for the released model; where FlexAttention trains, its own BlockMask or the dense mask."""
    if device.type == "cpu":
        return attention_backends(device)

    @contextlib.contextmanager
    def masked(mask: Any) -> Iterator[None]:
        before, model.flex_attnmask = model.flex_attnmask, mask
        yield
        model.flex_attnmask = before

    dense = released.dense_mask(model, device)
    return {"flex": contextlib.nullcontext, "fused, dense mask": functools.partial(masked, dense)}


def under(context: Context, run: Run) -> Run:
    def wrapped() -> Any:
        with context():
            return run()

    return wrapped


def with_best_attention(run: Run, backends: Mapping[str, Context], device: torch.device) -> tuple[str, Run]:
    """The backend that is fastest in one run after a warm-up, and the run under it."""
    runs = {name: under(context, run) for name, context in backends.items()}
    if len(runs) == 1:
        return next(iter(runs.items()))
    trials = interleaved(runs, 1, device)
    best = min(trials, key=lambda name: trials[name].median)
    return best, runs[best]
