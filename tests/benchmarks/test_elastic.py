"""The elastic split's benchmark: retrieval by hand, a loss worked out apart, and runs that are gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image

from benchmarks import elastic
from madformer.pipeline import MADFormerPipeline
from madformer.training.data import draw_split
from madformer.training.trainer import Trainer
from tests.helpers.testing import small_vae
from tests.helpers.training_run import stop_after

NAMES = ["fixed-1", "fixed-3", "elastic-1", "elastic-3"]


def make_command(folder: Path) -> list[str]:
    """Twenty images with captions, an autoencoder, and the smallest runs over them."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(20):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index:02}.png")
        (folder / "images" / f"{index:02}.txt").write_text(f"picture {index}")
    small_vae().save_pretrained(folder / "vae")
    return [
        "--data", str(folder / "images"), "--image-size", "16", "--vae", str(folder / "vae"), "--preset", "tiny",
        "--runs", str(folder / "runs"), "--splits", "3", "1", "--steps", "2", "--out", str(folder / "record.json"),
        "--samples", "8", "--batch-size", "4", "--captions", "5", "--sample-steps", "2", "--repeats", "2",
        "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_command(tmp_path_factory.mktemp("elastic"))


@pytest.mark.slow
def test_from_training_to_the_record(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(command[1]).parent
    assert elastic.main([*command, "--only", "fixed-3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"fixed-3_trained_steps": 2}
    assert sorted(path.name for path in (folder / "runs").glob("*-*")) == ["fixed-3"]
    before = (folder / "runs" / "fixed-3" / "metrics.jsonl").read_bytes()

    picture = folder / "plot.png"
    assert elastic.main([*command, "--plot", str(picture)]) == 0
    record = json.loads((folder / "record.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record["metrics"]
    assert (folder / "runs" / "fixed-3" / "metrics.jsonl").read_bytes() == before
    rows = {elastic.row_name(row["model"], row["diffusion_layers"]): row for row in record["rows"]}
    assert list(rows) == NAMES
    assert [row["trained_steps"] for row in rows.values()] == [2] * 4
    assert rows["fixed-1"]["flops_per_image"] == rows["elastic-1"]["flops_per_image"]
    assert rows["fixed-1"]["flops_per_image"] < rows["fixed-3"]["flops_per_image"]
    # what both steps of the elastic model drew, so that it is the fixed one
    assert [draw_split(elastic.run_config("elastic", elastic.parse(command)).model, 0, step) for step in (0, 1)] == [
        3,
        3,
    ]
    for same in ("image_loss", "retrieval"):
        assert rows["elastic-3"][same] == rows["fixed-3"][same]
    assert len({row["image_loss"] for row in rows.values()}) == 3
    assert all(len(row["seconds_per_image"]["samples"]) == 2 for row in rows.values())
    assert Image.open(picture).width > 1000
    assert str(folder) not in json.dumps(record)
    check_loss(record, elastic.parse(command))


def check_loss(record: dict[str, Any], options: Any) -> None:
    """The elastic model's at either split, by the formula."""
    config = elastic.run_config("elastic", options)
    data, schedule = elastic.LatentDataset(config.data), DDPMScheduler()
    for split in (1, 3):
        model = MADFormerPipeline.from_pretrained(options.runs / "elastic" / "model").transformer
        losses = []
        for batch in elastic.fixed_batches(data, config, options):
            kept = schedule.alphas_cumprod[batch.timestep_BM][..., None, None]
            noisy = kept.sqrt() * batch.clean_BMLC + (1 - kept).sqrt() * batch.noise_BMLC
            with torch.no_grad():
                told = (batch.timestep_BM, batch.text_BP)
                output = model(batch.clean_BMLC, noisy, *told, diffusion_layers=split)
            losses.append(F.mse_loss(output.prediction, batch.noise_BMLC).item())
        assert record["metrics"][f"elastic-{split}_image_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


@pytest.mark.slow
def test_a_run_is_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*make_command(tmp_path), "--only", "elastic"]
    plain = Trainer.run

    def stopping(trainer: Trainer) -> None:
        stop_after(trainer, 1)
        plain(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", stopping)
        assert elastic.main(command) == 1
    assert "was stopped at step 1 of 2; the same command goes on" in capsys.readouterr().err
    assert elastic.main(command) == 0
    lines = (tmp_path / "runs" / "elastic" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert not (tmp_path / "record.json").exists()
    capsys.readouterr()
    assert elastic.main([*command, "--steps", "3"]) == 1
    assert "elastic holds another run, with steps=2: take another --runs" in capsys.readouterr().err


def test_nothing_to_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert elastic.main([*make_command(tmp_path), "--evaluate"]) == 1
    assert "runs holds none of fixed-1, fixed-3, elastic" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "fixed-2"], "--only fixed-2 must be one of fixed-1, fixed-3, elastic"),
        (["--samples", "6"], "--samples 6 must be a multiple of --batch-size 4"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        elastic.parse([*command, *arguments])
    assert message in capsys.readouterr().err
