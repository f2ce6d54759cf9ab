"""Attention of a few tokens to each other against float64."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, library

from madformer.kernels.self_attention import SHORT, self_attention, self_attention_ref
from tests.helpers.testing import COMPILER, DEVICE, assert_op_matches, each_dtype, needs_cpp

cpp = functools.partial(self_attention, backend="cpp")


def make_inputs(batch: int, tokens: int, width: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Thirds of one packed projection."""
    packed = torch.randn(batch, tokens, 3 * width, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    return dict(zip(("q_BLC", "k_BLC", "v_BLC"), packed.chunk(3, dim=-1), strict=True))


@needs_cpp
@each_dtype
def test_matches_float64(dtype: torch.dtype) -> None:
    for shape, heads in (((2, 1, 3), 1), ((3, 16, 24), 2), ((1, 37, 40), 5), ((2, 150, 6), 1)):
        inputs = make_inputs(*shape, dtype=dtype)
        op, reference = (functools.partial(f, num_heads=heads) for f in (cpp, self_attention_ref))
        assert_op_matches(op, reference, inputs)
        transposed = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in inputs.items()}
        assert torch.equal(op(**transposed), op(**inputs))


@needs_cpp
def test_nothing_to_do_and_faults() -> None:
    assert cpp(**make_inputs(0, 4, 6), num_heads=2).shape == (0, 4, 6)
    inputs = make_inputs(2, 5, 6)
    inputs["k_BLC"][1, 3, 4] = torch.nan
    out = cpp(**inputs, num_heads=2)
    assert torch.equal(out.isfinite(), self_attention_ref(**inputs, num_heads=2).isfinite())


@needs_cpp
def test_opcheck_and_compiles_whole() -> None:
    inputs = make_inputs(2, 5, 6)
    library.opcheck(torch.ops.madformer.self_attention_cpp.default, (*inputs.values(), 2))
    compiled = torch.compile(functools.partial(cpp, num_heads=2), fullgraph=True, backend=COMPILER)
    assert torch.equal(compiled(**inputs), cpp(**inputs, num_heads=2))


def test_gradients_and_many_tokens_are_the_reference_s() -> None:
    """Which "auto" takes for them; C++, asked for by name, refuses the first."""
    inputs = {name: x.clone().requires_grad_() for name, x in make_inputs(2, 5, 6).items()}
    out = self_attention(**inputs, num_heads=2)
    assert torch.equal(out, self_attention_ref(**inputs, num_heads=2))
    out.sum().backward()
    assert all(x.grad is not None for x in inputs.values())
    many = make_inputs(1, SHORT + 1, 6)
    assert torch.equal(self_attention(**many, num_heads=2), self_attention_ref(**many, num_heads=2))


@needs_cpp
def test_c_has_no_gradient() -> None:
    inputs = {name: x.clone().requires_grad_() for name, x in make_inputs(2, 5, 6).items()}
    with pytest.raises(ValueError, match="no gradient in C"):
        cpp(**inputs, num_heads=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_BLC": torch.zeros(3, 4)}, r"q_BLC must be \(B, L, C\)"),
        ({"num_heads": 4}, "num_heads=4 must divide the 6 channels"),
        ({"num_heads": 0}, "num_heads=0 must divide"),
        ({"v_BLC": torch.zeros(2, 5, 3)}, "v_BLC must have q_BLC's shape"),
        ({"backend": "triton"}, "must be one of auto, cpp, reference for self_attention"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    arguments = {**make_inputs(2, 5, 6), "num_heads": 2, **change}
    with pytest.raises(ValueError, match=message):
        self_attention(**arguments)
