"""The statistics of the benchmarks, and how runs are interleaved."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from benchmarks import timing

CPU = torch.device("cpu")


def test_spread_is_linear_between_samples() -> None:
    spread = timing.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.first_quartile, spread.median, spread.third_quartile) == (2.0, 3.0, 4.0)
    spread = timing.Spread.of([0.0, 1.0])
    assert (spread.first_quartile, spread.median, spread.third_quartile) == (0.25, 0.5, 0.75)
    assert timing.Spread.of([7.0]).median == statistics.median([7.0])


def test_runs_are_interleaved_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []

    def run(name: str, duration: float) -> None:
        order.append(name)
        clock[0] += duration

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    spreads = timing.interleaved({"a": lambda: run("a", 1.0), "b": lambda: run("b", 2.0)}, 3, CPU)
    assert "".join(order) == "ab" + "ab" * 3
    assert spreads["a"].samples == (1.0,) * 3
    assert spreads["b"].samples == (2.0,) * 3


@pytest.mark.parametrize(("size", "calls"), [(1, 64), (100 * 1024**2, 6), (8 * 1024**3, 2)])
def test_replays_rotate_through_more_than_the_cache(size: int, calls: int) -> None:
    assert timing.calls_for(size) == calls


@pytest.mark.gpu
def test_captured_calls_compute_and_are_timed() -> None:
    results = []

    def prepare() -> timing.Run:
        x = torch.full((1 << 20,), 2.0, device="cuda")
        results.append(x)
        return lambda: x.mul_(2)

    captured = timing.capture(prepare, calls=3)
    before = results[2][0].item()
    assert captured.time() > 0
    assert results[2][0].item() == 2 * before
