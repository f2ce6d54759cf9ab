"""Which tokens a packed sequence holds, and so who attends to whom.

Packed order: text, clean blocks, noise blocks. Keys are always all of them.

| query         | attends to                                                                                     |
|---------------|------------------------------------------------------------------------------------------------|
| text token t  | text tokens 0..t                                                                               |
| clean block i | the text, clean blocks 0..i                                                                    |
| noise block i | the text, clean blocks 0..i-1 (as far as there are) and noise block i                          |
|               | without a clean stream: the text, noise blocks 0..i                                            |

With ``cross_block=False`` every image block attends to the text and to itself alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockLayout:
    """The mask of :func:`block_causal_attention`, and with it the lengths of its arguments.

    Args:
        block_size: tokens of an image block.
        noise_blocks: blocks of the noise stream.
        clean_blocks: blocks of the clean stream; 0 when there is none.
        cross_block: False restricts every image block to the text and itself.
        text_length: tokens of the text; 0 when there is none.
        text_queries: False when the text gives keys and values only.
        clean_queries: False when the clean stream gives keys and values only.

    Raises:
        ValueError: a negative count, or a block size below 1.
    """

    block_size: int
    noise_blocks: int
    clean_blocks: int = 0
    cross_block: bool = True
    text_length: int = 0
    text_queries: bool = True
    clean_queries: bool = True

    def __post_init__(self) -> None:
        for name, least in (("block_size", 1), ("noise_blocks", 0), ("clean_blocks", 0), ("text_length", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def clean_length(self) -> int:
        return self.clean_blocks * self.block_size

    @property
    def key_length(self) -> int:
        return self.text_length + self.clean_length + self.noise_blocks * self.block_size

    @property
    def text_query_length(self) -> int:
        """How many queries, the first ones, are text: a causal square of the text's keys."""
        return self.text_length if self.text_queries else 0

    @property
    def query_blocks(self) -> int:
        """Image blocks among the queries, after the text: clean ones first, then noise."""
        return self.noise_blocks + (self.clean_blocks if self.clean_queries else 0)

    @property
    def query_length(self) -> int:
        return self.text_query_length + self.query_blocks * self.block_size

    def key_ranges(self) -> Iterator[list[tuple[int, int]]]:
        """For every image block of the queries, in order: the half-open ranges of keys that all its tokens attend to.

        In ascending order, apart from each other and not empty; two at most, as the clean prefix follows the text.
        """
        size, text, clean = self.block_size, self.text_length, self.clean_blocks
        for block in range(0 if self.clean_queries else clean, clean + self.noise_blocks):
            index = block if block < clean else block - clean
            # What clean and noise blocks see before themselves is the same.
            seen = (min(index, clean) if clean else index) if self.cross_block else 0
            prefix, own = text + seen * size, text + block * size
            if prefix == own:
                yield [(0, own + size)]
            else:
                yield [(0, prefix), (own, own + size)] if prefix else [(own, own + size)]

    def dense_mask(self, device: torch.device | str | None = None) -> Tensor:
        """``(query_length, key_length)`` of bool, True where a query attends."""
        text, size = self.text_query_length, self.block_size
        mask = torch.zeros(self.query_length, self.key_length, dtype=torch.bool, device=device)
        mask[:text, :text] = torch.ones(text, text, dtype=torch.bool, device=device).tril()
        for block, ranges in enumerate(self.key_ranges()):
            rows = slice(text + block * size, text + (block + 1) * size)
            for start, stop in ranges:
                mask[rows, start:stop] = True
        return mask


class Gather(torch.autograd.Function):
    """Of a tensor's tokens some ranges, one after the other, for each of several readers: a token may have many.

    Autograd's own gradient of a slice is as long as all tokens, in the working dtype, and it adds up one for every
    reader: on two cores, 17 blocks of 64 tokens, a twelfth of a training step.
    """

    @staticmethod
    def forward(x: Tensor, readers: tuple[tuple[tuple[int, int], ...], ...], dim: int) -> tuple[Tensor, ...]:
        parts = ([x.narrow(dim, start, stop - start) for start, stop in ranges] for ranges in readers)
        return tuple(own[0] if len(own) == 1 else torch.cat(own, dim) for own in parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any, int], output: tuple[Tensor, ...]) -> None:
        x, ctx.readers, ctx.dim = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        total = grads[0].new_zeros(ctx.shape, dtype=torch.promote_types(grads[0].dtype, torch.float32))
        for ranges, grad in zip(ctx.readers, grads, strict=True):
            pieces = grad.split([stop - start for start, stop in ranges], ctx.dim)
            for (start, stop), piece in zip(ranges, pieces, strict=True):
                total.narrow(ctx.dim, start, stop - start).add_(piece)
        return total.to(grads[0].dtype), None, None
