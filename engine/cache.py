"""Keys and values of the blocks that are done and the condition of the block at hand, allocated once.

Shape legend: R rows of the cache, B samples of a pass, H heads, L tokens of a block, S tokens of a row, D head dim,
C channels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from madformer.config import MADFormerConfig
from madformer.engine.rows import take
from madformer.kernels import cached_attention, dispatch
from madformer.kernels.cached_attention import OP, SHORT
from madformer.model.layer import Projections


class ConditioningCache:
    """A row for each image: keys and values of every layer, and the condition.

    A block is written behind its row's finished prefix, where the next write overwrites it, until :meth:`advance`
    makes it part of the prefix. Attention therefore reads one contiguous range: nothing is concatenated, and no mask
    is needed. How long each prefix is stands on the device alone, so that rows may be at different blocks and one
    captured graph serves them all. A text is a first write like any other.

    Args:
        rows: R, how many images at once; twice as many under guidance.
        backend: of the kernels, as :meth:`madformer.model.MADFormer.set_backend` takes it.
    """

    def __init__(
        self, config: MADFormerConfig, rows: int, *, dtype: torch.dtype, device: torch.device, backend: str = "auto"
    ) -> None:
        max_length = config.text_length + config.num_blocks * config.block_size
        shape = (config.num_layers, rows, config.num_heads, max_length, config.head_dim)
        self.keys_RHSD = [torch.empty(shape[1:], dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values_RHSD = [torch.empty(shape[1:], dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.condition_RLC = torch.zeros(rows, config.block_size, config.hidden_size, dtype=dtype, device=device)
        self.lengths_R = torch.zeros(rows, dtype=torch.int32, device=device)
        self.backend = backend
        # On a CPU the lengths can be read for nothing, and PyTorch's attention over slices needs no mask.
        prefers_slices = backend == dispatch.AUTO and config.block_size > SHORT
        resolved = dispatch.resolve(OP, backend, device, dtype)
        self.on_host = device.type == "cpu" and (resolved == "reference" or prefers_slices)

    @property
    def nbytes(self) -> int:
        tensors = (*self.keys_RHSD, *self.values_RHSD, self.condition_RLC, self.lengths_R)
        return sum(tensor.nbytes for tensor in tensors)

    def reset(self, rows_B: Tensor | None = None) -> None:
        """Forget what these rows hold (all of them for None); the memory stays."""
        if rows_B is None:
            self.lengths_R.zero_()
        else:
            self.lengths_R.index_fill_(0, rows_B, 0)

    def clear(self, rows_B: Tensor | None, first_layer: int) -> None:
        """Zeros for what the layers from this one on hold of these rows (all of them for None).

        It lies behind every prefix then, where whoever reads under a mask would see a NaN through it.
        """
        for cached in (*self.keys_RHSD[first_layer:], *self.values_RHSD[first_layer:]):
            if rows_B is None:
                cached.zero_()
            else:
                cached.index_fill_(0, rows_B, 0)

    def advance(self, num_tokens: int, rows_B: Tensor | None = None) -> None:
        """Make the tokens that were written last part of the prefix."""
        if rows_B is None:
            self.lengths_R += num_tokens
        else:
            self.lengths_R.index_add_(0, rows_B, self.lengths_R.new_full(rows_B.shape, num_tokens))

    def part(self, rows: slice) -> ConditioningCache:
        """A cache of these rows, in the same memory."""
        part = copy.copy(self)
        part.keys_RHSD = [keys[rows] for keys in self.keys_RHSD]
        part.values_RHSD = [values[rows] for values in self.values_RHSD]
        part.condition_RLC, part.lengths_R = self.condition_RLC[rows], self.lengths_R[rows]
        return part

    def view(self, rows_B: Tensor | None, num_tokens: int) -> CacheView:
        """These rows (all for None) for a pass of ``num_tokens`` tokens each."""
        lengths_B = take(self.lengths_R, rows_B)
        ends_B = lengths_B + num_tokens
        if not self.on_host:
            return CacheView(self, rows_B, lengths_B, ends_B)
        rows = range(len(lengths_B)) if rows_B is None else rows_B.tolist()
        return CacheView(self, rows_B, lengths_B, ends_B, list(zip(rows, ends_B.tolist(), strict=True)))


@dataclass(frozen=True)
class CacheView:
    """Some rows of a cache during one pass of their samples.

    Attributes:
        lengths_B: tokens of each finished prefix. ends_B: the same with the tokens of this pass.
        on_host: row and end of every sample where the host knows them.
    """

    cache: ConditioningCache
    rows_B: Tensor | None
    lengths_B: Tensor
    ends_B: Tensor
    on_host: list[tuple[int, int]] | None = None

    def attend_causally(self, layer: int, projections: Projections) -> Tensor | None:
        """:meth:`attend` for a text, whose rows are empty before it: each token to those up to itself."""
        q = projections.heads_into(
            self.cache.keys_RHSD[layer], self.cache.values_RHSD[layer], self.lengths_B, self.rows_B
        )
        return None if q is None else F.scaled_dot_product_attention(q, *self.text(layer, q.shape[2]), is_causal=True)

    def text(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``(B, H, num_tokens, D)`` that each row begins with."""
        keys, values = self.cache.keys_RHSD[layer], self.cache.values_RHSD[layer]
        return take(keys[:, :, :num_tokens], self.rows_B), take(values[:, :, :num_tokens], self.rows_B)

    def attend(self, layer: int, projections: Projections) -> Tensor | None:
        """Put the tokens' keys and values behind the prefix, and let their queries attend to both.

        Returns:
            ``(B, H, L, D)``; None where the tokens have no queries.
        """
        keys, values = self.cache.keys_RHSD[layer], self.cache.values_RHSD[layer]
        q = projections.heads_into(keys, values, self.lengths_B, self.rows_B)
        if q is None:
            return None
        if self.on_host is not None:
            return _attend_on_host(q, keys, values, self.on_host)
        return cached_attention(q, keys, values, self.ends_B, rows_B=self.rows_B, backend=self.cache.backend)


def _attend_on_host(q_BHLD: Tensor, keys_RHSD: Tensor, values_RHSD: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """Attention over slices: one call for each run of evenly spaced rows of one length."""
    runs = _runs(spans)
    attended = [
        F.scaled_dot_product_attention(q, keys_RHSD[rows, :, :end], values_RHSD[rows, :, :end])
        for q, (rows, end, _) in zip(q_BHLD.split([count for *_, count in runs]), runs, strict=True)
    ]
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def _runs(spans: list[tuple[int, int]]) -> list[tuple[slice, int, int]]:
    """Rows, their end and how many there are, of samples one after the other that a slice reaches."""
    runs: list[tuple[slice, int, int]] = []
    for row, end in spans:
        if runs:
            rows, its_end, count = runs[-1]
            spacing = rows.step if count > 1 else row - rows.start
            if end == its_end and spacing > 0 and row == rows.start + spacing * count:
                runs[-1] = slice(rows.start, row + 1, spacing), end, count + 1
                continue
        runs.append((slice(row, row + 1, 1), end, 1))
    return runs
