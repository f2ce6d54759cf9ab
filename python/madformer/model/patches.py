"""Patches of latents to tokens and back by one linear layer each, in place of the U-Net's halves.

Shape legend: N images or blocks, C channels, H rows, W columns, E time embedding, P side of a patch, L tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from madformer.config import MADFormerConfig
from madformer.model.layer import RMSNorm, modulated
from madformer.model.plain import projected
from madformer.model.unet import Half, NoTimeEmbedding, Skips


class PatchEmbedding(Half):
    """``(N, latent_channels, H, W)`` to token maps ``(N, hidden_size, H / P, W / P)``, and no skip connections."""

    def __init__(self, config: MADFormerConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Linear(config.latent_channels * config.patch_size**2, config.hidden_size, bias=False)
        self.time_embedding = NoTimeEmbedding()

    def forward(self, x_NCHW: Tensor, temb_NE: Tensor) -> tuple[Tensor, Skips]:
        size = self.patch_size
        patches_NCHPWP = x_NCHW.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        tokens_NHWC = self.proj(patches_NCHPWP.permute(0, 2, 4, 3, 5, 1).flatten(3))
        return tokens_NHWC.permute(0, 3, 1, 2), ()


class PatchDecoder(Half):
    """Token maps back to ``(N, latent_channels, H, W)``, under AdaLN as in DiT's final layer (arXiv:2212.09748)."""

    def __init__(self, config: MADFormerConfig) -> None:
        super().__init__()
        self.patch_size, hidden = config.patch_size, config.hidden_size
        self.norm = RMSNorm(hidden, eps=config.norm_eps)
        self.modulation = nn.Linear(hidden, 2 * hidden)
        self.proj = nn.Linear(hidden, config.latent_channels * config.patch_size**2)
        self.time_embedding = NoTimeEmbedding()

    def reset_modulation(self) -> None:
        """Predicts zero at first."""
        for linear in (self.modulation, self.proj):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x_NCHW: Tensor, temb_NE: Tensor, skips: Skips, modulation_NC: Tensor | None = None) -> Tensor:
        assert modulation_NC is not None
        size, width = self.patch_size, x_NCHW.shape[3]
        shift_NC, scale_NC = projected(self.modulation, modulation_NC.to(x_NCHW.dtype)).chunk(2, dim=-1)
        patches_NLC = self.proj(modulated(self.norm, x_NCHW.flatten(2).mT, shift_NC, scale_NC))
        patches_NHWPPC = patches_NLC.unflatten(1, (-1, width)).unflatten(3, (size, size, -1))
        return patches_NHWPPC.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
