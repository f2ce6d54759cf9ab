"""The runtime of sampling: scheduler tables, caches and loops.

What a program needs of it is imported from here; :mod:`.reference` tells the algorithm without any of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from madformer.lazy import exporter

if TYPE_CHECKING:
    from madformer.conditioning.prompt import Prompt
    from madformer.engine.batching import InFlightBatcher, QueueFullError
    from madformer.engine.memory import OutOfMemoryError
    from madformer.engine.options import SamplingOptions
    from madformer.engine.plan import NoiseSource, Plan
    from madformer.engine.progress import Change, FinishedBlock, Progress
    from madformer.engine.reference import sample_uncached
    from madformer.engine.running import InUseError, NonFiniteError
    from madformer.engine.sampler import Sampler, bytes_per_image
    from madformer.engine.schedule import ScheduleTable, tabulate

__all__ = [
    "Change",
    "FinishedBlock",
    "InFlightBatcher",
    "InUseError",
    "NoiseSource",
    "NonFiniteError",
    "OutOfMemoryError",
    "Plan",
    "Progress",
    "Prompt",
    "QueueFullError",
    "Sampler",
    "SamplingOptions",
    "ScheduleTable",
    "bytes_per_image",
    "sample_uncached",
    "tabulate",
]

__getattr__ = exporter(
    __name__,
    {
        "madformer.engine.batching": ("InFlightBatcher", "QueueFullError"),
        "madformer.conditioning.prompt": ("Prompt",),
        "madformer.engine.memory": ("OutOfMemoryError",),
        "madformer.engine.options": ("SamplingOptions",),
        "madformer.engine.plan": ("NoiseSource", "Plan"),
        "madformer.engine.progress": ("Change", "FinishedBlock", "Progress"),
        "madformer.engine.reference": ("sample_uncached",),
        "madformer.engine.running": ("InUseError", "NonFiniteError"),
        "madformer.engine.sampler": ("Sampler", "bytes_per_image"),
        "madformer.engine.schedule": ("ScheduleTable", "tabulate"),
    },
)
