"""How training samples are noised, and what a network is to say of them.

There are two ways. The variance-preserving one (arXiv:2006.11239) has whole timesteps and three targets: the noise, the
clean sample, or the velocity of arXiv:2202.00512. Flow matching (arXiv:2210.02747, 2209.03003) is on the straight line
from the clean sample to the noise, and its target is the difference of the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from madformer.config import PredictionType

if TYPE_CHECKING:
    from madformer.training.config import TrainingConfig

NoiseSchedule: TypeAlias = DDPMScheduler | FlowMatchEulerDiscreteScheduler
"""What says how noisy a timestep is: the variance-preserving one that is discrete, or the straight path of a flow."""


def noise_schedule(prediction_type: PredictionType, **options: Any) -> NoiseSchedule:
    """What training is noised by; ``options`` as :func:`madformer.engine.schedulers.default_scheduler` takes them."""
    if prediction_type == "flow":
        return FlowMatchEulerDiscreteScheduler(**options)
    return DDPMScheduler(prediction_type=prediction_type, **options)


def add_noise(scheduler: NoiseSchedule, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Clean samples at their timesteps; all tensors start with the same flat batch dimension."""
    if isinstance(scheduler, DDPMScheduler):
        return scheduler.add_noise(clean, noise, timestep)
    # not the scheduler's scale_noise, which knows timesteps of its table alone
    return torch.lerp(clean, noise, _share(scheduler, timestep).view(-1, *(1,) * (clean.dim() - 1)))


def _share(scheduler: FlowMatchEulerDiscreteScheduler, timestep: Tensor) -> Tensor:
    """Of the noise, from 0 to 1, in fp32."""
    return timestep.float() / scheduler.config.num_train_timesteps


def prediction_target(
    prediction_type: PredictionType, scheduler: NoiseSchedule, clean: Tensor, noise: Tensor, timestep: Tensor
) -> Tensor:
    """What the network should say; all tensors start with the same flat batch dimension."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return clean
    if prediction_type == "flow":
        return noise - clean
    return scheduler.get_velocity(clean, noise, timestep)


def min_snr_weight(prediction_type: PredictionType, scheduler: NoiseSchedule, timestep: Tensor, gamma: float) -> Tensor:
    """Weight of a squared error at each timestep, in fp32 (arXiv:2303.09556, section 3.4).

    With ``snr = a / (1 - a)`` of the schedule's cumulated ``a`` it is ``min(snr, gamma)`` on the predicted clean
    sample; what that is on epsilon or v divides by ``snr`` or ``snr + 1``. A flow's error at a share ``s`` of noise is
    ``s`` times as large on the clean sample, and its ``snr`` is ``((1 - s) / s) ** 2``.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        share = _share(scheduler, timestep)
        return torch.minimum((1 - share) ** 2, gamma * share**2)
    signal = scheduler.alphas_cumprod.to(timestep.device)[timestep]
    snr = signal / (1 - signal)
    scale = {"sample": 1.0, "epsilon": snr, "v_prediction": snr + 1}[prediction_type]
    return snr.clamp(max=gamma) / scale


@dataclass(frozen=True)
class FlowTimesteps:
    """How noisy a flow's training samples are (arXiv:2403.03206, section 3.1).

    Attributes:
        logit_normal: draw shares of noise whose logits are normal, most of them in the middle; else all as often.
        mean, deviation: of the logits.
        shift: more than 1 for more noise: a share ``s`` becomes ``shift * s / (1 + (shift - 1) * s)``.
    """

    logit_normal: bool = False
    mean: float = 0.0
    deviation: float = 1.0
    shift: float = 1.0

    def shares(self, random: np.random.Generator, count: int) -> np.ndarray:
        """From 0 to 1, float64."""
        if self.logit_normal:
            shares = 1 / (1 + np.exp(-(self.mean + self.deviation * random.standard_normal(count))))
        else:
            shares = 1 - random.random(count)
        return self.shift * shares / (1 + (self.shift - 1) * shares)

    @classmethod
    def of(cls, config: TrainingConfig) -> Self | None:
        """A run's; None where another thing than a flow is predicted."""
        if config.model.prediction_type != "flow":
            return None
        is_normal = config.flow_sampling == "logit-normal"
        return cls(is_normal, config.flow_logit_mean, config.flow_logit_std, config.flow_shift)
