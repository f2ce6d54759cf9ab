"""Latency under Poisson arrivals: the virtual clock against waits worked out by hand, the gate, and the record."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import batching
from madformer.conditioning.prompt import Prompt
from madformer.engine.batching import InFlightBatcher
from madformer.engine.plan import Plan

SECONDS_A_BATCH = 4.0


class Clock:
    """Stands still but for the work that is charged to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Noises:
    """Request ``i`` has the image ``i``."""

    def __getitem__(self, request: int) -> Tensor:
        return torch.tensor([float(request)])

    def prompt(self, *batch: int) -> Prompt:
        return Prompt()


def make_plan(clock: Clock, size: int) -> Plan:
    def run(batch: Tensor, prompt: Prompt) -> Tensor:
        assert len(batch) == size
        clock.now += SECONDS_A_BATCH
        return batch

    plan: Any = SimpleNamespace(batch=size, run=run, model=SimpleNamespace(device=torch.device("cpu")))
    return plan


class FakeBatcher:
    """A second a step, three steps an image; images leave at the beginning of the step after their last."""

    sampler = SimpleNamespace(source=SimpleNamespace(device=torch.device("cpu")))

    def __init__(self, clock: Clock, slots: int) -> None:
        self.clock, self.slots = clock, slots
        self.waiting: list[tuple[Future[Tensor], Tensor]] = []
        self.running: list[list[Any]] = []

    num_waiting = property(lambda self: len(self.waiting))
    num_running = property(lambda self: len(self.running))

    def submit(self, noise: Tensor, steps: int, prompt: Prompt) -> Future[Tensor]:
        future: Future[Tensor] = Future()
        self.waiting.append((future, noise))
        return future

    def step(self) -> int:
        for job in [job for job in self.running if job[2] == 0]:
            self.running.remove(job)
            job[0].set_result(job[1])
        while self.waiting and len(self.running) < self.slots:
            self.running.append([*self.waiting.pop(0), 3])
        if self.running:
            self.clock.now += 1.0
        for job in self.running:
            job[2] -= 1
        return len(self.running)


def test_in_flight_on_a_virtual_clock(clock: Clock) -> None:
    batcher: Any = FakeBatcher(clock, slots=2)
    served = batching.serve_in_flight(batcher, [1.0, 1.5, 1.5, 20.0], 3, Noises())  # type: ignore[arg-type]
    # the first begins at 1; the second joins at 2, the third waits for the first one's slot until 4
    assert served.latencies == pytest.approx([3.0, 5.0 - 1.5, 7.0 - 1.5, 3.0])
    assert [image.item() for image in served.images] == [0, 1, 2, 3]
    assert (served.finished, served.busy) == pytest.approx((23.0, 9.0))


@pytest.mark.parametrize(
    ("wait_until_full", "latencies", "finished"),
    [
        # [1, 2] begins at 2, [3, 3.5] when that is done at 6, [30, 31] at 31
        (True, [5.0, 4.0, 7.0, 6.5, 5.0, 4.0], 35.0),
        # [1] begins at once, [2, 3] at 5, [3.5] at 9, [30] at 30, [31] at 34
        (False, [4.0, 7.0, 6.0, 9.5, 4.0, 7.0], 38.0),
    ],
)
def test_batches_on_a_virtual_clock(
    clock: Clock, wait_until_full: bool, latencies: list[float], finished: float
) -> None:
    times = [1.0, 2.0, 3.0, 3.5, 30.0, 31.0]
    served = batching.serve_batches(make_plan(clock, 2), times, Noises(), wait_until_full=wait_until_full)  # type: ignore[arg-type]
    assert served.latencies == pytest.approx(latencies)
    assert served.finished == pytest.approx(finished)
    assert [image.item() for image in served.images] == list(range(6))


def test_arrivals_are_a_poisson_process() -> None:
    times = batching.arrivals(4000, rate=5.0)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    # of an exponential distribution the standard deviation is the mean: three standard errors of each
    assert mean == pytest.approx(0.2, rel=0.05)
    assert variance**0.5 == pytest.approx(0.2, rel=0.07)
    assert times == batching.arrivals(4000, rate=5.0)
    assert times != batching.arrivals(4000, rate=5.0, seed=1)


def test_statistics_of_latencies() -> None:
    latency = batching.Latency.of([float(value) for value in range(101)])
    assert (latency.mean, latency.median, latency.percentile_95) == (50.0, 50.0, 95.0)


def served(scale: float) -> batching.Served:
    return batching.Served([], 0, 0, [torch.full((2,), scale), torch.full((2,), scale)])


@pytest.mark.parametrize(
    ("dtype", "in_flight", "agrees"),
    [
        (torch.bfloat16, 1.02, True),
        (torch.bfloat16, 1.03, False),
        (torch.bfloat16, float("nan"), False),
        (torch.float32, 1.0005, True),
        (torch.float32, 1.005, False),
    ],
)
def test_images_that_disagree_are_no_speed(dtype: torch.dtype, in_flight: float, agrees: bool) -> None:
    exact = [torch.ones(2)]
    policies = {"full batches": served(1.01 if dtype == torch.bfloat16 else 1.0), "in flight": served(in_flight)}
    if agrees:
        assert batching.check(policies, exact, dtype)["in flight"] == pytest.approx(in_flight - 1, rel=1e-3)
    else:
        with pytest.raises(batching.CannotCompare, match="no speeds: images of in flight"):
            batching.check(policies, exact, dtype)


def test_record(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "record.json"
    arguments = ["--preset", "tiny", "--slots", "2", "--steps", "1", "--requests", "4", "--precision", "exact"]
    steps = count_calls(monkeypatch, InFlightBatcher, "step")
    assert batching.main([*arguments, "--out", str(out)]) == 0
    assert steps
    record = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record["metrics"]
    means = {name: latency["mean"] for name, latency in record["latency"].items()}
    assert record["metrics"]["inflight_latency_gain"] == means["full batches"] / means["in flight"]
    assert record["arrivals_per_second"] == pytest.approx(0.6 * record["capacity_images_per_second"])
    assert max(record["relative_errors"].values()) < 1e-4


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[Any]:
    calls: list[Any] = []
    original: Callable[..., Any] = getattr(owner, name)

    def counted(self: Any) -> Any:
        calls.append(self)
        return original(self)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests", "10", "--slots", "4"], "--requests 10 must be a multiple of --slots 4"),
        (["--load", "1"], "--load 1.0 must lie between 0 and 1"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        batching.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    assert batching.main(["--model", "no/such/model", "--out", str(out)]) == 1
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1
    assert "no/such/model" in stderr
    assert not out.exists()
