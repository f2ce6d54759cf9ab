"""Keys and values of the blocks that are done, allocated once at their maximum.

Shape legend: B batch, H heads, L tokens, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValueCache:
    """One buffer of keys and values for each layer, filled block by block.

    The block at hand is written behind the finished prefix, where the next write overwrites it, until
    :meth:`advance` makes it part of the prefix. Attention therefore reads one contiguous range: nothing is
    concatenated, and no mask is needed.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads: int,
        max_length: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (num_layers, batch, num_heads, max_length, head_dim)
        self.keys_BHLD = torch.empty(shape, dtype=dtype, device=device)
        self.values_BHLD = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def reset(self) -> None:
        """Forget every block; the memory stays."""
        self.length = 0

    def advance(self, num_tokens: int) -> None:
        """Make the tokens behind the prefix part of it."""
        assert self.length + num_tokens <= self.keys_BHLD.shape[3]
        self.length += num_tokens

    def write(self, layer: int, k_BHLD: Tensor, v_BHLD: Tensor) -> None:
        """Put a block's keys and values behind the prefix."""
        span = slice(self.length, self.length + k_BHLD.shape[2])
        self.keys_BHLD[layer, :, :, span] = k_BHLD
        self.values_BHLD[layer, :, :, span] = v_BHLD

    def attend(self, layer: int, q_BHLD: Tensor) -> Tensor:
        """Attention of a block to the prefix and to itself, ``(B, H, L, D)``."""
        stop = self.length + q_BHLD.shape[2]
        keys, values = self.keys_BHLD[layer, :, :, :stop], self.values_BHLD[layer, :, :, :stop]
        return F.scaled_dot_product_attention(q_BHLD, keys, values)
