"""Configurations of the released training scripts, as their ``baseline.conf`` has them, for this library's trainer.

Such a file holds ``KEY=value`` lines as a shell reads them; the keys are the options of the released ``train.py`` in
capitals. ``DATASET`` says which branch's script it is for, FFHQ's where it is left out; whatever else is left out has
that script's default.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from madformer.compat import madformer_ffhq, madformer_imagenet
from madformer.compat.checkpoint import RELEASED_HEAD_DIM, RELEASED_MODEL_CONFIG
from madformer.config import MADFormerConfig
from madformer.objects import require, with_nearest

VAE_DOWNSCALE = 8
PLACEHOLDER = "Your/Path/To/Model/Config.json"
"""What ``baseline.conf`` was released with for ``MODEL_CONFIG_PATH``: nobody's file."""

# Defaults of both scripts; their types are the options' types.
DEFAULTS: dict[str, Any] = {
    "LR": 3e-4,
    "WEIGHT_DECAY": 5e-2,
    "BETA1": 0.9,
    "BETA2": 0.95,
    "GLOBAL_SEED": 0,
    "NUM_WORKERS": 4,
    "LOG_EVERY": 10,
    "CKPT_EVERY": 10_000,
    "MIXED_PRECISION": "bf16",
    "MAX_GRAD_NORM": 1.0,
    "PATCH_SIZE": 1,
    "VAE_LATENT_SIZE": 4,
    "SQUARE_BLOCK": True,
    "LR_SCHEDULER": "wsd",
    "LR_WARMUP": 0.01,
    "MODEL_CONFIG_PATH": PLACEHOLDER,
    "LAMBDA_HIDDEN_LOSS": 0.1,
    "DIFF_DEPTH": 14,
    "CLEAR_CLEAN": False,
    "CLEAR_COND": False,
    "DENOISING_MLP": False,
    "CLEAR_TOWER_LOSS_LAMBDA": 0.0,
}


# Defaults that differ, FFHQ's and ImageNet's.
DIFFERENT: dict[str, tuple[Any, Any]] = {
    "DATASET_PATH": ("./datasets/ffhq-1024", "./datasets/imagenet"),
    "EPOCHS": (200, 50),
    "GLOBAL_BATCH_SIZE": (64, 256),
    "PER_GPU_BATCH_SIZE": (1, 4),
    "IMAGE_SIZE": (1024, 256),
    "BLOCK_SIZE": (256, 64),
    "PRE_DOWNSAMPLE_BLOCK_SIZE": (1024, 256),
    "AR_LEN": (16, 4),
    "SPATIAL_LEN": (4096, 256),
}


@dataclass(frozen=True)
class Script:
    """What one of the scripts has for itself.

    Attributes:
        model: ours of the class that it trains.
        num_images: in its data set.
        defaults: of its options.
        model_config: what the JSON file released with it says, and no default does.
        data: our name for the data set at ``DATASET_PATH``.
        training: what it says in no option, by our names.
    """

    model: type[madformer_ffhq.MADFormer]
    num_images: int
    defaults: dict[str, Any]
    model_config: dict[str, Any]
    data: str = "{}"
    training: dict[str, Any] = field(default_factory=dict)


FFHQ_MODEL = {**RELEASED_MODEL_CONFIG, "intermediate_size": 4096}
LLAMA_TEXT = {"vocab_size": 128_256, "pad_token_id": 128_004, "max_position_embeddings": 2}
SCRIPTS = {
    "ffhq": Script(
        madformer_ffhq.MADFormer,
        num_images=70_000,
        defaults=DEFAULTS | {key: default for key, (default, _) in DIFFERENT.items()},
        model_config=FFHQ_MODEL,
    ),
    "imagenet": Script(
        madformer_imagenet.MADFormer,
        num_images=1_281_167,
        defaults=DEFAULTS
        | {key: default for key, (_, default) in DIFFERENT.items()}
        | {"IMAGE_LOSS_LAMBDA": 1.0, "TEXT_LOSS_LAMBDA": 0.0},
        model_config=FFHQ_MODEL | LLAMA_TEXT,
        # a data set that `save_to_disk` wrote
        data="hf:{}",
        training={"tokenizer": "NousResearch/Llama-3.2-1B", "caption": "label", "caption_dropout": 0.0},
    ),
}
IGNORED = {
    "RESULTS_DIR": "the run's folder is an argument of its own",
    "ID": "the run's folder is an argument of its own",
    "LOCAL_RANK": "torchrun sets it",
    "VAE_PATCH_PIXELS": "the released script reads it nowhere",
    "USE_ROPE": "the released script reads it nowhere: there is always RoPE",
    "SINGLE_TOWER": "the released script reads it nowhere: every stream has its own tower",
}
PARSERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()], "true or false"),
    int: (int, "whole number"),
    float: (float, "number"),
    str: (str, "text"),
}
PRECISIONS = {"bf16": "bf16", "none": "fp32"}
MIN_COSINE_FACTOR = 0.01


@dataclass(frozen=True)
class ReleasedConfig:
    """A released configuration in this library's terms.

    Attributes:
        model: with the quirks of the released code.
        training: values for the fields of :class:`madformer.training.config.TrainingConfig`.
        ignored: keys of the file that mean nothing here, and why.
    """

    model: MADFormerConfig
    training: dict[str, Any]
    ignored: dict[str, str]


def read_released_config(
    path: str | Path,
    *,
    model_config: str | Path | Mapping[str, Any] | None = None,
    num_images: int | None = None,
    world_size: int = 1,
) -> ReleasedConfig:
    """Read a ``baseline.conf``.

    Args:
        model_config: in place of the file that ``MODEL_CONFIG_PATH`` names, which is looked for from the working
            directory and from beside ``path``. ``DATASET_PATH`` is looked for from the working directory, and from
            every folder above ``path``.
        num_images: in the data set, since the released scripts count epochs, not steps; None for all of FFHQ or of
            ImageNet's training set.
        world_size: processes; the rest of the global batch is accumulated.

    Raises:
        OSError: no such file.
        ValueError: an unknown key, a value that it cannot have, or a geometry that no model has; one line.
    """
    path = Path(path)
    written = _read_lines(path)
    name = written.pop("DATASET", "ffhq")
    if name not in SCRIPTS:
        raise ValueError(f"{path}: DATASET={name!r} must be one of {', '.join(SCRIPTS)}")
    script = SCRIPTS[name]
    known = [*script.defaults, *IGNORED]
    if unknown := [key for key in written if key not in known]:
        raise ValueError(f"{path}: unknown {', '.join(with_nearest(key, known) for key in unknown)}")
    values = {key: _convert(path, key, written.get(key), default) for key, default in script.defaults.items()}
    if num_images is None:
        num_images = script.num_images
    try:
        if model_config is None:
            model_config = _model_config(path, values["MODEL_CONFIG_PATH"], script)
        model = _model(script, values, model_config)
        values["DATASET_PATH"] = _data_folder(path, values["DATASET_PATH"])
        training = _training(script, values, model, num_images, world_size)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: its model configuration has a field missing, or of another type: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    ignored = {key: reason for key, reason in IGNORED.items() if key in written}
    return ReleasedConfig(model, training, ignored)


def _read_lines(path: Path) -> dict[str, str]:
    values = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        for word in words[words[:1] == ["export"] :]:
            key, equals, value = word.partition("=")
            if not equals:
                raise ValueError(f"{path}, line {number}: {word!r} is no KEY=value")
            values[key.strip().upper()] = value
    return values


def _convert(path: Path, key: str, text: str | None, default: Any) -> Any:
    """The value in the type of the script's default."""
    if text is None:
        return default
    parse, kind = PARSERS[type(default)]
    try:
        return parse(text)
    except (KeyError, ValueError):
        raise ValueError(f"{path}: {key}={text!r} is no {kind}") from None


def _model_config(path: Path, named: str, script: Script) -> Path | dict[str, Any]:
    if named == PLACEHOLDER:
        return script.model_config
    for candidate in (Path(named), path.parent / named):
        if candidate.is_file():
            return candidate
    raise ValueError(f"MODEL_CONFIG_PATH={named} names no file, from here or from {path.parent}")


def _data_folder(path: Path, named: str) -> str:
    """Of ``DATASET_PATH``, which counts from where the scripts are run: the clone, below which ``path`` lies."""
    candidates = [Path(named), *(folder / named for folder in path.absolute().parents)]
    found = next((candidate for candidate in candidates if candidate.exists()), None)
    return named if found in (None, candidates[0]) else str(found)


def _model(script: Script, values: Mapping[str, Any], model_config: str | Path | Mapping[str, Any]) -> MADFormerConfig:
    """Of the released class, with what the script passes to it."""
    require(values["PATCH_SIZE"] == 1, f"PATCH_SIZE={values['PATCH_SIZE']} must be 1: a latent is a position here")
    with torch.device("meta"):
        config = script.model(
            block_size=values["BLOCK_SIZE"],
            ar_len=values["AR_LEN"],
            spatial_len=values["BLOCK_SIZE"] * values["AR_LEN"],
            square_block=values["SQUARE_BLOCK"],
            model_config_path=model_config,
            diff_depth=values["DIFF_DEPTH"],
            clear_clean=values["CLEAR_CLEAN"],
            clear_cond=values["CLEAR_COND"],
            denoising_mlp=values["DENOISING_MLP"],
        ).config
    derived = {
        "VAE_LATENT_SIZE": config.latent_channels,
        "SPATIAL_LEN": config.block_size * config.num_blocks,
        "PRE_DOWNSAMPLE_BLOCK_SIZE": config.latents_per_block,
        "IMAGE_SIZE": config.latent_shape[1] * VAE_DOWNSCALE,
    }
    for key, expected in derived.items():
        geometry = f"BLOCK_SIZE={config.block_size} and AR_LEN={config.num_blocks}"
        require(values[key] == expected, f"{key}={values[key]} must be {expected} with {geometry}")
    # the ImageNet class's own 16 heads cannot run: its rotation is made for heads of 64
    return config.replace(num_heads=config.hidden_size // RELEASED_HEAD_DIM)


def _training(
    script: Script, values: Mapping[str, Any], model: MADFormerConfig, num_images: int, world_size: int
) -> dict[str, Any]:
    """The released hyperparameters; EMA decay and the schedules' shapes are constants there."""
    precision, schedule = values["MIXED_PRECISION"], values["LR_SCHEDULER"]
    require(precision in PRECISIONS, f"MIXED_PRECISION={precision!r} must be one of {', '.join(PRECISIONS)}")
    require(schedule in ("wsd", "cosine", "constant"), f"LR_SCHEDULER={schedule!r} must be wsd, cosine or constant")
    batch, micro_batch = values["GLOBAL_BATCH_SIZE"], values["PER_GPU_BATCH_SIZE"] * world_size
    require(
        micro_batch > 0 and batch % micro_batch == 0 and batch > 0,
        f"GLOBAL_BATCH_SIZE={batch} must be a multiple of PER_GPU_BATCH_SIZE={values['PER_GPU_BATCH_SIZE']} on "
        f"{world_size} processes",
    )
    steps = values["EPOCHS"] * (num_images // batch)
    require(steps > 0, f"EPOCHS={values['EPOCHS']} of {num_images} images are no step of GLOBAL_BATCH_SIZE={batch}")
    return {
        "data": script.data.format(values["DATASET_PATH"]),
        "image_size": values["IMAGE_SIZE"],
        "num_workers": values["NUM_WORKERS"],
        "steps": steps,
        "batch_size": batch,
        "accumulation_steps": batch // micro_batch,
        "learning_rate": values["LR"],
        "weight_decay": values["WEIGHT_DECAY"],
        "beta1": values["BETA1"],
        "beta2": values["BETA2"],
        "schedule": schedule,
        # Its constant schedule has no warm-up either.
        "warmup": 0.0 if schedule == "constant" else values["LR_WARMUP"],
        "decay_start": 0.85,
        "decay_exponent": 6.0,
        "min_learning_rate": MIN_COSINE_FACTOR if schedule == "cosine" else 0.0,
        # 0 turns clipping off there.
        "max_grad_norm": values["MAX_GRAD_NORM"] or math.inf,
        "ema_decays": (0.9999,),
        # FFHQ's script has one constant weight, and no text.
        "image_loss_weight": values.get("IMAGE_LOSS_LAMBDA", 1.0),
        "text_loss_weight": values.get("TEXT_LOSS_LAMBDA", 0.0),
        "hidden_loss_weight": 0.0 if values["CLEAR_COND"] else values["LAMBDA_HIDDEN_LOSS"],
        # The released loop asks for it together with clear_clean, which has no clean tower: it never counts.
        "clean_loss_weight": values["CLEAR_TOWER_LOSS_LAMBDA"] if model.has_clean_stream else 0.0,
        "precision": PRECISIONS[precision],
        "seed": values["GLOBAL_SEED"],
        "log_every": values["LOG_EVERY"],
        "save_every": values["CKPT_EVERY"],
        **script.training,
    }
