"""RMSNorm's kernels, with and without the residual addition, against float64 and against the model's formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from madformer.kernels.norm_common import choose_backward_settings, choose_forward_settings, choose_splits
from madformer.kernels.rms_norm import rms_norm, rms_norm_ref
from tests.helpers.testing import COMPILER, DEVICE, OUR_BACKENDS, assert_op_matches, each_dtype, needs_cpp

EPS = 1e-5
Op = Callable[..., Any]
reference = partial(rms_norm_ref, eps=EPS)
each_residual = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])


@pytest.fixture(params=OUR_BACKENDS)
def op(request: pytest.FixtureRequest) -> Op:
    return partial(rms_norm, eps=EPS, backend=request.param)


def make_inputs(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    residual: bool = True,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, stream = 2 * torch.randn(2, *shape, generator=generator).to(DEVICE, dtype)
    weight = 1 + torch.randn(shape[-1], generator=generator).to(DEVICE, weight_dtype) / 4
    inputs = {"x": x, "weight": weight} | ({"residual": stream} if residual else {})
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def check(op: Callable[..., Any], inputs: dict[str, Any], **options: Any) -> None:
    assert_op_matches(op, reference, inputs, rows={"weight": math.prod(inputs["x"].shape[:-1])}, **options)


@each_residual
@each_dtype
# One column, an odd number, one row, heads, and a row of several chunks of which the last is part empty.
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33,), (2, 3, 2, 64), (2, 300)], ids=str)
def test_matches_float64(op: Op, shape: tuple[int, ...], dtype: torch.dtype, residual: bool) -> None:
    check(op, make_inputs(*shape, dtype=dtype, weight_dtype=dtype, residual=residual))


@pytest.mark.parametrize(("rows", "cols"), [(2, 1152), (1, 8192)])
def test_wide_rows(op: Op, rows: int, cols: int) -> None:
    """The model's width, and the widest, where a row takes all warps."""
    check(op, make_inputs(rows, cols, dtype=torch.bfloat16))


@needs_cpp
def test_rows_wider_than_a_program_and_more_than_a_chunk() -> None:
    """C++ has no widest row, and sums its gradients in chunks."""
    check(partial(rms_norm, eps=EPS, backend="cpp"), make_inputs(9, 8193))


def test_programs_take_several_tiles(op: Op) -> None:
    """More rows than the backward pass has programs for at once, and a last tile that is part empty."""
    check(op, make_inputs(122, 64, residual=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_in_float32(op: Op, dtype: torch.dtype) -> None:
    inputs = make_inputs(6, 40, dtype=dtype)
    check(op, inputs)
    assert op(**inputs)[0].dtype == dtype


def test_stream_in_float32(op: Op) -> None:
    """A branch in bfloat16 on a stream in float32, as autocast has them: neither loses its dtype."""
    inputs = make_inputs(6, 40, dtype=torch.bfloat16)
    inputs["residual"] = inputs["residual"].detach().float().requires_grad_()
    check(op, inputs)
    y, total = op(**inputs)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)


@each_dtype
def test_total_is_the_rounded_sum(op: Op, dtype: torch.dtype) -> None:
    """``y`` is the norm of the sum that is returned, bit for bit as in two separate ops."""
    inputs = make_inputs(4, 40, dtype=dtype)
    y, total = op(**inputs)
    assert torch.equal(total, inputs["x"] + inputs["residual"])
    assert torch.equal(y, op(total, inputs["weight"]))


@each_dtype
def test_reference_is_the_formula(dtype: torch.dtype) -> None:
    """PyTorch's own norm in float32, rounded once."""
    x, weight = make_inputs(4, 40, dtype=dtype, residual=False).values()
    expected = F.rms_norm(x.float(), (40,), weight, EPS)
    torch.testing.assert_close(rms_norm(x, weight, eps=EPS, backend="reference"), expected.to(dtype))


def test_without_weight(op: Op) -> None:
    inputs = make_inputs(5, 40)
    check(op, inputs | {"weight": None})


LAYOUTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "parts of one projection": lambda x: (x[..., :40], x[..., 40:]),
    "streams of one sequence": lambda x: (x[:, :3, :40], x[:, 3:, :40]),
    "heads": lambda x: (x.unflatten(2, (2, 40)).transpose(1, 2),) * 2,
    "transposed": lambda x: (x.mT, x.mT),
    "rows skipped": lambda x: (x[:, ::2], x[:, 1::2]),
    "expanded": lambda x: (x[:, :1].expand(-1, 6, -1), x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(op: Op, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = LAYOUTS[layout](torch.randn(2, 6, 80, generator=generator).to(DEVICE))
    weight = torch.randn(2 * x.shape[-1], generator=generator).to(DEVICE)[::2]
    check(op, {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "residual": residual.requires_grad_()})


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda g: g.mT.contiguous().mT,
    "a row for all": lambda g: g[:1, :1].expand(g.shape),
    "one number": lambda g: g.flatten()[0].expand(g.shape),
    "strided columns": lambda g: g.repeat(1, 1, 2)[..., ::2],
    "part of a sequence": lambda g: torch.cat([g, g], 1)[:, : g.shape[1]],
}


@pytest.mark.parametrize("grads", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_layouts_of_the_gradient(op: Op, grads: Callable[[Tensor], Tensor]) -> None:
    check(op, make_inputs(4, 5, 33), grads=grads)


@pytest.mark.parametrize(("used", "names"), [(0, ("x", "weight", "residual")), (1, ("x", "residual"))])
def test_one_result_is_used(op: Op, used: int, names: tuple[str, ...]) -> None:
    """The gradient of the other is not there; that of the sum alone passes unchanged."""
    inputs = {name: x.detach().requires_grad_(name in names) for name, x in make_inputs(4, 40).items()}
    rows = {"weight": 4}
    assert_op_matches(lambda **x: op(**x)[used], lambda **x: reference(**x)[used], inputs, rows=rows)


@pytest.mark.parametrize("names", [("x",), ("weight",), ("residual",), ("x", "weight")], ids=str)
def test_only_wanted_gradients(op: Op, names: tuple[str, ...]) -> None:
    inputs = {name: x.detach().requires_grad_(name in names) for name, x in make_inputs(4, 40).items()}
    assert_op_matches(lambda **x: op(**x)[0], lambda **x: reference(**x)[0], inputs, rows={"weight": 4})


def test_deterministic(op: Op) -> None:
    """The sum over rows is the same to the last bit, over several programs."""

    def gradient() -> Tensor:
        inputs = make_inputs(40, 8, residual=False)
        op(**inputs).square().sum().backward()
        return inputs["weight"].grad

    assert torch.equal(gradient(), gradient())


@each_residual
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_nothing_to_do(op: Op, shape: tuple[int, ...], residual: bool) -> None:
    inputs = make_inputs(*shape, residual=residual)
    result = op(**inputs)
    y = result[0] if residual else result
    y.sum().backward()
    assert y.shape == inputs["x"].grad.shape == shape
    assert torch.equal(inputs["weight"].grad, torch.zeros(4, device=DEVICE))


@pytest.mark.parametrize(
    ("name", "dtype", "residual"),
    [
        ("residual_norm", torch.float32, False),
        ("residual_norm", torch.bfloat16, True),
        ("residual_norm_cpp", torch.float32, False),
    ],
    ids=str,
)
def test_opcheck(name: str, dtype: torch.dtype, residual: bool) -> None:
    inputs = make_inputs(3, 40, dtype=dtype)
    added = inputs["residual"] if residual else None
    arguments = (inputs["x"], None, None, inputs["weight"], None, added, None, False, EPS)
    library.opcheck(getattr(torch.ops.madformer, name).default, arguments)


def test_compiles_whole(op: Op) -> None:
    compiled = torch.compile(op, fullgraph=True, backend=COMPILER)
    check(compiled, make_inputs(3, 40))
    with torch.compiler.set_stance("fail_on_recompile"):
        check(compiled, make_inputs(3, 40))
    check(compiled, make_inputs(5, 40))


def test_autocast(op: Op) -> None:
    """No op that autocast casts: results have the dtypes of the arguments."""
    inputs = make_inputs(3, 40, dtype=torch.bfloat16)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        check(op, inputs)


def test_large_and_small_values(op: Op) -> None:
    """Half-precision values whose mean square is not one."""
    x = torch.tensor([[3e4, -6e4, 1e4, 5e4], [1e-6, -3e-6, 2e-6, 0.0]], device=DEVICE).half()
    op, plain = partial(rms_norm, eps=1e-14, backend="triton"), partial(rms_norm_ref, eps=1e-14)
    assert_op_matches(op, plain, {"x": x, "weight": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, "x must have columns"),
        ({"x": torch.zeros(3, 0)}, "x must have columns"),
        ({"x": torch.zeros(3, 4, dtype=torch.int32)}, r"x must be torch\.float32 or"),
        ({"x": torch.zeros(3, 4).double()}, r"x must be torch\.float32 or"),
        ({"x": torch.zeros(3, 8193), "weight": None, "residual": None}, "x must have at most 8192 columns"),
        ({"weight": torch.zeros(5)}, r"weight must have the shape \(4,\), got \(5,\)"),
        ({"weight": torch.zeros(4).long()}, "weight must be"),
        ({"weight": torch.zeros(4, device="meta")}, "weight must be on"),
        ({"residual": torch.zeros(3, 5)}, r"residual must have the shape \(3, 4\)"),
        ({"residual": torch.zeros(3, 4).long()}, "residual must be"),
        ({"residual": torch.zeros(3, 4, device="meta")}, "residual must be on"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"eps": float("nan")}, "eps must be positive, got nan"),
        ({"backend": "flex"}, "backend='flex' must be one of auto, triton, cpp, reference for rms_norm"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    def here(value: Any) -> Any:
        return value.to(DEVICE) if isinstance(value, Tensor) and value.device.type != "meta" else value

    arguments = {"x": torch.zeros(3, 4), "weight": None, "residual": None, "eps": EPS, "backend": "triton", **change}
    with pytest.raises(ValueError, match=message):
        rms_norm(**{name: here(value) for name, value in arguments.items()})


def test_float64_stays_on_the_reference() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, device=DEVICE)
    assert rms_norm(x, None, eps=EPS).dtype == torch.float64


@pytest.mark.parametrize("cols", [1, 8, 33, 64, 100, 192, 320, 768, 1152, 1536, 3072, 4096, 8192])
def test_settings_cover_a_row(cols: int) -> None:
    """Tiles are powers of two that give every thread 8 (4) elements; where a row is wide few lanes are idle."""
    for settings, per_thread in ((choose_forward_settings(cols), 8), (choose_backward_settings(cols, 3), 4)):
        assert all(size & (size - 1) == 0 for size in (settings.rows, settings.chunk, settings.num_warps))
        assert settings.rows * settings.chunk == settings.num_warps * 32 * per_thread
        lanes = -(-cols // settings.chunk) * settings.chunk
        assert lanes * settings.rows // (32 * settings.num_warps) <= 48, "elements of a thread"
        if cols % 64 == 0:
            assert lanes <= cols * 9 / 8


@pytest.mark.parametrize(
    ("blocks", "tiles", "programs", "expected"),
    [(32, 256, 528, 16), (128, 256, 528, 4), (1024, 256, 528, 1), (1, 3, 528, 3), (1, 0, 528, 1)],
)
def test_splits_fill_the_machine_once(blocks: int, tiles: int, programs: int, expected: int) -> None:
    assert choose_splits(blocks, tiles, programs) == expected


@pytest.mark.gpu
@each_residual
@pytest.mark.parametrize("batch", [1, 4])
def test_at_the_size_of_the_model(op: Op, batch: int, residual: bool) -> None:
    check(op, make_inputs(batch, 8192, 1152, dtype=torch.bfloat16, residual=residual))
