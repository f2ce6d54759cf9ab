"""The training objective: image loss on noisy blocks, hidden loss on the condition, losses of clean tower and text.

Where its arguments come from: ``training/data.py`` draws latents, noise and timesteps of a sample from the seed and its
position in the run alone; ``data/sources.py`` reads samples (tar shards, folders, Hugging Face; another is a class with
the members of ``Source`` and a line in ``data/images.py``, ``_open_source``). ``madformer train tiny --data photos
--out run`` is all of it, for your own pictures.

Shape legend: B batch, M blocks, L latents of a block, C channels, P tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from madformer.config import PredictionType


@dataclass(frozen=True)
class LossWeights:
    """Factors of the losses; a loss of weight 0 is not computed.

    Attributes:
        min_snr_gamma: see :func:`min_snr_weight`; 0 for none.
        padding: the token that is not to be predicted; None for no such one.
    """

    image: float = 1.0
    hidden: float = 0.1
    clean: float = 0.0
    text: float = 0.0
    min_snr_gamma: float = 0.0
    padding: int | None = None


@dataclass
class Losses:
    """Mean squared errors and the text's cross-entropy, each a scalar; ``total`` is their weighted sum."""

    total: Tensor
    image: Tensor
    hidden: Tensor | None = None
    clean: Tensor | None = None
    text: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        named = {
            "loss": self.total, "image": self.image, "hidden": self.hidden, "clean": self.clean, "text": self.text,
        }  # fmt: skip
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


def min_snr_weight(prediction_type: PredictionType, scheduler: DDPMScheduler, timestep: Tensor, gamma: float) -> Tensor:
    """Weight of a squared error at each timestep, in fp32 (arXiv:2303.09556, section 3.4).

    With ``snr = a / (1 - a)`` of the schedule's cumulated ``a`` it is ``min(snr, gamma)`` on the predicted clean
    sample; what that is on epsilon or v divides by ``snr`` or ``snr + 1``.
    """
    signal = scheduler.alphas_cumprod.to(timestep.device)[timestep]
    snr = signal / (1 - signal)
    scale = {"sample": 1.0, "epsilon": snr, "v_prediction": snr + 1}[prediction_type]
    return snr.clamp(max=gamma) / scale


def training_losses(
    model: torch.nn.Module,
    clean_BMLC: Tensor,
    noise_BMLC: Tensor,
    timestep_BM: Tensor,
    scheduler: DDPMScheduler,
    weights: LossWeights | None = None,
    text_BP: Tensor | None = None,
    labels_B: Tensor | None = None,
    diffusion_layers: int | None = None,
    order_BM: Tensor | None = None,
) -> Losses:
    """Noise every block to a timestep of its own, predict, and compare.

    Args:
        model: a :class:`~madformer.model.MADFormer`, bare or wrapped (``torch.compile``, DDP, FSDP).
        clean_BMLC: scaled latents, the blocks in the order that they are to be made in.
        noise_BMLC: standard normal.
        timestep_BM: of every block, int64.
        scheduler: gives the noise schedule and, as its ``prediction_type``, what is predicted.
        text_BP, labels_B: token ids and classes, for a model with such.
        diffusion_layers: of this batch, for an elastic model. order_BM: the blocks' places, for one of random order.
    """
    weights = weights or LossWeights()
    prediction_type: PredictionType = scheduler.config.prediction_type
    flat = clean_BMLC.flatten(0, 1), noise_BMLC.flatten(0, 1), timestep_BM.flatten()
    noisy_BMLC = scheduler.add_noise(*flat).view_as(clean_BMLC)
    target_BMLC = prediction_target(prediction_type, scheduler, *flat).view_as(clean_BMLC)

    output = model(
        clean_BMLC,
        noisy_BMLC,
        timestep_BM,
        text_BP,
        labels_B,
        diffusion_layers=diffusion_layers,
        order_BM=order_BM,
        return_condition=weights.hidden > 0,
        return_clean=weights.clean > 0,
        return_logits=weights.text > 0,
    )
    image = F.mse_loss(output.prediction.float(), target_BMLC, reduction="none").mean((2, 3))
    if weights.min_snr_gamma:
        image = image * min_snr_weight(prediction_type, scheduler, timestep_BM, weights.min_snr_gamma)
    losses = Losses(total=weights.image * image.mean(), image=image.mean())
    if output.condition is not None:
        losses.hidden = F.mse_loss(output.condition.float(), clean_BMLC)
        losses.total = losses.total + weights.hidden * losses.hidden
    if output.clean is not None and clean_BMLC.shape[1] > 1:
        # the last clean block is context for nobody
        losses.clean = F.mse_loss(output.clean[:, :-1].float(), clean_BMLC[:, :-1])
        losses.total = losses.total + weights.clean * losses.clean
    if output.logits is not None and text_BP is not None:
        losses.text = next_token_loss(output.logits, text_BP, weights.padding)
        losses.total = losses.total + weights.text * losses.text
    return losses


def next_token_loss(logits_BPV: Tensor, text_BP: Tensor, padding: int | None) -> Tensor:
    """Mean cross-entropy of every token but the first, ``padding`` left out; 0 where there is none."""
    logits, following = logits_BPV[:, :-1].flatten(0, 1).float(), text_BP[:, 1:].flatten()
    if padding is None:
        return F.cross_entropy(logits, following)
    total = F.cross_entropy(logits, following, ignore_index=padding, reduction="sum")
    return total / (following != padding).sum().clamp(min=1)
