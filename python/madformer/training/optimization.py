"""Learning-rate schedule and weight averaging."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def wsd(step: int, total: int, *, warmup: float, decay_start: float, decay_exponent: float) -> float:
    """Warm-up, stable, decay: the factor on the learning rate at a step counted from 0.

    Linear to 1 over ``warmup * total`` steps, 1 until ``decay_start * total``, then halved ``decay_exponent`` times
    by the end.
    """
    warmup_steps, decay_step = int(warmup * total), int(decay_start * total)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step < decay_step:
        return 1.0
    return 0.5 ** (decay_exponent * (step - decay_step) / max(total - decay_step, 1))


class ExponentialMovingAverage(Generic[Model]):
    """``average = decay * average + (1 - decay) * weights`` after every step, in fp32.

    Early on the decay is held at ``(1 + step) / (10 + step)``, so that the initial weights are soon forgotten.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Model, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = list(self.model.parameters())
        weights = [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
