"""Attention to a cached prefix and the own block against float64. What lies behind every prefix is NaN."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend

from madformer.kernels import dispatch
from madformer.kernels.cached_attention import cached_attention, cached_attention_ref
from madformer.kernels.cached_attention.op import choose_num_splits, choose_settings
from madformer.kernels.launch import Target, compiling_for, target
from tests.helpers.testing import COMPILER, DEVICE, assert_op_matches, assert_within_budget, each_dtype, needs_cpp

Inputs = dict[str, Tensor]
each_backend = pytest.mark.parametrize("backend", ["reference", "triton", pytest.param("cpp", marks=needs_cpp)])


def tile(head_dim: int, dtype: torch.dtype, num_queries: int = 1) -> tuple[int, int]:
    """Queries and keys of a tile, to test around."""
    settings = choose_settings(1, num_queries, 1, head_dim, dtype, target(DEVICE))
    return settings.block_m, settings.block_n


def make_inputs(
    lengths: Sequence[int],
    capacity: int,
    own: int,
    queries: int = 9,
    heads: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    rows: Sequence[int] | None = None,
    num_rows: int | None = None,
) -> Inputs:
    """Arguments by name; with ``own`` of 0 there is no own block, and with ``rows`` the caches have ``num_rows``."""
    generator = torch.Generator().manual_seed(0)

    def random(length: int, count: int = len(lengths)) -> Tensor:
        return torch.randn(count, heads, length, head_dim, generator=generator).to(DEVICE, dtype)

    num_rows = len(lengths) if num_rows is None else num_rows
    inputs = {
        "q_BHLD": random(queries),
        "k_cache_RHSD": random(capacity, num_rows),
        "v_cache_RHSD": random(capacity, num_rows),
        "lengths_B": torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
    }
    if rows is not None:
        inputs["rows_B"] = torch.tensor(rows, device=DEVICE)
    hide_unread(inputs)
    return inputs | ({"k_BHND": random(own), "v_BHND": random(own)} if own else {})


def hide_unread(inputs: Inputs) -> None:
    """NaN behind the longest prefix that is read of every row."""
    lengths = inputs["lengths_B"].tolist()
    rows = inputs["rows_B"].tolist() if "rows_B" in inputs else range(len(lengths))
    for name in ("k_cache_RHSD", "v_cache_RHSD"):
        for row, cache in enumerate(inputs[name]):
            read = max([0, *(length for length, its in zip(lengths, rows, strict=True) if its == row)])
            cache[:, read:] = float("nan")


def triton(num_splits: int | None = None, scale: float | None = None) -> Callable[..., Tensor]:
    def attend(**inputs: Tensor) -> Tensor:
        return cached_attention(**inputs, num_splits=num_splits, scale=scale, backend="triton")

    return attend


def cpp(scale: float | None = None) -> Callable[..., Tensor]:
    return functools.partial(cached_attention, scale=scale, backend="cpp")


@needs_cpp
@each_dtype
@pytest.mark.parametrize("own", [0, 5], ids=["own in the cache", "own apart"])
def test_cpp_matches_float64(own: int, dtype: torch.dtype) -> None:
    """Tiles of one vector of queries and of two, and a rest; keys of no tile, a part, and two; odd head dims; rows."""
    for queries, head_dim in ((1, 64), (3, 1), (9, 12), (16, 64), (19, 6), (33, 7)):
        inputs = make_inputs([0, 1, 127, 300], 300, own, queries, 2, head_dim, dtype)
        assert_op_matches(cpp(), cached_attention_ref, inputs)
    inputs = make_inputs([130, 3, 70, 0], 133, own, dtype=dtype, rows=[3, 1, 3, 4], num_rows=5)
    assert_op_matches(cpp(0.5), functools.partial(cached_attention_ref, scale=0.5), inputs)
    large = make_inputs([60, 135], 135, 30, dtype=dtype)
    large["q_BHLD"] *= 100
    assert_op_matches(cpp(), cached_attention_ref, large)


@needs_cpp
def test_cpp_lets_no_fault_through() -> None:
    """A query, key or value that is no number shows in every result that it has a part in, and in no other."""
    for name in ("q_BHLD", "k_cache_RHSD", "v_cache_RHSD", "k_BHND", "v_BHND"):
        for fault in (torch.nan, torch.inf):
            inputs = make_inputs([200, 140], 200, 5, dtype=torch.float32)
            inputs[name][1, 0, 2, 3] = fault
            out, expected = cpp()(**inputs), cached_attention_ref(**inputs)
            assert torch.equal(out.isfinite(), expected.isfinite()), name


@each_dtype
@pytest.mark.parametrize("own", [0, 5], ids=["own in the cache", "own apart"])
def test_matches_float64(own: int, dtype: torch.dtype) -> None:
    queries, keys = tile(64, dtype, num_queries=65)
    capacity = 2 * keys + 3
    inputs = make_inputs([capacity, keys + 1], capacity, own, queries + 1, heads=2, head_dim=64, dtype=dtype)
    assert_op_matches(triton(), cached_attention_ref, inputs)


@pytest.mark.parametrize("num_splits", [1, 2, 5])
@pytest.mark.parametrize("own", ["none", "ragged", "full"])
def test_splits_and_lengths(own: str, num_splits: int) -> None:
    """Every kind of range: none, less than a tile, just tiles, tiles and a rest, the whole cache, shares of nothing."""
    _, keys = tile(16, torch.bfloat16)
    lengths = [0, 1, keys, 2 * keys + 5]
    length = {"none": 0, "ragged": keys + 2, "full": keys}[own]
    inputs = make_inputs(lengths, 2 * keys + 5, length)
    assert_op_matches(triton(num_splits), cached_attention_ref, inputs)


@pytest.mark.parametrize(
    ("head_dim", "num_splits"), [(1, 1), (8, 2), (32, 1), (64, 2), (72, 1), (80, 2), (96, 1), (128, 2)]
)
def test_head_dims(head_dim: int, num_splits: int) -> None:
    inputs = make_inputs([20, 3], 23, 5, head_dim=head_dim)
    assert_op_matches(triton(num_splits), cached_attention_ref, inputs)


def test_matches_attention_written_out() -> None:
    """The oracle itself, against softmax over what is concatenated by hand."""
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in make_inputs([4, 0, 7], 7, 3).items()}
    out = cached_attention_ref(**inputs, scale=0.5)
    for b, length in enumerate([4, 0, 7]):
        k = torch.cat((inputs["k_cache_RHSD"][b, :, :length], inputs["k_BHND"][b]), dim=1)
        v = torch.cat((inputs["v_cache_RHSD"][b, :, :length], inputs["v_BHND"][b]), dim=1)
        expected = (0.5 * inputs["q_BHLD"][b] @ k.mT).softmax(-1) @ v
        torch.testing.assert_close(out[b], expected)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_own_block_apart_or_in_the_cache(num_splits: int) -> None:
    """Where the prefix is whole tiles the kernel does the same arithmetic on both, so it is the same bit for bit."""
    _, keys = tile(16, torch.bfloat16)
    apart = make_inputs([keys, 0], 2 * keys, 5)
    within = {name: x.clone() for name, x in apart.items() if name not in ("k_BHND", "v_BHND")}
    for own, cache in (("k_BHND", "k_cache_RHSD"), ("v_BHND", "v_cache_RHSD")):
        for b, length in enumerate([keys, 0]):
            within[cache][b, :, length : length + 5] = apart[own][b]
    within["lengths_B"] += 5
    assert torch.equal(triton(num_splits)(**apart), triton(num_splits)(**within))


OUTSIDE = [-1, 3, 2**40, -(2**62)]


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("own", [0, 5], ids=["own in the cache", "own apart"])
def test_rows(own: int, num_splits: int) -> None:
    """Samples out of order, two that share a row to different lengths, one that reads nothing of its row."""
    _, keys = tile(16, torch.bfloat16)
    inputs = make_inputs([keys + 5, 3, 2 * keys, 0], 2 * keys + 5, own, rows=[3, 1, 3, 4], num_rows=5)
    assert_op_matches(triton(num_splits), cached_attention_ref, inputs)


@each_backend
@pytest.mark.parametrize("own", [0, 5], ids=["own in the cache", "own apart"])
def test_rows_are_those_gathered_by_hand(own: int, backend: str) -> None:
    """Bit for bit, from caches with more rows than there are samples, with fewer, and with one."""
    for rows, num_rows, dtype in (([4, 0, 4], 6, torch.int32), ([1, 1, 0], 2, torch.int64), ([0] * 3, 1, torch.int32)):
        inputs = make_inputs([20, 3, 9], 23, own, rows=rows, num_rows=num_rows)
        inputs["rows_B"] = inputs["rows_B"].to(dtype)
        gathered = {name: x[rows] if "cache" in name else x for name, x in inputs.items() if name != "rows_B"}
        expected = cached_attention(**gathered, num_splits=1, backend=backend)
        assert torch.equal(cached_attention(**inputs, num_splits=1, backend=backend), expected)


@each_backend
@pytest.mark.parametrize(("own", "num_splits"), [(0, 2), (5, 1)], ids=["own in the cache", "own apart"])
def test_a_row_outside_has_no_cached_keys(own: int, num_splits: int, backend: str) -> None:
    """As if its length were 0; on a GPU a read would be an illegal access."""
    inputs = make_inputs([7] * 5, 7, own, queries=2, rows=[2, *OUTSIDE], num_rows=3)
    out = cached_attention(**inputs, num_splits=num_splits, backend=backend)
    emptied = inputs | {
        "lengths_B": torch.tensor([7, 0, 0, 0, 0], device=DEVICE),
        "rows_B": torch.tensor([2, 0, 0, 0, 0], device=DEVICE),
    }
    assert torch.equal(out, cached_attention(**emptied, num_splits=num_splits, backend=backend))
    assert out[0].isfinite().all()
    assert bool((out[1:] == 0).all()) == (own == 0)


@pytest.mark.parametrize("num_splits", [1, 3])
@each_backend
def test_nothing_to_attend_to_gives_zero(backend: str, num_splits: int) -> None:
    inputs = make_inputs([0, 7], 7, 0)
    out = cached_attention(**inputs, num_splits=num_splits, backend=backend)
    assert (out[0] == 0).all()
    assert (out[1] != 0).all()


@each_backend
@pytest.mark.parametrize("own", [0, 5])
def test_cache_without_room(own: int, backend: str) -> None:
    inputs = make_inputs([0, 0], 0, own)
    out = cached_attention(**inputs, backend=backend)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    assert_within_budget(out, cached_attention_ref(**exact), cached_attention_ref(**inputs))


@each_backend
def test_lengths_are_clamped(backend: str) -> None:
    inputs = make_inputs([-3, 7, 2], 7, 5)
    beyond = {**inputs, "lengths_B": torch.tensor([-(2**40), 2**40, 2], device=DEVICE)}
    assert torch.equal(cached_attention(**beyond, backend=backend), cached_attention(**inputs, backend=backend))


@pytest.mark.parametrize("shape", [(0, 1, 9), (2, 0, 9), (2, 1, 0)], ids=["batch", "heads", "queries"])
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    batch, heads, queries = shape
    out = triton()(**make_inputs([3] * batch, 6, 4, queries, heads))
    assert out.shape == (*shape, 16)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_more_samples_than_a_grid_is_wide(num_splits: int) -> None:
    """CUDA takes 65,535 programs along a grid's second and third dimension."""
    samples, grids = 70_000, []
    q, cache = torch.zeros(samples, 3, 1, 16), torch.zeros(samples, 3, 2, 16)
    lengths = torch.ones(samples, dtype=torch.int32)
    with compiling_for(Target(90, num_sms=132), lambda kernel, grid, *args, **settings: grids.append(grid)):
        cached_attention(q, cache, cache, lengths, num_splits=num_splits, backend="triton")
    assert grids[0] == (samples * num_splits, 3)
    assert all(size <= 65_535 for grid in grids for size in grid[1:])


def layer_of_cache(x: Inputs) -> Inputs:
    return {name: torch.stack((x[name], x[name]))[1] for name in ("k_cache_RHSD", "v_cache_RHSD")}


def tokens_before_heads(x: Inputs) -> Inputs:
    return {name: v.transpose(1, 2).contiguous().transpose(1, 2) for name, v in x.items() if name != "lengths_B"}


def packed_projection(x: Inputs) -> Inputs:
    packed = torch.stack([x[name].transpose(1, 2) for name in ("q_BHLD", "k_BHND", "v_BHND")], dim=2)
    return dict(zip(("q_BHLD", "k_BHND", "v_BHND"), packed.permute(2, 0, 3, 1, 4), strict=True))


def odd_strides(x: Inputs) -> Inputs:
    return {name: torch.nn.functional.pad(v, (1, 2))[..., 1:-2] for name, v in x.items() if name != "lengths_B"}


def shared_prefix(x: Inputs) -> Inputs:
    caches = {name: x[name][:1].expand(2, -1, -1, -1) for name in ("k_cache_RHSD", "v_cache_RHSD")}
    return caches | {"lengths_B": x["lengths_B"][:1].expand(2)}


def strided_lengths(x: Inputs) -> Inputs:
    return {"lengths_B": torch.stack((x["lengths_B"], x["lengths_B"] - 2), dim=1).long()[:, 0]}


def strided_rows(x: Inputs) -> Inputs:
    """Row 0 for both, whose prefix is the longer one."""
    return {"rows_B": torch.tensor([[0, 9], [0, 9]], device=DEVICE)[:, 0]}


def expanded_rows(x: Inputs) -> Inputs:
    return {"rows_B": torch.zeros(1, dtype=torch.int32, device=DEVICE).expand(2)}


@pytest.mark.parametrize(
    "layout",
    [
        layer_of_cache,
        tokens_before_heads,
        packed_projection,
        odd_strides,
        shared_prefix,
        strided_lengths,
        strided_rows,
        expanded_rows,
    ],
    ids=lambda layout: layout.__name__,
)
@pytest.mark.parametrize("op", [triton(), pytest.param(cpp(), marks=needs_cpp)], ids=["triton", "cpp"])
def test_layouts(op: Callable[..., Tensor], layout: Callable[[Inputs], Inputs]) -> None:
    inputs = make_inputs([70, 3], 81, 9, heads=2)
    assert_op_matches(op, cached_attention_ref, inputs | layout(inputs))


def test_result_is_a_view_for_the_projection() -> None:
    for num_splits in (1, 2):
        out = triton(num_splits)(**make_inputs([3, 4], 7, 5, queries=2, heads=3))
        assert out.transpose(1, 2).is_contiguous()


FAR = 2**30 + 1  # Twice this is beyond 32 bits, once it is not; odd, so that strides cannot be given in larger units.


@pytest.mark.parametrize("strides", [(FAR, 16, 48, 1), (16, FAR, 48, 1), (16, 48, FAR, 1)], ids=["R", "H", "S"])
@pytest.mark.parametrize("backwards", [False, True], ids=["", "rows"])
def test_addresses_beyond_32_bits(strides: tuple[int, ...], backwards: bool) -> None:
    inputs = make_inputs([3, 3, 3], 3, 5, heads=3)
    if backwards:
        inputs["rows_B"] = torch.tensor([2, 1, 0], dtype=torch.int32, device=DEVICE)
    for name in ("k_cache_RHSD", "v_cache_RHSD"):
        inputs[name] = spread_out(inputs[name], strides)
    assert_op_matches(triton(), cached_attention_ref, inputs)


def spread_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy with these strides, in memory of which a CPU commits only the pages that are touched."""
    size = 1 + sum((length - 1) * stride for length, stride in zip(x.shape, strides, strict=True))
    if DEVICE.type == "cuda":
        storage = torch.zeros(size, dtype=x.dtype, device=DEVICE)
    else:
        storage = torch.frombuffer(mmap.mmap(-1, size * x.element_size()), dtype=x.dtype)
    return storage.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("scale", [0.02, 3.0])
def test_scale(scale: float) -> None:
    inputs = make_inputs([30], 41, 5)
    reference = lambda **x: cached_attention_ref(**x, scale=scale)  # noqa: E731
    assert_op_matches(triton(2, scale), reference, inputs)


def test_large_scores() -> None:
    """Exponentials of the scores themselves would overflow, in a split as in the whole."""
    inputs = make_inputs([60, 5], 65, 30, dtype=torch.float32)
    inputs["q_BHLD"] *= 100
    for num_splits in (1, 3):
        assert_op_matches(triton(num_splits), cached_attention_ref, inputs)


@pytest.mark.parametrize(("own", "num_splits", "rows"), [(0, None, None), (5, 2, None), (0, 2, [3, 0])])
def test_opcheck(own: int, num_splits: int | None, rows: list[int] | None) -> None:
    inputs = make_inputs([6, 2], 9, own, rows=rows, num_rows=rows and 4)
    names = ("q_BHLD", "k_cache_RHSD", "v_cache_RHSD", "lengths_B", "k_BHND", "v_BHND", "rows_B")
    arguments = [*(inputs.get(name) for name in names), 0.25, num_splits]
    library.opcheck(torch.ops.madformer.cached_attention.default, arguments)
    if "cpp" not in dispatch._UNAVAILABLE and DEVICE.type == "cpu":
        library.opcheck(torch.ops.madformer.cached_attention_cpp.default, arguments[:-1])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiles_whole_for_all_lengths_and_rows(backend: str) -> None:
    counter = CompileCounterWithBackend(COMPILER)

    @torch.compile(fullgraph=True, backend=counter)
    def attend(**inputs: Tensor) -> Tensor:
        return cached_attention(**inputs, backend=backend)

    for lengths in ([6, 2], [0, 9], [9, 9]):
        assert_op_matches(attend, cached_attention_ref, make_inputs(lengths, 9, 5))
    assert counter.frame_count == 1
    for rows in ([2, 0], [1, 1], [3, -1]):
        assert_op_matches(attend, cached_attention_ref, make_inputs([6, 2], 9, 5, rows=rows, num_rows=3))
    assert counter.frame_count == 2


@each_backend
def test_gradients_are_refused(backend: str) -> None:
    inputs = make_inputs([3], 6, 4)
    inputs["q_BHLD"].requires_grad_()
    with pytest.raises(ValueError, match="q must not require a gradient: cached_attention has no backward"):
        cached_attention(**inputs, backend=backend)
    with torch.no_grad():
        assert not cached_attention(**inputs, backend=backend).requires_grad


def with_rows(x: Inputs, **changes: Tensor) -> Inputs:
    return {"rows_B": torch.zeros_like(x["lengths_B"]), **changes}


def no_rows(x: Inputs) -> Inputs:
    return {name: x[name][:0] for name in ("k_cache_RHSD", "v_cache_RHSD")}


@each_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"q_BHLD": x["q_BHLD"][0]}, r"q must have the shape \(B, H, L, D\), got \(1, 9, 16\)"),
        (lambda x: {"k_cache_RHSD": x["k_cache_RHSD"][0]}, "k_cache must have four dimensions"),
        (lambda x: {"k_cache_RHSD": x["k_cache_RHSD"][:1]}, r"k_cache must have the shape \(2, 1, 6, 16\), got \(1, "),
        (lambda x: {"v_cache_RHSD": x["v_cache_RHSD"].float()}, "v_cache must have q's dtype torch.bfloat16, got"),
        (lambda x: {"v_cache_RHSD": x["v_cache_RHSD"][:, :, :5]}, "v_cache must have k_cache's shape"),
        (lambda x: {"v_cache_RHSD": x["v_cache_RHSD"].to("meta")}, "v_cache must be on"),
        (lambda x: {"k_cache_RHSD": x["k_cache_RHSD"].mT.contiguous().mT}, "k_cache must have a contiguous last dim"),
        (lambda x: {"k_BHND": None}, "k is missing: the own block needs both k and v"),
        (lambda x: {"v_BHND": None}, "v is missing: the own block needs both k and v"),
        (lambda x: {"v_BHND": x["v_BHND"][:, :, :3]}, "v must have k's shape"),
        (lambda x: {"k_BHND": x["k_BHND"][..., :8]}, r"k must have the shape \(2, 1, 4, 16\), got \(2, 1, 4, 8\)"),
        (lambda x: {"lengths_B": x["lengths_B"][:1]}, r"lengths must have the shape \(2,\), got \(1,\)"),
        (lambda x: {"lengths_B": x["lengths_B"].float()}, "lengths must be torch.int32 or torch.int64, got"),
        (lambda x: {"lengths_B": x["lengths_B"].to("meta")}, "lengths must be on"),
        (lambda x: {"rows_B": x["lengths_B"][:1]}, r"rows must have the shape \(2,\), got \(1,\)"),
        (lambda x: {"rows_B": x["lengths_B"].short()}, "rows must be torch.int32 or torch.int64, got torch.int16"),
        (lambda x: {"rows_B": x["lengths_B"].to("meta")}, "rows must be on"),
        (lambda x: with_rows(x, k_cache_RHSD=x["k_cache_RHSD"][:1]), "v_cache must have k_cache's shape"),
        (lambda x: with_rows(x, k_BHND=x["k_BHND"][:1]), r"k must have the shape \(2, 1, 4, 16\), got \(1, "),
        (lambda x: with_rows(x, **no_rows(x)), r"k_cache must have at least one row, got \(0, 1, 6, 16\)"),
        (lambda x: {"scale": 0.0}, r"scale=0.0 must be positive and finite"),
        (lambda x: {"scale": float("nan")}, r"scale=nan must be positive and finite"),
        (lambda x: {"num_splits": 0}, r"num_splits=0 must be in 1\.\.32"),
        (lambda x: {"num_splits": 33}, r"num_splits=33 must be in 1\.\.32"),
        (lambda x: {"backend": "flex"}, "must be one of auto, triton, cpp, reference for cached_attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(change: Callable[[Inputs], dict[str, object]], message: str, backend: str) -> None:
    inputs = make_inputs([3, 2], 6, 4)
    arguments: dict[str, object] = {"backend": backend, **inputs, **change(inputs)}
    with pytest.raises(ValueError, match=message):
        cached_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "q must be torch.float32 or torch.bfloat16 or torch.float16, got torch.float64"),
        ({"head_dim": 160}, "q must have a head dim of at most 128 for Triton, got 160"),
    ],
    ids=["float64", "wide heads"],
)
def test_what_the_kernel_does_not_take(change: dict[str, object], message: str) -> None:
    """By name it is an error; by ``auto``, also where that would be Triton, another takes it."""
    inputs = make_inputs([3, 2], 6, 4, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        cached_attention(**inputs, backend="triton")
    inputs = make_inputs([3, 2], 6, 4, **({"dtype": torch.float32} | change))  # type: ignore[arg-type]
    torch.testing.assert_close(cached_attention(**inputs), cached_attention_ref(**inputs))


def test_number_of_splits() -> None:
    """What the model samples with, on the 132 SMs of an H200: as many programs as it takes, and no more."""
    sms, capacity, tiles = 132, 4352, 2
    chosen = {batch: choose_num_splits(batch * 18 * tiles, capacity, 64, 2, sms) for batch in (1, 2, 4, 8, 16, 32, 64)}
    assert chosen[64] == chosen[32] == 1
    assert sorted(chosen.values(), reverse=True) == list(chosen.values())
    assert all(batch * 18 * tiles * splits >= sms for batch, splits in chosen.items())
    assert choose_num_splits(1, 64, 64, 2, sms) == 1  # a single tile of keys
    assert choose_num_splits(1, 0, 64, 2, sms) == 1


FFHQ = {"capacity": 4096, "own": 256, "queries": 256, "heads": 18, "head_dim": 64}


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("num_splits", [None, 1, 5])
@pytest.mark.parametrize("rows", [None, [4, 0, 2]], ids=["", "rows"])
def test_on_the_model(rows: list[int] | None, dtype: torch.dtype, num_splits: int | None) -> None:
    inputs = make_inputs([0, 3840, 1000], **FFHQ, dtype=dtype, rows=rows, num_rows=rows and 5)
    assert_op_matches(triton(num_splits), cached_attention_ref, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [None, [4, 0, 2]], ids=["", "rows"])
def test_on_the_engine(rows: list[int] | None) -> None:
    """The own block in the cache, as ``KeyValueCache`` has it."""
    inputs = make_inputs([256, 4096, 1256], **(FFHQ | {"own": 0}), rows=rows, num_rows=rows and 5)
    assert_op_matches(triton(), cached_attention_ref, inputs)


@pytest.mark.gpu
@each_backend
@pytest.mark.parametrize("num_splits", [None, 1])
def test_a_captured_graph_serves_all_lengths_and_rows(num_splits: int | None, backend: str) -> None:
    inputs = make_inputs([3840, 3840], **FFHQ, rows=[0, 1], num_rows=4)
    attend = lambda **x: cached_attention(**x, num_splits=num_splits, backend=backend)  # noqa: E731
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attend(**inputs)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = attend(**inputs)
    for lengths, rows in (([3840, 256], [0, 1]), ([0, 1], [2, 2]), ([777, 9], [3, -1])):
        inputs["lengths_B"].copy_(torch.tensor(lengths))
        inputs["rows_B"].copy_(torch.tensor(rows))
        hide_unread(inputs)
        graph.replay()
        oracle = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        assert_within_budget(out, cached_attention_ref(**oracle), cached_attention_ref(**inputs))
        for name in ("k_cache_RHSD", "v_cache_RHSD"):
            inputs[name].normal_()
