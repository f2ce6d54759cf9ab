"""The training mask three ways: a transcription of its definition, structure, and SDPA under the dense mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import madformer.kernels.block_causal_attention as module
from madformer.kernels.block_causal_attention import BlockLayout, block_causal_attention
from testing import assert_within_budget

LAYOUTS = [
    BlockLayout(3, noise_blocks=4, clean_blocks=3),
    BlockLayout(4, noise_blocks=4, clean_blocks=4),
    BlockLayout(2, noise_blocks=5),
    BlockLayout(4, noise_blocks=0, clean_blocks=3),
    BlockLayout(4, noise_blocks=1),
    BlockLayout(3, noise_blocks=4, clean_blocks=3, clean_queries=False),
    BlockLayout(3, noise_blocks=4, clean_blocks=4, cross_block=False),
    BlockLayout(3, noise_blocks=4, cross_block=False),
]


def attends(layout: BlockLayout, query: tuple[str, int], key: tuple[str, int]) -> bool:
    """The definition, block by block, with nothing clever in it."""
    (query_stream, i), (key_stream, j) = query, key
    if query == key:
        return True
    if not layout.cross_block:
        return False
    if query_stream == "clean":
        return key_stream == "clean" and j <= i
    if layout.clean_blocks:
        return key_stream == "clean" and j < i
    return j <= i


def transcribed_mask(layout: BlockLayout) -> torch.Tensor:
    streams = [("clean", i) for i in range(layout.clean_blocks)] + [("noise", i) for i in range(layout.noise_blocks)]
    queries = streams if layout.clean_queries else streams[layout.clean_blocks :]
    blocks = torch.tensor([[attends(layout, query, key) for key in streams] for query in queries])
    return blocks.repeat_interleave(layout.block_size, 0).repeat_interleave(layout.block_size, 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_mask_is_its_definition(layout: BlockLayout) -> None:
    assert torch.equal(layout.dense_mask(), transcribed_mask(layout))


def test_live_share_at_ffhq_1024() -> None:
    """272 of 1024 block pairs."""
    mask = BlockLayout(1, noise_blocks=16, clean_blocks=16).dense_mask()
    assert (mask.sum().item(), mask.numel()) == (272, 1024)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_query_block_has_at_most_two_ranges(layout: BlockLayout) -> None:
    ranges = list(layout.key_ranges())
    assert len(ranges) * layout.block_size == layout.query_length
    assert all(1 <= len(own) <= 2 and all(start < stop for start, stop in own) for own in ranges)


@pytest.mark.parametrize("masked", [True, False], ids=["one masked call", "one call a block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_against_sdpa(layout: BlockLayout, dtype: torch.dtype, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MASKED_KEY_LENGTH", 10_000 if masked else 0)
    generator = torch.Generator().manual_seed(0)
    lengths = (layout.query_length, layout.key_length, layout.key_length)
    oracle = [torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64) for length in lengths]
    weight = torch.randn(2, 3, layout.query_length, 8, generator=generator, dtype=torch.float64)
    mask = transcribed_mask(layout)
    results = []
    for kind in (torch.float64, dtype, None):
        inputs = [x.detach().to(kind or dtype).requires_grad_() for x in oracle]
        if kind is None:
            output = block_causal_attention(*inputs, layout)
        else:
            output = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
        output.backward(weight.to(output.dtype))
        results.append([output.detach(), *(x.grad for x in inputs)])
    for name, reference, eager, ours in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        assert_within_budget(ours, reference, eager, name=name)


def test_wrong_lengths_are_named() -> None:
    layout = BlockLayout(4, noise_blocks=2, clean_blocks=1)
    good, bad = torch.randn(1, 1, 12, 8), torch.randn(1, 1, 8, 8)
    for position, name in enumerate("qkv"):
        arguments = [bad if position == index else good for index in range(3)]
        with pytest.raises(ValueError, match=rf"{name} has shape \(1, 1, 8, 8\)"):
            block_causal_attention(*arguments, layout)
