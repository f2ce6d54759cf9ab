"""The training speed table: its arithmetic, what it refuses, and its record where the released code is at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import training
from madformer.benchmark.timing import Spread
from training import COMPILED, OURS, RELEASED, Row

CLONE = os.environ.get("MADFORMER_RELEASED")


def row(name: str, batch: int, seconds: float, gigabytes: int, mfu: float = 0.1) -> Row:
    return Row(name, batch, Spread.of([seconds]), gigabytes * 10**9, mfu)


def test_metrics_compare_like_with_like() -> None:
    rows = [
        row(RELEASED, 1, 1.0, 60), row(RELEASED, 2, 1.6, 100),
        row(OURS, 1, 0.5, 30), row(OURS, 2, 0.8, 45), row(OURS, 4, 1.5, 80, mfu=0.4),
        row(COMPILED, 1, 0.4, 28), row(COMPILED, 2, 0.9, 40),
    ]  # fmt: skip
    assert training.metrics(rows) == pytest.approx(
        {
            "training_mfu": 0.4,
            "training_images_per_second": 4 / 1.5,
            "training_best_vs_released": (4 / 1.5) / (2 / 1.6),
            "training_b1_vs_released": 1.0 / 0.4,
            "training_memory_vs_released": 40 / 100,
        }
    )


def test_no_gpu_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training.main(["--released", str(tmp_path), "--out", str(tmp_path / "record.json")]) == 1
    assert capsys.readouterr().err == "training: --device cuda: this PyTorch sees no CUDA device\n"
    assert not (tmp_path / "record.json").exists()


@pytest.mark.skipif(CLONE is None, reason="MADFORMER_RELEASED names no clone of the released code")
def test_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    arguments = ["--released", str(CLONE), "--device", "cpu", "--tiny", "--batches", "1", "2", "--repeats", "1"]
    assert training.main([*arguments, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["metrics"] == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {(entry["name"], entry["batch"]) for entry in record["rows"]} == {
        (name, batch) for name in (RELEASED, OURS, COMPILED) for batch in (1, 2)
    }
    assert max(record["relative_errors"].values()) < 1e-5
