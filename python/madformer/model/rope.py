"""Rotary position embedding: two-dimensional over the tokens of an image, in block order; one-dimensional over text.

Shape legend: L tokens, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from madformer.config import MADFormerConfig


def token_positions(config: MADFormerConfig) -> Tensor:
    """Row and column of every token, ``(2, num_blocks * block_size)``, in the order the blocks are generated.

    Blocks are squares in raster order, tokens in raster order within each. With ``square_blocks=False`` the
    released code numbers the tokens in raster order over the whole image instead.
    """
    grid, side = config.token_grid, math.isqrt(config.block_size)
    raster = torch.arange(grid * grid, device="cpu")
    if config.square_blocks:
        raster = raster.view(grid // side, side, grid // side, side).transpose(1, 2).reshape(-1)
    return torch.stack((raster // grid, raster % grid))


def rope_tables(config: MADFormerConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each ``(num_blocks * block_size, head_dim)`` in fp32, made on the
    CPU even under ``torch.device("meta")``.

    The first half of the head dimension turns with the row, the second with the column. Frequencies follow the
    released code: exponents evenly spaced over [0, 1], and a base that grows with the side of the token grid.
    """
    per_axis = config.head_dim // 2
    base = (int(8 * config.token_grid / math.pi) // 100 + 1) * 100
    frequencies = 1.0 / base ** torch.linspace(0, 1, per_axis // 2, device="cpu")
    angles = token_positions(config)[:, :, None] * frequencies
    table = torch.cat([torch.cat((axis, axis), dim=-1) for axis in angles], dim=-1)
    return table.cos(), table.sin()


def text_rope_tables(config: MADFormerConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a text's tokens, each ``(text_length, head_dim)``, with Llama's frequencies.

    Which channels turn together is the kernel's pairing, the same for every stream: a pair has its frequency in both
    channels.
    """
    theta = 1.0 if config.text is None else config.text.rope_theta
    frequencies = theta ** (-torch.arange(0, config.head_dim, 2, device="cpu") / config.head_dim)
    angles = torch.arange(config.text_length, device="cpu")[:, None] * frequencies
    table = torch.cat([torch.cat((part, part), dim=-1) for part in angles.chunk(rope_axes(config), dim=-1)], dim=-1)
    return table.cos(), table.sin()


def rope_axes(config: MADFormerConfig) -> int:
    """Parts of a head in each of which the first half of the channels is paired with the second."""
    return 2 if config.rope_pairing == "axial" else 1


class RotaryEmbedding(nn.Module):
    """The tables of all streams as buffers that stay fp32 whatever dtype the model is cast to."""

    cos: Tensor
    sin: Tensor
    text_cos: Tensor
    text_sin: Tensor

    def __init__(self, config: MADFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.axes = rope_axes(config)
        for name, table in self._all_tables().items():
            self.register_buffer(name, table, persistent=False)

    def _all_tables(self) -> dict[str, Tensor]:
        tables = (*rope_tables(self.config), *text_rope_tables(self.config))
        return dict(zip(("cos", "sin", "text_cos", "text_sin"), tables, strict=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)
        # A cast to bf16 would lose the angles, and to_empty() leaves them undefined: make them anew.
        device = self.cos.device
        for name, table in self._all_tables().items():
            setattr(self, name, table.to(device))
        return self

    def text_tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the text, each ``(text_length, head_dim)``."""
        return self.text_cos, self.text_sin

    def tables(self, first_block: int, num_blocks: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of ``num_blocks`` blocks, each ``(num_blocks * block_size, head_dim)``."""
        size = self.config.block_size
        span = slice(first_block * size, (first_block + num_blocks) * size)
        return self.cos[span], self.sin[span]
