"""Several processes train what one does, and go on from one another's checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from madformer.config import TextConfig, tiny
from madformer.training import parallel
from madformer.training.config import TrainingConfig
from madformer.training.costs import costs_of
from madformer.training.trainer import Trainer
from tests.helpers.training_run import ROUNDING, losses, run_apart

TEXT_MODEL = tiny().replace(
    text=TextConfig(vocab_size=257, length=6, pad_token_id=256), elastic_diffusion_layers=(1, 2)
)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"parallel": "ddp", "accumulation_steps": 2}, marks=pytest.mark.slow),
        {"parallel": "fsdp"},
        pytest.param({"parallel": "ddp", "clean_loss_weight": 0.1}, marks=pytest.mark.slow),
        pytest.param({"parallel": "ddp", "model": TEXT_MODEL, "text_loss_weight": 0.1}, marks=pytest.mark.slow),
        pytest.param({"parallel": "fsdp", "model": TEXT_MODEL}, marks=pytest.mark.slow),
        pytest.param({"parallel": "hsdp", "shard_group": 1}, marks=pytest.mark.slow),
        pytest.param({"parallel": "fsdp", "accumulation_steps": 2, "compile": True}, marks=pytest.mark.slow),
        pytest.param({"parallel": "fsdp", "activation_checkpointing": "selective"}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: " ".join("text" if name == "model" else str(value) for name, value in changes.items()),
)
def test_two_processes_train_as_one(
    config: TrainingConfig, unbroken: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    """The loss curve of two processes, stopped after four steps, and that of one which goes on from there."""
    alone = unbroken
    if objective := {name: value for name, value in changes.items() if name == "model" or "weight" in name}:
        alone = tmp_path / "alone"
        if "model" in objective:
            data = shutil.copytree(config.data, tmp_path / "captioned")
            for image in list(data.iterdir()):
                image.with_suffix(".txt").write_text(f"picture {image.stem}")
            config = dataclasses.replace(config, data=str(data))
        Trainer(dataclasses.replace(config, **objective), alone).run()
    run_apart(tmp_path / "run", dataclasses.replace(config, save_every=4, **changes), processes=2, stop=4)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone)[:4], rel=ROUNDING)
    rest = dataclasses.replace(config, **(changes | {"parallel": "none", "accumulation_steps": 1, "compile": False}))
    trainer = Trainer(rest, tmp_path / "run", resume=True)
    assert trainer.step == 4
    trainer.run()
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=ROUNDING)


@pytest.mark.slow
def test_two_processes_go_on_from_one(config: TrainingConfig, unbroken: Path, tmp_path: Path) -> None:
    run_apart(tmp_path / "run", config, stop=3)
    run_apart(tmp_path / "run", dataclasses.replace(config, parallel="fsdp"), processes=2, torchrun=True)
    assert losses(tmp_path / "run") == pytest.approx(losses(unbroken), rel=ROUNDING)


def killed_until_done(folder: Path, config: TrainingConfig, moments: random.Random, longest: float) -> int:
    """Kill -9 at random moments until a session comes through; how often it was killed."""
    kills = 0
    while True:
        try:
            run_apart(folder, config, timeout=moments.uniform(0, longest))
        except subprocess.TimeoutExpired:
            kills += 1
        else:
            return kills


@pytest.mark.slow
def test_killed_at_random_moments(config: TrainingConfig, tmp_path: Path) -> None:
    """Twenty and more kills: bit for bit the losses of the unbroken run, each step once."""
    longer = dataclasses.replace(config, steps=150)
    started = time.monotonic()
    run_apart(tmp_path / "whole", longer)
    taken, moments, kills = time.monotonic() - started, random.Random(0), 0
    for run in itertools.count():
        folder = tmp_path / f"killed-{run}"
        kills += killed_until_done(folder, longer, moments, longest=1.2 * taken)
        assert losses(folder) == losses(tmp_path / "whole")
        if kills >= 20:
            break


def test_gradients_come_for_every_trained_parameter(config: TrainingConfig) -> None:
    """What DDP without ``find_unused_parameters`` relies on."""
    unread = costs_of(config).unread
    assert unread == {name for name in unread if name.startswith(f"layers.{config.model.num_layers - 1}.towers.clean.")}
    with_clean_loss = dataclasses.replace(config, clean_loss_weight=0.1)
    assert costs_of(with_clean_loss).unread == frozenset()


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({"parallel": "none"}, {"WORLD_SIZE": "2", "RANK": "0"}, "torchrun started 2"),
        ({"parallel": "fsdp"}, {}, "needs torchrun"),
        ({"batch_size": 6, "accumulation_steps": 2}, {"WORLD_SIZE": "2", "RANK": "0"}, "batch_size=6 must be a mult"),
        ({"parallel": "hsdp", "shard_group": 3}, {"WORLD_SIZE": "4", "RANK": "0"}, "shard_group=3 must divide the 4"),
    ],
)
def test_groups_that_cannot_be(
    config: TrainingConfig,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    environment: dict[str, str],
    message: str,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        parallel.join(dataclasses.replace(config, **changes))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointed_activations_give_the_same_gradients(config: TrainingConfig, mode: str) -> None:
    world = parallel.World(0, 1, torch.device("cpu"), "none", None)
    gradients = []
    for activation_checkpointing in ("none", mode):
        changed = dataclasses.replace(config, activation_checkpointing=activation_checkpointing)
        model, _ = parallel.make_model(changed, world, frozenset())
        latents = torch.randn(2, 4, 16, 4, generator=torch.Generator().manual_seed(0))
        model(latents, latents, torch.full((2, 4), 7)).prediction.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*gradients, strict=True))
