"""Losses in bf16 beside those in fp32: what is compared, what is refused, and two small runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import training_precision
from benchmarks.record import CannotCompare
from madformer.training import trainer
from madformer.training.config import TrainingConfig
from tests.helpers.training_run import make_config


def given(monkeypatch: pytest.MonkeyPatch, bf16: float) -> None:
    """Runs whose losses are 2 and, in bf16 in the last tenth, as told; before, in bf16, far off."""
    losses = {"fp32": [2.0] * 20, "bf16": [9.0] * 18 + [bf16] * 2}
    monkeypatch.setattr(training_precision, "losses_of", lambda config, precision, folder: losses[precision])


def test_means_of_the_last_tenth_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given(monkeypatch, 1.99)
    assert training_precision.main(["--steps", "20"]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert metrics == pytest.approx({"last_loss_fp32": 2.0, "last_loss_bf16": 1.99, "last_loss_difference": 0.005})


@pytest.mark.parametrize("wrong", [2.03, float("nan")])
def test_losses_that_differ_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: float
) -> None:
    given(monkeypatch, wrong)
    assert training_precision.main(["--steps", "20"]) == 1
    error = capsys.readouterr().err
    assert error == f"training_precision: the mean loss of the last 2 steps is {wrong:.4f} in bf16 and 2.0000 in fp32\n"


def test_no_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert training_precision.main(["--data", str(tmp_path / "nowhere"), "--steps", "2"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_that_was_stopped_is_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "matmul_rate", lambda device, dtype: 1.0)
    stopping = trainer.Trainer._report

    def report(self: trainer.Trainer, *arguments: object) -> None:
        stopping(self, *arguments)  # type: ignore[arg-type]
        self.stop()

    monkeypatch.setattr(trainer.Trainer, "_report", report)
    with pytest.raises(CannotCompare, match=r"it was stopped at step 1 of \d+$"):
        training_precision.compare(make_config(tmp_path))


@pytest.mark.slow
def test_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "matmul_rate", lambda device, dtype: 1.0)
    config: TrainingConfig = make_config(tmp_path)
    record = training_precision.compare(config)
    fp32, bf16 = record["losses"]["fp32"], record["losses"]["bf16"]
    assert len(fp32) == len(bf16) == config.steps
    assert fp32 != bf16
    assert bf16 == pytest.approx(fp32, rel=0.02)
