"""What a training run is. Presets are functions that return one; the command line is derived from the fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from madformer import config as model_presets
from madformer.config import MADFormerConfig


@dataclass(frozen=True)
class TrainingConfig:
    """One run. The defaults are the paper's, as far as one machine goes.

    Attributes:
        data: shards, a folder of images, or ``hf:NAME``; see :func:`madformer.data.open_dataset`.
        vae: folder or hub id of an ``AutoencoderKL``.
        image_size: pixels along one side.
        cache_latents: encode the data set once, before the first step, and keep it in memory.
        batch_size: images in an optimiser step; split into ``accumulation_steps`` micro-batches.
        warmup, decay_start, decay_exponent: WSD: linear warm-up over this share of the steps, constant, then from
            that share on a decay to ``0.5 ** decay_exponent``.
        hidden_loss_weight, clean_loss_weight: of the condition's and the clean tower's loss; the image loss counts 1.
        precision: dtype of the autocast region; weights and optimiser stay fp32.
        keep_checkpoints: how many of the newest to keep.
        compile: pass the network through ``torch.compile``.
        backend, attention_backend: of the kernels, see :meth:`madformer.model.MADFormer.set_backend`; an empty
            ``attention_backend`` is the same as ``backend``.
        num_threads: of torch on a CPU; 0 leaves torch's choice.
    """

    model: MADFormerConfig = field(default_factory=MADFormerConfig)
    data: str = ""
    vae: str = "stabilityai/sd-vae-ft-mse"
    image_size: int = 1024
    cache_latents: bool = False
    num_workers: int = 4

    steps: int = 210_000
    batch_size: int = 64
    accumulation_steps: int = 1
    learning_rate: float = 3e-4
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    warmup: float = 0.01
    decay_start: float = 0.85
    decay_exponent: float = 6.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999

    hidden_loss_weight: float = 0.1
    clean_loss_weight: float = 0.0

    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = False
    backend: str = "auto"
    attention_backend: str = ""
    device: str = "auto"
    num_threads: int = 0
    seed: int = 0
    log_every: int = 10
    save_every: int = 10_000
    keep_checkpoints: int = 3

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulation_steps",
            "log_every",
            "save_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of accumulation_steps={self.accumulation_steps}"
            )
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision={self.precision!r} must be 'bf16' or 'fp32'")
        if not 0 <= self.warmup <= self.decay_start <= 1:
            raise ValueError(f"warmup={self.warmup} and decay_start={self.decay_start} must rise within [0, 1]")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be in [0, 1)")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        return cls(**{**values, "model": MADFormerConfig.from_dict(values["model"])})


def ffhq1024() -> TrainingConfig:
    """The paper's FFHQ-1024 run."""
    return TrainingConfig()


def imagenet256() -> TrainingConfig:
    """The image part of the paper's ImageNet-256 run."""
    return TrainingConfig(model=model_presets.imagenet256(), image_size=256, steps=250_000, batch_size=256)


def emoji64() -> TrainingConfig:
    """Emoji on a laptop's processor: the run that made the checkpoint in ``assets/``."""
    return TrainingConfig(
        model=model_presets.emoji64(),
        data="data/emoji64",
        vae="runs/emoji-vae",
        image_size=64,
        cache_latents=True,
        num_workers=0,
        steps=3_300,
        batch_size=32,
        learning_rate=1e-3,
        decay_start=0.67,
        ema_decay=0.999,
        save_every=250,
    )


PRESETS: dict[str, Callable[[], TrainingConfig]] = {
    preset.__name__: preset for preset in (ffhq1024, imagenet256, emoji64)
}
