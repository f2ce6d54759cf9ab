"""SwiGLU's kernel against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, library

from madformer.kernels.swiglu import swiglu, swiglu_ref
from tests.helpers.testing import (
    COMPILER,
    DEVICE,
    KERNEL_DTYPES,
    OUR_BACKENDS,
    assert_op_matches,
    each_dtype,
    needs_cpp,
)

Op = Callable[..., Tensor]


@pytest.fixture(params=OUR_BACKENDS)
def op(request: pytest.FixtureRequest) -> Op:
    return partial(swiglu, backend=request.param)


def make_inputs(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate, up = 2 * torch.randn(2, *shape, generator=generator)
    return {name: x.to(DEVICE, dtype).requires_grad_() for name, x in {"gate": gate, "up": up}.items()}


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (5,), (3, 7), (2, 3, 96), (2, 2, 3, 2049)])
def test_matches_float64(op: Op, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_op_matches(op, swiglu_ref, make_inputs(*shape, dtype=dtype))


LAYOUTS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "halves of one projection": lambda x: dict(zip(("gate", "up"), x.chunk(2, dim=-1), strict=True)),
    "transposed": lambda x: {"gate": x.mT, "up": x.mT},
    "rows skipped": lambda x: {"gate": x[:, ::2], "up": x[:, 1::2]},
    "expanded": lambda x: {"gate": x[:, :1].expand(-1, 6, -1), "up": x},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(op: Op, layout: str) -> None:
    x = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    inputs = {name: x.requires_grad_() for name, x in LAYOUTS[layout](x).items()}
    assert_op_matches(op, swiglu_ref, inputs)


@pytest.mark.parametrize(
    "grads",
    [lambda g: g.mT.contiguous().mT, lambda g: g[:1, :1].expand(g.shape), lambda g: g.repeat(1, 1, 2)[..., ::2]],
    ids=["transposed", "stride 0", "strided columns"],
)
def test_layouts_of_the_gradient(op: Op, grads: Callable[[Tensor], Tensor]) -> None:
    assert_op_matches(op, swiglu_ref, make_inputs(4, 5, 33), grads=grads)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_nothing_to_do(op: Op, shape: tuple[int, ...]) -> None:
    assert op(**make_inputs(*shape)).shape == shape


@needs_cpp
@each_dtype
def test_values_at_the_ends(dtype: torch.dtype) -> None:
    """Where an exponential overflows and underflows, and beyond numbers, C++ gives what PyTorch does."""
    largest = torch.finfo(dtype).max
    ends = [0.0, -0.0, 20.0, -20.0, 90.0, -90.0, 1e4, -1e4, largest, -largest, torch.inf, -torch.inf, torch.nan]
    gate = torch.tensor(ends, dtype=dtype).repeat(3)
    actual, expected = (f(gate, torch.ones_like(gate)) for f in (partial(swiglu, backend="cpp"), swiglu_ref))
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=torch.finfo(dtype).eps, atol=1e-30)


@pytest.mark.parametrize(
    ("name", "dtype"), [("swiglu_cpp", torch.float32), *(("swiglu", dtype) for dtype in KERNEL_DTYPES)], ids=str
)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    library.opcheck(getattr(torch.ops.madformer, name).default, tuple(make_inputs(3, 40, dtype=dtype).values()))


def test_compiles_whole(op: Op) -> None:
    compiled = torch.compile(op, fullgraph=True, backend=COMPILER)
    for rows in (3, 3, 5):
        assert_op_matches(compiled, swiglu_ref, make_inputs(rows, 40))


def test_autocast(op: Op) -> None:
    """No op that autocast casts: the result has the dtype of the arguments."""
    inputs = make_inputs(3, 40, dtype=torch.bfloat16)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert_op_matches(op, swiglu_ref, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": torch.zeros(3, 5)}, r"up must have gate's shape"),
        ({"up": torch.zeros(3, 4).half()}, r"up must have gate's dtype torch.float32, got torch.float16"),
        ({"up": torch.zeros(3, 4, device="meta")}, "up must have gate's device"),
        ({"backend": "flex"}, "backend='flex' must be one of auto, triton, cpp, reference for swiglu"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    arguments = {"gate": torch.zeros(3, 4, device=DEVICE), "up": torch.zeros(3, 4, device=DEVICE), **change}
    with pytest.raises(ValueError, match=message):
        swiglu(**arguments)


def test_integers_are_refused() -> None:
    gate = torch.zeros(3, 4, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"gate must be torch\.float32 or"):
        swiglu(gate, gate, backend="triton")
