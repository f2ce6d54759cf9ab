"""The comparison with the released code: what it refuses, its statistics, and its record where that code is at hand."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import compare_released, released
from madformer import config
from madformer.measuring.bare import Work
from madformer.measuring.timing import Spread
from madformer.training.costs import Costs

RELEASED = os.environ.get("MADFORMER_RELEASED")

METRICS = [
    "engine_overhead_fp32",
    "engine_overhead_bf16",
    "max_relative_error",
    "training_compat_vs_released_fp32",
    "sampling_vs_released_bf16",
    "sampling_vs_released_fp32",
    "sampling_fraction_of_roof_bf16",
    "training_vs_released_fp32",
    "training_vs_released_bf16",
]


def test_path_without_released_code_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    assert compare_released.main(["--released", str(tmp_path / "nowhere"), "--out", str(out)]) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert len(stderr.splitlines()) == 1
    assert "nowhere" in stderr
    assert not out.exists()


def test_package_that_is_not_installed_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "models.py").write_text("import a_package_that_nobody_has\n")
    assert compare_released.main(["--released", str(tmp_path)]) == 1
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1
    assert "a_package_that_nobody_has" in stderr


@pytest.mark.parametrize("inside", ["", "src"])
def test_import_leaves_no_trace_and_redirects_the_device(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    (folder / "rope.py").write_text("NAME = 'theirs'\n")
    (folder / "models.py").write_text("from rope import NAME\nDEVICE = 'cuda'\nWORD = 'cuda core'\n")
    path, ours = list(sys.path), {"models": object(), "config": object()}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in ours.items():
            patch.setitem(sys.modules, name, module)
        module = released.load_released(tmp_path, "cpu")
        assert {name: sys.modules[name] for name in ours} == ours
    assert (module.NAME, module.DEVICE, module.WORD) == ("theirs", "cpu", "cuda core")
    assert "rope" not in sys.modules
    assert sys.path == path


def test_relative_error_is_that_of_all_tensors_together() -> None:
    expected = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    actual = [torch.tensor([3.0, 0.3]), torch.tensor([4.4])]
    assert released.relative_error(actual, expected) == pytest.approx(0.1)
    assert released.relative_error(expected, expected) == 0


@pytest.mark.parametrize("wrong", [4e-3, float("nan"), float("inf")])
def test_gate_names_what_disagrees(wrong: float) -> None:
    assert released.check({"loss": 1e-7, "samples": 1e-4}) == 1e-4
    with pytest.raises(compare_released.CannotCompare, match="samples"):
        released.check({"loss": 1e-7, "samples": wrong})


def spread(seconds: float) -> Spread:
    return Spread.of([seconds])


def test_metrics_end_with_the_comparison_and_say_nothing_that_was_not_timed() -> None:
    sampling: dict[str, Any] = {
        "spreads": {"released fp32": spread(12.0), "ours fp32": spread(6.0), "ours bf16": spread(3.0)},
        "overhead": {"fp32": 0.01, "bf16": 0.02},
        "fractions_of_roof": {"fp32": 0.8, "bf16": 0.5},
    }
    spreads = {"released fp32": spread(8.0), "ours fp32, drop-in": spread(6.4), "ours fp32, native": spread(5.0)}
    found = compare_released.metrics(sampling, {"spreads": spreads}, 1e-6)
    assert found == dict(zip(METRICS, [0.01, 0.02, 1e-6, 1.25, 4.0, 2.0, 0.5, 1.6], strict=False))
    sampling["spreads"] |= {"ours bf16, compiled": spread(2.0)}
    assert compare_released.metrics(sampling, {"spreads": spreads}, 1e-6)["sampling_vs_released_bf16"] == 6.0
    spreads["ours bf16, native"] = spread(2.0)
    assert list(compare_released.metrics(sampling, {"spreads": spreads}, 1e-6).items())[-1] == (METRICS[-1], 4.0)


def test_roof_of_bf16_is_no_lower_than_that_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without bf16 units multiplies in fp32: its products in bf16 are no roof."""
    image = Work(num_blocks=4, ar_flops=10**9, step_flops=10**8, unet_flops=0, step_bytes=0)
    monkeypatch.setattr(Work, "of", lambda model: image)
    spreads, flops = {"ours fp32": spread(2.0), "ours bf16": spread(1.0)}, 2 * (10**9 + 3 * 10**8)
    for rate, highest in ((1e6, 1e9), (4e9, 4e9)):
        roof = {"fp32": 1e9, "bf16": rate}
        shares = compare_released.fractions_of_roof(None, released.TINY, spreads, roof)
        assert shares == pytest.approx({"fp32": flops / 2 / 1e9, "bf16": flops / highest})


def test_bf16_that_would_take_minutes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_released, "costs_of", lambda config: Costs(1, frozenset(), 30 * 10**9, 1))
    model = SimpleNamespace(config=config.tiny())
    assert compare_released.too_slow_in_bf16(model, released.TINY, {"fp32": 1e9, "bf16": 1e9}) is None
    why = compare_released.too_slow_in_bf16(model, released.TINY, {"fp32": 1e9, "bf16": 0.5e9})
    assert why == "a step would take 120 s: products in bf16 run at 0.5 GFLOP/s here"


@pytest.mark.slow
@pytest.mark.skipif(RELEASED is None, reason="MADFORMER_RELEASED does not name a clone of the released code")
def test_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("einops")
    out = tmp_path / "record.json"
    assert compare_released.main(["--released", str(RELEASED), "--tiny", "--repeats", "2", "--out", str(out)]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads(out.read_text())
    assert record.keys() >= {"commit", "device", "threads", "versions", "shape", "repeats", "relative_errors"}
    assert list(record["metrics"]) == METRICS
    assert record["metrics"]["max_relative_error"] < 1e-4
    medians = {name: spread["median"] for name, spread in record["sampling"]["spreads"].items()}
    gain = medians["released fp32"] / medians[compare_released.way_of(medians, "ours bf16")]
    assert record["metrics"]["sampling_vs_released_bf16"] == pytest.approx(gain)
    assert record["training"]["spreads"].keys() == record["training"]["attention"].keys()
