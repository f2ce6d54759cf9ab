"""The sampling speed table: its arithmetic, its gate, what it leaves out by name, and its record."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import ROOT, launches, sampling
from madformer.config import tiny
from madformer.engine.options import SamplingOptions
from madformer.engine.plan import Plan
from madformer.measuring.bare import Work
from madformer.measuring.sampling import Roof
from madformer.measuring.timing import Spread
from madformer.model import MADFormer

RELEASED = os.environ.get("MADFORMER_RELEASED")
CPU = torch.device("cpu")


def make_bench(**changes: Any) -> sampling.Bench:
    torch.manual_seed(0)
    exact = MADFormer(tiny()).eval()
    values: dict[str, Any] = {
        "device": CPU,
        "scale": sampling.TRIAL,
        "repeats": 1,
        "deadline": time.perf_counter() + 3600,
        "model": exact,
        "exact": exact,
        "released": None,
        "roof": Roof(matmul_flops=1e12, copy_bytes=1e9),
        "work": Work(num_blocks=4, ar_flops=10**9, step_flops=4 * 10**9, unet_flops=1, step_bytes=10**6),
    }
    return sampling.Bench(**(values | changes))


def test_busy_time_is_the_union() -> None:
    assert launches.busy_time([(5.0, 6.0), (0.0, 2.0), (1.0, 1.5), (1.5, 3.0)]) == 4.0
    assert launches.busy_time([]) == 0.0


def test_idle_is_what_the_kernels_leave_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench()
    monkeypatch.setattr(launches, "time_loops", lambda plans, repeats: {"loop": Spread.of([0.004])})
    monkeypatch.setattr(launches, "kernel_spans", lambda run, device: [(1.000, 1.002), (1.003, 1.004)])
    assert launches.idle(bench.plan(1, 2), 1)["idle_fraction"] == pytest.approx(0.25)
    monkeypatch.setattr(launches, "kernel_spans", lambda run, device: [])
    with pytest.raises(sampling.CannotCompare, match="the profiler recorded no kernels"):
        launches.idle(bench.plan(1, 2), 1)


def test_metrics_take_the_most_steps_that_both_were_measured_at() -> None:
    bench = make_bench()
    short, long, large = bench.scale.steps, bench.scale.confirmed_steps, bench.scale.large_batch
    for name, batch, steps, value in (
        (sampling.OURS, 1, short, 1.0),
        (sampling.RELEASED_FP32, 1, short, 9.0),
        (sampling.RELEASED_BF16, 1, short, 5.0),
        (sampling.OURS, 1, long, 10.0),
        (sampling.RELEASED_FP32, 1, long, 80.0),
        (sampling.OURS, large, short, 2.0),
        (sampling.RELEASED_BF16, large, short, 5.0),
        ("sweep", 1, short, 1.0),
        ("sweep", large, short, 1.5),
    ):
        bench.add(name, batch, steps, Spread.of([value]))
    metrics = sampling.metrics(bench)
    assert metrics["sampling_b1_vs_released_fp32"] == 8.0
    assert metrics["sampling_b1_vs_released_bf16"] == 5.0
    assert metrics[f"sampling_b{large}_vs_released_bf16"] == 2.5
    assert metrics["seconds_per_image_b1"] == 10.0
    assert metrics["best_batch"] == large
    assert "images_per_second_best" not in metrics
    # 1 GFLOP a step and block: 4 blocks, as many steps, 1 TFLOP/s
    assert metrics["sampling_fraction_of_roof"] == pytest.approx(4e-3 * short * large / 1.5)
    bench.add(sampling.OURS, large, long, Spread.of([4.0]))
    metrics = sampling.metrics(bench)
    assert metrics["images_per_second_best"] == large / 4.0
    assert metrics["sampling_fraction_of_roof"] == pytest.approx(4e-3 * long * large / 4.0)
    assert "loop_idle_fraction" not in metrics


def test_floors_stand_beside_every_figure() -> None:
    bench = make_bench()
    bench.add("x", 2, 5, Spread.of([1.0]))
    (figure,) = bench.figures
    assert figure.operations_floor == pytest.approx(2 * 21e9 / 1e12)
    assert figure.bytes_floor == pytest.approx(4 * 5 * 1e6 / 1e9)


def test_questions_that_cannot_be_answered_are_left_out_by_name() -> None:
    bench = make_bench(deadline=time.perf_counter() + 5)

    def too_large(own: sampling.Bench) -> None:
        raise torch.OutOfMemoryError("no room\nand a stack of reasons")

    def differ(own: sampling.Bench) -> None:
        raise sampling.CannotCompare("they differ")

    def break_down(own: sampling.Bench) -> None:
        raise RuntimeError("CUDA error: misaligned address\nand advice")

    kept: list[int] = []
    bench.save = lambda own: kept.append(len(own.left_out))
    bench.ask("long", lambda own: 1, expected=60)
    bench.ask("gpu", lambda own: 1, needs="it needs CUDA")
    bench.ask("large", too_large)
    bench.ask("different", differ)
    bench.ask("broken", break_down)
    bench.ask("answered", lambda own: 42)
    assert kept == [1, 2, 3, 4, 5, 5]
    assert bench.left_out == [
        "long: no time left for the 60 s that it takes",
        "gpu: it needs CUDA",
        "large: no room",
        "different: they differ",
        "broken: RuntimeError: CUDA error: misaligned address",
    ]
    assert bench.answers == {"answered": 42}


@pytest.mark.parametrize(("factor", "wrong"), [(1.0, None), (1.01, "ours, fp32"), (float("nan"), "ours, fp32")])
def test_gate(monkeypatch: pytest.MonkeyPatch, factor: float, wrong: str | None) -> None:
    """A released sampler that gives our own results, but for a factor."""
    bench = make_bench(released=object())

    def draw(plan: Plan, shape: Any) -> Tensor:
        size = plan.slots.canvas_RMLC.shape
        return plan.run(torch.randn(size, generator=torch.Generator().manual_seed(0)))

    def released(model: Any, shape: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return factor * draw(
                sampling.Sampler(bench.exact, sampling.make_scheduler()).plan(1, SamplingOptions(2)), shape
            )

    monkeypatch.setattr(sampling, "sample_ours", draw)
    monkeypatch.setattr(sampling, "sample_released", released)
    if wrong is None:
        assert sampling.agreement(bench)["ours, fp32"] == 0
    else:
        with pytest.raises(sampling.CannotCompare, match=f"no speeds: relative error above 0.003 in {wrong}"):
            sampling.agreement(bench)


def test_no_gpu_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "record.json"
    assert sampling.main(["--out", str(out)]) == 1
    assert capsys.readouterr().err == "sampling: --device cuda: this PyTorch sees no CUDA device\n"
    assert not out.exists()


def check_record(record: dict[str, Any]) -> None:
    assert record["metrics"].keys() >= {"seconds_per_image_b1", "images_per_second_best", "sampling_fraction_of_roof"}
    assert record["metrics"].keys() >= {"inflight_latency_gain", "matmul_flops", "best_batch"}
    names = {(figure["name"], figure["batch"]) for figure in record["figures"]}
    assert names >= {(sampling.OURS, 1), (sampling.OURS, 2), ("eager", 1), ("sweep", 1), ("sweep", 2)}
    if not torch.cuda.is_available():
        left_out = [name.partition(":")[0] for name in record["left_out"]]
        assert left_out[-6:] == [
            "idle",
            "launches, replays",
            "launches, one launch",
            "MLP, batch 1",
            "U-Net, batch 1",
            "U-Net, batch 2",
        ]
        assert "loop_idle_fraction" not in record["metrics"]


@pytest.mark.slow
def test_record_without_released_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    assert sampling.main(["--device", "cpu", "--tiny", "--repeats", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record["metrics"]
    check_record(record)
    assert record["left_out"][0].startswith("all that compares with the released sampler")
    assert not any("released" in name for name in record["metrics"])


@pytest.mark.slow
@pytest.mark.skipif(RELEASED is None, reason="MADFORMER_RELEASED does not name a clone of the released code")
def test_record_with_released_code(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("einops")
    out = tmp_path / "record.json"
    arguments = ["--device", "cpu", "--tiny", "--repeats", "1", "--released", str(RELEASED), "--out", str(out)]
    assert sampling.main(arguments) == 0
    record = json.loads(out.read_text())
    check_record(record)
    assert record["answers"]["agreement"]["ours, fp32"] < 1e-4
    seconds = {(f["name"], f["batch"], f["steps"]): f["seconds"]["median"] for f in record["figures"]}
    gain = seconds[sampling.RELEASED_FP32, 1, 2] / seconds[sampling.OURS, 1, 2]
    assert record["metrics"]["sampling_b1_vs_released_fp32"] == pytest.approx(gain)


def test_suites_run() -> None:
    """Each of pytest-benchmark's cases once, on the smallest model."""

    class Outcomes:
        passed = 0

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            self.passed += report.when == "call" and report.passed

    outcomes = Outcomes()
    arguments = [str(ROOT / "benchmarks" / "suites"), "--benchmark-disable", "-k", "not emoji64"]
    assert pytest.main([*arguments, "-p", "no:cacheprovider"], plugins=[outcomes]) == 0
    assert outcomes.passed == 9
