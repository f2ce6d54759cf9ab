"""The weights that a run begins with: new ones, or those of a model, with adapters on top where they are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

import torch

from madformer.config import MADFormerConfig
from madformer.files.hub import CONFIG_NAME
from madformer.model import MADFormer
from madformer.model.lora import add_lora
from madformer.training.config import TrainingConfig


def with_initial_model(config: TrainingConfig, given: Collection[str] | None) -> TrainingConfig:
    """The configuration with the model of ``init_from``.

    Args:
        given: names of fields that were chosen, those of the model after ``model.``.

    Raises:
        FileNotFoundError: there is no such model. ValueError: it is damaged, or a field of it was chosen.
    """
    check_initial(config, given)
    return dataclasses.replace(config, model=load_initial(config.init_from).config.register())


def check_initial(config: TrainingConfig, given: Collection[str] | None) -> None:
    """Raises ``ValueError`` where a field of the model was chosen, which is that of ``init_from``."""
    if chosen := [name for name in given or () if name.startswith("model.")]:
        raise ValueError(f"{chosen[0]} cannot be chosen: the model is that of init_from={config.init_from!r}")


def initial_config(name: str) -> MADFormerConfig:
    """What :func:`load_initial` loads, without its weights where it is a folder; errors likewise."""
    folder = Path(name)
    if not folder.is_dir():
        return load_initial(name).config
    return MADFormerConfig.from_file((folder if _is_alone(folder) else folder / "transformer") / CONFIG_NAME)


def _is_alone(folder: Path) -> bool:
    """Whether a model itself lies there, and no pipeline."""
    return (folder / CONFIG_NAME).is_file()


def load_initial(name: str) -> MADFormer:
    """The model of a folder or hub id, or of a pipeline there, in fp32; errors as ``from_pretrained``."""
    alone = _is_alone(Path(name))
    return MADFormer.from_pretrained(name, subfolder=None if alone else "transformer", dtype=torch.float32)


def make_initial(config: TrainingConfig, unread: Collection[str] = ()) -> MADFormer:
    """The model of a run before its first step.

    Args:
        unread: names of parameters that are not trained, nor adapters of their layers.
    """
    model = load_initial(config.init_from) if config.init_from else MADFormer(config.model)
    if model.config != config.model:
        raise ValueError(f"init_from={config.init_from!r} holds another model than the run's")
    model = _with_adapters(model, config)
    for name, parameter in model.named_parameters():
        layer, adapter, _ = name.partition(".lora_")
        trained = f"{layer}.weight" if adapter else name
        parameter.requires_grad_(parameter.requires_grad and trained not in unread)
    return model


def adapted(config: TrainingConfig) -> MADFormer:
    """A model with the names of a run's, whatever its weights; allocated where ``torch.device`` says."""
    return _with_adapters(MADFormer(config.model), config)


def _with_adapters(model: MADFormer, config: TrainingConfig) -> MADFormer:
    if not config.lora_rank:
        return model
    return add_lora(model, config.lora_rank, config.lora_alpha, config.lora_targets.split(","))


def merge(model: MADFormer) -> MADFormer:
    """Put the effect of adapters, if any, into the weights, which become other tensors."""
    if getattr(model, "peft_config", None):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        model.fuse_lora()
        model.unload_lora()
    return model
