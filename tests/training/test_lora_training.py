"""Adapters on a trained model: the base stays, a run resumes exactly, and its export is what diffusers loads."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from madformer import MADFormer
from madformer.cli.main import main
from madformer.training.config import TrainingConfig
from madformer.training.trainer import Trainer
from tests.helpers.testing import perturb, relative_error
from tests.helpers.training_run import losses, stop_after

pytest.importorskip("peft")


def test_adapters_are_trained_resumed_and_exported(config: TrainingConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = perturb(MADFormer(config.model), scale=0.01)
    assert isinstance(base, MADFormer)
    base.save_pretrained(tmp_path / "base")
    config = dataclasses.replace(config, init_from=str(tmp_path / "base"), lora_rank=2, lora_alpha=4.0, save_every=3)
    whole = Trainer(config, tmp_path / "whole")
    whole.run()
    trained = {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert all(parameter.abs().sum() > 0 for name, parameter in whole.model.named_parameters() if name in trained)
    own = dict(base.named_parameters())
    for name, parameter in whole.model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, own[name.replace(".base_layer", "")]), name

    stopping = Trainer(config, tmp_path / "parts")
    stop_after(stopping, 4)
    stopping.run()
    Trainer(config, tmp_path / "parts", resume=True).run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")

    merged = MADFormer.from_pretrained(tmp_path / "whole" / "model" / "transformer")
    assert main(["export", str(tmp_path / "whole"), "--out", str(tmp_path / "lora")]) == 0
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    loaded = copy.deepcopy(base)
    loaded.load_lora_adapter(str(tmp_path / "lora"))
    assert main(["export", str(tmp_path / "whole"), "--out", str(tmp_path / "merged"), "--merged"]) == 0
    exported = MADFormer.from_pretrained(tmp_path / "merged" / "transformer")
    shape = (1, config.model.num_blocks, config.model.latents_per_block, config.model.latent_channels)
    latents, timestep = torch.randn(shape), torch.full(shape[:2], 300)
    with torch.no_grad():
        expected = merged(latents, latents, timestep).prediction
        assert relative_error(loaded(latents, latents, timestep).prediction, expected) < 1e-5
        assert relative_error(exported(latents, latents, timestep).prediction, expected) < 1e-5
        assert relative_error(base(latents, latents, timestep).prediction, expected) > 1e-4


def test_what_is_refused(config: TrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora_rank=2 needs init_from"):
        dataclasses.replace(config, lora_rank=2)
    missing = dataclasses.replace(config, init_from=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="no folder"):
        Trainer(missing, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"model\.num_layers cannot be chosen"):
        Trainer(missing, tmp_path / "run", given=["model.num_layers"])
