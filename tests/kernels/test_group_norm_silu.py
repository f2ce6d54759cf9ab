"""GroupNorm with SiLU against float64: whole slabs and split ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend

from madformer.kernels.group_norm_silu import GroupNormSettings, choose_settings, group_norm_silu, group_norm_silu_ref
from madformer.kernels.launch import Target
from tests.helpers.testing import COMPILER, DEVICE, OUR_BACKENDS, assert_op_matches, each_dtype, needs_cpp

H200 = Target(capability=90, num_sms=132)


Op = Callable[..., Tensor]


@pytest.fixture(params=OUR_BACKENDS)
def op(request: pytest.FixtureRequest) -> Op:
    return partial(group_norm_silu, backend=request.param)


def make_inputs(
    *shape: int,
    num_groups: int = 2,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    temb: bool = False,
    mean: float = 0.5,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype | None) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    maps, channels = shape[:2]
    inputs = {
        "x_NCHW": (normal(*shape, dtype=torch.float32) + mean).to(dtype, memory_format=torch.channels_last),
        "weight": normal(channels, dtype=weight_dtype or dtype),
        "bias": normal(channels, dtype=weight_dtype or dtype),
    }
    if temb:
        inputs["temb_NC"] = normal(maps, channels, dtype=dtype)
    return {**{name: x.requires_grad_() for name, x in inputs.items()}, "num_groups": num_groups, "eps": 1e-6}


def check(op: Op, inputs: dict[str, Any], **kwargs: Any) -> None:
    maps, channels, height, width = inputs["x_NCHW"].shape
    pixels, group = height * width, channels // inputs["num_groups"]
    # Moments are sums over a slab, and everything is made of them.
    rows = dict.fromkeys(("result 0", "x_NCHW", "temb_NC"), pixels * group)
    rows |= dict.fromkeys(("weight", "bias"), maps * pixels)
    assert_op_matches(op, group_norm_silu_ref, inputs, rows=rows, **kwargs)


@pytest.fixture(params=["whole", "split", "whole, kept", "split, kept"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, of which a program takes all of a slab or up to two: a last program then has a part of one."""
    chunk = 2 if request.param.startswith("split") else 1 << 20
    settings = GroupNormSettings(block_pixels=2, chunk=2 * chunk, num_warps=1, keep=request.param.endswith("kept"))
    module = importlib.import_module("madformer.kernels.group_norm_silu")
    monkeypatch.setattr(module, "choose_settings", lambda *args, **kwargs: settings)


each_cut = pytest.mark.usefixtures("cut")


@each_dtype
@pytest.mark.parametrize("temb", [True, False])
def test_matches_float64(op: Op, temb: bool, dtype: torch.dtype) -> None:
    check(op, make_inputs(1, 6, 3, 5, dtype=dtype, temb=temb))


@pytest.mark.parametrize(("shape", "num_groups"), [((2, 8, 1, 1), 2), ((1, 7, 2, 3), 1), ((1, 4, 2, 2), 4)], ids=str)
def test_shapes(op: Op, shape: tuple[int, ...], num_groups: int) -> None:
    check(op, make_inputs(*shape, num_groups=num_groups))


def test_without_silu(op: Op) -> None:
    check(op, {**make_inputs(1, 6, 2, 3, temb=True), "silu": False})


@each_cut
@each_dtype
def test_cuts(op: Op, dtype: torch.dtype) -> None:
    check(op, make_inputs(1, 3, 3, 3, num_groups=1, dtype=dtype))


@each_cut
def test_cuts_of_many_slabs(op: Op) -> None:
    check(op, make_inputs(2, 4, 1, 5, temb=True))


@each_cut
def test_mean_that_is_large_beside_the_deviation(op: Op) -> None:
    """Float32 sums of squares would leave nothing of the variance."""
    check(op, make_inputs(1, 4, 3, 3, num_groups=1, mean=3000.0))


def test_weights_of_another_dtype(op: Op) -> None:
    inputs = make_inputs(2, 6, 2, 2, dtype=torch.bfloat16, weight_dtype=torch.float32, temb=True)
    inputs["temb_NC"] = inputs["temb_NC"].detach().float().requires_grad_()
    check(op, inputs)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "NCHW": lambda x: x[:, :6].contiguous(),
    "channels of a wider map": lambda x: x[:, 2:8],
    "expanded maps": lambda x: x[:1, :6].expand(2, -1, -1, -1),
    "expanded columns": lambda x: x[:, :6, :, :1].expand(-1, -1, -1, 3),
    "rows skipped": lambda x: x[:, :6, ::2],
    "transposed": lambda x: x[:, :6].mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(op: Op, layout: str) -> None:
    inputs = make_inputs(2, 6, 1, 1, num_groups=1)
    x = torch.randn(2, 8, 4, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    inputs["x_NCHW"] = LAYOUTS[layout](x.to(memory_format=torch.channels_last)).requires_grad_()
    inputs["bias"] = inputs["bias"].detach()[:1].expand(6).requires_grad_()
    inputs["temb_NC"] = x[0, :6, :1, 0].expand(6, 2).mT.requires_grad_()
    check(op, inputs)
    y = op(**inputs)
    stays = op.keywords["backend"] == "cpp" and inputs["x_NCHW"].is_contiguous()
    assert y.is_contiguous(memory_format=torch.contiguous_format if stays else torch.channels_last)


@each_cut
@pytest.mark.parametrize(
    "grads",
    [lambda g: g.contiguous(), lambda g: g[:1, :1, :1, :1].expand(g.shape), lambda g: g.repeat(1, 2, 1, 1)[:, ::2]],
    ids=["NCHW", "stride 0", "strided channels"],
)
def test_layouts_of_the_gradient(op: Op, grads: Callable[[Tensor], Tensor]) -> None:
    check(op, make_inputs(1, 4, 1, 5, temb=True), grads=grads)


def test_no_maps(op: Op) -> None:
    inputs = make_inputs(0, 6, 2, 2, temb=True)
    y = op(**inputs)
    y.sum().backward()
    assert y.shape == (0, 6, 2, 2)
    assert inputs["weight"].grad.eq(0).all()
    assert inputs["temb_NC"].grad.shape == (0, 6)


@pytest.mark.parametrize("frozen", ["x_NCHW", "weight", "temb_NC"])
def test_some_gradients_only(op: Op, frozen: str) -> None:
    """Against the op itself: PyTorch's crashes on the CPU for a channels-last map that needs no gradient."""

    def gradients(inputs: dict[str, Any]) -> dict[str, Tensor | None]:
        op(**inputs).square().sum().backward()
        return {name: x.grad for name, x in inputs.items() if isinstance(x, Tensor)}

    expected, inputs = gradients(make_inputs(1, 6, 2, 2, temb=True)), make_inputs(1, 6, 2, 2, temb=True)
    inputs[frozen] = inputs[frozen].detach()
    for name, grad in gradients(inputs).items():
        assert grad is None if name == frozen else torch.equal(grad, expected[name])


@pytest.mark.parametrize("backend", ["reference", *OUR_BACKENDS])
def test_is_what_a_residual_block_computes(backend: str) -> None:
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=4, out_channels=6, temb_channels=4, groups=2).to(DEVICE)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, temb = torch.randn(1, 4, 3, 3, device=DEVICE), torch.randn(1, 4, device=DEVICE)

    def norm(which: torch.nn.GroupNorm, x: Tensor, temb_NC: Tensor | None = None) -> Tensor:
        shape = which.num_groups, which.weight, which.bias
        return group_norm_silu(x, *shape, eps=which.eps, temb_NC=temb_NC, backend=backend)

    hidden = block.conv1(norm(block.norm1, x))
    hidden = block.conv2(norm(block.norm2, hidden, block.time_emb_proj(torch.nn.functional.silu(temb))))
    torch.testing.assert_close(block.conv_shortcut(x) + hidden, block(x, temb))


@each_cut
def test_is_deterministic(op: Op) -> None:
    def run() -> list[Tensor]:
        inputs = make_inputs(1, 4, 1, 5, temb=True)
        op(**inputs).square().sum().backward()
        return [inputs[name].grad for name in ("x_NCHW", "weight", "bias", "temb_NC")]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@needs_cpp
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels last", "planes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maps_of_several_pieces_do_not_depend_on_threads(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Larger than a piece of C++'s and than what one thread takes, with pixels and channels that no vector divides."""
    inputs, op = (
        make_inputs(1, 59, 57, 81, num_groups=1, dtype=dtype, temb=True),
        partial(group_norm_silu, backend="cpp"),
    )
    inputs["x_NCHW"] = inputs["x_NCHW"].detach().contiguous(memory_format=layout).requires_grad_()
    check(op, inputs)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        tensors = [x for x in inputs.values() if isinstance(x, Tensor)]
        y = op(**inputs)
        return [y, *torch.autograd.grad(y.square().sum(), tensors)]

    before = torch.get_num_threads()
    try:
        assert all(torch.equal(one, two) for one, two in zip(run(1), run(2), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["", "_cpp"])
@pytest.mark.parametrize("temb", [True, False])
def test_opcheck(temb: bool, name: str) -> None:
    inputs = make_inputs(1, 3, 2, 2, num_groups=1, temb=temb, dtype=torch.bfloat16)
    tensors = inputs["x_NCHW"], inputs.get("temb_NC"), inputs["weight"], inputs["bias"]
    op = getattr(torch.ops.madformer, f"group_norm_silu{name}")
    library.opcheck(op.default, (*tensors, 1, 1e-6, True))


@pytest.mark.parametrize("name", ["", "_cpp"])
def test_opcheck_of_the_backward(name: str) -> None:
    inputs = make_inputs(1, 3, 2, 2, num_groups=1, temb=True)
    tensors = [inputs[name].detach() for name in ("x_NCHW", "temb_NC", "weight", "bias")]
    y, mean, rstd = torch.ops.madformer.group_norm_silu(*tensors, 1, 1e-6, True)
    library.opcheck(
        getattr(torch.ops.madformer, f"group_norm_silu_backward{name}").default,
        (y, *tensors, mean, rstd, 1, True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_whole_and_once(op: Op) -> None:
    counter = CompileCounterWithBackend(COMPILER)
    compiled = torch.compile(op, fullgraph=True, backend=counter)
    inputs = make_inputs(1, 3, 2, 2, num_groups=1, temb=True)
    for _ in range(2):
        assert_op_matches(compiled, group_norm_silu_ref, inputs)
    # The float64 and eager runs are the reference's: one graph is the kernel's.
    assert counter.frame_count == 1


def test_autocast(op: Op) -> None:
    """No op that autocast casts: the result has the dtype of the map."""
    inputs = make_inputs(1, 6, 2, 2, dtype=torch.bfloat16, weight_dtype=torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        check(op, inputs)


MODEL_SHAPES = [
    (channels, side) for side, widths in ((32, (512, 1024, 1536)), (16, (512, 1024, 1536, 2048))) for channels in widths
]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("maps", [1, 2, 8, 16, 64])
@pytest.mark.parametrize(("channels", "side"), MODEL_SHAPES)
def test_settings_cover_slabs_and_fill_the_gpu(channels: int, side: int, maps: int, backward: bool) -> None:
    slabs, num_pixels = maps * 8, side**2
    settings = choose_settings(slabs, num_pixels, channels // 8, H200, backward=backward)
    splits = -(-num_pixels // settings.chunk)
    assert settings.chunk % settings.block_pixels == 0
    assert settings.block_pixels & (settings.block_pixels - 1) == 0
    assert slabs * splits >= 0.9 * H200.num_sms or settings.chunk == settings.block_pixels
    # A thread has 16 or 32 elements of a tile: more would spill, fewer would wait for memory.
    assert settings.block_pixels * (channels // 8) / (32 * settings.num_warps) <= 32


def test_one_program_a_slab_where_maps_are_many_or_tiny() -> None:
    for slabs, num_pixels, group_channels in ((128, 1024, 64), (8, 64, 6), (8, 16, 12)):
        settings = choose_settings(slabs, num_pixels, group_channels, H200, backward=False)
        assert settings.chunk >= num_pixels
    assert choose_settings(8, 1024, 64, H200, backward=False).chunk < 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_NCHW": torch.zeros(2, 6, 4)}, r"x_NCHW must be \(N, C, H, W\) with channels and pixels, got \(2, 6, 4\)"),
        ({"x_NCHW": torch.zeros(2, 6, 0, 4)}, r"x_NCHW must be \(N, C, H, W\) with channels and pixels"),
        ({"x_NCHW": torch.zeros(2, 6, 4, 4, dtype=torch.int64)}, "x_NCHW must be torch.float32 or"),
        ({"num_groups": 4}, "num_groups=4 must divide the 6 channels of x_NCHW"),
        ({"num_groups": 0}, "num_groups=0 must divide"),
        ({"weight": torch.zeros(5)}, r"weight must have the shape \(6,\), got \(5,\)"),
        ({"weight": torch.zeros(6).double()}, "weight must be torch.float32 or"),
        ({"bias": torch.zeros(6, device="meta")}, "bias must be on"),
        ({"temb_NC": torch.zeros(1, 6)}, r"temb_NC must have the shape \(2, 6\), got \(1, 6\)"),
        ({"temb_NC": torch.zeros(2, 6, device="meta")}, "temb_NC must be on"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
        ({"eps": float("nan")}, "eps=nan must be positive"),
        ({"backend": "flex"}, "backend='flex' must be one of auto, triton, cpp, reference for group_norm_silu"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    inputs = {name: x.detach() if isinstance(x, Tensor) else x for name, x in make_inputs(2, 6, 4, 4).items()}
    change = {
        name: x.to(DEVICE) if isinstance(x, Tensor) and x.device.type == "cpu" else x for name, x in change.items()
    }
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**{**inputs, "backend": "triton", **change})


def test_groups_too_wide_for_a_program() -> None:
    x, weight = torch.zeros(1, 4097, 1, 1, device=DEVICE), torch.zeros(4097, device=DEVICE)
    with pytest.raises(ValueError, match="num_groups=1 puts more than 4096 channels into a group"):
        group_norm_silu(x, 1, weight, weight, eps=1e-6, backend="triton")


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("maps", [1, 16, 64])
@pytest.mark.parametrize(("channels", "side"), [(512, 32), (1024, 16), (1536, 16)])
def test_shapes_of_the_model(op: Op, channels: int, side: int, maps: int, dtype: torch.dtype) -> None:
    check(op, make_inputs(maps, channels, side, side, num_groups=8, dtype=dtype, temb=True))
