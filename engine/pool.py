"""What a plan is made for, by which it is found again, and plans that are kept between calls."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from madformer.config import MADFormerConfig
from madformer.engine.cache import ConditioningCache
from madformer.engine.memory import OutOfMemoryError
from madformer.engine.options import SamplingOptions
from madformer.engine.schedule import Schedule
from madformer.engine.sharing import SharedSlots
from madformer.engine.slots import Slots
from madformer.engine.structure import dtype_and_device
from madformer.model.madformer import MADFormer

if TYPE_CHECKING:
    from madformer.engine.plan import Plan
    from madformer.engine.sampler import Sampler


@dataclass(frozen=True)
class ModelKind:
    """What a plan's memory and passes are made for, of a model."""

    config: MADFormerConfig
    dtype: torch.dtype
    device: torch.device
    backend: str
    attention_backend: str

    @classmethod
    def of(cls, model: MADFormer, grid: tuple[int, int] | None = None) -> ModelKind:
        config = model.config if grid is None else model.config.at_grid(*grid)
        return cls(config, *dtype_and_device(model), model.backend, model.attention_backend)

    def allocate(self, rows: int, max_steps: int, *, guided: bool, shares: int = 1) -> tuple[Slots, ConditioningCache]:
        """What outlasts a pass of so many images at once, in so many shares."""
        slots_of = Slots if shares == 1 else partial(SharedSlots, shares)
        slots = slots_of(self.config, rows, max_steps, self.device, guided=guided)
        rows *= slots.branches
        cache = ConditioningCache(self.config, rows, dtype=self.dtype, device=self.device, backend=self.backend)
        return slots, cache

    def difference(self, expected: ModelKind) -> str:
        """What is not as expected, in one line."""
        fields = [
            (prefix + field.name, getattr(one, field.name), getattr(other, field.name))
            for prefix, one, other in (("config.", self.config, expected.config), ("", self, expected))
            for field in dataclasses.fields(one)
            if field.name != "config"
        ]
        return ", ".join(f"{name}={one}, not {other}" for name, one, other in fields if one != other)


@dataclass(frozen=True)
class PlanKey:
    """What a plan depends on. Values of weights and of schedules are not in it."""

    batch: int
    num_steps: int
    guided: bool
    refresh_every: int
    tabulated: bool
    clip: float | None
    kind: ModelKind

    @classmethod
    def of(cls, batch: int, schedule: Schedule, kind: ModelKind, options: SamplingOptions) -> PlanKey:
        steps, table = len(schedule.timesteps), schedule.table
        clip = None if table is None else table.clip
        every = min(options.refresh_every, steps)
        return cls(batch, steps, options.guided, every, table is not None, clip, kind)


class PlanPool:
    """Keeps the plans that were used last. Any thread may ask it, and nobody waits.

    A copy of it, and what a pickle of it gives, is empty.

    Args:
        most_idle: how many plans are kept that nobody uses, each with a cache and on a CPU its packed weights.
    """

    def __init__(self, most_idle: int = 2) -> None:
        self.most_idle = most_idle
        self._idle: list[Plan] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.most_idle,)

    @contextlib.contextmanager
    def plan(self, sampler: Sampler, *arguments: Any, **options: Any) -> Iterator[Plan]:
        """A plan of one's own, of :meth:`~madformer.engine.sampler.Sampler.plan`, until the context is left."""
        try:
            plan = sampler.plan(*arguments, **options, reuse=self._take)
        except OutOfMemoryError:
            if not self._idle:
                raise
            self.clear()
            plan = sampler.plan(*arguments, **options)
        try:
            yield plan
        finally:
            plan.rest()
            with self._lock:
                self._idle.append(plan)
                del self._idle[: -self.most_idle]

    def clear(self) -> None:
        """Give back the memory of idle plans."""
        with self._lock:
            self._idle.clear()

    def _take(self, key: PlanKey) -> Plan | None:
        with self._lock:
            for plan in reversed(self._idle):
                if plan.key == key:
                    self._idle.remove(plan)
                    return plan
        return None
