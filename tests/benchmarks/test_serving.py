"""How figures of a server are put together: waits on a virtual clock, percentiles, metrics, options; no timing."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("httpx", reason="httpx is not installed")

from benchmarks import serving
from benchmarks.record import CannotCompare


def test_full_batches_wait_for_their_last_request_and_for_each_other() -> None:
    """Two at a time, 3 s a batch: they begin at 1, at 10 (the last to come) and at 13 (when the one before is done)."""
    assert serving.full_batches([0.0, 1.0, 2.0, 10.0, 11.0], 2, 3.0) == pytest.approx((4 + 3 + 11 + 3 + 5) / 5)
    # n batches of requests that are all there at once: the mean over batches of k s
    assert serving.full_batches([0.0] * 12, 3, 2.0) == pytest.approx(2.0 * (4 + 1) / 2)
    # whoever comes alone, after the one before is done, waits for a batch
    assert serving.full_batches([0.0, 5.0, 9.0], 1, 1.5) == pytest.approx(1.5)


def test_cuts_of_a_ramp_are_its_percents() -> None:
    assert serving.cuts(range(100, -1, -1)) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert serving.cuts([1.0, 2.0]) == pytest.approx({"p50": 1.5, "p95": 1.95, "p99": 1.99})
    assert serving.cuts([1.0]) is None


def test_images_a_second_while_it_is_full() -> None:
    """Of two clients: the first two and the last two are left out, unless hardly any are left."""
    assert serving.images_a_second([0.0, 5.0, 6.0, 6.5, 7.0, 7.5, 20.0, 30.0], 2, 1.0) == pytest.approx(2.0)
    assert serving.images_a_second([0.0, 1.0, 4.0], 2, 1.0) == pytest.approx(0.5)
    with pytest.raises(CannotCompare, match="--seconds 3 is too short"):
        serving.images_a_second([1.0], 2, 3.0)


def test_figures_of_a_load() -> None:
    level = serving.Level(
        0.8, 2.0, images=[1.0, 2.0, 3.0], first_blocks=[0.5, 0.5, 0.8], refused=1, lost=2, seconds=6.0,
        fills=[0.5, 1.0], step_seconds=[0.125, 0.375],
    )  # fmt: skip
    assert level.figures(40) == {
        "load": 0.8, "arrivals_per_second": 2.0, "requests": 6, "refused": 1, "lost": 2,
        "goodput_images_per_second": 0.5, "latency": serving.cuts([1, 2, 3]), "mean_latency": 2.0,
        "first_block": serving.cuts([0.5, 0.5, 0.8]), "batch_fill": 0.75,
        "predicted_latency_by_step_times": 40 * 0.25,
    }  # fmt: skip
    empty = serving.Level(1.0, 1.0, refused=3, seconds=1.0).figures(40)
    assert (empty["requests"], empty["goodput_images_per_second"]) == (3, 0.0)
    for name in ("latency", "mean_latency", "first_block", "batch_fill", "predicted_latency_by_step_times"):
        assert empty[name] is None


def level_of(load: float, p95: float | None, **figures: Any) -> dict[str, Any]:
    latency = None if p95 is None else {"p50": 1.0, "p95": p95, "p99": p95}
    return {"load": load, "latency": latency, "predicted_latency_by_step_times": None, **figures}


def test_metrics() -> None:
    """Of a record made by hand; what was not measured is left out, and nothing is made up for it."""
    levels = [
        level_of(0.6, 3.0, mean_latency=2.0),
        level_of(0.8, 4.0, predicted_latency_by_step_times=5.0),
        level_of(1.2, 6.0, refused=3, requests=12),
    ]
    record = {
        "alone": {
            "own_cost": 0.03, "own_cost_over_one_thread": 0.01, "first_block_share": 0.3, "streamed_seconds": 2.0,
        },
        "images_per_second": 9.0, "pipeline_images_per_second": 10.0, "full_batches_mean_latency": 7.0,
        "soak": {"mib_per_minute": 0.5}, "levels": levels,
    }  # fmt: skip
    always = {
        "server_own_cost": 0.03, "server_own_cost_over_one_thread": 0.01, "server_first_block_share": 0.3,
        "server_throughput_over_pipeline": 0.9,
    }  # fmt: skip
    assert serving.metrics(record) == pytest.approx(
        {
            **always,
            "server_p95_at_80_over_unloaded": 2.0,
            "server_p95_at_80_over_predicted": 0.8,
            "server_p95_at_120_over_80": 1.5,
            "server_refused_at_120": 0.25,
            "server_full_batches_over_in_flight": 3.5,
            "server_mib_per_minute": 0.5,
        }
    )
    unanswered = {"soak": None, "levels": [level_of(0.6, None), level_of(0.8, None), level_of(1.2, 6.0)]}
    assert serving.metrics(record | unanswered) == pytest.approx(always)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *((f"--{name}={value}", "must be positive") for name in ("slots", "max-waiting", "steps", "rounds", "pairs")
          for value in (0, -1)),
        *((f"--seconds={value}", "must be positive") for value in (0, -1, "nan", "inf")),
        *((f"--soak={value}", "--soak must be 0 or at least 10") for value in (-20, 9.9, "nan", "inf")),
        *((f"--loads={value}", "--loads must be positive") for value in (0, -0.5, "nan", "inf")),
        ("--slots=many", "invalid int value"),
    ],
)  # fmt: skip
def test_options_that_make_no_measurement(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        serving.parse([words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_options() -> None:
    options = serving.parse(["--loads", "0.8", "2", "--soak", "10", "--slots", "3"])
    assert (options.loads, options.soak, options.slots) == ([0.8, 2.0], 10.0, 3)
    assert serving.parse([]).loads == list(serving.LOADS)
