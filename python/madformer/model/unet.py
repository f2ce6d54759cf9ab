"""The U-Net halves around the Transformer: latents to tokens and back, built of diffusers' blocks.

Submodule names are those of the released checkpoints. Shape legend: N images or blocks, C channels, H rows,
W columns, L = H * W pixels, E time embedding, P what all residual blocks of a half project of it, T = E or E + P.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, AttnUpBlock2D, DownBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from madformer.config import MADFormerConfig
from madformer.kernels import conv3x3, dispatch, group_norm_silu, self_attention
from madformer.model.plain import PreciseLinear, cast, is_plain, plus, precise

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


_SECTIONS = AttnDownBlock2D, AttnUpBlock2D, DownBlock2D, UpBlock2D
Told = tuple[Tensor, tuple[Tensor, ...]]
"""The time embedding, ``(N, E)``, and what each residual block of a half adds for it, ``(N, C)``."""


def trains(conv: nn.Module, x_NCHW: Tensor) -> bool:
    """Whether gradients are asked of a convolution that :func:`madformer.kernels.conv3x3.conv3x3` is."""
    return (
        torch.is_grad_enabled()
        and x_NCHW.is_cpu
        and isinstance(conv, nn.Conv2d)
        and is_plain(conv, nn.Conv2d)
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def convolved(conv: Any, x_NCHW: Tensor, backend: str) -> Tensor:
    """``conv(x_NCHW)``, in training by the op where it can be."""
    if not trains(conv, x_NCHW):
        result: Tensor = conv(x_NCHW)
        return result
    return conv3x3(x_NCHW, conv.weight, conv.bias, backend=_backend_of("conv3x3", backend))


def _backend_of(op: str, backend: str) -> str:
    """What a model was given where this op has it; else the op chooses."""
    return backend if dispatch.has(op, backend) else dispatch.AUTO


class Upsample(Upsample2D):
    """diffusers' layer as the U-Net uses it, which in training does not make the larger map that it convolves."""

    backend = "auto"

    @classmethod
    def adopt(cls, layers: nn.ModuleList | None) -> None:
        """Make these layers of a diffusers block ones of this class, weights and names untouched."""
        for layer in layers or ():
            assert type(layer) is Upsample2D
            assert layer.norm is None
            assert layer.name == "conv"
            assert layer.interpolate
            layer.__class__ = cls

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        conv: Any = self.conv
        if args or kwargs or output_size is not None or not trains(conv, hidden_states):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return conv3x3(
            hidden_states, conv.weight, conv.bias, doubled=True, backend=_backend_of("conv3x3", self.backend)
        )


class ResnetBlock(ResnetBlock2D):
    """diffusers' block as the U-Net uses it (nothing resampled), its norms fused with SiLU and the time's addition.

    Attributes:
        number: among the residual blocks of its half.
    """

    backend = "auto"
    number: int

    @classmethod
    def adopt(cls, blocks: nn.ModuleList, first: int) -> int:
        """Make these resnets of a diffusers block ones of this class, weights and names untouched.

        Args:
            first: number of the first one. Returns that of the next.
        """
        for number, block in enumerate(blocks, first):
            assert type(block) is ResnetBlock2D
            assert block.time_embedding_norm == "default"
            assert block.upsample is None
            assert block.downsample is None
            assert block.output_scale_factor == 1
            block.__class__ = cls
            block.number = number
        return first + len(blocks)

    def forward(self, input_tensor: Tensor, temb: Tensor | Told) -> Tensor:
        temb, told = temb if isinstance(temb, tuple) else (temb, None)
        if not is_plain(self.nonlinearity, nn.SiLU) or not is_plain(self.dropout, nn.Dropout) or self.dropout.p:
            return super().forward(input_tensor, temb)
        hidden = convolved(self.conv1, self._norm_silu(self.norm1, input_tensor), self.backend)
        added: Tensor | None = None
        if told is not None:
            added = told[self.number]
        elif self.time_emb_proj is not None:
            added = self.time_emb_proj(F.silu(temb))
        hidden = self._norm_silu(self.norm2, hidden, added)
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        if trains(self.conv2, hidden):
            return input_tensor + convolved(self.conv2, hidden, self.backend)
        return plus(self.conv2, hidden, input_tensor)

    def _norm_silu(self, norm: nn.GroupNorm, x_NCHW: Tensor, temb_NC: Tensor | None = None) -> Tensor:
        if not is_plain(norm, nn.GroupNorm):
            return F.silu(norm(x_NCHW if temb_NC is None else x_NCHW + temb_NC[:, :, None, None]))
        return group_norm_silu(
            x_NCHW, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, temb_NC=temb_NC, backend=self.backend
        )


class PixelAttention(Attention):
    """diffusers' attention as the U-Net uses it: the pixels of a map to each other, and the map added.

    The same numbers by half as many operators: maps stay channels-last, and are the tokens as they lie.
    """

    backend = "auto"

    @classmethod
    def adopt(cls, layers: nn.ModuleList) -> None:
        """Make these attentions of a diffusers block ones of this class, weights and names untouched."""
        for layer in layers:
            assert type(layer) is Attention
            assert layer.residual_connection
            assert layer.rescale_output_factor == 1
            assert all(part is None for part in (layer.spatial_norm, layer.norm_q, layer.norm_k))
            layer.__class__ = cls

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        norm, (out, dropout) = self.group_norm, self.to_out
        if (
            args
            or kwargs
            or type(self.processor) is not AttnProcessor2_0
            or not is_plain(norm, nn.GroupNorm)
            or not is_plain(dropout, nn.Dropout)
            or dropout.p
        ):
            return super().forward(hidden_states, *args, **kwargs)
        normed = group_norm_silu(
            hidden_states, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, silu=False, backend=self.backend
        )
        x_NLC = normed.permute(0, 2, 3, 1).flatten(1, 2)
        q_NLC, k_NLC, v_NLC = self.to_q(x_NLC), self.to_k(x_NLC), self.to_v(x_NLC)
        backend = _backend_of("self_attention", self.backend)
        attended_NLC = self_attention(q_NLC, k_NLC, v_NLC, self.heads, backend=backend)
        branch_NHWC = out(attended_NLC).unflatten(1, hidden_states.shape[2:])
        return hidden_states + branch_NHWC.permute(0, 3, 1, 2)


class Half(nn.Module):
    """What turns latents into tokens, or back.

    Attributes:
        time_width: E, 0 for none. block_widths: channels of the residual blocks, which sum up to P.
    """

    backend = "auto"
    time_embedding: nn.Module
    time_width = 0
    block_widths: tuple[int, ...] = ()

    def _tell_time(self, width: int) -> None:
        """Have the residual blocks told an embedding of so many numbers, 0 for none."""
        self.time_embedding = TimestepEmbedding(width) if width else NoTimeEmbedding()
        self.time_width = width
        self.block_widths = tuple(block.out_channels for block in self._blocks()) if width else ()

    def told(self, timestep_N: Tensor) -> Tensor:
        """What :meth:`forward` may be told of the time: ``(N, E + P)`` in fp32, in float64 for a model in it.

        Behind the embedding stands what each residual block projects of it, by the weights as they are now. It is NaN
        where somebody may want to see when they do; :meth:`forward` then leaves it to them.
        """
        temb_NE = self.time_embedding(timestep_N)
        if not self.time_width:
            return temb_NE
        if not self._projects_ahead():
            unknown = temb_NE.new_full((len(temb_NE), sum(self.block_widths)), torch.nan)
            return torch.cat((temb_NE, unknown), dim=1)
        layers = [block.time_emb_proj for block in self._blocks()]
        activated_NE = F.silu(temb_NE.to(layers[0].weight.dtype))
        return torch.cat((temb_NE, *(layer(activated_NE).to(temb_NE.dtype) for layer in layers)), dim=1)

    @staticmethod
    def told_to(half: Any, timestep_N: Tensor, width: int) -> Tensor:
        """:meth:`told`, in ``width`` columns; of a module in a half's place that does not have it, its embedding."""
        if hasattr(half, "told"):
            told_NT: Tensor = half.told(timestep_N)
            return told_NT
        temb_NE: Tensor = half.time_embedding(timestep_N)
        return F.pad(temb_NE, (0, width - temb_NE.shape[1]), value=torch.nan)

    @staticmethod
    def taken_by(half: nn.Module, told_NT: Tensor, time_width: int) -> Tensor:
        """What it takes of that: a module that does not have :meth:`told`, its embedding alone."""
        return told_NT if hasattr(half, "told") else told_NT[:, :time_width]

    def for_blocks(self, told_NT: Tensor, dtype: torch.dtype) -> Tensor | Told:
        """The embedding as the residual blocks take it, with what :meth:`told` found for them."""
        told_NT = cast(told_NT, dtype)
        if told_NT.shape[1] == self.time_width:
            return told_NT
        if not self._projects_ahead():
            return told_NT[:, : self.time_width]
        temb_NE, *added = told_NT.split((self.time_width, *self.block_widths), dim=1)
        return temb_NE, tuple(added)

    def sections(self) -> Iterable[Any]:
        """diffusers' blocks, by level."""
        return ()

    def _blocks(self) -> Iterator[Any]:
        for section in self.sections():
            yield from section._modules["resnets"]

    def _projects_ahead(self) -> bool:
        """Whether nobody sees when the residual blocks project the time."""
        return (
            is_plain(self, type(self))
            and all(type(section) in _SECTIONS and is_plain(section, type(section)) for section in self.sections())
            and all(is_plain(part, kind) for block in self._blocks() for part, kind in _projecting(block))
        )


def _projecting(block: Any) -> tuple[tuple[nn.Module, type[nn.Module]], ...]:
    return (block, ResnetBlock), (block._modules["time_emb_proj"], nn.Linear)


class UNetDownsampler(Half):
    """``(N, latent_channels, H, W)`` to token maps ``(N, hidden_size, H / s, W / s)`` and skip connections."""

    def __init__(self, config: MADFormerConfig) -> None:
        super().__init__()
        unet = config.unet
        assert unet is not None
        channels = unet.block_out_channels
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], kernel_size=3, padding=1)
        self.down_blocks, number = nn.ModuleList(), 0
        for level, out_channels in enumerate(channels):
            last = level == len(channels) - 1
            common = {
                "in_channels": channels[max(level - 1, 0)],
                "out_channels": out_channels,
                "temb_channels": config.time_widths[0] or None,
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
            number = ResnetBlock.adopt(block.resnets, number)
            PixelAttention.adopt(getattr(block, "attentions", nn.ModuleList()))
            self.down_blocks.append(block)
        self.conv_out = nn.Conv2d(channels[-1], config.hidden_size, kernel_size=3, padding=1)
        self._tell_time(config.time_widths[0])

    def sections(self) -> Iterable[Any]:
        return self.down_blocks

    def forward(self, x_NCHW: Tensor, told_NT: Tensor) -> tuple[Tensor, Skips]:
        temb = self.for_blocks(told_NT, x_NCHW.dtype)
        x = self.conv_in(x_NCHW)
        skips: Skips = (x,)
        for block in self.down_blocks:
            x, outputs = block(hidden_states=x, temb=temb)
            skips += tuple(outputs)
        return convolved(self.conv_out, x, self.backend), skips


class UNetUpsampler(Half):
    """Token maps and skip connections back to ``(N, latent_channels, H, W)``."""

    def __init__(self, config: MADFormerConfig) -> None:
        super().__init__()
        unet = config.unet
        assert unet is not None
        channels = unet.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.hidden_size, channels[0], kernel_size=3, padding=1)
        self.up_blocks, number = nn.ModuleList(), 0
        for level, out_channels in enumerate(channels):
            last = level == len(channels) - 1
            common = {
                "in_channels": channels[min(level + 1, len(channels) - 1)],
                "prev_output_channel": channels[max(level - 1, 0)],
                "out_channels": out_channels,
                "temb_channels": config.time_widths[0] or None,
                "num_layers": unet.layers_per_block[::-1][level] + 1,
                "resnet_groups": unet.norm_groups,
            }
            if unet.attention[::-1][level]:
                head_dim = out_channels // unet.num_heads
                upsample = None if last else "conv"
                block = AttnUpBlock2D(**common, attention_head_dim=head_dim, upsample_type=upsample)
            else:
                block = UpBlock2D(**common, add_upsample=not last)
            number = ResnetBlock.adopt(block.resnets, number)
            PixelAttention.adopt(getattr(block, "attentions", nn.ModuleList()))
            Upsample.adopt(block.upsamplers)
            self.up_blocks.append(block)
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, kernel_size=3, padding=1)
        self._tell_time(config.time_widths[0])

    def sections(self) -> Iterable[Any]:
        return self.up_blocks

    def forward(self, x_NCHW: Tensor, told_NT: Tensor, skips: Skips, modulation_NC: Tensor | None = None) -> Tensor:
        temb = self.for_blocks(told_NT, x_NCHW.dtype)
        x = convolved(self.conv_in, x_NCHW, self.backend)
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
