"""From statistics to a ranking of block counts and splits: a hypothesis, with no constant in it that was fitted.

Shape legend: S resamplings of the images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from madformer.config import MADFormerConfig
from madformer.evaluation.moments import Array
from madformer.sweeps.costs import layers_once

__all__ = ["Candidate", "Unit", "expected_error", "steps_within"]

Unit = Literal["layers", "steps"]
"""What a budget counts: layers of the Transformer that an image's tokens pass through, or steps of a block."""


@dataclass(frozen=True, order=True)
class Candidate:
    """A block count M and a split: the last D layers are diffusion layers."""

    num_blocks: int
    diffusion_layers: int

    def __str__(self) -> str:
        return f"M={self.num_blocks}, D={self.diffusion_layers}"

    def of(self, base: MADFormerConfig) -> MADFormerConfig:
        """The configuration of an image as large as ``base``'s in a square number of blocks of the image's shape.

        Raises:
            ValueError: tokens do not divide into such blocks, or the layers are fewer.
        """
        side, (rows, columns) = math.isqrt(max(self.num_blocks, 0)), base.token_grid
        if side < 1 or side**2 != self.num_blocks or rows % side or columns % side:
            raise ValueError(
                f"{self.num_blocks} blocks are not possible: their number is a square, whose root divides the "
                f"{rows} x {columns} tokens of the image"
            )
        if not 1 <= self.diffusion_layers <= base.num_layers:
            raise ValueError(f"diffusion_layers={self.diffusion_layers} must be from 1 to num_layers={base.num_layers}")
        block = rows // side, columns // side
        return base.replace(
            num_blocks=self.num_blocks, block_grid=(side, side), block_size=math.prod(block), block_shape=block,
            diffusion_layers=self.diffusion_layers, elastic_diffusion_layers=(), square_blocks=True,
        )  # fmt: skip


def steps_within(config: MADFormerConfig, budget: float, unit: Unit) -> int:
    """Denoising steps of a block that a budget pays for, without guidance; 0 where it pays for none."""
    if unit == "steps":
        return math.floor(budget)
    # what a sweep measured at so many steps is within the budget of what that cost, whatever rounding says
    return max(0, math.floor((budget - layers_once(config)) / config.diffusion_layers + 1e-9))


def expected_error(config: MADFormerConfig, steps: int, explained_S: Array, slope_S: Array) -> Array:
    """What the hypothesis expects of a model, ``(S,)``; it has no unit, and only its order is meant.

    With ``r`` the explained share of the variance, ``a`` the slope of the spectrum, ``s`` the latents along the shorter
    side of a block, M blocks, N layers of which D are diffusion layers, and T steps::

        octaves   = 1 + max(a, 0) * log2(max(s / 2, 1))
        own       = (1 - r) * (octaves / T + 1 / D) + r / (1 + N - D)
        error     = own * (1 + r * (M - 1) / M)

    What earlier blocks do not explain has to be drawn: its error falls with the steps, of which it takes the more the
    more octaves a block has and the steeper the spectrum is, and with the depth of what draws it. What they do explain
    is predicted, by the autoregressive layers. What is wrong with earlier blocks is handed on once.

    Args:
        explained_S, slope_S: see :class:`~madformer.advice.statistics.Predictability` and
            :class:`~madformer.advice.statistics.Spectrum`; an explained share below 0 counts as 0.

    Returns:
        Infinity where there are no steps.
    """
    explained_S = np.clip(explained_S, 0, 1)
    if steps < 1:
        return np.full(explained_S.shape, math.inf)
    octaves_S = 1 + np.maximum(slope_S, 0) * math.log2(max(min(config.block_latents) / 2, 1))
    drawn_S = (1 - explained_S) * (octaves_S / steps + 1 / config.diffusion_layers)
    own_S = drawn_S + explained_S / (1 + config.ar_layers)
    return np.asarray(own_S * (1 + explained_S * (config.num_blocks - 1) / config.num_blocks))
