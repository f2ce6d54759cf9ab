"""The training objective: image loss on noisy blocks, hidden loss on the condition, loss of the clean tower.

Shape legend: B batch, M blocks, L latents of a block, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from madformer.config import PredictionType
from madformer.model import MADFormer


@dataclass
class Losses:
    """Mean squared errors, each a scalar; ``total`` is their weighted sum."""

    total: Tensor
    image: Tensor
    hidden: Tensor | None = None
    clean: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        named = {"loss": self.total, "image": self.image, "hidden": self.hidden, "clean": self.clean}
        return {name: value.detach() for name, value in named.items() if value is not None}


def prediction_target(
    prediction_type: PredictionType, scheduler: DDPMScheduler, clean: Tensor, noise: Tensor, timestep: Tensor
) -> Tensor:
    """What the network should say; all tensors start with the same flat batch dimension."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return clean
    return scheduler.get_velocity(clean, noise, timestep)


def training_losses(
    model: torch.nn.Module,
    clean_BMLC: Tensor,
    scheduler: DDPMScheduler,
    *,
    hidden_weight: float = 0.1,
    clean_weight: float = 0.0,
    generator: torch.Generator | None = None,
) -> Losses:
    """Noise every block to a timestep of its own, predict, and compare.

    Args:
        model: a :class:`MADFormer`, bare or wrapped (``torch.compile``, DDP).
        clean_BMLC: scaled latents.
        scheduler: gives the noise schedule.
        generator: CPU generator of noise and timesteps, so that a run draws the same on every device.
    """
    network = getattr(model, "module", model)
    network = getattr(network, "_orig_mod", network)
    assert isinstance(network, MADFormer)
    device, batch = clean_BMLC.device, clean_BMLC.shape[:2]
    noise = torch.randn(clean_BMLC.shape, generator=generator).to(device)
    timestep = torch.randint(0, scheduler.config.num_train_timesteps, batch, generator=generator).to(device)
    flat = clean_BMLC.flatten(0, 1), noise.flatten(0, 1), timestep.flatten()
    noisy = scheduler.add_noise(*flat).unflatten(0, batch)
    target = prediction_target(network.config.prediction_type, scheduler, *flat).unflatten(0, batch)

    output = model(clean_BMLC, noisy, timestep, return_condition=hidden_weight > 0, return_clean=clean_weight > 0)
    image = F.mse_loss(output.prediction.float(), target)
    losses = Losses(total=image, image=image)
    if output.condition is not None:
        losses.hidden = F.mse_loss(output.condition.float(), clean_BMLC)
        losses.total = losses.total + hidden_weight * losses.hidden
    if output.clean is not None and clean_BMLC.shape[1] > 1:
        # the last clean block is context for nobody
        losses.clean = F.mse_loss(output.clean[:, :-1].float(), clean_BMLC[:, :-1])
        losses.total = losses.total + clean_weight * losses.clean
    return losses
