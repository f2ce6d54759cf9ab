"""Learning-rate schedules, averages of the weights, and the watch over steps that went wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from madformer.training.config import TrainingConfig


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """The factor on the learning rate at a step counted from 0; :class:`TrainingConfig` describes the schedules."""
    warmup_steps = int(config.warmup * config.steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.schedule == "wsd":
        first = int(config.decay_start * config.steps)
        return 0.5 ** (config.decay_exponent * max(step - first, 0) / max(config.steps - first, 1))
    if config.schedule == "cosine":
        progress = (step - warmup_steps) / max(config.steps - warmup_steps, 1)
        return config.min_learning_rate + (1 - config.min_learning_rate) * (1 + math.cos(math.pi * progress)) / 2
    return 1.0


class MovingAverages:
    """``average = decay * average + (1 - decay) * weights`` after every step, in fp32, for each of several decays.

    Early on a decay is held at ``(1 + step) / (10 + step)``, so that the initial weights are soon forgotten. Where the
    model is sharded, so are its averages.

    Attributes:
        weights: by decay, then by parameter name.
    """

    def __init__(self, model: nn.Module, decays: Sequence[float]) -> None:
        self.parameters = dict(model.named_parameters())
        self.weights = {
            decay: {name: parameter.detach().clone() for name, parameter in self.parameters.items()} for decay in decays
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        current = [parameter.detach() for parameter in self.parameters.values()]
        for decay, averages in self.weights.items():
            held = min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(averages.values()), current, 1 - held)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {str(decay): dict(averages) for decay, averages in self.weights.items()}


class StepGuard:
    """Lets no step through whose gradient is not finite or explodes: weights and optimiser state stay as they are.

    The decision stays on the device, where fused AdamW reads it as it would a gradient scaler's: nothing waits for it.

    Args:
        explosion: a norm explodes that is more than so many times the running mean of the good ones; 0 for never.

    Attributes:
        skipped: steps of the run that were skipped. in_a_row: of these, the last ones without a good step since.
    """

    DECAY = 0.99
    GOOD_STEPS = 20
    """Before so many the mean says nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, explosion: float = 0.0) -> None:
        self.optimizer: Any = optimizer
        self.limit = explosion or math.inf
        self.skipped, self.in_a_row, self.good = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(3))
        self.norm_sum = torch.zeros((), dtype=torch.float64, device=device)

    def step(self, grad_norm: Tensor) -> None:
        """``optimizer.step()``, unless this norm, of all gradients, forbids it."""
        mean = self.norm_sum / (1 - self.DECAY**self.good)
        exploded = (self.good >= self.GOOD_STEPS) & (grad_norm > self.limit * mean)
        bad = exploded | ~torch.isfinite(grad_norm)
        self.norm_sum += torch.where(bad, 0, (1 - self.DECAY) * (grad_norm - self.norm_sum))
        self.good += ~bad
        self.skipped += bad
        self.in_a_row += 1
        self.in_a_row *= bad
        self.optimizer.grad_scale, self.optimizer.found_inf = None, bad.float()
        self.optimizer.step()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("skipped", "in_a_row", "good", "norm_sum")}
