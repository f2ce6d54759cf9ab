"""The training speed table: its arithmetic, what it refuses, what it keeps when something fails, and its record."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo  # takes seconds, which are not to be a contender's

from benchmarks import training
from benchmarks.released import TINY, Models, dense_mask, load_released
from benchmarks.training import COMPILED, OURS, RELEASED, Batch, Course, Pass, Row, Sweep
from madformer.measuring.timing import Spread
from madformer.training.costs import Costs

CLONE = os.environ.get("MADFORMER_RELEASED")
CPU = torch.device("cpu")

# What is run of the released code, around ours; OFFSET makes the model another one.
MODELS = """
import torch
from madformer.compat.madformer_ffhq import MADFormer as Compat

class MADFormer(Compat):
    position_ids_precompute = torch.zeros(1)

    def build_attention_mask(self, *_):
        return torch.ones(1, 1, dtype=torch.bool)

    def forward(self, *arguments):
        prediction, condition, clean = super().forward(*arguments)
        return prediction + OFFSET, condition, clean
"""


def make_clone(folder: Path, offset: float = 0.0) -> Path:
    (folder / "models.py").write_text(f"OFFSET = {offset}\n{MODELS}")
    return folder


def command(clone: Path, out: Path) -> list[str]:
    return ["--released", str(clone), "--device", "cpu", "--tiny", "--repeats", "1", "--out", str(out)]


def row(name: str, batch: int, seconds: float, gigabytes: int, mfu: float = 0.1) -> Row:
    return Row(name, batch, Spread.of([seconds]), gigabytes * 10**9, mfu)


def test_metrics_compare_like_with_like() -> None:
    ours = [
        row(OURS, 1, 0.5, 30), row(OURS, 2, 0.8, 45), row(OURS, 4, 1.5, 80, mfu=0.4),
        row(COMPILED, 1, 0.4, 28), row(COMPILED, 2, 0.9, 40),
    ]  # fmt: skip
    alone = {"training_mfu": 0.4, "training_images_per_second": 4 / 1.5}
    assert training.metrics(ours) == pytest.approx(alone)
    released = [row(RELEASED, 1, 1.0, 60), row(RELEASED, 2, 1.6, 100)]
    assert training.metrics([*ours, *released]) == pytest.approx(
        {
            **alone,
            "training_best_vs_released": (4 / 1.5) / (2 / 1.6),
            "training_b1_vs_released": 1.0 / 0.4,
            "training_memory_vs_released": 40 / 100,
        }
    )
    assert training.metrics(released) == {}


def test_no_gpu_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training.main(["--released", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "training: --device cuda: this PyTorch sees no CUDA device\n"


# What ends a contender


def sweep(monkeypatch: pytest.MonkeyPatch, step: Callable[[Batch], None], limit: float) -> Sweep:
    monkeypatch.setattr(training, "make_contender", lambda name, course: (step, {"loss": 0.0}))
    costs = Costs(parameters=1, unread=frozenset(), flops=1, activation_bytes=1)
    course = Course(ModuleType("models"), TINY, CPU, (1, 2, 4, 8), 1, Pass(torch.ones(()), []), costs, 1.0)
    return training.sweep(OURS, course, limit)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nMore"), ValueError("out of resource")])
def test_a_failure_ends_the_batches_and_keeps_their_rows(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def step(batch: Batch) -> None:
        if len(batch.clean) == 4:
            raise error

    swept = sweep(monkeypatch, step, limit=60)
    assert [row.batch for row in swept.rows] == [1, 2]
    assert swept.ended == f"batch 4: {type(error).__name__}: {str(error).splitlines()[0]}"


def test_time_ends_what_catches_every_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGALRM)

    def step(batch: Batch) -> None:
        while len(batch.clean) == 2:
            with contextlib.suppress(Exception):
                time.sleep(60)

    swept = sweep(monkeypatch, step, limit=2)
    assert [row.batch for row in swept.rows] == [1]
    assert swept.ended == "batch 2: OutOfTime: its 2 s are over"
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)) == (handler, (0, 0))


@pytest.mark.slow
def test_contenders_that_fail_or_compute_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = training.prepare

    def spoil(name: str, models: Models, *args: Any) -> None:
        prepare(name, models, *args)
        if name == RELEASED:
            with torch.no_grad():
                models.released.boi_block.add_(1)
        if name == COMPILED:
            raise RuntimeError("no compiler")

    monkeypatch.setattr(training, "prepare", spoil)
    out = tmp_path / "record.json"
    assert training.main([*command(make_clone(tmp_path), out), "--batches", "2", "1"]) == 0
    record = json.loads(out.read_text())
    assert record["metrics"] == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["metrics"].keys() == {"training_mfu", "training_images_per_second"}
    assert [(row["name"], row["batch"]) for row in record["rows"]] == [(OURS, 1), (OURS, 2)]
    assert record["ended"][OURS] is None
    assert "CannotCompare: no speeds: relative error above 0.1 in gradients" in record["ended"][RELEASED]
    assert record["ended"][COMPILED] == "batch 0: RuntimeError: no compiler"


def test_another_model_is_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    assert training.main(command(make_clone(tmp_path, offset=0.1), out)) == 1
    assert "training: no speeds: relative error above 0.003 in loss" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.skipif(CLONE is None, reason="MADFORMER_RELEASED names no clone of the released code")
def test_a_wrong_mask_is_seen_in_bf16() -> None:
    module = load_released(Path(str(CLONE)), "cpu")
    models, batch = training.build(module, TINY, CPU), Batch.draw(TINY, CPU)
    _, expected = training.agreement(models, batch, CPU)
    errors = {}
    allowed, size = dense_mask(models.released, CPU), TINY.block_size
    one_block_less, clean = allowed.clone(), TINY.num_blocks * TINY.block_size
    one_block_less[clean + size : clean + 2 * size, :size] = -torch.inf
    masks = {"right": allowed, "none": torch.zeros_like(allowed), "one block less": one_block_less}
    for name, models.released.flex_attnmask in masks.items():
        errors[name] = training.autocast_pass(RELEASED, models, batch).errors(expected)["gradients"]
    assert errors["right"] < training.MAX_BF16_ERROR / 2
    assert min(errors["none"], errors["one block less"]) > 2 * training.MAX_BF16_ERROR


def test_no_time_is_no_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "matmul_rate", lambda device, dtype: 1.0)
    monkeypatch.setattr(training, "costs_of", lambda config: Costs(1, frozenset(), 1, 1))
    out = tmp_path / "record.json"
    assert training.main([*command(make_clone(tmp_path), out), "--budget", "0"]) == 1
    assert "training: nothing was measured: ours, batch 0: OutOfTime" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "clone",
    [
        "made here",
        pytest.param(CLONE, marks=pytest.mark.skipif(CLONE is None, reason="MADFORMER_RELEASED names no clone")),
    ],
    ids=["made here", "released"],
)
def test_record(tmp_path: Path, capsys: pytest.CaptureFixture[str], clone: str) -> None:
    path, out = make_clone(tmp_path) if clone == "made here" else Path(clone), tmp_path / "record.json"
    assert training.main([*command(path, out), "--batches", "1", "2"]) == 0
    record = json.loads(out.read_text())
    assert record["metrics"] == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["metrics"].keys() == {
        "training_mfu", "training_images_per_second", "training_best_vs_released", "training_b1_vs_released",
    }  # fmt: skip
    assert {(entry["name"], entry["batch"]) for entry in record["rows"]} == {
        (name, batch) for name in (RELEASED, OURS, COMPILED) for batch in (1, 2)
    }
    assert set(record["ended"].values()) == {None}
    assert max(record["relative_errors"].values()) < 1e-5
    # compiled and not, ours rounds alike
    errors = record["bf16_errors"]
    assert errors[OURS]["gradients"] == pytest.approx(errors[COMPILED]["gradients"], rel=0.1)
    assert 1e-3 < errors[OURS]["gradients"] < 0.05
