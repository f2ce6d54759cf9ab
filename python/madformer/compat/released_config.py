"""Configurations of the released FFHQ training script, as its ``baseline.conf`` has them, for this library's trainer.

Such a file holds ``KEY=value`` lines as a shell reads them; the keys are the options of the released ``train.py`` in
capitals. What the file leaves out has the script's default.
"""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madformer.compat.checkpoint import RELEASED_HEAD_DIM, RELEASED_MODEL_CONFIG
from madformer.compat.madformer_ffhq import CONTEXTS, native_config, read_model_config
from madformer.config import MADFormerConfig

FFHQ_IMAGES = 70_000
VAE_DOWNSCALE = 8
PLACEHOLDER = "Your/Path/To/Model/Config.json"
"""What ``baseline.conf`` was released with for ``MODEL_CONFIG_PATH``: nobody's file."""
HIDDEN_SIZE, DEPTH = 1152, 28
"""Of the released constructor, which its script gives no option for."""

# Defaults of the released train.py; their types are the options' types.
DEFAULTS: dict[str, Any] = {
    "DATASET": "ffhq",
    "DATASET_PATH": "./datasets/ffhq-1024",
    "LR": 3e-4,
    "WEIGHT_DECAY": 5e-2,
    "BETA1": 0.9,
    "BETA2": 0.95,
    "EPOCHS": 200,
    "GLOBAL_BATCH_SIZE": 64,
    "PER_GPU_BATCH_SIZE": 1,
    "GLOBAL_SEED": 0,
    "NUM_WORKERS": 4,
    "LOG_EVERY": 10,
    "CKPT_EVERY": 10_000,
    "MIXED_PRECISION": "bf16",
    "MAX_GRAD_NORM": 1.0,
    "IMAGE_SIZE": 1024,
    "PATCH_SIZE": 1,
    "VAE_LATENT_SIZE": 4,
    "BLOCK_SIZE": 256,
    "PRE_DOWNSAMPLE_BLOCK_SIZE": 1024,
    "SQUARE_BLOCK": True,
    "AR_LEN": 16,
    "LR_SCHEDULER": "wsd",
    "LR_WARMUP": 0.01,
    "MODEL_CONFIG_PATH": PLACEHOLDER,
    "SPATIAL_LEN": 4096,
    "LAMBDA_HIDDEN_LOSS": 0.1,
    "DIFF_DEPTH": 14,
    "CLEAR_CLEAN": False,
    "CLEAR_COND": False,
    "DENOISING_MLP": False,
    "CLEAR_TOWER_LOSS_LAMBDA": 0.0,
}
IGNORED = {
    "RESULTS_DIR": "the run's folder is an argument of its own",
    "ID": "the run's folder is an argument of its own",
    "LOCAL_RANK": "torchrun sets it",
    "VAE_PATCH_PIXELS": "the released script reads it nowhere",
    "USE_ROPE": "the released script reads it nowhere: there is always RoPE",
    "SINGLE_TOWER": "the released script reads it nowhere: there are always two towers",
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
    num_images: int = FFHQ_IMAGES,
    world_size: int = 1,
) -> ReleasedConfig:
    """Read a ``baseline.conf``.

    Args:
        model_config: in place of the file that ``MODEL_CONFIG_PATH`` names, which is looked for from the working
            directory and from beside ``path``.
        num_images: in the data set; the released script counts epochs, not steps.
        world_size: processes; the rest of the global batch is accumulated.

    Raises:
        OSError: no such file.
        ValueError: an unknown key, a value that it cannot have, or a geometry that no model has; one line.
    """
    path = Path(path)
    written = _read_lines(path)
    if unknown := [key for key in written if key not in DEFAULTS and key not in IGNORED]:
        raise ValueError(f"{path}: unknown {', '.join(map(_with_nearest, unknown))}")
    values = {key: _convert(path, key, written.get(key), default) for key, default in DEFAULTS.items()}
    try:
        model = _model(values, _model_config_source(path, values["MODEL_CONFIG_PATH"], model_config))
        training = _training(values, model, num_images, world_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    ignored = {key: reason for key, reason in IGNORED.items() if key in written}
    return ReleasedConfig(model, training, ignored)


def _read_lines(path: Path) -> dict[str, str]:
    values = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
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


def _with_nearest(key: str) -> str:
    nearest = difflib.get_close_matches(key, [*DEFAULTS, *IGNORED], n=1, cutoff=0)
    return f"{key} (the nearest known name is {nearest[0]})"


def _convert(path: Path, key: str, text: str | None, default: Any) -> Any:
    """The value in the type of the script's default."""
    if text is None:
        return default
    parse, kind = PARSERS[type(default)]
    try:
        return parse(text)
    except (KeyError, ValueError):
        raise ValueError(f"{path}: {key}={text!r} is no {kind}") from None


def _model_config_source(
    path: Path, named: str, given: str | Path | Mapping[str, Any] | None
) -> str | Path | Mapping[str, Any]:
    if given is not None:
        return given
    if named == PLACEHOLDER:
        return {**RELEASED_MODEL_CONFIG, "intermediate_size": 4096}
    for candidate in (Path(named), path.parent / named):
        if candidate.is_file():
            return candidate
    raise ValueError(f"MODEL_CONFIG_PATH={named} names no file, from here or from {path.parent}")


def _model(values: Mapping[str, Any], model_config: str | Path | Mapping[str, Any]) -> MADFormerConfig:
    _require(values["PATCH_SIZE"] == 1, f"PATCH_SIZE={values['PATCH_SIZE']} must be 1: a latent is a position here")
    config = native_config(
        read_model_config(model_config),
        hidden_loss_input="condition+noisy",
        hidden_size=HIDDEN_SIZE,
        num_layers=DEPTH,
        num_heads=HIDDEN_SIZE // RELEASED_HEAD_DIM,
        num_blocks=values["AR_LEN"],
        block_size=values["BLOCK_SIZE"],
        diffusion_layers=values["DIFF_DEPTH"],
        context=CONTEXTS[values["CLEAR_CLEAN"], values["CLEAR_COND"]],
        cross_block_attention=not values["DENOISING_MLP"],
        square_blocks=values["SQUARE_BLOCK"],
    )
    derived = {
        "VAE_LATENT_SIZE": config.latent_channels,
        "SPATIAL_LEN": config.block_size * config.num_blocks,
        "PRE_DOWNSAMPLE_BLOCK_SIZE": config.latents_per_block,
        "IMAGE_SIZE": config.latent_side * VAE_DOWNSCALE,
    }
    for key, expected in derived.items():
        geometry = f"BLOCK_SIZE={config.block_size} and AR_LEN={config.num_blocks}"
        _require(values[key] == expected, f"{key}={values[key]} must be {expected} with {geometry}")
    return config


def _training(values: Mapping[str, Any], model: MADFormerConfig, num_images: int, world_size: int) -> dict[str, Any]:
    """The released hyperparameters; EMA decay, image loss weight and the schedules' shapes are constants there."""
    _require(values["DATASET"] == "ffhq", f"DATASET={values['DATASET']!r}: the released script knows 'ffhq' alone")
    precision, schedule = values["MIXED_PRECISION"], values["LR_SCHEDULER"]
    _require(precision in PRECISIONS, f"MIXED_PRECISION={precision!r} must be one of {', '.join(PRECISIONS)}")
    _require(schedule in ("wsd", "cosine", "constant"), f"LR_SCHEDULER={schedule!r} must be wsd, cosine or constant")
    batch, micro_batch = values["GLOBAL_BATCH_SIZE"], values["PER_GPU_BATCH_SIZE"] * world_size
    _require(
        micro_batch > 0 and batch % micro_batch == 0 and batch > 0,
        f"GLOBAL_BATCH_SIZE={batch} must be a multiple of PER_GPU_BATCH_SIZE={values['PER_GPU_BATCH_SIZE']} on "
        f"{world_size} processes",
    )
    steps = values["EPOCHS"] * (num_images // batch)
    _require(steps > 0, f"EPOCHS={values['EPOCHS']} of {num_images} images are no step of GLOBAL_BATCH_SIZE={batch}")
    return {
        "data": values["DATASET_PATH"],
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
        "image_loss_weight": 1.0,
        "hidden_loss_weight": 0.0 if values["CLEAR_COND"] else values["LAMBDA_HIDDEN_LOSS"],
        # The released loop asks for it together with clear_clean, which has no clean tower: it never counts.
        "clean_loss_weight": values["CLEAR_TOWER_LOSS_LAMBDA"] if model.has_clean_stream else 0.0,
        "precision": PRECISIONS[precision],
        "seed": values["GLOBAL_SEED"],
        "log_every": values["LOG_EVERY"],
        "save_every": values["CKPT_EVERY"],
    }


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
