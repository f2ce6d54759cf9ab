"""AdaLN's kernels against float64, over modulation per sample and per block, and against DiT's own order of ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from madformer.kernels.adaln import adaln, adaln_ref
from tests.helpers.testing import COMPILER, DEVICE, OUR_BACKENDS, assert_op_matches, each_dtype, relative_error

ALL = frozenset({"residual", "gate", "weight", "bias"})
Op = Callable[..., Any]
each_norm = pytest.mark.parametrize("norm", ["layer", "rms"])


@pytest.fixture(params=OUR_BACKENDS)
def op(request: pytest.FixtureRequest) -> Op:
    return partial(adaln, backend=request.param)


def make_inputs(
    samples: int = 1,
    blocks: int | None = 2,
    tokens: int = 3,
    cols: int = 40,
    *,
    having: Iterable[str] = ("residual", "gate"),
    dtype: torch.dtype = torch.float32,
    modulation_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Modulation is three parts of one projection, by block, or by sample where ``blocks`` is None."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    length = tokens * (blocks or 1)
    rows = (samples, 6 * cols) if blocks is None else (samples, blocks, 6 * cols)
    shift, scale, gate = make(*rows).to(modulation_dtype or dtype).chunk(6, dim=-1)[:3]
    inputs = {
        "x": (1 + 2 * make(samples, length, cols)).to(dtype),
        "shift": shift,
        "scale": scale,
        "residual": (make(samples, length, cols) - 1).to(dtype),
        "gate": gate,
        "weight": 1 + make(cols) / 4,
        "bias": make(cols),
    }
    kept = {"x", "shift", "scale", *having}
    return {name: x.requires_grad_() for name, x in inputs.items() if name in kept}


def check(op: Callable[..., Any], inputs: dict[str, Any], norm: str = "layer", **options: Any) -> None:
    samples, length, _ = inputs["x"].shape
    blocks = inputs["shift"].shape[1] if inputs["shift"].dim() == 3 else 1
    rows = dict.fromkeys(("shift", "scale", "gate"), length // blocks) | dict.fromkeys(
        ("weight", "bias"), samples * length
    )
    assert_op_matches(partial(op, norm=norm), partial(adaln_ref, norm=norm), inputs, rows=rows, **options)


@each_norm
@each_dtype
def test_matches_float64(op: Op, dtype: torch.dtype, norm: str) -> None:
    check(op, make_inputs(dtype=dtype), norm)


@pytest.mark.parametrize(("samples", "blocks"), [(2, None), (2, 1), (2, 2)], ids=["by sample", "one block", "blocks"])
def test_several_samples(op: Op, samples: int, blocks: int | None) -> None:
    check(op, make_inputs(samples, blocks))


@pytest.mark.parametrize(
    ("norm", "having"),
    [
        ("layer", ()),
        ("rms", ("residual",)),
        ("layer", ("weight",)),
        ("layer", ("bias",)),
        ("layer", ALL),
        ("rms", ALL),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(sorted(value)),
)
def test_parts_may_be_left_out(op: Op, norm: str, having: Iterable[str]) -> None:
    check(op, make_inputs(having=having), norm)


@pytest.mark.parametrize(("norm", "tokens", "cols"), [("rms", 1, 1), ("layer", 2, 7), ("layer", 3, 300)])
def test_sizes(op: Op, norm: str, tokens: int, cols: int) -> None:
    """One column, an odd number, and a row of several chunks of which the last is part empty."""
    check(op, make_inputs(1, 1, tokens, cols), norm)


def test_model_width(op: Op) -> None:
    check(op, make_inputs(1, 1, 2, 1152, dtype=torch.bfloat16))


def test_programs_take_several_tiles(op: Op) -> None:
    """More tokens of a block than the backward pass has programs for, and a last tile that is part empty."""
    check(op, make_inputs(1, 2, 39, 64, having=ALL))


def test_modulation_in_float32(op: Op) -> None:
    """A projection of the timestep that was kept in float32 beside activations in bfloat16."""
    inputs = make_inputs(dtype=torch.bfloat16, modulation_dtype=torch.float32)
    check(op, inputs)
    assert {x.dtype for x in op(**inputs)} == {torch.bfloat16}


def test_stream_in_float32(op: Op) -> None:
    """Neither the branch nor the stream loses its dtype."""
    inputs = make_inputs(having=("residual",), dtype=torch.bfloat16)
    inputs["residual"] = inputs["residual"].detach().float().requires_grad_()
    check(op, inputs)
    assert [x.dtype for x in op(**inputs)] == [torch.bfloat16, torch.float32]


@each_norm
def test_result_is_that_of_the_rounded_sum(op: Op, norm: str) -> None:
    inputs = make_inputs(dtype=torch.bfloat16)
    y, total = op(**inputs, norm=norm)
    assert torch.equal(y, op(total, inputs["shift"], inputs["scale"], norm=norm))


@each_norm
def test_reference_is_the_block_of_dit(norm: str) -> None:
    """``x + gate * branch``, the norm, ``modulate``; each sample on its own, each block with its own row."""
    inputs = make_inputs(samples=2, blocks=3, tokens=4)
    y, total = adaln(**inputs, norm=norm, backend="reference")
    normalise = F.layer_norm if norm == "layer" else F.rms_norm
    for sample in range(2):
        for block in range(3):
            tokens = slice(4 * block, 4 * block + 4)
            x, residual = inputs["x"][sample, tokens], inputs["residual"][sample, tokens]
            shift, scale, gate = (inputs[name][sample, block] for name in ("shift", "scale", "gate"))
            expected = residual + gate * x
            torch.testing.assert_close(total[sample, tokens], expected)
            torch.testing.assert_close(y[sample, tokens], normalise(expected, (40,), eps=1e-6) * (1 + scale) + shift)


def test_adaln_zero_passes_the_stream(op: Op) -> None:
    """At its initial values, all modulation zero, a block of DiT adds nothing."""
    inputs = {name: x.detach() for name, x in make_inputs().items()}
    inputs |= {name: torch.zeros_like(inputs[name]) for name in ("shift", "scale", "gate")}
    y, total = op(**inputs)
    assert torch.equal(total, inputs["residual"])
    torch.testing.assert_close(y, F.layer_norm(total, (40,), eps=1e-6))


def test_a_mean_far_from_zero(op: Op) -> None:
    """The error is the mean's own rounding; a difference of sums of squares would lose the mean squared."""
    x, shift, scale = (x.detach() for x in make_inputs(having=()).values())
    x = x + 1000
    expected = adaln_ref(x.double(), shift.double(), scale.double())
    mean_over_deviation = 1000 / x.std().item()
    assert relative_error(op(x, shift, scale), expected) < mean_over_deviation * torch.finfo(x.dtype).eps


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "part of a sequence": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "part of a projection": lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
    "transposed": lambda x: x.mT.contiguous().mT,
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one sample for all": lambda x: x[:1].expand_as(x),
    "one number": lambda x: x.flatten()[0].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(op: Op, layout: str) -> None:
    inputs = {name: LAYOUTS[layout](x.detach()).requires_grad_() for name, x in make_inputs(2, 1).items()}
    if layout == "one number":  # Its deviation is zero, and the gradient of the norm eps ** -0.5 times rounding.
        inputs["residual"] = make_inputs(2, 1)["residual"]
    check(op, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_gradient(op: Op, layout: str) -> None:
    check(op, make_inputs(2, 1), grads=LAYOUTS[layout])


@pytest.mark.parametrize("names", [("x",), ("residual",), ("shift",), ("gate",), ("bias",)], ids="".join)
def test_only_wanted_gradients(op: Op, names: tuple[str, ...]) -> None:
    inputs = {name: x.detach().requires_grad_(name in names) for name, x in make_inputs(having=ALL).items()}
    rows = {"shift": 3, "gate": 3, "bias": 6}
    assert_op_matches(lambda **x: op(**x)[0], lambda **x: adaln_ref(**x)[0], inputs, rows=rows)


def test_only_the_sum_is_used(op: Op) -> None:
    inputs = {name: x.detach().requires_grad_(name in ("x", "residual", "gate")) for name, x in make_inputs().items()}
    assert_op_matches(lambda **x: op(**x)[1], lambda **x: adaln_ref(**x)[1], inputs, rows={"gate": 3})


def test_saves_the_branch_for_its_gate_only(op: Op) -> None:
    """Without a gate to learn, ``x`` is free after the forward pass."""

    def saved(**requires_grad: bool) -> list[int]:
        inputs = {name: x.detach().requires_grad_(requires_grad.get(name, True)) for name, x in make_inputs().items()}
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda _: None):
            op(**inputs)
        return [x for x in kept if x == inputs["x"].data_ptr()]

    assert saved()
    assert not saved(gate=False)


def test_deterministic(op: Op) -> None:
    def gradients() -> list[Tensor]:
        inputs = make_inputs(1, 1, 40, 8, having=ALL)
        sum(x.square().sum() for x in op(**inputs)).backward()
        return [x.grad for x in inputs.values()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize(("samples", "tokens"), [(0, 3), (2, 0)])
def test_nothing_to_do(op: Op, samples: int, tokens: int) -> None:
    inputs = make_inputs(samples, 2, tokens, 8, having=ALL)
    y, total = op(**inputs)
    (y.sum() + total.sum()).backward()
    assert y.shape == total.shape == inputs["x"].shape
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in inputs.values())


@pytest.mark.parametrize("op", ["residual_norm", "residual_norm_cpp"])
def test_opcheck(op: str) -> None:
    inputs = make_inputs(having=ALL, dtype=torch.bfloat16)
    names = ("x", "shift", "scale", "weight", "bias", "residual", "gate")
    library.opcheck(getattr(torch.ops.madformer, op).default, (*(inputs[name] for name in names), True, 1e-6))


def test_compiles_whole(op: Op) -> None:
    compiled = torch.compile(op, fullgraph=True, backend=COMPILER)
    check(compiled, make_inputs(having=ALL))
    with torch.compiler.set_stance("fail_on_recompile"):
        check(compiled, make_inputs(having=ALL))
    check(compiled, make_inputs(tokens=4, having=ALL))


def test_autocast(op: Op) -> None:
    """No op that autocast casts: the result has the dtype of the arguments."""
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        check(op, make_inputs(dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 4)}, r"x must be \(B, L, C\)"),
        ({"x": torch.zeros(1, 6, 4, dtype=torch.int32)}, r"x must be torch\.float32 or"),
        ({"shift": torch.zeros(1, 5)}, r"shift must be \(1, 4\) or \(1, M, 4\), got the shape \(1, 5\)"),
        ({"shift": torch.zeros(2, 2, 4)}, "shift must be"),
        ({"shift": torch.zeros(4)}, "shift must be"),
        ({"shift": torch.zeros(1, 4, 4)}, "shift must have a number of rows that divides the 6 tokens of x, got 4"),
        ({"shift": torch.zeros(1, 0, 4)}, "shift must have a number of rows"),
        ({"shift": torch.zeros(1, 2, 4, device="meta")}, "shift must be on"),
        ({"shift": torch.zeros(1, 2, 4).long(), "scale": torch.zeros(1, 2, 4).long()}, r"shift must be torch\.float32"),
        ({"scale": torch.zeros(1, 3, 4)}, "scale must have shift's shape"),
        ({"scale": torch.zeros(1, 2, 4).half()}, "scale must have shift's dtype"),
        ({"gate": torch.zeros(1, 3, 4), "residual": torch.zeros(1, 6, 4)}, "gate must have shift's shape"),
        ({"gate": torch.zeros(1, 2, 4)}, "gate needs a residual"),
        ({"residual": torch.zeros(1, 5, 4)}, "residual must have the shape"),
        ({"residual": torch.zeros(1, 6, 4, device="meta")}, "residual must be on"),
        ({"weight": torch.zeros(5)}, "weight must have the shape"),
        ({"bias": torch.zeros(4).long()}, "bias must be"),
        ({"norm": "batch"}, "norm='batch' must be 'layer' or 'rms'"),
        ({"eps": -1.0}, "eps must be positive, got -1.0"),
        ({"backend": "flex"}, "backend='flex' must be one of auto, triton, cpp, reference for adaln"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    def here(value: Any) -> Any:
        return value.to(DEVICE) if isinstance(value, Tensor) and value.device.type != "meta" else value

    rows = torch.zeros(1, 2, 4)
    arguments = {"x": torch.zeros(1, 6, 4), "shift": rows, "scale": rows, "backend": "triton", **change}
    with pytest.raises(ValueError, match=message):
        adaln(**{name: here(value) for name, value in arguments.items()})


@pytest.mark.gpu
@each_norm
@pytest.mark.parametrize("batch", [1, 4])
def test_at_the_size_of_the_model(op: Op, batch: int, norm: str) -> None:
    check(op, make_inputs(batch, 32, 256, 1152, dtype=torch.bfloat16), norm)
