"""Clocks: medians of interleaved rounds, and marks around the launches of one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from madformer.machine import seconds, synchronize

Run = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a list of seconds, by linear interpolation between the values."""

    median: float
    first_quartile: float
    third_quartile: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], tuple(samples))
        first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, first, third, tuple(samples))


def interleaved(runs: Mapping[str, Run], repeats: int, device: torch.device) -> dict[str, Spread]:
    """Every run once to warm up, then ``repeats`` rounds of all: what slows the machine slows them alike."""
    for run in runs.values():
        run()
    rounds = [[seconds(run, device) for run in runs.values()] for _ in range(repeats)]
    return {name: Spread.of(column) for name, column in zip(runs, zip(*rounds, strict=True), strict=True)}


@dataclass
class Stopwatch:
    """Adds up the time of some calls within a run.

    On a GPU by events in its stream, so that no call is waited for: a call then lasts from when the device is done
    with what came before it, or from its launch if that is later, until the device is done with it.
    """

    device: torch.device
    intervals: list[tuple[Any, Any]] = field(default_factory=list)

    def around(self, run: Run) -> Run:
        """``run`` with its time taken at every call."""

        def timed() -> Any:
            started = self._mark()
            result = run()
            self.intervals.append((started, self._mark()))
            return result

        return timed

    def read(self) -> float:
        """Seconds of all calls since the last reading; waits for the device."""
        synchronize(self.device)
        if self.device.type == "cuda":
            total = sum(start.elapsed_time(stop) for start, stop in self.intervals) / 1e3
        else:
            total = sum(stop - start for start, stop in self.intervals)
        self.intervals.clear()
        return total

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
