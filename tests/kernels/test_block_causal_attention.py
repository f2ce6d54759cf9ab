"""The training mask three ways, and every backend but ours in Triton under it.

The mask: a transcription of its definition, structural statements, and each backend against SDPA under the dense mask.
Packages that are not installed are skipped, and tested with stand-ins that do what they promise in plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from madformer.kernels import dispatch
from madformer.kernels.block_causal_attention import BlockLayout, block_causal_attention, peers, reference
from tests.helpers.testing import COMPILER, DEVICE, assert_op_matches, assert_within_budget, needs_cpp

FLAGS = [
    dict(zip(("cross_block", "text_queries", "clean_queries"), values, strict=True))
    for values in itertools.product([True, False], repeat=3)
]
# block size, noise blocks, clean blocks
STREAMS = [(3, 4, 3), (4, 4, 4), (2, 5, 0), (4, 0, 3), (4, 1, 0), (2, 4, 2), (3, 2, 4), (1, 3, 3), (2, 0, 0)]
each_streams = pytest.mark.parametrize("streams", STREAMS, ids=str)


def layouts(streams: tuple[int, int, int]) -> list[BlockLayout]:
    """With every combination of flags, with and without text."""
    return [BlockLayout(*streams, text_length=text, **flags) for text in (0, 5) for flags in FLAGS]


# Few enough to run every backend on.
SOME_LAYOUTS = [
    BlockLayout(3, 4, 3),
    BlockLayout(4, 4, 4, clean_queries=False),
    BlockLayout(2, 5),
    BlockLayout(4, 0, 3),
    BlockLayout(3, 4, 4, cross_block=False),
    BlockLayout(3, 4, cross_block=False),
    BlockLayout(3, 4, 3, text_length=5),
    BlockLayout(2, 4, 2, text_length=7, text_queries=False),
    BlockLayout(2, 4, 2, text_length=1, text_queries=False, clean_queries=False),
    BlockLayout(4, 3, text_length=3),
    BlockLayout(4, 3, 2, cross_block=False, text_length=6),
    BlockLayout(4, 3, 2, cross_block=False, text_length=6, text_queries=False, clean_queries=False),
    BlockLayout(4, 0, text_length=9),
]
FLEX_LAYOUTS = [SOME_LAYOUTS[6], SOME_LAYOUTS[11]]


# The mask

Token = tuple[str, int, int]  # its stream, its block there, its place in the stream


def tokens(layout: BlockLayout) -> list[Token]:
    counts = {
        "text": layout.text_length,
        "clean": layout.clean_length,
        "noise": layout.noise_blocks * layout.block_size,
    }
    return [(stream, place // layout.block_size, place) for stream, count in counts.items() for place in range(count)]


def is_query(layout: BlockLayout, token: Token) -> bool:
    return {"text": layout.text_queries, "clean": layout.clean_queries, "noise": True}[token[0]]


def attends(layout: BlockLayout, query: Token, key: Token) -> bool:
    """The definition, token by token, with nothing clever in it."""
    (query_stream, i, query_place), (key_stream, j, key_place) = query, key
    if query_stream == "text":
        return key_stream == "text" and key_place <= query_place
    if key_stream == "text":
        return True
    if (query_stream, i) == (key_stream, j):
        return True
    if not layout.cross_block:
        return False
    if query_stream == "clean":
        return key_stream == "clean" and j <= i
    if layout.clean_blocks:
        return key_stream == "clean" and j < i
    return j <= i


@functools.cache
def transcribed_mask(layout: BlockLayout) -> Tensor:
    queries = [token for token in tokens(layout) if is_query(layout, token)]
    rows = [[attends(layout, query, key) for key in tokens(layout)] for query in queries]
    return torch.tensor(rows, dtype=torch.bool).reshape(layout.query_length, layout.key_length)


@each_streams
def test_mask_is_its_definition(streams: tuple[int, int, int]) -> None:
    for layout in layouts(streams):
        assert torch.equal(layout.dense_mask(), transcribed_mask(layout)), layout


@each_streams
def test_mask_of_flex_attention_is_the_same(streams: tuple[int, int, int]) -> None:
    for layout in layouts(streams):
        if layout.query_length:
            mask = create_mask(peers.mask_mod(layout), 1, 1, layout.query_length, layout.key_length, "cpu")
            assert torch.equal(mask[0, 0], transcribed_mask(layout)), layout


def test_live_share_at_ffhq_1024() -> None:
    """272 of 1024 block pairs."""
    mask = BlockLayout(1, noise_blocks=16, clean_blocks=16).dense_mask()
    assert (mask.sum().item(), mask.numel()) == (272, 1024)


@each_streams
def test_ranges(streams: tuple[int, int, int]) -> None:
    """Two at most, in order, apart; a block sees all of itself last."""
    for layout in layouts(streams):
        ranges = list(layout.key_ranges())
        assert len(ranges) == layout.query_blocks, layout
        assert layout.query_length == layout.text_query_length + layout.query_blocks * layout.block_size, layout
        first = layout.key_length - layout.query_blocks * layout.block_size
        for block, own in enumerate(ranges, start=1):
            bounds = list(itertools.chain.from_iterable(own))
            assert len(own) in (1, 2), layout
            assert bounds[0] >= 0, layout
            assert all(start < stop for start, stop in itertools.pairwise(bounds)), layout
            assert bounds[-1] == first + block * layout.block_size, layout
            assert bounds[-2] <= bounds[-1] - layout.block_size, layout


@each_streams
def test_streams_that_do_not_ask_change_nothing_else(streams: tuple[int, int, int]) -> None:
    for layout in layouts(streams):
        everything = replace(layout, text_queries=True, clean_queries=True)
        asked = torch.tensor([is_query(layout, token) for token in tokens(layout)], dtype=torch.bool)
        assert torch.equal(layout.dense_mask(), everything.dense_mask()[asked]), layout


@each_streams
def test_text_comes_before_the_same_mask(streams: tuple[int, int, int]) -> None:
    for layout in layouts(streams):
        without = replace(layout, text_length=0).dense_mask()
        assert torch.equal(layout.dense_mask()[layout.text_query_length :, layout.text_length :], without), layout


@each_streams
@pytest.mark.parametrize("cross_block", [True, False])
def test_who_sees_whom(streams: tuple[int, int, int], cross_block: bool) -> None:
    """Text sees text alone. Noise is seen by its own block alone, or without a clean stream by later blocks too."""
    layout = BlockLayout(*streams, cross_block=cross_block, text_length=5)
    mask, text, image = layout.dense_mask(), 5, 5 + layout.clean_length
    assert torch.equal(mask[:text], torch.ones_like(mask[:text]).tril())
    assert mask[text:, :text].all()
    assert not mask[text:image, image:].any()
    block = torch.ones(layout.block_size, layout.block_size, dtype=torch.bool)
    seen = torch.eye(layout.noise_blocks, dtype=torch.bool)
    if layout.clean_blocks == 0 and cross_block:
        seen = torch.ones_like(seen).tril()
    assert torch.equal(mask[image:, image:], torch.kron(seen, block))


@pytest.mark.parametrize(
    "change", [{"block_size": 0}, {"noise_blocks": -1}, {"clean_blocks": -1}, {"text_length": -2}], ids=str
)
def test_bad_layouts(change: dict[str, int]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=rf"{name} must be at least \d, got {value}"):
        BlockLayout(**{"block_size": 4, "noise_blocks": 2, **change})


# The backends


def dense(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """SDPA under the transcribed mask, and the log-sum-exp."""
    mask = transcribed_mask(layout).to(q.device)
    scores = (q.detach() @ k.detach().mT).to(torch.promote_types(q.dtype, torch.float32))
    scores = (scores * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)).masked_fill(~mask, -math.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), scores.logsumexp(-1)


def attention(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, **options: Any) -> Any:
    return block_causal_attention(q, k, v, layout, **options)


@dataclass
class Backend:
    """A backend as the tests call it; ``calls`` are those of a stand-in for its package."""

    name: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    differentiable: bool = True
    gives_lse: bool = True
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, **options: Any) -> tuple[Tensor, ...]:
        result = block_causal_attention(q, k, v, layout, backend=self.name, return_lse=self.gives_lse, **options)
        return result if self.gives_lse else (result,)

    def expected(self, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, **options: Any) -> tuple[Tensor, ...]:
        return dense(q, k, v, layout, **options)[: 1 + self.gives_lse]

    def check(self, inputs: dict[str, Any], **options: Any) -> None:
        tensors = {name: x.requires_grad_(self.differentiable) for name, x in inputs.items() if name in ("q", "k", "v")}
        assert_op_matches(self, self.expected, inputs | tensors, **options)


T = TypeVar("T")
PACKAGES = ("flash_attn", "xformers")
HALVES = (torch.bfloat16, torch.float16)
BACKENDS = {
    "reference": lambda: Backend("reference", (*Backend.dtypes, torch.float64)),
    "sdpa, masked": lambda: Backend("sdpa", (*Backend.dtypes, torch.float64), gives_lse=False),
    "sdpa, block by block": lambda: Backend("sdpa", (*Backend.dtypes, torch.float64), gives_lse=False),
    "cpp": lambda: Backend("cpp"),
    "flex": lambda: Backend("flex", differentiable=DEVICE.type == "cuda"),
    "flash_attn": lambda: Backend("flash_attn", HALVES),
    "xformers": lambda: Backend("xformers", gives_lse=False),
    "flash_attn 2, stand-in": lambda: Backend("flash_attn", HALVES),
    "flash_attn 4, stand-in": lambda: Backend("flash_attn", HALVES),
    "xformers, stand-in": lambda: Backend("xformers", gives_lse=False),
}


def split_attention(
    q: Tensor, k: Tensor, v: Tensor, queries: list[int], keys: list[int], scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Sequence by sequence: what packages with variable-length attention promise. (T, H, D) in, (H, T) log-sum-exps."""
    assert (sum(queries), sum(keys), sum(keys)) == (len(q), len(k), len(v))
    outs, lses = [], []
    for one in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        qs, ks, vs = (x.transpose(0, 1) for x in one)
        outs.append(F.scaled_dot_product_attention(qs, ks, vs, is_causal=causal, scale=scale).transpose(0, 1))
        scores = (qs.float() @ ks.float().mT) * scale
        if causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, dim=1)


def stand_in_for_flash_attn(monkeypatch: pytest.MonkeyPatch, version: int, calls: list[dict[str, Any]]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append({"q": q, "k": k, "v": v, **options})
        assert q.dtype in HALVES
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        lengths = []
        for side in "qk":
            offsets = options[f"cu_seqlens_{side}"]
            assert (offsets.dtype, offsets.device) == (torch.int32, q.device)
            lengths.append(offsets.diff().tolist())
            assert options[f"max_seqlen_{side}"] == max(lengths[-1])
        return split_attention(q, k, v, *lengths, options["softmax_scale"], options["causal"])

    def version_2(*tensors: Tensor, return_attn_probs: bool = False, **options: Any) -> Any:
        out, lse = attention(*tensors, **options)
        return (out, lse, None) if return_attn_probs else out

    def version_4(*tensors: Tensor, return_lse: bool = False, **options: Any) -> Any:
        out, lse = attention(*tensors, **options)
        return out, lse if return_lse else None

    package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    if version == 2:
        package.flash_attn_varlen_func = version_2
    else:
        cute.flash_attn_varlen_func = version_4
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)


def stand_in_for_xformers(monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]) -> None:
    @dataclass
    class BlockDiagonalMask:
        queries: list[int]
        keys: list[int]

        @classmethod
        def from_seqlens(cls, q_seqlen: Any, kv_seqlen: Any, *, device: torch.device) -> BlockDiagonalMask:
            return cls(list(q_seqlen), list(kv_seqlen))

    class BlockDiagonalCausalMask(BlockDiagonalMask):
        pass

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, *, scale: float) -> Tensor:
        calls.append({"q": q, "k": k, "v": v})
        assert len(q) == len(k) == len(v) == 1, "a block-diagonal bias is for a batch of one"
        causal = isinstance(attn_bias, BlockDiagonalCausalMask)
        return split_attention(q[0], k[0], v[0], attn_bias.queries, attn_bias.keys, scale, causal)[0][None]

    ops, biases = ModuleType("xformers.ops"), ModuleType("xformers.ops.fmha.attn_bias")
    ops.memory_efficient_attention = memory_efficient_attention
    biases.BlockDiagonalMask, biases.BlockDiagonalCausalMask = BlockDiagonalMask, BlockDiagonalCausalMask
    monkeypatch.setitem(sys.modules, ops.__name__, ops)
    monkeypatch.setitem(sys.modules, biases.__name__, biases)


def need(name: str) -> None:
    """Skips without the package that is asked for; what is plain PyTorch has to be there."""
    try:
        dispatch.resolve("block_causal_attention", name, DEVICE)
    except RuntimeError as error:
        if name in ("reference", "sdpa"):
            raise
        pytest.skip(str(error))


def test_plain_pytorch_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("it cannot run here")

    monkeypatch.setattr(dispatch, "resolve", refuse)
    for name in ("reference", "sdpa"):
        with pytest.raises(RuntimeError, match="it cannot run here"):
            need(name)
    with pytest.raises(pytest.skip.Exception):
        need("flash_attn")


def cases(values: Iterable[T], possible: Callable[[str, T], bool]) -> list[tuple[str, T]]:
    """Of every backend with every value, for the fixture ``backend`` and a parameter, those that can be run at all."""
    return [(name, value) for name in BACKENDS for value in values if possible(name, value)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    chosen = BACKENDS[request.param]()
    if "stand-in" in request.param:
        if chosen.name == "xformers":
            stand_in_for_xformers(monkeypatch, chosen.calls)
        else:
            stand_in_for_flash_attn(monkeypatch, 2 if "2" in request.param else 4, chosen.calls)
        monkeypatch.setattr(dispatch, "resolve", lambda op, backend, device: backend)
    else:
        need(chosen.name)
    if chosen.name == "sdpa":
        monkeypatch.setattr(reference, "MASKED_KEY_LENGTH", 10_000 if "masked" in request.param else 0)
    if chosen.name == "flex":
        torch.compiler.reset()
    peers._block_diagonal_bias.cache_clear()
    yield chosen
    peers._block_diagonal_bias.cache_clear()


def make_inputs(
    layout: BlockLayout, dtype: torch.dtype = torch.float32, batch: int = 2, heads: int = 3, dim: int = 16
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    lengths = {"q": layout.query_length, "k": layout.key_length, "v": layout.key_length}
    tensors = {name: torch.randn(batch, heads, n, dim, generator=generator) for name, n in lengths.items()}
    return {name: x.to(DEVICE, dtype) for name, x in tensors.items()} | {"layout": layout}


# of flex, whose mask is tested for all, each layout is compiled, which takes seconds
@pytest.mark.parametrize(
    ("backend", "layout"),
    cases(SOME_LAYOUTS, lambda name, layout: name != "flex" or layout in FLEX_LAYOUTS),
    ids=str,
    indirect=["backend"],
)
def test_against_sdpa(backend: Backend, layout: BlockLayout) -> None:
    backend.check(make_inputs(layout, backend.dtypes[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_scale(backend: Backend, dtype: torch.dtype) -> None:
    inputs = make_inputs(BlockLayout(4, 5, 4, text_length=3), dtype)
    if dtype in backend.dtypes:
        backend.check(inputs | {"scale": 0.4})
    else:
        with pytest.raises(ValueError, match=f"q must be torch.*, got {dtype}"):
            backend(**inputs)


def test_float64(backend: Backend) -> None:
    """To its own rounding, where the error budget has nothing to compare with; the kernels do not take it."""
    inputs = make_inputs(BlockLayout(4, 5, 4, text_length=3), torch.float64)
    if torch.float64 not in backend.dtypes:
        with pytest.raises(ValueError, match=r"q must be torch.*, got torch\.float64"):
            backend(**inputs)
        return
    results = []
    for attend in (backend, backend.expected):
        tensors = [inputs[name].clone().requires_grad_() for name in "qkv"]
        outputs = attend(*tensors, inputs["layout"])
        (outputs[0] * torch.arange(16, device=DEVICE)).sum().backward()
        results.append([*outputs, *(x.grad for x in tensors)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def from_blhd(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def packed(x: Tensor) -> Tensor:
    """The middle of a projection (B, L, 3 * H * D)."""
    batch, heads, length, dim = x.shape
    buffer = torch.full((batch, length, 3, heads, dim), math.nan, dtype=x.dtype, device=x.device)
    buffer[:, :, 1] = x.transpose(1, 2)
    return buffer[:, :, 1].transpose(1, 2)


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "BLHD": from_blhd,
    "packed": packed,
    "window of a cache": lambda x: F.pad(x, (0, 0, 2, 3), value=math.nan)[:, :, 2:-3],
    "same heads": lambda x: x[:, :1].expand(x.shape),
    "strided columns": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
}


def takes(name: str, memory: str) -> bool:
    """The packages refuse columns that are strided; flex is compiled for each, which takes seconds."""
    return memory == "packed" or (name != "flex" and (memory != "strided columns" or not name.startswith(PACKAGES)))


@pytest.mark.parametrize(("backend", "memory"), cases(MEMORY, takes), indirect=["backend"])
def test_layouts_in_memory(backend: Backend, memory: str) -> None:
    inputs = make_inputs(BlockLayout(4, 3, 2, text_length=3), backend.dtypes[0])
    tensors = {name: MEMORY[memory](inputs[name]) for name in "qkv"}
    backend.check(inputs | tensors, grads=MEMORY[memory] if memory in ("BLHD", "same heads") else torch.clone)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if not name.startswith(PACKAGES)], indirect=True)
def test_compiles_whole(backend: Backend) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, text: int) -> tuple[Tensor, ...]:
        return backend(q, k, v, BlockLayout(4, 3, 2, text_length=text))

    def expected(q: Tensor, k: Tensor, v: Tensor, text: int) -> tuple[Tensor, ...]:
        return backend.expected(q, k, v, BlockLayout(4, 3, 2, text_length=text))

    inputs = make_inputs(BlockLayout(4, 3, 2, text_length=3))
    inputs = {name: inputs[name].requires_grad_(backend.differentiable) for name in "qkv"}
    compiled = torch.compile(attend, fullgraph=True, backend=COMPILER)
    assert_op_matches(lambda **x: compiled(**x, text=3), lambda **x: expected(**x, text=3), inputs)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_op_matches(lambda **x: compiled(**x, text=3), lambda **x: expected(**x, text=3), inputs)


def test_autocast_casts_as_sdpa_does(backend: Backend) -> None:
    """All three at once, whatever they were; gradients come back in their dtypes."""
    layout = BlockLayout(4, 3, 2, text_length=3)
    made = make_inputs(layout)
    inputs = [made["q"], made["k"].half(), made["v"]]
    inputs = [x.detach().requires_grad_(backend.differentiable) for x in inputs]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out, *lse = backend(*inputs, layout)
        sdpa, _ = dense(*inputs, layout)
    assert out.dtype == sdpa.dtype == torch.bfloat16
    cast = [x.detach().bfloat16().requires_grad_(backend.differentiable) for x in inputs]
    direct, *direct_lse = backend(*cast, layout)
    torch.testing.assert_close([out, *lse], [direct, *direct_lse], rtol=0, atol=0)
    if backend.differentiable:
        out.sum().backward()
        direct.sum().backward()
        for x, y in zip(inputs, cast, strict=True):
            assert x.grad.dtype == x.dtype
            torch.testing.assert_close(x.grad, y.grad.to(x.dtype), rtol=0, atol=0)


def test_autocast_leaves_float64() -> None:
    inputs = make_inputs(SOME_LAYOUTS[0], torch.float64)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert attention(**inputs).dtype == torch.float64


@pytest.mark.parametrize(
    ("layout", "batch"), [(BlockLayout(4, 2, 1), 0), (BlockLayout(4, 0, 2, clean_queries=False), 2)], ids=str
)
def test_nothing_to_do(backend: Backend, layout: BlockLayout, batch: int) -> None:
    inputs = make_inputs(layout, backend.dtypes[0], batch)
    out, *lse = backend(**inputs)
    assert (out.shape, out.dtype) == (inputs["q"].shape, inputs["q"].dtype)
    assert all(x.shape == out.shape[:3] and x.dtype == torch.float32 for x in lse)


def test_log_sum_exp_takes_no_gradient(backend: Backend) -> None:
    inputs = make_inputs(SOME_LAYOUTS[0], backend.dtypes[0])
    tensors = {name: inputs[name].requires_grad_(backend.differentiable) for name in "qkv"}
    if backend.gives_lse:
        out, lse = backend(**(inputs | tensors))
        assert (out.requires_grad, lse.requires_grad) == (backend.differentiable, False)
        assert lse.dtype == torch.float32
    else:
        with pytest.raises(ValueError, match=rf"return_lse=True: backend='{backend.name}' gives none"):
            attention(**inputs, backend=backend.name, return_lse=True)


def test_auto_takes_what_can_do_it() -> None:
    """On a CPU SDPA of float64; the reference for the log-sum-exp, which SDPA keeps."""
    inputs = make_inputs(SOME_LAYOUTS[6], torch.float64)
    assert torch.equal(attention(**inputs), attention(**inputs, backend="sdpa"))
    out, lse = attention(**inputs, return_lse=True)
    expected, expected_lse = attention(**inputs, return_lse=True, backend="reference")
    assert lse.dtype == torch.float64
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@needs_cpp
def test_auto_takes_cpp_where_it_is_faster() -> None:
    """In fp32; of halves for gradients, or for the log-sum-exp."""
    inputs = make_inputs(SOME_LAYOUTS[6])
    tensors = [inputs[name] for name in "qkv"]
    halves, layout = [x.bfloat16() for x in tensors], inputs["layout"]
    trained = [x.clone().requires_grad_() for x in halves]

    def of(backend: str, *given: Tensor) -> Tensor:
        return attention(*given, layout, backend=backend)

    for given, chosen, other in (
        (tensors, "cpp", "sdpa"), (halves, "sdpa", "cpp"), (trained, "cpp", "sdpa")
    ):  # fmt: skip
        assert torch.equal(of("auto", *given), of(chosen, *given))
        assert not torch.equal(of("auto", *given), of(other, *given))
    with torch.no_grad():
        assert torch.equal(of("auto", *trained), of("sdpa", *trained))
    assert torch.equal(attention(*halves, layout, return_lse=True)[0], of("cpp", *halves))


# The decompositions for packages


@pytest.mark.parametrize("backend", [name for name in BACKENDS if "stand-in" in name], indirect=True)
def test_number_of_calls_and_copies(backend: Backend) -> None:
    """One call for all blocks and one for the text; blocks that see themselves alone are not copied."""
    for layout, calls in ((BlockLayout(4, 3, 2), 1), (BlockLayout(4, 3, 2, text_length=5), 2)):
        backend.calls.clear()
        backend(**make_inputs(layout, backend.dtypes[0]))
        assert len(backend.calls) == calls
    inputs = make_inputs(BlockLayout(4, 3, 2, cross_block=False), backend.dtypes[0])
    inputs |= {name: from_blhd(inputs[name]) for name in "qkv"}
    backend(**inputs)
    for name in "qkv":
        assert backend.calls[-1][name].data_ptr() == inputs[name].data_ptr()


def test_many_copies_are_summed_in_float32() -> None:
    """A running sum of ones in bfloat16 stops growing at 256."""
    keys = torch.ones(1, 2, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    gathered = peers._gather(keys, ((0, 1),) * 1024)
    gathered.backward(torch.ones_like(gathered))
    assert keys.grad.flatten().tolist() == [1024, 0]


def test_cached_tensors_may_be_saved_for_a_backward() -> None:
    """They may have been made first in inference mode, whose tensors may not."""
    layout = BlockLayout(4, 7, 5, text_length=2)
    with torch.inference_mode():
        mask, offsets = peers._block_mask(layout, DEVICE), peers._offsets((3, 1, 4), DEVICE)
    assert not mask.kv_indices.is_inference()
    assert not offsets.is_inference()
    assert peers._block_mask(layout, DEVICE) is mask
    assert offsets.tolist() == [0, 3, 4, 8]


@pytest.mark.parametrize(("backend_name", "package"), [("flash_attn", "flash-attn"), ("xformers", "xFormers")])
def test_a_package_that_is_missing_is_not_replaced(backend_name: str, package: str) -> None:
    if importlib.util.find_spec(backend_name) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(RuntimeError, match=rf"backend='{backend_name}' cannot run .*: {package} is not installed"):
        attention(**make_inputs(SOME_LAYOUTS[0], torch.bfloat16), backend=backend_name)


def test_a_package_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "resolve", lambda op, backend, device: backend)
    monkeypatch.setitem(sys.modules, "xformers.ops", ModuleType("xformers.ops"))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    inputs = make_inputs(SOME_LAYOUTS[0], torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"^backend='xformers' cannot run: xformers\.ops does not load: .*attribute"):
        attention(**inputs, backend="xformers")
    with pytest.raises(RuntimeError, match=r"^backend='flash_attn' cannot run: flash_attn does not load: .*flash_attn"):
        attention(**inputs, backend="flash_attn")


# Bad arguments


def test_flex_has_no_gradients_on_a_cpu() -> None:
    inputs = make_inputs(SOME_LAYOUTS[0])
    tensors = {name: inputs[name].cpu().requires_grad_() for name in "qkv"}
    with pytest.raises(RuntimeError, match="backend='flex' cannot compute gradients on cpu"):
        attention(**(inputs | tensors), backend="flex")
    with torch.no_grad():
        attention(**(inputs | tensors), backend="flex")


BAD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "length": (lambda x: x[:, :, 1:], r"{name} has shape \(2, 3, 7, 16\); BlockLayout.* needs \(B, H, 8, D\)"),
    "dimensions": (lambda x: x[0], r"{name} has shape \(3, 8, 16\)"),
    "no head dim": (lambda x: x[..., :0], "{name} has head dim 0; 1 to 256"),
    "wide head dim": (lambda x: x.repeat(1, 1, 1, 17), "{name} has head dim 272; 1 to 256"),
}
BAD_BESIDE_Q: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "head dim": (lambda x: x[..., :8], r"{name} has shape \(2, 3, 8, 8\); its B, H and D must be q's"),
    "heads": (lambda x: x[:, :1], r"{name} has shape \(2, 1, 8, 16\); its B, H and D must be q's"),
    "batch": (lambda x: x[:1], r"{name} has shape \(1, 3, 8, 16\); its B, H and D must be q's"),
    "dtype": (lambda x: x.half(), r"{name} must have q's dtype torch.float32, got torch.float16"),
    "device": (lambda x: x.to("meta"), "{name} must be on .*, got meta"),
}


@pytest.mark.parametrize(
    ("name", "bad"), [*itertools.product("qkv", BAD), *itertools.product("kv", BAD_BESIDE_Q)], ids=str
)
def test_bad_arguments_are_named(name: str, bad: str) -> None:
    inputs = make_inputs(BlockLayout(2, 3, 1))
    change, message = (BAD | BAD_BESIDE_Q)[bad]
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message.format(name=name)):
        attention(**inputs)


def test_integers_and_unknown_backends_are_refused() -> None:
    inputs = make_inputs(BlockLayout(2, 3, 1), torch.int32)
    with pytest.raises(ValueError, match=r"q must be torch\.float32 or .*, got torch.int32"):
        attention(**inputs)
    with pytest.raises(
        ValueError, match=r"backend='cuda' must be one of auto, .*cpp, sdpa, flex, flash_attn, xformers"
    ):
        attention(**inputs, backend="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend_name", ["sdpa", "flex", "flash_attn", "xformers"])
def test_at_the_size_of_ffhq_1024(backend_name: str) -> None:
    """A quarter of the heads, so that the dense reference fits beside."""
    need(backend_name)
    layout = BlockLayout(256, 16, 16)
    inputs = make_inputs(layout, torch.bfloat16, batch=1, heads=4, dim=64)
    results = []
    for name, dtype in (("reference", torch.float32), ("reference", torch.bfloat16), (backend_name, torch.bfloat16)):
        tensors = [inputs[x].detach().to(dtype).requires_grad_() for x in "qkv"]
        out = block_causal_attention(*tensors, layout, backend=name)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
        results.append([out.detach(), *(x.grad for x in tensors)])
    for name, oracle, eager, ours in zip(("output", "dq", "dk", "dv"), *results, strict=True):
        assert_within_budget(ours, oracle, eager, name=name, rows=4096)
