"""The training objective: image loss on noisy blocks, hidden loss on the condition, losses of clean tower and text.

Where its arguments come from: ``training/data.py`` draws latents, noise and timesteps of a sample from the seed and its
position in the run alone; ``data/sources.py`` reads samples (tar shards, folders, Hugging Face; another is a class with
the members of ``Source`` and a line in ``data/images.py``, ``open_source``). ``madformer train tiny --data photos
--out run`` is all of it, for your own pictures.

Shape legend: B batch, M blocks, L latents of a block, C channels, P tokens of a text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from madformer.config import PredictionType
from madformer.engine.schedulers import predicted_by
from madformer.training.noise import NoiseSchedule, add_noise, min_snr_weight, prediction_target


@dataclass
class Batch:
    """What a step's losses are made of: a micro-batch, the blocks in the order that they are to be made in.

    Attributes:
        clean_BMLC: scaled latents drawn from the posterior, fp32.
        noise_BMLC: standard normal, fp32.
        timestep_BM: one for every block: int64 or, of a flow, the noise's share times 1000, fp32.
        labels_B: int64, -1 unknown or left out; None for a model without classes.
        captions: as the model reads them, empty where there is none.
        text_BP: their token ids, int64; None for a model without text.
        order_BM: int64, the place of every block where each sample has an order of its own; else None.
    """

    clean_BMLC: Tensor
    noise_BMLC: Tensor
    timestep_BM: Tensor
    labels_B: Tensor | None = None
    captions: Sequence[str] = ()
    text_BP: Tensor | None = None
    order_BM: Tensor | None = None

    def pin_memory(self) -> Self:
        """What a ``DataLoader`` calls on batches that it does not know."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> Self:
        """On a device, without waiting for it."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        mapped = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(mapped, name, function(value))
        return mapped


@dataclass(frozen=True)
class LossWeights:
    """Factors of the losses; a loss of weight 0 is not computed.

    Attributes:
        min_snr_gamma: see :func:`~madformer.training.noise.min_snr_weight`; 0 for none.
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


def training_losses(
    model: torch.nn.Module,
    batch: Batch,
    scheduler: NoiseSchedule,
    weights: LossWeights | None = None,
    *,
    diffusion_layers: int | None = None,
) -> Losses:
    """Noise every block to a timestep of its own, predict, and compare.

    Args:
        model: a :class:`~madformer.model.MADFormer`, bare or wrapped (``torch.compile``, DDP, FSDP).
        batch: on the model's device, with what the model is to be told.
        scheduler: of :func:`~madformer.training.noise.noise_schedule`; gives the noise and what is predicted.
        diffusion_layers: of this batch, for an elastic model.
    """
    weights = weights or LossWeights()
    prediction_type = cast("PredictionType", predicted_by(scheduler))
    clean_BMLC, timestep_BM = batch.clean_BMLC, batch.timestep_BM
    flat = clean_BMLC.flatten(0, 1), batch.noise_BMLC.flatten(0, 1), timestep_BM.flatten()
    noisy_BMLC = add_noise(scheduler, *flat).view_as(clean_BMLC)
    target_BMLC = prediction_target(prediction_type, scheduler, *flat).view_as(clean_BMLC)

    output = model(
        clean_BMLC,
        noisy_BMLC,
        timestep_BM,
        batch.text_BP,
        batch.labels_B,
        diffusion_layers=diffusion_layers,
        order_BM=batch.order_BM,
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
    if output.logits is not None and batch.text_BP is not None:
        losses.text = next_token_loss(output.logits, batch.text_BP, weights.padding)
        losses.total = losses.total + weights.text * losses.text
    return losses


def next_token_loss(logits_BPV: Tensor, text_BP: Tensor, padding: int | None) -> Tensor:
    """Mean cross-entropy of every token but the first, ``padding`` left out; 0 where there is none."""
    logits, following = logits_BPV[:, :-1].flatten(0, 1).float(), text_BP[:, 1:].flatten()
    if padding is None:
        return F.cross_entropy(logits, following)
    total = F.cross_entropy(logits, following, ignore_index=padding, reduction="sum")
    return total / (following != padding).sum().clamp(min=1)
