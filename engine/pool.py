"""Plans that are kept between calls, each used by one of them at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from madformer.engine.memory import OutOfMemoryError
from madformer.engine.plan import Plan
from madformer.engine.plan_key import PlanKey
from madformer.engine.sampler import Sampler


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
