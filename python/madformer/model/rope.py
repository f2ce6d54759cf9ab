"""Rotary position embedding: two-dimensional over the tokens of an image, block by block; one-dimensional over text.

Shape legend: B batch, M blocks, L tokens of all blocks, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from madformer.config import MADFormerConfig, rope_base
from madformer.model.blocks import block_order

RotaryTables = tuple[Tensor, Tensor]
"""Cosines and sines."""


def token_positions(config: MADFormerConfig) -> Tensor:
    """Row and column of every token, ``(2, L)``: block after block by place, and in raster order within each.

    With ``square_blocks=False`` the released code numbers the tokens in raster order over the whole image instead.
    """
    (rows, columns), (height, width) = config.token_grid, config.block_tokens
    raster = torch.arange(rows * columns, device="cpu")
    if config.square_blocks:
        raster = raster.view(rows // height, height, columns // width, width).transpose(1, 2).reshape(-1)
    return torch.stack((raster // columns, raster % columns))


def rope_tables(config: MADFormerConfig) -> RotaryTables:
    """Cosines and sines, each ``(L, D)`` in fp32, made on the CPU even under ``torch.device("meta")``,
    whatever the default dtype.

    The first half of the head dimension turns with the row, the second with the column. Frequencies follow the
    released code: exponents evenly spaced over [0, 1].
    """
    per_axis = config.head_dim // 2
    frequencies = 1.0 / rope_base(config) ** torch.linspace(0, 1, per_axis // 2, dtype=torch.float32, device="cpu")
    angles = token_positions(config)[:, :, None] * frequencies
    table = torch.cat([torch.cat((axis, axis), dim=-1) for axis in angles], dim=-1)
    return table.cos(), table.sin()


def text_rope_tables(config: MADFormerConfig) -> RotaryTables:
    """Cosines and sines of a text's tokens, each ``(text_length, head_dim)``, with Llama's frequencies.

    Which channels turn together is the kernel's pairing, the same for every stream: a pair has its frequency in both
    channels.
    """
    theta = 1.0 if config.text is None else config.text.rope_theta
    frequencies = theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim)
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
    order: Tensor

    def __init__(self, config: MADFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.axes = rope_axes(config)
        for name, table in self._all_tables().items():
            self.register_buffer(name, table, persistent=False)

    def _all_tables(self) -> dict[str, Tensor]:
        order = torch.tensor(block_order(self.config), device="cpu")
        tables = (*rope_tables(self.config), *text_rope_tables(self.config), order)
        return dict(zip(("cos", "sin", "text_cos", "text_sin", "order"), tables, strict=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)
        # A cast to bf16 would lose the angles, and to_empty() leaves them undefined: make them anew.
        self._make()
        return self

    def _make(self) -> None:
        device = self.cos.device
        for name, table in self._all_tables().items():
            setattr(self, name, table.to(device))

    def text_tables(self) -> RotaryTables:
        """Cosines and sines of the text, each ``(text_length, head_dim)``."""
        return self.text_cos, self.text_sin

    def tables(self, order: Tensor | None = None) -> RotaryTables:
        """Cosines and sines of all blocks, each ``(L, D)``, in the model's own order.

        Args:
            order: places in another order, ``(M,)``; or ``(B, M)``, one for each sample, for tables ``(B, L, D)``.
        """
        if order is None:
            if self.config.block_order != "spiral":
                return self.cos, self.sin
            order = self.order
        cos, sin = (table.unflatten(0, (-1, self.config.block_size))[order] for table in (self.cos, self.sin))
        return cos.flatten(-3, -2), sin.flatten(-3, -2)

    def set_config(self, config: MADFormerConfig) -> None:
        """Make the tables of another configuration."""
        self.config = config
        self._make()
