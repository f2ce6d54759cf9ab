"""A 3x3 convolution by minimal filtering against float64."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, library

from madformer.kernels.conv3x3 import conv3x3, conv3x3_ref
from tests.helpers.testing import COMPILER, DEVICE, assert_op_matches, needs_cpp

cpp = functools.partial(conv3x3, backend="cpp")
# maps, channels of input and result, height, width
SHAPES = [(2, 5, 3, 4, 6), (1, 19, 40, 5, 3), (3, 1, 1, 1, 1), (2, 8, 16, 1, 7), (5, 33, 9, 2, 2)]


def make_inputs(
    maps: int, channels: int, results: int, height: int, width: int, *, bias: bool = True
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(maps, channels, height, width, generator=generator)
    inputs = {
        "x_NCHW": x.contiguous(memory_format=torch.channels_last),
        "weight_KC33": torch.randn(results, channels, 3, 3, generator=generator),
    }
    if bias:
        inputs["bias_K"] = torch.randn(results, generator=generator)
    return {name: value.to(DEVICE).requires_grad_() for name, value in inputs.items()}


@needs_cpp
@pytest.mark.parametrize("doubled", [False, True])
def test_matches_float64(doubled: bool) -> None:
    op, reference = (functools.partial(f, doubled=doubled) for f in (cpp, conv3x3_ref))
    for maps, channels, results, height, width in SHAPES:
        inputs = make_inputs(maps, channels, results, height, width, bias=channels != 8)
        rows = dict.fromkeys(("weight_KC33", "bias_K"), maps * height * width * (4 if doubled else 1))
        # A number of a tile is a sum of 16 products of sums.
        rows |= {"x_NCHW": 16 * 9 * results, "result 0": 16 * 9 * channels}
        assert_op_matches(op, reference, inputs, rows=rows)
        assert_op_matches(op, reference, inputs, rows=rows, grads=lambda g: g.mT.clone().mT)


@needs_cpp
def test_layouts_and_parts_that_need_no_gradient() -> None:
    inputs = make_inputs(2, 5, 3, 4, 6)
    planes = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in inputs.items()}
    assert torch.equal(cpp(**planes), cpp(**inputs))
    packed = torch.cat((planes["x_NCHW"], planes["x_NCHW"]), 1).contiguous(memory_format=torch.channels_last)
    assert torch.equal(cpp(**{**planes, "x_NCHW": packed[:, 5:]}), cpp(**inputs))
    cpp(**inputs).square().sum().backward()
    for name, x in inputs.items():
        alone = {**planes, name: planes[name].requires_grad_()}
        cpp(**alone).square().sum().backward()
        assert torch.equal(planes[name].grad, x.grad), name
        planes[name] = planes[name].detach()


@needs_cpp
def test_empty_batch_and_faults() -> None:
    inputs = make_inputs(0, 5, 3, 4, 6)
    out = cpp(**inputs)
    assert out.shape == (0, 3, 4, 6)
    out.sum().backward()
    assert not inputs["weight_KC33"].grad.any()
    inputs = {name: x.detach() for name, x in make_inputs(2, 5, 3, 8, 8).items()}
    inputs["x_NCHW"][1, 3, 2, 2] = torch.inf
    out, expected = cpp(**inputs), conv3x3_ref(**inputs)
    assert (out.isfinite() | ~expected.isfinite())[0].all()
    assert not out[1, :, 1:4, 1:4].isfinite().any()


@needs_cpp
def test_opcheck_and_compiles_whole() -> None:
    x = make_inputs(2, 5, 3, 3, 6)["x_NCHW"].detach()
    tiles = torch.ops.madformer.winograd_spread_cpp(x, False)
    ops = torch.ops.madformer
    library.opcheck(ops.winograd_spread_cpp.default, (x, True))
    library.opcheck(ops.winograd_spread_backward_cpp.default, (tiles, 3, 6, False))
    library.opcheck(ops.winograd_gather_cpp.default, (tiles, torch.ones(5), 3, 6, False))
    library.opcheck(ops.winograd_gather_backward_cpp.default, (x, True))
    inputs = {name: value.detach() for name, value in make_inputs(2, 5, 3, 4, 6).items()}
    compiled = torch.compile(cpp, fullgraph=True, backend=COMPILER)
    torch.testing.assert_close(compiled(**inputs), cpp(**inputs))


@needs_cpp
def test_auto_takes_it_for_training_alone() -> None:
    """Where it pays: the bits of the result tell which it was."""
    wide, narrow = make_inputs(2, 128, 128, 3, 2), make_inputs(2, 128, 127, 3, 2)
    assert torch.equal(conv3x3(**wide), cpp(**wide))
    assert not torch.equal(cpp(**wide), conv3x3_ref(**wide))
    assert torch.equal(conv3x3(**narrow), conv3x3_ref(**narrow))
    assert torch.equal(conv3x3(**narrow, doubled=True), cpp(**narrow, doubled=True))
    with torch.no_grad():
        assert torch.equal(conv3x3(**wide), conv3x3_ref(**wide))
    assert torch.equal(conv3x3(**{name: x.detach() for name, x in wide.items()}), conv3x3_ref(**wide))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3x3(**wide).dtype == torch.bfloat16
    double = {name: x.detach().double().requires_grad_() for name, x in wide.items()}
    assert torch.equal(conv3x3(**double), conv3x3_ref(**double))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_NCHW": torch.zeros(3, 4)}, r"x_NCHW must be \(N, C, H, W\)"),
        ({"x_NCHW": torch.zeros(1, 5, 0, 2)}, "with channels and pixels"),
        ({"weight_KC33": torch.zeros(3, 5, 1, 1)}, r"weight_KC33 must have the shape \(3, 5, 3, 3\)"),
        ({"bias_K": torch.zeros(4)}, r"bias_K must have the shape \(3,\)"),
        ({"backend": "triton"}, "must be one of auto, cpp, reference for conv3x3"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    inputs = {name: x.detach() for name, x in make_inputs(2, 5, 3, 4, 6).items()}
    with pytest.raises(ValueError, match=message):
        conv3x3(**{**inputs, **change})


@needs_cpp
def test_c_takes_float32_alone() -> None:
    inputs = {name: x.detach().bfloat16() for name, x in make_inputs(2, 5, 3, 4, 6).items()}
    with pytest.raises(ValueError, match=r"x_NCHW must be torch.float32"):
        cpp(**inputs)
