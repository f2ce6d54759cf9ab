"""The kernels of qk_norm_rope against float64, against the model's own layers, and on the layouts both pass them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, library, nn

from madformer.config import MADFormerConfig
from madformer.kernels import dispatch
from madformer.kernels.norm_common import reduction_launch
from madformer.kernels.qk_norm_rope import launchers, qk_norm_rope, qk_norm_rope_ref
from madformer.kernels.qk_norm_rope.reference import apply_rope
from madformer.model.layer import QK_NORM_EPS, Tower
from madformer.model.rope import rope_tables
from tests.helpers.testing import COMPILER, DEVICE, assert_op_matches, each_dtype

STATUSES = {status.backend: status for status in dispatch.report()}
CPU = torch.device("cpu")


def backend_param(backend: str, device: torch.device) -> Any:
    status = STATUSES[backend]
    return pytest.param(
        backend, device, id=backend, marks=pytest.mark.skipif(not status.available, reason=status.reason)
    )


TRITON, CPP = backend_param("triton", DEVICE), backend_param("cpp", CPU)
each_kernel = pytest.mark.parametrize(("backend", "device"), [TRITON, CPP])
eager = partial(qk_norm_rope, backend="reference")


def make_inputs(
    device: torch.device,
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
        return torch.randn(shape, generator=generator).to(device, dtype)

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


def check(
    backend: str,
    inputs: dict[str, Any],
    grads: Callable[[Tensor], Tensor] = torch.clone,
    op: Callable[..., Any] = qk_norm_rope,
) -> None:
    kernel = partial(op, backend=backend)
    assert_op_matches(kernel, qk_norm_rope_ref, inputs, rows=summed_rows(inputs), grads=grads)


@each_kernel
@pytest.mark.parametrize(
    ("head_dim", "axes"), [(8, 2), (16, 1), (32, 2), (64, 1), (64, 2), (72, 2), (80, 1), (96, 2), (128, 1)]
)
def test_matches_float64(backend: str, device: torch.device, head_dim: int, axes: int) -> None:
    check(backend, make_inputs(device, head_dim=head_dim, axes=axes))


@each_kernel
@each_dtype
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(backend: str, device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    check(backend, make_inputs(device, dtype=dtype, weight_dtype=weight_dtype, head_dim=64))


def test_weights_of_two_dtypes() -> None:
    """The gradient of one in fp32 is not rounded where the other's is: that of fp32 weights to the bit."""
    inputs = make_inputs(DEVICE, (3,), head_dim=8, weight_dtype=torch.bfloat16)
    mixed = {**inputs, "k_weight": [w.detach().float().requires_grad_() for w in inputs["k_weight"]]}
    wide = {**mixed, "q_weight": [w.detach().float().requires_grad_() for w in inputs["q_weight"]]}

    def gradients(given: dict[str, Any]) -> tuple[Tensor, ...]:
        loss = sum(x.float().square().sum() for x in qk_norm_rope(**given, backend="triton"))
        return torch.autograd.grad(loss, [given["q_weight"][0], given["k_weight"][0]])

    (q, k), (q_wide, k_wide) = gradients(mixed), gradients(wide)
    assert torch.equal(k, k_wide)
    assert torch.equal(q, q_wide.bfloat16())


def test_shares_of_many_programs_are_summed() -> None:
    """In several tiles, and of columns that fill none."""
    partials = torch.randn(2 * 2100, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sums = torch.empty(2, 20, device=DEVICE)
    reduction_launch(2, 2100, 20, DEVICE)(None, partials, *[None] * 7, sums, None)
    torch.testing.assert_close(sums, partials.double().view(2, 2100, 20).sum(1).float(), rtol=1e-5, atol=1e-4)


STREAMS = {
    "keys and values first": ((3, 5), (2, 3)),
    "three, the middle without queries": ((1, 4, 2), (3, 2, 3)),
    "no queries at all": ((3,), (2,)),
    "one empty": ((0, 4), (3, 3)),
    "all empty": ((0,), (3,)),
}


@each_kernel
@pytest.mark.parametrize("streams", STREAMS)
def test_streams(backend: str, device: torch.device, streams: str) -> None:
    lengths, parts = STREAMS[streams]
    inputs = make_inputs(device, lengths, parts, batch=2 if len(parts) == 2 else 1)
    check(backend, inputs)
    q, k, v = eager(**inputs)
    assert k.shape[2] == v.shape[2] == sum(lengths)
    assert q.shape[2] == sum(length for length, count in zip(lengths, parts, strict=True) if count == 3)


def test_programs_take_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of heads in the forward and of tokens in the backward, as many as do not divide evenly."""
    settings = launchers.RopeSettings(tokens=2, heads=2, cols=4, heads_per_program=4, num_programs=2)
    monkeypatch.setattr(launchers, "choose_settings", lambda stream: settings)
    check("triton", make_inputs(DEVICE, (5,), num_heads=6))


@each_kernel
def test_text_beside_images(backend: str, device: torch.device) -> None:
    """Each stream has its own pairing."""
    check(backend, make_inputs(device, (2, 3), (3, 3), axes=[1, 2]))


def without(inputs: dict[str, Any], **streams: Sequence[int]) -> dict[str, Any]:
    """The inputs with None for the streams listed by name of an argument."""
    missing = {name: [None if i in at else x for i, x in enumerate(inputs[name])] for name, at in streams.items()}
    return inputs | missing


NO_NORM: dict[str, Sequence[int]] = {"q_weight": (0,), "k_weight": (0,)}
NO_ROTATION: dict[str, Sequence[int]] = {"cos": (0,), "sin": (0,)}


@each_kernel
@pytest.mark.parametrize("omitted", [NO_NORM, NO_ROTATION], ids=["no norm", "no rotation"])
def test_what_may_be_omitted(backend: str, device: torch.device, omitted: dict[str, Sequence[int]]) -> None:
    check(backend, without(make_inputs(device), **omitted))


@each_kernel
def test_streams_omit_different_things(backend: str, device: torch.device) -> None:
    """The lists that the op takes are shorter than the streams are many."""
    check(backend, without(make_inputs(device, (2, 1), (3, 3)), **NO_NORM, cos=(1,), sin=(1,)))


@each_kernel
def test_copies_are_exact(backend: str, device: torch.device) -> None:
    """Values, and queries and keys of a stream that is neither normalised nor rotated."""
    inputs = without(make_inputs(device, (2, 3), (3, 3), dtype=torch.bfloat16), **NO_NORM, **NO_ROTATION)
    actual, expected = qk_norm_rope(**inputs, backend=backend), eager(**inputs)
    assert torch.equal(actual[2], expected[2])
    assert all(torch.equal(x[:, :, :2], y[:, :, :2]) for x, y in zip(actual, expected, strict=True))


@each_kernel
def test_memory_is_token_major(backend: str, device: torch.device) -> None:
    assert all(x.transpose(1, 2).is_contiguous() for x in qk_norm_rope(**make_inputs(device), backend=backend))


@each_kernel
def test_weight_of_absent_queries_is_ignored(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, parts=(2,))
    check(backend, inputs | {"q_weight": [torch.full((8,), float("nan"), device=device)]})


LAYOUTS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "spans of one packed sequence": lambda x: [x[:, :1], x[:, 1:]],
    "columns of a wider projection": lambda x: [x.repeat(1, 1, 2)[..., 48:]],
    "odd strides": lambda x: [nn.functional.pad(x, (1, 2))[..., 1:-2]],
    "tokens first": lambda x: [x.repeat(2, 1, 1).transpose(0, 1).contiguous().transpose(0, 1)],
    "transposed": lambda x: [x.mT.contiguous().mT],
    "expanded": lambda x: [x.expand(2, -1, -1)],
}


@each_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, device: torch.device, layout: str) -> None:
    x = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(0)).to(device)
    qkv = [part.requires_grad_() for part in LAYOUTS[layout](x)]
    inputs = make_inputs(device, [part.shape[1] for part in qkv], [3] * len(qkv))
    check(backend, inputs | {"qkv": qkv})


@each_kernel
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
def test_layouts_of_the_gradient(backend: str, device: torch.device, grads: Callable[[Tensor], Tensor]) -> None:
    check(backend, make_inputs(device, (1, 2), (2, 3)), grads=grads)


TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "of each sample": lambda x: torch.stack((x, x.flip(0))),
    "one for all samples": lambda x: x.expand(2, -1, -1),
    "a span of a longer one": lambda x: torch.cat((x, x, x))[len(x) : 2 * len(x)],
    "transposed": lambda x: x.mT.contiguous().mT,
}


@each_kernel
@pytest.mark.parametrize("tables", TABLES)
def test_tables(backend: str, device: torch.device, tables: str) -> None:
    inputs = make_inputs(device, batch=2)
    arranged = {name: [TABLES[tables](x) for x in inputs[name]] for name in ("cos", "sin")}
    check(backend, inputs | arranged)


@each_kernel
def test_tables_of_two_layouts(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device)
    check(backend, inputs | {"sin": [TABLES["transposed"](x) for x in inputs["sin"]]})


@each_kernel
@pytest.mark.parametrize("frozen", [["qkv"], ["q_weight", "k_weight"], ["k_weight"]], ids=", ".join)
def test_only_what_needs_a_gradient(backend: str, device: torch.device, frozen: list[str]) -> None:
    inputs = make_inputs(device)
    op, reference = (
        lambda name=name, **inputs: qk_norm_rope(**inputs, backend=name)[:2] for name in (backend, "reference")
    )
    assert_op_matches(op, reference, inputs | {name: [x.detach() for x in inputs[name]] for name in frozen})


@each_kernel
def test_gradients_of_unused_results(backend: str, device: torch.device) -> None:
    """A result that nobody uses has the gradient zero."""
    inputs = make_inputs(device)
    actual, expected = (
        torch.autograd.grad(
            qk_norm_rope(**inputs, backend=name)[1].square().sum(),
            inputs["qkv"] + inputs["q_weight"],
            allow_unused=True,
        )
        for name in (backend, "reference")
    )
    torch.testing.assert_close(actual[0], expected[0])
    assert actual[1].count_nonzero() == 0


@each_kernel
@pytest.mark.parametrize("pairing", ["axial", "released"])
def test_equals_the_models_layers(backend: str, device: torch.device, pairing: str) -> None:
    """Norms of a tower, rotary embedding and concatenation one by one; a clean stream without queries first."""
    torch.manual_seed(0)
    config = MADFormerConfig(hidden_size=16, num_heads=2, num_blocks=4, block_size=1, rope_pairing=pairing)
    tower, axes = Tower(config).to(device), 2 if pairing == "axial" else 1
    for norm in (tower.q_norm, tower.k_norm):
        norm.backend = "reference"
        nn.init.normal_(norm.weight, 1, 0.2)
    cos, sin = (table.to(device) for table in rope_tables(config))
    clean, noise = torch.randn(1, 3, 16, device=device), torch.randn(1, 4, 16, device=device)
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
    check(backend, inputs)


def op_arguments(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the registered op for inputs that omit nothing, queries only of streams with three parts."""
    streams = len(inputs["qkv"])
    return {
        "qkv": inputs["qkv"],
        "weights": [
            x for pair in zip(inputs["q_weight"], inputs["k_weight"], strict=True) for x in pair if x is not None
        ],
        "tables": [x for pair in zip(inputs["cos"], inputs["sin"], strict=True) for x in pair],
        "normalised": [True] * streams,
        "axes": [2] * streams,
        "num_heads": inputs["num_heads"],
        "head_dim": inputs["cos"][0].shape[-1],
        "eps": 1e-6,
    }


def backward_arguments(inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of its backward, for one stream with queries."""
    forward = op_arguments(inputs)
    (qkv,) = inputs["qkv"]
    shape = len(qkv), forward["num_heads"], qkv.shape[1], forward["head_dim"]
    grads = {name: torch.randn(shape, device=qkv.device) for name in ("dq", "dk", "dv")}
    detached = {name: [x.detach() for x in forward[name]] for name in ("qkv", "weights")}
    return forward | detached | grads | {"needs_weights": True}


def registered(op: str, backend: str) -> Any:
    return getattr(torch.ops.madformer, op + {"triton": "", "cpp": "_cpp"}[backend]).default


@each_kernel
def test_opcheck(backend: str, device: torch.device) -> None:
    library.opcheck(registered("qk_norm_rope", backend), (), op_arguments(make_inputs(device, parts=(2,))))


@each_kernel
def test_opcheck_of_the_backward(backend: str, device: torch.device) -> None:
    arguments = backward_arguments(make_inputs(device))
    for needs_weights in (True, False):
        library.opcheck(registered("qk_norm_rope_backward", backend), (), arguments | {"needs_weights": needs_weights})


@each_kernel
def test_compiles_whole(backend: str, device: torch.device) -> None:
    compiler = COMPILER if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend=compiler)
    check(backend, make_inputs(device, (1, 2), (2, 3)), op=compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(backend, make_inputs(device, (1, 2), (2, 3)), op=compiled)


@each_kernel
def test_autocast(backend: str, device: torch.device) -> None:
    """No op that autocast casts: bf16 projections meet fp32 weights."""
    with torch.autocast(device.type, dtype=torch.bfloat16):
        check(backend, make_inputs(device, dtype=torch.bfloat16))


@pytest.mark.parametrize(("backend", "device"), [CPP])
@each_dtype
@pytest.mark.parametrize("axes", [1, 2])
def test_threads_change_nothing(backend: str, device: torch.device, dtype: torch.dtype, axes: int) -> None:
    """Nor do the sums over tokens, which are cut into several pieces, the last one shorter, depend on them."""
    inputs = make_inputs(device, (70, 45), (3, 2), batch=3, num_heads=4, head_dim=64, axes=axes, dtype=dtype)

    def run(num_threads: int) -> list[Tensor]:
        torch.set_num_threads(num_threads)
        results = qk_norm_rope(**inputs, backend=backend)
        leaves = [x for name in ("qkv", "q_weight", "k_weight") for x in inputs[name] if x is not None]
        return [*results, *torch.autograd.grad(results, leaves, [x.detach().cos() for x in results])]

    num_threads = torch.get_num_threads()
    try:
        alone, *shared = (run(count) for count in (1, 2, 3))
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(x, y) for results in shared for x, y in zip(results, alone, strict=True))
    check(backend, inputs)


@pytest.mark.parametrize(("backend", "device"), [CPP])
def test_compiled_ops_guard_their_memory_without_the_public_function(backend: str, device: torch.device) -> None:
    op, backward = (registered(name, backend) for name in ("qk_norm_rope", "qk_norm_rope_backward"))
    inputs = backward_arguments(make_inputs(device))
    gradients = {name: inputs.pop(name) for name in ("dq", "dk", "dv", "needs_weights")}
    op(**inputs)
    backward(**gradients, **inputs)
    (qkv,), tables, weights = (inputs[name] for name in ("qkv", "tables", "weights"))
    for change in (
        {"qkv": []},
        {"qkv": [qkv[..., :47]]},
        {"qkv": [qkv.int()]},
        {"qkv": [qkv, qkv]},
        {"qkv": [qkv, qkv[..., :32].half()], "normalised": [True, False], "axes": [2, 0]},
        {"qkv": [qkv, qkv[:0, :, :32]], "normalised": [True, False], "axes": [2, 0]},
        {"weights": weights[:1]},
        {"weights": weights * 2},
        {"weights": [weights[0][:7], weights[1]]},
        {"weights": [weights[0], weights[1].double()]},
        {"tables": tables[:1]},
        {"tables": [x[:2] for x in tables]},
        {"tables": [tables[0], tables[1].half()]},
        {"tables": [tables[0], tables[1].expand(3, -1, -1)]},
        {"normalised": [False]},
        {"normalised": []},
        {"axes": [3]},
        {"axes": [0]},
        {"num_heads": 3},
        {"num_heads": 0},
    ):
        for call in (op, partial(backward, **gradients)):
            with pytest.raises(RuntimeError, match="must"):
                call(**inputs | change)
    for change in (
        {"dq": gradients["dq"][:, :, :2]},
        {"dk": gradients["dk"][:, :1]},
        {"dv": gradients["dv"].bfloat16()},
        {"dv": gradients["dv"][..., :4]},
        {"dk": gradients["dk"][0]},
    ):
        with pytest.raises(RuntimeError, match="gradients must"):
            backward(**gradients | change, **inputs)


@pytest.mark.parametrize("op", ["qk_norm_rope", "qk_norm_rope_cached"])
def test_auto_chooses_compiled_code_for_what_it_computes_in(op: str) -> None:
    resolve = partial(dispatch.resolve, op, "auto", CPU)
    assert resolve(torch.bfloat16) == ("cpp" if STATUSES["cpp"].available else "reference")
    assert resolve(torch.float64) == "reference"


@pytest.mark.gpu
@pytest.mark.parametrize("axes", [1, 2])
def test_at_the_models_shape(axes: int) -> None:
    inputs = make_inputs(DEVICE, (4096, 4096), num_heads=18, head_dim=64, axes=axes, batch=1, dtype=torch.bfloat16)
    check("triton", inputs)


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
        ({"backend": "sdpa"}, "backend='sdpa' must be one of auto, triton, cpp, reference for qk_norm_rope"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**make_inputs(DEVICE, (5, 3), (3, 3), batch=2, head_dim=16) | change)


@each_kernel
def test_integers_are_refused(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device)
    inputs["qkv"] = [x.int() for x in inputs["qkv"]]
    with pytest.raises(ValueError, match=r"qkv\[0\] must be torch.float32 or"):
        qk_norm_rope(**inputs, backend=backend)
