"""What AdaLN tells the diffusion layers: the time and the class (arXiv:2212.09748, section 3.2).

Shape legend: N samples or blocks, B samples, F frequencies, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madformer.config import MADFormerConfig
from madformer.model.plain import PreciseLinear, precise

FREQUENCY_CHANNELS = 256
MAX_PERIOD = 10_000


class Conditioner(nn.Module):
    """Embeds timesteps and classes to vectors that are added; layers project the SiLU of the sum."""

    def __init__(self, config: MADFormerConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.linear_1 = PreciseLinear(FREQUENCY_CHANNELS, hidden)
        self.linear_2 = PreciseLinear(hidden, hidden)
        self.num_classes = config.num_classes
        if config.num_classes:
            # the last one stands for a class that is left out
            self.classes = nn.Embedding(config.num_classes + config.null_class, hidden)

    def reset_modulation(self) -> None:
        """DiT's initialisation."""
        for linear in (self.linear_1, self.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        if self.num_classes:
            nn.init.normal_(self.classes.weight, std=0.02)

    def time(self, timestep_N: Tensor) -> Tensor:
        """``(N, C)`` in fp32, in float64 for a model in it: bf16 cannot tell 998 from 999."""
        steps_F = torch.arange(FREQUENCY_CHANNELS // 2, dtype=torch.float32, device=timestep_N.device)
        angles_NF = timestep_N.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps_F / len(steps_F))
        waves = torch.cat((angles_NF.cos(), angles_NF.sin()), dim=-1)
        return self.linear_2(F.silu(self.linear_1(waves)))

    def label(self, labels_B: Tensor) -> Tensor:
        """``(B, C)`` as :meth:`time`; a negative label is one left out."""
        return precise(self.classes(torch.where(labels_B < 0, self.num_classes, labels_B)))
