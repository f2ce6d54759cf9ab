"""Models out of a run's checkpoints, in both formats."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from madformer.cli.main import main
from madformer.compat.export import released_arguments, to_released
from madformer.compat.madformer_ffhq import MADFormer as ReleasedMADFormer
from madformer.config import tiny
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from madformer.training.config import TrainingConfig
from madformer.training.trainer import Trainer
from testing import relative_error

RELEASED = {
    "hidden_size": 128, "num_heads": 2, "rope_pairing": "released", "clean_timestep": "noisy",
    "hidden_loss_input": "condition+noisy", "hidden_loss_skips": "same_block",
}  # fmt: skip


@pytest.fixture(scope="module")
def trainer(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    model = config.model.replace(**RELEASED)
    trainer = Trainer(dataclasses.replace(config, model=model, steps=4), tmp_path_factory.mktemp("run"))
    trainer.run()
    return trainer


@pytest.mark.parametrize("weights", ["0.9", "0.5", "raw"])
def test_native(trainer: Trainer, tmp_path: Path, weights: str) -> None:
    assert main(["export", str(trainer.folder), "--weights", weights, "--out", str(tmp_path / "out")]) == 0
    exported = MADFormerPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    raw = dict(trainer.model.named_parameters())
    expected = raw if weights == "raw" else trainer.averages.weights[float(weights)]
    actual = dict(exported.transformer.named_parameters())
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert exported.vae is not None


def test_an_older_step(trainer: Trainer, tmp_path: Path) -> None:
    for step in (2, 4):
        assert main(["export", str(trainer.folder), "--step", str(step), "--out", str(tmp_path / str(step))]) == 0
    older, newer = (MADFormerPipeline.from_pretrained(tmp_path / step).transformer.boi for step in ("2", "4"))
    assert not torch.equal(older, newer)


def test_released(trainer: Trainer, tmp_path: Path) -> None:
    """Read back as a released checkpoint it is the model that it was, by what it computes."""
    file = tmp_path / "ckpts.pt"
    assert main(["export", str(trainer.folder), "--format", "released", "--out", str(file)]) == 0
    latents = torch.randn(1, 4, 16, 4, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([[1, 10, 100, 999]])
    expected = trainer.pipeline().transformer(latents, latents, timestep).prediction
    model_config = released_arguments(trainer.config.model)["model_config_path"]
    released = ReleasedMADFormer.from_released(file, model_config=model_config)
    assert relative_error(released.to_native()(latents, latents, timestep).prediction, expected) < 1e-5


def test_what_cannot_be_exported(trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(trainer.folder), str(tmp_path / "out")
    for arguments, message in (
        ([run, "--step", "3"], "holds no checkpoint of step 3, only step-00000002, step-00000004"),
        ([run, "--weights", "0.7"], "weights='0.7' must be one of raw, 0.9, 0.5"),
        ([str(tmp_path)], "holds no run: no config.json"),
    ):
        assert main(["export", *arguments, "--out", out]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_the_released_code_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no rope_pairing='axial' \(there 'released'\), clean_timestep='zero'"):
        to_released(MADFormer(tiny()))
