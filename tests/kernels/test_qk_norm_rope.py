"""The kernels of qk_norm_rope against float64, against the model's own layers, and on the layouts both pass them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, library, nn

from madformer.config import MADFormerConfig
from madformer.kernels.qk_norm_rope import launchers, qk_norm_rope, qk_norm_rope_ref
from madformer.kernels.qk_norm_rope.reference import apply_rope
from madformer.model.layer import QK_NORM_EPS, Tower
from madformer.model.rope import rope_tables
from testing import COMPILER, DEVICE, assert_op_matches, each_dtype

triton = partial(qk_norm_rope, backend="triton")
eager = partial(qk_norm_rope, backend="reference")


def make_inputs(
    lengths: Sequence[int] = (3,),
    parts: Sequence[int] = (3,),
    *,
    batch: int = 1,
    num_heads: int = 2,
    head_dim: int = 8,
    axes: int | list[int] = 2,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Streams of these lengths; those of two parts have keys and values only."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    angles = [7 * make(length, head_dim, dtype=torch.float32) for length in lengths]
    weights = [[1 + make(head_dim, dtype=weight_dtype) / 4 for _ in lengths] for _ in range(2)]
    return {
        "qkv": [
            make(batch, length, count * num_heads * head_dim, dtype=dtype).requires_grad_()
            for length, count in zip(lengths, parts, strict=True)
        ],
        "q_weight": [x.requires_grad_() if count == 3 else None for x, count in zip(weights[0], parts, strict=True)],
        "k_weight": [x.requires_grad_() for x in weights[1]],
        "cos": [x.cos() for x in angles],
        "sin": [x.sin() for x in angles],
        "num_heads": num_heads,
        "axes": axes,
    }


def summed_rows(inputs: dict[str, Any]) -> dict[str, int]:
    """How many rows each weight's gradient sums."""
    rows = [x.shape[0] * x.shape[1] * inputs["num_heads"] for x in inputs["qkv"]]
    return {f"{name} {index}": count for name in ("q_weight", "k_weight") for index, count in enumerate(rows)}


def assert_matches(
    inputs: dict[str, Any], op: Callable[..., Any] = triton, grads: Callable[[Tensor], Tensor] = torch.clone
) -> None:
    assert_op_matches(op, qk_norm_rope_ref, inputs, rows=summed_rows(inputs), grads=grads)


@pytest.mark.parametrize(
    ("head_dim", "axes"), [(8, 2), (16, 1), (32, 2), (64, 1), (64, 2), (72, 2), (80, 1), (96, 2), (128, 1)]
)
def test_matches_float64(head_dim: int, axes: int) -> None:
    assert_matches(make_inputs(head_dim=head_dim, axes=axes))


@each_dtype
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    assert_matches(make_inputs(dtype=dtype, weight_dtype=weight_dtype, head_dim=64))


STREAMS = {
    "keys and values first": ((3, 5), (2, 3)),
    "three, the middle without queries": ((1, 4, 2), (3, 2, 3)),
    "no queries at all": ((3,), (2,)),
    "one empty": ((0, 4), (3, 3)),
    "all empty": ((0,), (3,)),
}


@pytest.mark.parametrize("streams", STREAMS)
def test_streams(streams: str) -> None:
    lengths, parts = STREAMS[streams]
    inputs = make_inputs(lengths, parts, batch=2 if len(parts) == 2 else 1)
    assert_matches(inputs)
    q, k, v = eager(**inputs)
    assert k.shape[2] == v.shape[2] == sum(lengths)
    assert q.shape[2] == sum(length for length, count in zip(lengths, parts, strict=True) if count == 3)


def test_programs_take_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of heads in the forward and of tokens in the backward, as many as do not divide evenly."""
    settings = launchers.Settings(tokens=2, heads=2, cols=4, heads_per_program=4, num_programs=2)
    monkeypatch.setattr(launchers, "choose_settings", lambda stream: settings)
    assert_matches(make_inputs((5,), num_heads=6))


def test_text_beside_images() -> None:
    """Each stream has its own pairing."""
    assert_matches(make_inputs((2, 3), (3, 3), axes=[1, 2]))


def without(inputs: dict[str, Any], **streams: Sequence[int]) -> dict[str, Any]:
    """The inputs with None for the streams listed by name of an argument."""
    missing = {name: [None if i in at else x for i, x in enumerate(inputs[name])] for name, at in streams.items()}
    return inputs | missing


NO_NORM: dict[str, Sequence[int]] = {"q_weight": (0,), "k_weight": (0,)}
NO_ROTATION: dict[str, Sequence[int]] = {"cos": (0,), "sin": (0,)}


@pytest.mark.parametrize("omitted", [NO_NORM, NO_ROTATION], ids=["no norm", "no rotation"])
def test_what_may_be_omitted(omitted: dict[str, Sequence[int]]) -> None:
    assert_matches(without(make_inputs(), **omitted))


def test_streams_omit_different_things() -> None:
    """The lists that the op takes are shorter than the streams are many."""
    assert_matches(without(make_inputs((2, 1), (3, 3)), **NO_NORM, cos=(1,), sin=(1,)))


def test_copies_are_exact() -> None:
    """Values, and queries and keys of a stream that is neither normalised nor rotated."""
    inputs = without(make_inputs((2, 3), (3, 3), dtype=torch.bfloat16), **NO_NORM, **NO_ROTATION)
    actual, expected = triton(**inputs), eager(**inputs)
    assert torch.equal(actual[2], expected[2])
    assert all(torch.equal(x[:, :, :2], y[:, :, :2]) for x, y in zip(actual, expected, strict=True))


def test_memory_is_token_major() -> None:
    assert all(x.transpose(1, 2).is_contiguous() for x in triton(**make_inputs()))


def test_weight_of_absent_queries_is_ignored() -> None:
    inputs = make_inputs(parts=(2,))
    assert_matches(inputs | {"q_weight": [torch.full((8,), float("nan"), device=DEVICE)]})


LAYOUTS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "spans of one packed sequence": lambda x: [x[:, :1], x[:, 1:]],
    "columns of a wider projection": lambda x: [x.repeat(1, 1, 2)[..., 48:]],
    "odd strides": lambda x: [nn.functional.pad(x, (1, 2))[..., 1:-2]],
    "tokens first": lambda x: [x.repeat(2, 1, 1).transpose(0, 1).contiguous().transpose(0, 1)],
    "transposed": lambda x: [x.mT.contiguous().mT],
    "expanded": lambda x: [x.expand(2, -1, -1)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    x = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    qkv = [part.requires_grad_() for part in LAYOUTS[layout](x)]
    inputs = make_inputs([part.shape[1] for part in qkv], [3] * len(qkv))
    assert_matches(inputs | {"qkv": qkv})


@pytest.mark.parametrize(
    "grads",
    [
        lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
        lambda g: g.mT.contiguous().mT,
        lambda g: g[:1, :1, :1, :1].expand(g.shape),
        lambda g: g.repeat(1, 1, 1, 2)[..., ::2],
        lambda g: g.repeat(1, 1, 2, 1)[:, :, ::2],
    ],
    ids=["tokens first", "transposed", "stride 0", "strided channels", "strided tokens"],
)
def test_layouts_of_the_gradient(grads: Callable[[Tensor], Tensor]) -> None:
    assert_matches(make_inputs((1, 2), (2, 3)), grads=grads)


TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "of each sample": lambda x: torch.stack((x, x.flip(0))),
    "one for all samples": lambda x: x.expand(2, -1, -1),
    "a span of a longer one": lambda x: torch.cat((x, x, x))[len(x) : 2 * len(x)],
    "transposed": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("tables", TABLES)
def test_tables(tables: str) -> None:
    inputs = make_inputs(batch=2)
    arranged = {name: [TABLES[tables](x) for x in inputs[name]] for name in ("cos", "sin")}
    assert_matches(inputs | arranged)


def test_tables_of_two_layouts() -> None:
    inputs = make_inputs()
    assert_matches(inputs | {"sin": [TABLES["transposed"](x) for x in inputs["sin"]]})


@pytest.mark.parametrize("frozen", [["qkv"], ["q_weight", "k_weight"], ["k_weight"]], ids=", ".join)
def test_only_what_needs_a_gradient(frozen: list[str]) -> None:
    inputs = make_inputs()
    op, reference = (lambda function=function, **inputs: function(**inputs)[:2] for function in (triton, eager))
    assert_op_matches(op, reference, inputs | {name: [x.detach() for x in inputs[name]] for name in frozen})


def test_gradients_of_unused_results() -> None:
    """A result that nobody uses has the gradient zero."""
    inputs = make_inputs()
    actual, expected = (
        torch.autograd.grad(op(**inputs)[1].square().sum(), inputs["qkv"] + inputs["q_weight"], allow_unused=True)
        for op in (triton, eager)
    )
    torch.testing.assert_close(actual[0], expected[0])
    assert actual[1].count_nonzero() == 0


@pytest.mark.parametrize("pairing", ["axial", "released"])
def test_equals_the_models_layers(pairing: str) -> None:
    """Norms of a tower, rotary embedding and concatenation one by one; a clean stream without queries first."""
    torch.manual_seed(0)
    config = MADFormerConfig(hidden_size=16, num_heads=2, num_blocks=4, block_size=1, rope_pairing=pairing)
    tower, axes = Tower(config).to(DEVICE), 2 if pairing == "axial" else 1
    for norm in (tower.q_norm, tower.k_norm):
        norm.backend = "reference"
        nn.init.normal_(norm.weight, 1, 0.2)
    cos, sin = (table.to(DEVICE) for table in rope_tables(config))
    clean, noise = torch.randn(1, 3, 16, device=DEVICE), torch.randn(1, 4, 16, device=DEVICE)
    packed = [tower.key_value(clean), tower.query_key_value(noise)]

    clean_k, clean_v = packed[0].unflatten(-1, (2, 2, 8)).permute(2, 0, 3, 1, 4)
    q, k, v = packed[1].unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    rotate = partial(apply_rope, axes=axes)
    expected = (
        rotate(tower.q_norm(q), cos, sin),
        torch.cat((rotate(tower.k_norm(clean_k), cos[:3], sin[:3]), rotate(tower.k_norm(k), cos, sin)), dim=2),
        torch.cat((clean_v, v), dim=2),
    )
    weights = [tower.q_norm.weight] * 2, [tower.k_norm.weight] * 2
    tables = [cos[:3], cos], [sin[:3], sin]
    arguments = partial(dict, num_heads=2, axes=axes, eps=QK_NORM_EPS)
    assert all(map(torch.equal, eager(packed, *weights, *tables, **arguments()), expected))
    names = ("qkv", "q_weight", "k_weight", "cos", "sin")
    inputs = dict(zip(names, (packed, [None, weights[0][1]], weights[1], *tables), strict=True), **arguments())
    assert_matches(inputs)


def op_arguments(inputs: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of the registered op for inputs that omit nothing, queries only of streams with three parts."""
    weights = [x for pair in zip(inputs["q_weight"], inputs["k_weight"], strict=True) for x in pair if x is not None]
    tables = [x for pair in zip(inputs["cos"], inputs["sin"], strict=True) for x in pair]
    streams, head_dim = len(inputs["qkv"]), inputs["cos"][0].shape[-1]
    return inputs["qkv"], weights, tables, [True] * streams, [2] * streams, inputs["num_heads"], head_dim, 1e-6


def test_opcheck() -> None:
    library.opcheck(torch.ops.madformer.qk_norm_rope.default, op_arguments(make_inputs(parts=(2,))))


def test_opcheck_of_the_backward() -> None:
    inputs = make_inputs()
    grads = [torch.randn(1, 2, 3, 8, device=DEVICE) for _ in range(3)]
    qkv, weights, *rest = op_arguments(inputs)
    arguments = [x.detach() for x in qkv], [x.detach() for x in weights], *rest
    library.opcheck(torch.ops.madformer.qk_norm_rope_backward.default, (*grads, True, *arguments))


def test_compiles_whole() -> None:
    compiled = torch.compile(triton, fullgraph=True, backend=COMPILER)
    assert_matches(make_inputs((1, 2), (2, 3)), compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_matches(make_inputs((1, 2), (2, 3)), compiled)


def test_autocast() -> None:
    """No op that autocast casts: bf16 projections meet fp32 weights."""
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert_matches(make_inputs(dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("axes", [1, 2])
def test_at_the_models_shape(axes: int) -> None:
    inputs = make_inputs((4096, 4096), num_heads=18, head_dim=64, axes=axes, batch=1, dtype=torch.bfloat16)
    assert_matches(inputs)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **({"device": DEVICE} | options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": []}, "qkv must have at least one stream"),
        ({"q_weight": []}, "q_weight must have one entry a stream, 2, got 0"),
        ({"sin": [zeros(5, 16)]}, "sin must have one entry a stream, 2, got 1"),
        ({"axes": [1]}, "axes must have one entry a stream, 2, got 1"),
        ({"axes": [2, 3]}, r"axes\[1\]=3 must be positive"),
        ({"axes": 0}, r"axes\[0\]=0 must be positive"),
        ({"num_heads": 0}, "num_heads must be positive, got 0"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"qkv": [zeros(2, 5, 96), zeros(3, 3, 96)]}, r"qkv\[1\] must have the shape \(2, L, 96 or 64\)"),
        ({"qkv": [zeros(2, 5, 97), zeros(2, 3, 96)]}, r"qkv\[0\] must have the shape"),
        ({"qkv": [zeros(2, 5, 96), zeros(2, 3, 96).half()]}, r"qkv\[1\] must have the dtype torch.float32"),
        ({"qkv": [zeros(2, 5, 96), zeros(2, 3, 96, device="meta")]}, r"qkv\[1\] must be on"),
        ({"k_weight": [zeros(16), zeros(8)]}, r"k_weight\[1\] must have the shape \(16,\), got \(8,\)"),
        ({"k_weight": [zeros(16), None]}, r"q_weight\[1\] and k_weight\[1\] must both be given"),
        ({"q_weight": [zeros(16, device="meta"), zeros(16)]}, r"q_weight\[0\] must be on"),
        ({"q_weight": [zeros(16, dtype=torch.int32), zeros(16)]}, r"q_weight\[0\] must be torch.float32"),
        ({"cos": [zeros(4, 16), zeros(3, 16)]}, r"cos\[0\] must have the shape \(5, 16\), got \(4, 16\)"),
        ({"cos": [zeros(3, 5, 16), zeros(3, 16)]}, r"cos\[0\] must have the shape \(2, 5, 16\)"),
        ({"sin": [zeros(5, 16), None]}, r"cos\[1\] and sin\[1\] must both be given"),
        ({"sin": [zeros(5, 16).half(), zeros(3, 16)]}, r"sin\[0\] must be torch.float32"),
        ({"backend": "cpp"}, "backend='cpp' must be one of auto, triton, reference for qk_norm_rope"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**make_inputs((5, 3), (3, 3), batch=2, head_dim=16) | change)


def test_integers_are_refused() -> None:
    inputs = make_inputs()
    inputs["qkv"] = [x.int() for x in inputs["qkv"]]
    with pytest.raises(ValueError, match=r"qkv\[0\] must be torch.float32 or"):
        triton(**inputs)
