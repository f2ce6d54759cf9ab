"""The Triton kernels of attention under a layout against SDPA under its dense mask, in float64."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from madformer.kernels.block_causal_attention import BlockLayout, block_causal_attention, op
from madformer.kernels.block_causal_attention import forward as forward_kernel
from madformer.kernels.block_causal_attention.forward import AttentionSettings, Tile, is_masked
from tests.helpers.testing import COMPILER, DEVICE, assert_op_matches, assert_within_budget, each_dtype

SCALE = 0.3


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Cuts the kernels into tiles that the interpreter has done soon: queries by keys, keys by queries for dK/dV."""

    def set_tiles(rows: int = 16, cols: int = 16, tma: bool = False) -> None:
        tile = Tile(rows, cols, num_warps=4, num_stages=2)
        monkeypatch.setattr(op, "choose_settings", lambda *_: AttentionSettings(tile, tile, tile, tma))

    return set_tiles


def triton(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    return block_causal_attention(q, k, v, layout, scale=SCALE, return_lse=True, backend="triton")


def dense(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    mask = layout.dense_mask(q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.detach().to(wide) @ k.detach().mT.to(wide) * SCALE).masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE), scores.logsumexp(-1)


def make_inputs(
    layout: BlockLayout, *, batch: int = 1, heads: int = 1, dim: int = 16, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    lengths = {"q": layout.query_length, "k": layout.key_length, "v": layout.key_length}
    made = {
        name: torch.randn(batch, heads, length, dim, generator=generator).to(DEVICE, dtype).requires_grad_()
        for name, length in lengths.items()
    }
    return {**made, "layout": layout}


def assert_matches(inputs: dict[str, Any], function: Callable[..., Any] = triton, **options: Any) -> None:
    layout = inputs["layout"]
    rows = {"q": layout.key_length, "k": layout.query_length, "v": layout.query_length}
    assert_op_matches(function, dense, inputs, rows=rows, **options)


# Tiles of 16 x 16 divide the blocks and texts of the first group.
ALIGNED = [
    BlockLayout(16, 2, 1),
    BlockLayout(32, 2, 1, clean_queries=False),
    BlockLayout(16, 2),
    BlockLayout(16, 1, 1, clean_queries=False),
    BlockLayout(16, 1, 1, cross_block=False, clean_queries=False),
    BlockLayout(16, 1, 1, text_length=16, text_queries=False, clean_queries=False),
]
# Here they cut blocks or the text, or span several blocks.
CUT = [
    BlockLayout(16, 1, text_length=32),
    BlockLayout(16, 1, 1, text_length=7, text_queries=False),
    BlockLayout(10, 2, 1, text_length=9),
    BlockLayout(20, 1, 1, text_length=19, clean_queries=False),
    BlockLayout(4, 4, 3),
    BlockLayout(4, 5, 5, clean_queries=False),
    BlockLayout(4, 6, text_length=3),
    BlockLayout(5, 1, 4, text_length=3),
    BlockLayout(5, 3, 2, cross_block=False, text_length=6),
    BlockLayout(5, 0, 2, text_length=18, text_queries=False),
    BlockLayout(4, 0, text_length=20),
    BlockLayout(1, 12, 11),
]
LAYOUTS = ALIGNED + CUT


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_matches_float64(layout: BlockLayout, tiles: Callable[..., None]) -> None:
    tiles()
    assert_matches(make_inputs(layout))


@pytest.mark.parametrize("cut", [(32, 16), (16, 32)], ids=str)
@pytest.mark.parametrize("layout", [BlockLayout(32, 1, 1), BlockLayout(20, 1, 1, text_length=9)], ids=str)
def test_uneven_tiles_and_descriptors(layout: BlockLayout, cut: tuple[int, int], tiles: Callable[..., None]) -> None:
    tiles(*cut, tma=True)
    assert_matches(make_inputs(layout))


@pytest.mark.parametrize("dim", [1, 10, 64, 72, 80, 96, 128])
def test_head_dims(dim: int, tiles: Callable[..., None]) -> None:
    tiles(32, 32, tma=True)
    assert_matches(make_inputs(BlockLayout(8, 2, 1, clean_queries=False), dim=dim))


@each_dtype
@pytest.mark.parametrize("layout", [BlockLayout(16, 2), BlockLayout(5, 3, 2, clean_queries=False)], ids=str)
def test_dtypes(layout: BlockLayout, dtype: torch.dtype, tiles: Callable[..., None]) -> None:
    tiles()
    assert_matches(make_inputs(layout, dim=80, dtype=dtype))


@pytest.mark.parametrize("layout", [BlockLayout(64, 1, 1), BlockLayout(24, 2, 1, text_length=11)], ids=str)
def test_default_tiles(layout: BlockLayout) -> None:
    assert_matches(make_inputs(layout, dim=32, dtype=torch.float16))


def test_heads_in_groups(tiles: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of two heads, the last of one, as where keys and values of all heads exceed the L2 cache."""
    tiles(32, 32)
    layout = BlockLayout(32, 1)
    monkeypatch.setattr(forward_kernel, "L2_BYTES", 3 * 2 * layout.key_length * 16 * 4 // 2)
    assert_matches(make_inputs(layout, heads=3))


def packed(layout: BlockLayout, x: Tensor) -> dict[str, Tensor]:
    """Views of one packed projection, ``(B, L, 3, H, D)``, as a tower makes them."""
    return dict(zip("qkv", x.permute(2, 0, 3, 1, 4).unbind(0), strict=True))


VIEWS: dict[str, Callable[[BlockLayout, Tensor], dict[str, Tensor]]] = {
    "packed projection": packed,
    "unaligned": lambda layout, x: {name: x[..., 1:] for name, x in packed(layout, x).items()},
    "expanded": lambda layout, x: {name: x[:, :1].expand(-1, 2, -1, -1) for name, x in packed(layout, x).items()},
    "transposed": lambda layout, x: {name: x.mT.contiguous().mT for name, x in packed(layout, x).items()},
    "rows far apart": lambda layout, x: {
        name: x.repeat(1, 1, 1, 25)[..., 7:23] for name, x in packed(layout, x).items()
    },
}


@pytest.mark.parametrize("view", VIEWS)
def test_layouts_of_the_arguments(view: str, tiles: Callable[..., None]) -> None:
    tiles(32, 32, tma=True)
    layout = BlockLayout(8, 2)
    x = torch.randn(1, layout.key_length, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    inputs = {name: x.requires_grad_() for name, x in VIEWS[view](layout, x).items()}
    assert_matches({**inputs, "layout": layout})


@pytest.mark.parametrize(
    "grads",
    [lambda g: g.mT.contiguous().mT, lambda g: g[..., :1].expand(g.shape), lambda g: g[:, :1, :1].expand(g.shape)],
    ids=["transposed", "stride 0 in columns", "stride 0 in rows"],
)
def test_layouts_of_the_gradient(grads: Callable[[Tensor], Tensor], tiles: Callable[..., None]) -> None:
    tiles(32, 32, tma=True)
    assert_matches(make_inputs(BlockLayout(8, 2), heads=2), grads=grads)


def test_results_need_no_copy_before_a_projection(tiles: Callable[..., None]) -> None:
    tiles(32, 32)
    inputs = make_inputs(BlockLayout(8, 2), batch=2, heads=2)
    out, lse = triton(**inputs)
    assert out.transpose(1, 2).is_contiguous()
    assert (lse.dtype, lse.requires_grad) == (torch.float32, False)
    for grad in torch.autograd.grad(out.sum(), [inputs[name] for name in "qkv"]):
        assert grad.transpose(1, 2).is_contiguous()


def test_heads_beyond_32_bits(tiles: Callable[..., None]) -> None:
    """The second head starts 2**31 elements after the first; pages in between are never touched."""
    tiles(16, 16)
    layout, dim, stride = BlockLayout(16, 1), 16, 2**31 + 8
    count = stride + layout.key_length * dim
    if DEVICE.type == "cuda":
        memory = torch.zeros(count, dtype=torch.float16, device=DEVICE)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = torch.frombuffer(mmap.mmap(-1, 2 * count, flags=flags), dtype=torch.float16)
    inputs = make_inputs(layout, heads=2, dim=dim, dtype=torch.float16)
    far = memory.as_strided((1, 2, layout.key_length, dim), (1, stride, dim, 1))
    far.copy_(inputs["k"].detach())
    out, lse = triton(**inputs)
    assert torch.equal(triton(inputs["q"], far, inputs["v"], layout)[0], out)
    arguments = [x.detach() for x in (torch.ones_like(out), inputs["q"], inputs["k"], inputs["v"], out)]
    fields = [16, 1, 0, 1, 0, 1, 1]
    backward = torch.ops.madformer.block_causal_attention_backward
    base_2 = lse / torch.log(torch.tensor(2.0))
    for near, distant in zip(
        backward(*arguments, base_2, fields, SCALE),
        backward(*arguments[:2], far, *arguments[3:], base_2, fields, SCALE),
        strict=True,
    ):
        assert torch.equal(near, distant)


@pytest.mark.parametrize("queries", [16, 32])
@pytest.mark.parametrize("keys", [16, 32])
def test_masks_only_where_tiles_are_cut(queries: int, keys: int) -> None:
    """Without masks every tile of a stream is wholly live or wholly dead, and nothing but that is claimed."""
    for layout in (*LAYOUTS, BlockLayout(32, 2, 2, text_length=16, text_queries=False), BlockLayout(64, 2, 1)):
        mask = layout.dense_mask().float()
        masked = is_masked(layout, queries, keys)
        if not masked:
            shares = F.avg_pool2d(mask[None], (queries, keys))
            assert mask.shape[0] % queries == mask.shape[1] % keys == 0
            assert set(shares.unique().tolist()) <= {0.0, 1.0}, layout
    assert not is_masked(BlockLayout(256, 16, 16), 128, 128)
    assert not is_masked(BlockLayout(256, 16, 15, text_length=64, text_queries=False), 128, 64)


def test_opcheck(tiles: Callable[..., None]) -> None:
    tiles(32, 32)
    inputs = make_inputs(BlockLayout(8, 2), dtype=torch.bfloat16)
    library.opcheck(
        torch.ops.madformer.block_causal_attention.default,
        (inputs["q"], inputs["k"], inputs["v"], [8, 2, 0, 1, 0, 1, 1], SCALE),
    )


def test_compiles_whole(tiles: Callable[..., None]) -> None:
    tiles(32, 32)
    compiled = torch.compile(triton, fullgraph=True, backend=COMPILER)
    inputs = make_inputs(BlockLayout(8, 2))
    assert_matches(inputs, compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_matches(inputs, compiled)


def test_head_dim_and_scale_have_limits() -> None:
    layout = BlockLayout(4, 1)
    wide = torch.zeros(1, 1, 4, 136, device=DEVICE)
    with pytest.raises(ValueError, match="q must have a head dim of at most 128 for backend='triton', got 136"):
        block_causal_attention(wide, wide, wide, layout, backend="triton")
    with pytest.raises(ValueError, match=r"scale must be above 0 for backend='triton', got 0\.0"):
        block_causal_attention(*[wide[..., :16]] * 3, layout, scale=0.0, backend="triton")


MODEL_SHAPES = [
    (BlockLayout(256, 16, 16), 64, torch.bfloat16),
    (BlockLayout(256, 16, 16), 128, torch.bfloat16),
    (BlockLayout(256, 16, 15, clean_queries=False), 72, torch.bfloat16),
    (BlockLayout(256, 8, 8, text_length=77), 64, torch.bfloat16),
    (BlockLayout(256, 8, 8, text_length=77), 96, torch.float16),
    (BlockLayout(196, 5, 5), 80, torch.bfloat16),
    (BlockLayout(64, 16, 16), 64, torch.float16),
    (BlockLayout(16, 4, 4), 64, torch.bfloat16),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("layout", "dim", "dtype"), MODEL_SHAPES, ids=str)
def test_model_shapes(layout: BlockLayout, dim: int, dtype: torch.dtype) -> None:
    """With the tiles and the loads of this GPU; a second run gives the very same bits."""
    inputs = make_inputs(layout, batch=2, heads=3, dim=dim, dtype=dtype)
    weight = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)

    def run(backend: str, wide: torch.dtype) -> list[Tensor]:
        leaves = [inputs[name].detach().to(wide).requires_grad_() for name in "qkv"]
        out = block_causal_attention(*leaves, layout, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(wide))]

    actual, again = run("triton", dtype), run("triton", dtype)
    eager, oracle = run("sdpa", dtype), run("sdpa", torch.float64)
    for name, value, repeated, *expected in zip(("out", "dq", "dk", "dv"), actual, again, oracle, eager, strict=True):
        assert_within_budget(value, *expected, name=name, rows=layout.key_length)
        assert torch.equal(value, repeated), f"{name} is not deterministic"
