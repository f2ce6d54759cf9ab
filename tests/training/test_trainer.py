"""The run: order of the data, schedule, averaging, and resuming as if nothing had happened."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from madformer.config import tiny
from madformer.pipeline import MADFormerPipeline
from madformer.training.config import PRESETS, TrainingConfig
from madformer.training.data import LatentBatches, ShuffledStream
from madformer.training.losses import training_losses
from madformer.training.optimization import ExponentialMovingAverage, wsd
from madformer.training.trainer import Trainer


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """A folder of ten small images and a VAE for them, in a configuration of six steps."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("sources")
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(10):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")
    return TrainingConfig(
        model=tiny(), data=str(folder / "images"), vae=str(folder / "vae"), image_size=16, num_workers=0,
        steps=6, batch_size=4, learning_rate=1e-3, precision="fp32", ema_decay=0.9, log_every=1, save_every=2,
        keep_checkpoints=2, device="cpu",
    )  # fmt: skip


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in metrics(folder)]


@pytest.fixture(scope="module")
def unbroken(sources: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    Trainer(sources, folder).run()
    return folder


def test_a_run_leaves_a_model_to_sample_from(unbroken: Path) -> None:
    assert [record["step"] for record in metrics(unbroken)] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "image", "hidden", "grad_norm", "lr", "images_per_second"} <= metrics(unbroken)[0].keys()
    assert [path.name for path in sorted((unbroken / "checkpoints").iterdir())] == [
        "step-00000004.pt",
        "step-00000006.pt",
    ]
    pipeline = MADFormerPipeline.from_pretrained(unbroken / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(1, 2).images[0].size == (16, 16)
    state = torch.load(unbroken / "checkpoints" / "step-00000006.pt", weights_only=True)
    averaged = pipeline.transformer.state_dict()
    assert all(torch.equal(averaged[name], tensor) for name, tensor in state["ema"].items())
    assert any(not torch.equal(averaged[name], tensor) for name, tensor in state["model"].items())


@pytest.mark.parametrize("cache_latents", [False, True], ids=["images", "cached latents"])
def test_resume_is_exact(sources: TrainingConfig, tmp_path: Path, cache_latents: bool) -> None:
    """Stopped by SIGTERM after three steps and resumed: bit for bit the losses and weights of the unbroken run."""
    config = dataclasses.replace(sources, cache_latents=cache_latents)
    Trainer(config, tmp_path / "whole").run()
    trainer = Trainer(config, tmp_path / "broken")
    step = trainer._train_step

    def stop_after_three(batches: LatentBatches) -> dict[str, float]:
        record = step(batches)
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    trainer._train_step = stop_after_three  # type: ignore[method-assign]
    trainer.run()
    assert trainer.checkpoints()[-1].name == "step-00000003.pt"
    resumed = Trainer.from_folder(tmp_path / "broken")
    assert resumed.step == 3
    resumed.run()
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    last = "checkpoints/step-00000006.pt"
    whole, broken = (torch.load(tmp_path / run / last, weights_only=True) for run in ("whole", "broken"))
    for part in ("model", "ema"):
        assert all(torch.equal(tensor, whole[part][name]) for name, tensor in broken[part].items())


def test_accumulation_accumulates(sources: TrainingConfig, tmp_path: Path) -> None:
    """The step's gradient is the mean over its micro-batches; the released loop throws all but the last away."""
    trainer = Trainer(dataclasses.replace(sources, accumulation_steps=2, max_grad_norm=1e9), tmp_path)

    def batches() -> LatentBatches:
        return LatentBatches(trainer.images, trainer.vae, batch_size=2, num_blocks=4, seed=sources.seed)

    model, generator, expected = copy.deepcopy(trainer.model), torch.Generator().manual_seed(0), batches()
    for _ in range(2):
        clean = expected.next(generator)
        (training_losses(model, clean, trainer.noise_schedule, generator=generator).total / 2).backward()
    gradients: list[torch.Tensor | None] = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (gradients.extend(p.grad for p in trainer.model.parameters()), step())  # type: ignore
    trainer._train_step(batches())
    for ours, other in zip(gradients, model.parameters(), strict=True):
        assert (ours is None) == (other.grad is None)
        if ours is not None:
            torch.testing.assert_close(ours, other.grad, rtol=1e-4, atol=1e-7)


def test_a_run_is_not_overwritten(sources: TrainingConfig, unbroken: Path) -> None:
    with pytest.raises(ValueError, match="already holds a run"):
        Trainer(sources, unbroken)


def test_divergence_stops_and_names_the_last_good_checkpoint(sources: TrainingConfig, tmp_path: Path) -> None:
    trainer = Trainer(dataclasses.replace(sources, learning_rate=1e30, warmup=0.0), tmp_path)
    with pytest.raises(ValueError, match=r"the run has diverged; last good checkpoint: "):
        trainer.run()


def test_a_damaged_checkpoint_is_named(sources: TrainingConfig, tmp_path: Path) -> None:
    Trainer(dataclasses.replace(sources, steps=1), tmp_path).run()
    (newest,) = (tmp_path / "checkpoints").iterdir()
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step-00000001\.pt is damaged or truncated"):
        Trainer.from_folder(tmp_path)


def test_geometry_must_fit_the_latents(sources: TrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image_size=32 become 4 x 16 x 16 latents .* latent_channels=4 of side 8"):
        Trainer(dataclasses.replace(sources, image_size=32), tmp_path)


def test_missing_data_and_vae(sources: TrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Trainer(dataclasses.replace(sources, data=str(tmp_path / "nowhere")), tmp_path / "run")
    with pytest.raises(ValueError, match="holds no readable AutoencoderKL"):
        Trainer(dataclasses.replace(sources, vae=str(tmp_path)), tmp_path / "run")


# Parts


def test_every_epoch_visits_everything_once_in_another_order() -> None:
    stream = list(itertools.islice(iter(ShuffledStream(7, seed=3)), 21))
    epochs = [stream[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for start in (0, 1, 6, 7, 12):
        assert list(itertools.islice(iter(ShuffledStream(7, 3, start)), 9)) == stream[start : start + 9]


def test_batches_draw_from_the_posterior() -> None:
    """Mean and deviation of the encoder's answer, not its mean alone."""
    mean, deviation = torch.full((8, 4, 8, 8), 2.0), torch.full((8, 4, 8, 8), 0.5)
    batches = LatentBatches(TensorDataset(mean, deviation), None, batch_size=8, num_blocks=4, seed=0)  # type: ignore[arg-type]
    latents = batches.next(torch.Generator().manual_seed(0))
    assert latents.shape == (8, 4, 16, 4)
    assert latents.mean().item() == pytest.approx(2, abs=0.05)
    assert latents.std().item() == pytest.approx(0.5, abs=0.05)


def test_wsd_has_three_parts() -> None:
    values = [wsd(s, 1000, warmup=0.01, decay_start=0.85, decay_exponent=6) for s in range(1001)]
    assert values[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(values[10:850]) == {1.0}
    assert values[925] == pytest.approx(0.5**3)
    assert values[1000] == pytest.approx(0.5**6)


def test_average_forgets_its_start() -> None:
    """``sum of (1 - d) d^k w`` in the end; the first steps use a shorter memory."""
    model = nn.Linear(1, 1, bias=False)
    average = ExponentialMovingAverage(model, 0.5)
    expected = model.weight.item()
    for step in range(8):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 7


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name: str) -> None:
    config = PRESETS[name]()
    assert TrainingConfig.from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"batch_size": 5, "accumulation_steps": 2},
        {"precision": "fp8"},
        {"warmup": 0.9},
        {"ema_decay": 1.0},
    ],
)
def test_nonsense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(TrainingConfig(), **changes)
