"""How things are timed: medians of interleaved rounds, on a GPU by events around captured, cold-cache replays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]

COLD_BYTES = 512 * 1024**2
"""What a replay's calls should touch in all: several times the largest L2 (60 MB on an H200)."""
MAX_CALLS = 64
"""Calls captured in one replay, each on inputs of its own."""


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


def seconds(run: Run, device: torch.device) -> float:
    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - started


def interleaved(runs: Mapping[str, Run], repeats: int, device: torch.device) -> dict[str, Spread]:
    """Every run once to warm up, then ``repeats`` rounds of all: what slows the machine slows them alike."""
    for run in runs.values():
        run()
    rounds = [[seconds(run, device) for run in runs.values()] for _ in range(repeats)]
    return {name: Spread.of(column) for name, column in zip(runs, zip(*rounds, strict=True), strict=True)}


@dataclass(frozen=True)
class Captured:
    """Several calls of one operation, each on its own inputs, captured as one CUDA graph."""

    graph: torch.cuda.CUDAGraph
    calls: int
    kept: tuple[Any, ...]  # What the graph reads and writes must outlive it.

    def time(self) -> float:
        """Seconds of one call within a replay."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / self.calls


def calls_for(bytes_of_a_call: int) -> int:
    """How many input sets a replay rotates through, so that none is found in the cache."""
    return max(2, min(MAX_CALLS, -(-COLD_BYTES // max(bytes_of_a_call, 1))))


def capture(prepare: Callable[[], Run], calls: int) -> Captured:
    """Capture ``calls`` operations, each made by ``prepare`` outside the graph.

    ``prepare`` runs on the capturing stream: a backward pass runs on the stream of its forward, which must be the
    captured one.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs = [prepare() for _ in range(calls)]
        for run in runs[:2]:
            run()  # Compiles, and grows the workspaces that a capture may not.
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [run() for run in runs]
    torch.cuda.current_stream().wait_stream(stream)
    return Captured(graph, calls, (runs, results))


def rounds(captured: Mapping[str, Captured], budget: float, least: int = 10, most: int = 100) -> dict[str, Spread]:
    """Interleaved replays until ``budget`` seconds are spent, at least ``least`` rounds."""
    samples: dict[str, list[float]] = {name: [] for name in captured}
    for entry in captured.values():
        entry.time()
    started = time.perf_counter()
    for count in range(most):
        if count >= least and time.perf_counter() - started > budget:
            break
        for name, entry in captured.items():
            samples[name].append(entry.time())
    return {name: Spread.of(values) for name, values in samples.items()}
