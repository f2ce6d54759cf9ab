"""Training: objective, data order, optimisation, and the run itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from madformer.lazy import exporter

if TYPE_CHECKING:
    from madformer.training.config import TrainingConfig
    from madformer.training.losses import Batch, Losses, LossWeights, training_losses
    from madformer.training.trainer import Trainer

__all__ = ["Batch", "LossWeights", "Losses", "Trainer", "TrainingConfig", "training_losses"]

__getattr__ = exporter(
    __name__,
    {
        "madformer.training.config": ("TrainingConfig",),
        "madformer.training.losses": ("Batch", "LossWeights", "Losses", "training_losses"),
        "madformer.training.trainer": ("Trainer",),
    },
)
