"""Attention under the training mask: FFHQ-1024's layout, and what else the kernels are compiled for."""

from __future__ import annotations

import functools

import torch

from benchmarks.ops.case import Case, random
from madformer.kernels.block_causal_attention import BlockLayout, block_causal_attention

FFHQ_1024 = BlockLayout(256, noise_blocks=16, clean_blocks=16)
# The other widths of a head: in a last layer, in blocks that are smaller than a tile, with text and its triangle.
VARIANTS = [
    (72, BlockLayout(256, noise_blocks=16, clean_blocks=15, clean_queries=False)),
    (80, BlockLayout(16, noise_blocks=4, clean_blocks=4)),
    (96, BlockLayout(256, noise_blocks=16, clean_blocks=16, text_length=77)),
    (128, FFHQ_1024),
]

# One that is not installed is named in the record with the reason.
PEERS = ("flex", "sdpa", "flash_attn", "xformers")


def live_pairs(layout: BlockLayout) -> int:
    """Pairs of a query and a key that it attends to."""
    text = layout.text_query_length
    image = sum(stop - start for ranges in layout.key_ranges() for start, stop in ranges) * layout.block_size
    return text * (text + 1) // 2 + image


def make_case(op: str, layout: BlockLayout, batch: int, heads: int, dim: int, peers: tuple[str, ...]) -> Case:
    def inputs(device: torch.device) -> tuple[torch.Tensor, ...]:
        # As the model passes them: heads of a token lie together.
        lengths = (layout.query_length, layout.key_length, layout.key_length)
        packed = [random(device, batch, length, heads, dim, grad=False) for length in lengths]
        return tuple(x.transpose(1, 2).requires_grad_() for x in packed)

    flops = 4 * dim * live_pairs(layout) * heads * batch
    text = f", {layout.text_length} text tokens" if layout.text_length else ""
    queries = "" if layout.clean_queries else ", noise queries"
    blocks = f"{layout.clean_blocks} + {layout.noise_blocks} blocks of {layout.block_size}"
    attend = functools.partial(block_causal_attention, layout=layout)
    return Case(
        op=op,
        label=f"batch {batch}, {heads} heads of {dim}, {blocks}{text}{queries}, bf16",
        inputs=inputs,
        run=attend,
        forward_flops=flops,
        backward_flops=flops * 5 // 2,
        peers={name: functools.partial(attend, backend=name) for name in peers},
    )


def cases() -> list[Case]:
    return [
        *(make_case("block_causal_attention", FFHQ_1024, batch, 18, 64, PEERS) for batch in (1, 4)),
        *(make_case("block_causal_attention_variants", layout, 1, 16, dim, ()) for dim, layout in VARIANTS),
    ]
