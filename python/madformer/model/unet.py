"""The U-Net halves around the Transformer: latents to tokens and back, built of diffusers' blocks.

Submodule names are those of the released checkpoints. Shape legend: N images or blocks, C channels, H rows,
W columns, E time embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, AttnUpBlock2D, DownBlock2D, UpBlock2D
from torch import Tensor, nn

from madformer.config import MADFormerConfig
from madformer.kernels import group_norm_silu
from madformer.model.plain import PreciseLinear, is_plain, precise

Skips = tuple[Tensor, ...]


class TimestepEmbedding(nn.Module):
    """Two bias-free linear layers on the raw integer timestep, never below fp32: bf16 cannot tell 998 from 999."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = PreciseLinear(1, embed_dim, bias=False)
        self.linear_2 = PreciseLinear(embed_dim, embed_dim, bias=False)

    def forward(self, timestep_N: Tensor) -> Tensor:
        """``(N, E)`` in fp32, in float64 for a model in it."""
        return self.linear_2(F.silu(self.linear_1(precise(timestep_N)[:, None])))


class NoTimeEmbedding(nn.Module):
    """Where nothing is told the time."""

    def forward(self, timestep_N: Tensor) -> Tensor:
        """``(N, 0)``."""
        return torch.empty(len(timestep_N), 0, device=timestep_N.device)


class ResnetBlock(ResnetBlock2D):
    """diffusers' block as the U-Net uses it (nothing resampled), its norms fused with SiLU and the time's addition."""

    backend = "auto"

    @classmethod
    def adopt(cls, blocks: nn.ModuleList) -> None:
        """Make these resnets of a diffusers block ones of this class, weights and names untouched."""
        for block in blocks:
            assert type(block) is ResnetBlock2D
            assert block.time_embedding_norm == "default"
            assert block.upsample is None
            assert block.downsample is None
            assert block.output_scale_factor == 1
            block.__class__ = cls

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        if not is_plain(self.nonlinearity, nn.SiLU) or not is_plain(self.dropout, nn.Dropout) or self.dropout.p:
            return super().forward(input_tensor, temb)
        hidden = self.conv1(self._norm_silu(self.norm1, input_tensor))
        added = None if self.time_emb_proj is None else self.time_emb_proj(F.silu(temb))
        hidden = self.conv2(self._norm_silu(self.norm2, hidden, added))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return input_tensor + hidden

    def _norm_silu(self, norm: nn.GroupNorm, x_NCHW: Tensor, temb_NC: Tensor | None = None) -> Tensor:
        if not is_plain(norm, nn.GroupNorm):
            return F.silu(norm(x_NCHW if temb_NC is None else x_NCHW + temb_NC[:, :, None, None]))
        return group_norm_silu(
            x_NCHW, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, temb_NC=temb_NC, backend=self.backend
        )


class UNetDownsampler(nn.Module):
    """``(N, latent_channels, H, W)`` to token maps ``(N, hidden_size, H / s, W / s)`` and skip connections."""

    def __init__(self, config: MADFormerConfig) -> None:
        super().__init__()
        unet, time_width = config.unet, config.time_widths[0] or None
        assert unet is not None
        channels = unet.block_out_channels
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, out_channels in enumerate(channels):
            last = level == len(channels) - 1
            common = {
                "in_channels": channels[max(level - 1, 0)],
                "out_channels": out_channels,
                "temb_channels": time_width,
                "num_layers": unet.layers_per_block[level],
                "resnet_groups": unet.norm_groups,
                "downsample_padding": 1,
            }
            if unet.attention[level]:
                head_dim = out_channels // unet.num_heads
                downsample = None if last else "conv"
                block = AttnDownBlock2D(**common, attention_head_dim=head_dim, downsample_type=downsample)
            else:
                block = DownBlock2D(**common, add_downsample=not last)
            ResnetBlock.adopt(block.resnets)
            self.down_blocks.append(block)
        self.conv_out = nn.Conv2d(channels[-1], config.hidden_size, kernel_size=3, padding=1)
        self.time_embedding = TimestepEmbedding(time_width) if time_width else NoTimeEmbedding()

    def forward(self, x_NCHW: Tensor, temb_NE: Tensor) -> tuple[Tensor, Skips]:
        temb = temb_NE.to(x_NCHW.dtype)
        x = self.conv_in(x_NCHW)
        skips: Skips = (x,)
        for block in self.down_blocks:
            x, outputs = block(hidden_states=x, temb=temb)
            skips += tuple(outputs)
        return self.conv_out(x), skips


class UNetUpsampler(nn.Module):
    """Token maps and skip connections back to ``(N, latent_channels, H, W)``."""

    def __init__(self, config: MADFormerConfig) -> None:
        super().__init__()
        unet, time_width = config.unet, config.time_widths[0] or None
        assert unet is not None
        channels = unet.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.hidden_size, channels[0], kernel_size=3, padding=1)
        self.up_blocks = nn.ModuleList()
        for level, out_channels in enumerate(channels):
            last = level == len(channels) - 1
            common = {
                "in_channels": channels[min(level + 1, len(channels) - 1)],
                "prev_output_channel": channels[max(level - 1, 0)],
                "out_channels": out_channels,
                "temb_channels": time_width,
                "num_layers": unet.layers_per_block[::-1][level] + 1,
                "resnet_groups": unet.norm_groups,
            }
            if unet.attention[::-1][level]:
                head_dim = out_channels // unet.num_heads
                upsample = None if last else "conv"
                block = AttnUpBlock2D(**common, attention_head_dim=head_dim, upsample_type=upsample)
            else:
                block = UpBlock2D(**common, add_upsample=not last)
            ResnetBlock.adopt(block.resnets)
            self.up_blocks.append(block)
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, kernel_size=3, padding=1)
        self.time_embedding = TimestepEmbedding(time_width) if time_width else NoTimeEmbedding()

    def forward(self, x_NCHW: Tensor, temb_NE: Tensor, skips: Skips, modulation_NC: Tensor | None = None) -> Tensor:
        temb = temb_NE.to(x_NCHW.dtype)
        x = self.conv_in(x_NCHW)
        for block in self.up_blocks:
            assert isinstance(block, (UpBlock2D, AttnUpBlock2D))
            count = len(block.resnets)
            skips, own = skips[:-count], skips[-count:]
            x = block(hidden_states=x, res_hidden_states_tuple=own, temb=temb)
        return self.conv_out(x)


class LearnedSkips(nn.ParameterList):
    """What the first block has for the skip connections of a predecessor. To be called, for hooks that fetch it."""

    __call__ = nn.Module.__call__  # a list refuses to be called

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(self)


def skip_connections(config: MADFormerConfig) -> list[tuple[int, int]]:
    """Level (0 is full resolution) and channels of every skip connection, in the downsampler's order."""
    if config.unet is None:
        return []
    channels, last = config.unet.block_out_channels, len(config.unet.block_out_channels) - 1
    found = [(0, channels[0])]
    for level, layers in enumerate(config.unet.layers_per_block):
        found += [(level, channels[level])] * layers
        if level < last:
            found.append((level + 1, channels[level]))
    return found
