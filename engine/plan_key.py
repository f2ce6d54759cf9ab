"""What a plan is made for, by which it is found again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from madformer.config import MADFormerConfig
from madformer.engine.cache import ConditioningCache
from madformer.engine.options import SamplingOptions
from madformer.engine.schedule import Schedule
from madformer.engine.slots import Slots
from madformer.engine.structure import dtype_and_device
from madformer.model.madformer import MADFormer


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

    def allocate(self, rows: int, max_steps: int, *, guided: bool) -> tuple[Slots, ConditioningCache]:
        """What outlasts a pass of so many images at once."""
        slots = Slots(self.config, rows, max_steps, self.device, guided=guided)
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
