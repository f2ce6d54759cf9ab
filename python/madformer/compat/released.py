"""Reads the checkpoints of the released implementations into the native model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from madformer.compat import madformer_ffhq, madformer_imagenet
from madformer.compat.checkpoint import ReleasedCheckpoint
from madformer.model import MADFormer


def from_released(
    checkpoint: str | Path,
    *,
    model_config: str | Path | Mapping[str, Any] | None = None,
    weights: Literal["ema", "model"] = "ema",
) -> MADFormer:
    """A released training checkpoint, FFHQ's or ImageNet's, as a native model with the quirk fields set.

    See :meth:`madformer.compat.madformer_ffhq.MADFormer.from_released`; with text ``model_config`` must be given.
    """
    released = ReleasedCheckpoint.load(checkpoint, weights)
    family = madformer_imagenet if released.has_text else madformer_ffhq
    return family.MADFormer.from_checkpoint(released, model_config).to_native()
