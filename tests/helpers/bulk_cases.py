"""Settings for tests of folders, in which nothing is drawn."""

from __future__ import annotations

from typing import Any

from safetensors.torch import save

from madformer.bulk import Settings
from madformer.engine.options import SamplingOptions

NOTHING = save({})
"""A whole file of latents."""


def settings(**changes: Any) -> Settings:
    values = {
        "format": "png", "latents": True, "shard_size": None, "batch_size": 16, "seed": 0,
        "sampling": SamplingOptions(2), "precision": "exact", "scheduler": {"class": "DDIMScheduler"},
        "latent_shape": (4, 8, 8), "model": "0", "vae": None, "vae_tile": None, "recorded": {"size": None},
    }  # fmt: skip
    return Settings(**{**values, **changes})
