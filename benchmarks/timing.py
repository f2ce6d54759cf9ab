"""How kernels are timed: on a GPU by events around captured, cold-cache replays. Whole runs: the package's clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from madformer.machine import seconds
from madformer.measuring.timing import Run, Spread, interleaved

__all__ = ["Captured", "Run", "Spread", "calls_for", "capture", "interleaved", "rounds", "seconds"]

COLD_BYTES = 512 * 1024**2
"""What a replay's calls should touch in all: several times the largest L2 (60 MB on an H200)."""
DELAY_CYCLES = 400_000
"""About 0.2 ms: several times what it takes to launch a replay of :data:`MAX_CALLS` calls."""
MAX_CALLS = 64
"""Calls captured in one replay, each on inputs of its own."""


@dataclass(frozen=True)
class Captured:
    """Several calls of one operation, each on its own inputs, captured as one CUDA graph."""

    graph: torch.cuda.CUDAGraph
    calls: int
    kept: tuple[Any, ...]  # What the graph reads and writes must outlive it.

    def time(self) -> float:
        """Seconds of one call within a replay."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device sleeps until the replay is in its queue: else the first call waits for its launch, and is timed so.
        torch.cuda._sleep(DELAY_CYCLES)
        start.record()
        self.graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / self.calls


def calls_for(bytes_of_a_call: int) -> int:
    """How many input sets a replay rotates through, so that none is found in the cache.

    Args:
        bytes_of_a_call: that it touches. What it was given and leaves alone does not displace anything.
    """
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
