"""Keys and values of the blocks that are done, allocated once at their maximum.

Shape legend: B batch, H heads, L tokens of a block, S tokens of the cache, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from madformer.kernels import dispatch
from madformer.kernels.cached_attention import OP, cached_attention
from madformer.model.layer import Projections


class KeyValueCache:
    """One buffer of keys and values for each layer, filled block by block.

    The block at hand is written behind the finished prefix, where the next write overwrites it, until
    :meth:`advance` makes it part of the prefix. Attention therefore reads one contiguous range: nothing is
    concatenated, and no mask is needed.

    Args:
        backend: of the kernels, as :meth:`madformer.model.MADFormer.set_backend` takes it. Triton's write and read at
            positions that are on the device; the reference slices by their copy on the host.
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
        device: torch.device,
        backend: str = "auto",
    ) -> None:
        shape = (num_layers, batch, num_heads, max_length, head_dim)
        self.keys_BHSD = torch.empty(shape, dtype=dtype, device=device)
        self.values_BHSD = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.lengths_B = torch.zeros(batch, dtype=torch.int32, device=device)
        self.backend = backend
        self.on_device = dispatch.resolve(OP, backend, device, dtype) == "triton"

    def reset(self) -> None:
        """Forget every block; the memory stays."""
        self.length = 0
        self.lengths_B.zero_()

    def advance(self, num_tokens: int) -> None:
        """Make the tokens behind the prefix part of it."""
        assert self.length + num_tokens <= self.keys_BHSD.shape[3]
        self.length += num_tokens
        self.lengths_B += num_tokens

    def attend(self, layer: int, projections: Projections) -> Tensor | None:
        """Put a block's keys and values behind the prefix, and let its queries attend to both.

        Returns:
            ``(B, H, L, D)``; None where the block has no queries.
        """
        keys, values = self.keys_BHSD[layer], self.values_BHSD[layer]
        if self.on_device:
            q = projections.heads_into(keys, values, self.lengths_B)
            if q is None:
                return None
            return cached_attention(q, keys, values, self.lengths_B + q.shape[2], backend=self.backend)
        q, k, v = projections.heads()
        stop = self.length + k.shape[2]
        keys[:, :, self.length : stop] = k
        values[:, :, self.length : stop] = v
        if q.shape[2] == 0:
            return None
        return F.scaled_dot_product_attention(q, keys[:, :, :stop], values[:, :, :stop])
