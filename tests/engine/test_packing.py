"""Packed weights: the same numbers, the same parameters, and never stale ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import nn

from madformer.config import tiny
from madformer.engine import packing
from madformer.engine.options import SamplingOptions
from madformer.engine.packing import PackedConv2d, PackedLinear, can_pack, digest, packed
from madformer.engine.sampler import Sampler
from madformer.model import MADFormer
from tests.helpers.testing import assert_within_budget, perturb, relative_error

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _packs_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LEAST_WEIGHTS", 0)


def make_model(dtype: torch.dtype = torch.float32) -> MADFormer:
    torch.manual_seed(0)
    model = perturb(MADFormer(tiny())).to(dtype)
    assert isinstance(model, MADFormer)
    if not can_pack(model):
        pytest.skip(f"oneDNN does not run packed {dtype} weights on this processor")
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("stride", "size", "bias"), [(1, 3, True), (2, 3, True), (1, 1, False)])
@torch.inference_mode()
def test_convolution(stride: int, size: int, bias: bool, dtype: torch.dtype) -> None:
    make_model(dtype)
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, size, stride=stride, padding=size // 2, bias=bias)
    layer = PackedConv2d(conv.to(dtype))
    # a second shape, and a layout that is not channels-last
    for shape, layout in (((2, 16, 8, 8), torch.channels_last), ((3, 16, 6, 6), torch.contiguous_format)):
        x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        double = [None if t is None else t.double() for t in (conv.weight, conv.bias)]
        oracle = F.conv2d(x.double(), *double, stride=stride, padding=size // 2)
        assert_within_budget(layer(x), oracle, conv(x))
        # the other addend is left as it is
        other = torch.randn(oracle.shape).to(dtype).contiguous(memory_format=layout)
        before = other.clone()
        assert_within_budget(layer.plus(x, other), other.double() + oracle, other + conv(x))
        assert torch.equal(other, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_linear(bias: bool, dtype: torch.dtype) -> None:
    make_model(dtype)
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias).to(dtype)
    layer = PackedLinear(linear)
    for shape in ((2, 5, 64), (3, 64)):
        x = torch.randn(shape).to(dtype)
        oracle = F.linear(x.double(), *[None if t is None else t.double() for t in (linear.weight, linear.bias)])
        assert_within_budget(layer(x), oracle, linear(x))


def test_a_packed_model_shares_the_parameters() -> None:
    model = make_model()
    duplicate = packed(model)
    own = dict(model.named_parameters())
    assert all(parameter is own[name] for name, parameter in duplicate.named_parameters())
    kinds = {type(module) for module in duplicate.modules()}
    assert {PackedConv2d, PackedLinear} <= kinds
    assert not {nn.Conv2d, nn.Linear} & {type(module) for module in duplicate.layers.modules()}
    assert not any(isinstance(module, (PackedConv2d, PackedLinear)) for module in model.modules())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_are_the_same(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    noise = torch.randn(2, 4, 16, 4, generator=torch.Generator().manual_seed(0))
    plain, fast = (
        Sampler(model, DDIMScheduler(), pack_weights=pack).plan(2, SamplingOptions(3)).run(noise)
        for pack in (False, True)
    )
    assert relative_error(fast, plain) < (1e-5 if dtype == torch.float32 else 0.05)


def test_a_plan_follows_the_weights() -> None:
    """Written to in place, or loaded anew: the next run uses them."""
    model, noise = make_model(), torch.randn(1, 4, 16, 4, generator=torch.Generator().manual_seed(0))
    plan = Sampler(model, DDIMScheduler()).plan(1, SamplingOptions(2))

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        fresh = Sampler(model, DDIMScheduler(), pack_weights=False).plan(1, SamplingOptions(2))
        return plan.run(noise), fresh.run(noise)

    before, _ = both()
    with torch.no_grad():
        model.downsampler.conv_in.weight.mul_(1.5)
    ours, expected = both()
    assert relative_error(ours, expected) < 1e-5 < relative_error(ours, before)
    model.load_state_dict({name: tensor * 0.9 for name, tensor in model.state_dict().items()})
    changed, expected = both()
    assert relative_error(changed, expected) < 1e-5 < relative_error(changed, ours)


@pytest.mark.parametrize("extension", [True, False])
def test_a_digest_sees_every_bit(extension: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every two signs, which products of words would let cancel each other; and order."""
    if not extension:
        monkeypatch.setattr(packing, "_CONTENT_HASH", None)
    else:
        pytest.importorskip("madformer._C", reason="madformer._C is not built")
        assert packing._CONTENT_HASH is not None, "an extension of older sources"
    weight = torch.randn(75, generator=torch.Generator().manual_seed(0))
    content = weight.view(torch.uint8).numpy()
    seen = {digest(weight)}
    for at in range(8 * len(content)):
        content[at // 8] ^= 1 << at % 8
        seen.add(digest(weight))
        content[at // 8] ^= 1 << at % 8
    assert len(seen) == 1 + 8 * len(content)
    for second in range(len(weight)):
        for first in range(second):
            signs = torch.ones_like(weight)
            signs[[first, second]] = -1
            seen.add(digest(weight * signs))
    assert len(seen) == 1 + 8 * len(content) + len(weight) * (len(weight) - 1) // 2
    assert digest(weight) in seen
    assert digest(weight.flip(0)) not in seen
    image = torch.randn(4, 3, 5, 5)
    assert digest(image) == digest(image.clone())
    assert digest(image[:, :, ::2]) == digest(image[:, :, ::2].contiguous())
