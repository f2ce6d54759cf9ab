"""Models out of a run's checkpoints, in both formats."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import load_file

from madformer.cli.main import main
from madformer.compat import madformer_ffhq, madformer_imagenet
from madformer.compat.export import released_arguments, save_released, to_released
from madformer.config import TextConfig, tiny
from madformer.model import MADFormer
from madformer.model.blocks import from_blocks, to_maps
from madformer.pipeline import MADFormerPipeline
from madformer.training.config import TrainingConfig
from madformer.training.trainer import Trainer
from tests.helpers.testing import perturb, relative_error

RELEASED = {
    "hidden_size": 128, "num_heads": 2, "rope_pairing": "released", "clean_timestep": "noisy",
    "hidden_loss_input": "condition+noisy", "hidden_loss_skips": "same_block",
}  # fmt: skip
TEXT = TextConfig(vocab_size=257, length=6, pad_token_id=256, rope_theta=100.0)


@pytest.fixture(scope="module")
def trainer(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    model = config.model.replace(**RELEASED)
    trainer = Trainer(dataclasses.replace(config, model=model, steps=4, save_every=2), tmp_path_factory.mktemp("run"))
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


@pytest.mark.usefixtures("untraced")
def test_a_pipeline_is_whole_without_its_sources(config: TrainingConfig, tmp_path: Path) -> None:
    """Class names are in the data alone, and neither they nor the autoencoder need be there any more."""
    for index, image in enumerate(sorted(Path(config.data).iterdir())):
        folder = tmp_path / "data" / ("cats", "dogs")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder)
    vae = shutil.copytree(config.vae, tmp_path / "vae")
    model = config.model.replace(text=TEXT, num_classes=2, time_conditioning="unet+adaln")
    config = dataclasses.replace(config, model=model, data=str(tmp_path / "data"), vae=str(vae), steps=2)
    Trainer(config, tmp_path / "run").run()
    for source in (tmp_path / "data", vae):
        shutil.rmtree(source)
    run, out = tmp_path / "run" / "model", tmp_path / "out"
    (run / ".model_index.json.half").write_text("a run that goes on is writing it")
    assert main(["export", str(run.parent), "--out", str(out)]) == 0
    assert json.loads((out / "model_index.json").read_text()) == json.loads((run / "model_index.json").read_text())
    assert not list(out.glob(".*"))
    expected, exported = (MADFormerPipeline.from_pretrained(path, dtype=torch.float32) for path in (run, out))
    assert exported.config.class_names == ["cats", "dogs"]
    images = [
        pipeline(num_inference_steps=2, prompt="a", labels="dogs", seed=0, output_type="pt").images
        for pipeline in (expected, exported)
    ]
    assert torch.equal(*images)


def test_a_run_without_a_pipeline(trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(trainer.folder, tmp_path / "run", ignore=shutil.ignore_patterns("model_index.json"))
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 1
    assert "holds no model/ to take the rest of the pipeline from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_released(trainer: Trainer, tmp_path: Path) -> None:
    """Read back as a released checkpoint it is the model that it was, by what it computes."""
    file = tmp_path / "ckpts.pt"
    assert main(["export", str(trainer.folder), "--format", "released", "--out", str(file)]) == 0
    latents = torch.randn(1, 4, 16, 4, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([[1, 10, 100, 999]])
    expected = trainer.pipeline().transformer(latents, latents, timestep).prediction
    model_config = released_arguments(trainer.config.model)["model_config_path"]
    released = madformer_ffhq.MADFormer.from_released(file, model_config=model_config)
    assert relative_error(released.to_native()(latents, latents, timestep).prediction, expected) < 1e-5


def test_released_with_text(tmp_path: Path) -> None:
    """As what ImageNet's code trained: saved, and read back by the drop-in for it."""
    config = tiny().replace(**{**RELEASED, "hidden_loss_input": "condition"}, text=TEXT)
    native = perturb(MADFormer(config))
    save_released(tmp_path / "ckpts.pt", native, native)
    model_config = released_arguments(config)["model_config_path"]
    released = madformer_imagenet.MADFormer.from_released(tmp_path / "ckpts.pt", model_config=model_config)
    assert released.config == config
    text, latents = torch.randint(0, 257, (1, 6)), torch.randn(1, 4, 16, 4)
    timestep = torch.tensor([[1, 10, 100, 999]])
    expected = native(latents, latents, timestep, text, return_logits=True)
    prediction, _, _, logits = released(text, latents, latents, timestep)
    assert relative_error(prediction, to_maps(expected.prediction)) < 1e-5
    assert relative_error(logits, expected.logits) < 1e-5


@pytest.mark.usefixtures("untraced")
def test_there_and_back_with_text(config: TrainingConfig, tmp_path: Path) -> None:
    """A run, as a released checkpoint, converted and sampled by the commands: what the drop-in class draws from it."""
    model = config.model.replace(**{**RELEASED, "hidden_loss_input": "condition"}, text=TEXT)
    images = shutil.copytree(config.data, tmp_path / "captioned")
    for path in list(images.rglob("*.png")):
        path.with_suffix(".txt").write_text(f"caption of {path.stem}")
    Trainer(dataclasses.replace(config, data=str(images), model=model, steps=2), tmp_path / "run").run()
    checkpoint, model_config = tmp_path / "ckpts.pt", tmp_path / "madformer.json"
    model_config.write_text(json.dumps(released_arguments(model)["model_config_path"]))
    convert = ["--checkpoint", checkpoint, "--model-config", model_config, "--tokenizer", "bytes", "--weights", "model"]
    sample = ["--prompt", "207", "--steps", 3, "--seed", 5, "--latents", "--precision", "exact", "--device", "cpu"]
    for arguments in (
        ["export", tmp_path / "run", "--format", "released", "--out", checkpoint],
        ["convert", *convert, "--out", tmp_path / "out"],
        ["sample", "--model", tmp_path / "out", *sample, "--out", tmp_path / "latents"],
    ):
        assert main([str(argument) for argument in arguments]) == 0
    drawn = load_file(tmp_path / "latents" / "00000005.safetensors")["latents"]
    released = madformer_imagenet.MADFormer.from_released(checkpoint, model_config=model_config, weights="model")
    assert released.config == model
    # "207" in bytes, then padding
    text = torch.tensor([[50, 48, 55, 256, 256, 256]])
    scheduler = DPMSolverMultistepScheduler.from_config(DDIMScheduler().config)
    latents, others = (
        released.sample(ids, scheduler, 3, (1, 4, 16, 4), torch.Generator().manual_seed(5), torch.float)
        for ids in (text, text.flip(1))
    )
    assert relative_error(drawn, from_blocks(latents, model)[0]) < 1e-5
    assert relative_error(others, latents) > 1e-4


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
