"""``madformer.accelerate`` on a model that is not ours: a stand-in with the released names, against golden values."""

from __future__ import annotations

import copy
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compat_cases import BASELINE, CASES, Released, arguments, loss_of, make_compat
from diffusers import DDIMScheduler
from torch import Tensor, nn

import madformer
from madformer.kernels.dispatch import BackendUnavailableError
from testing import GoldenCase, relative_error

OUTPUT_TOLERANCE, SAMPLE_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 3e-3, 1e-2


@pytest.fixture
def released() -> Released:
    return Released(make_compat())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_gradients_and_samples_are_the_released_ones(case: GoldenCase) -> None:
    model, golden = madformer.accelerate(Released(make_compat(case))), case.tensors()
    outputs = dict(zip(("prediction", "condition", "clean_tower"), model(*arguments(case)), strict=True))
    assert (outputs["clean_tower"] is None) == ("clean_tower" not in golden)
    for name, output in outputs.items():
        assert output is None or relative_error(output, golden[name]) < OUTPUT_TOLERANCE, name
    loss = loss_of(model, case)
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=OUTPUT_TOLERANCE)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        expected = golden[f"gradnorm.{name}"].item()
        assert parameter.grad.norm().item() == pytest.approx(expected, rel=GRADIENT_TOLERANCE, abs=1e-6), name
    if case is BASELINE:
        generator = torch.Generator().manual_seed(case.sampler_seed)
        shape = tuple(golden["sample.ddim"].shape)
        latents = model.eval().sample(DDIMScheduler(), case.steps, shape, generator=generator, dtype=torch.float)
        assert relative_error(latents, golden["sample.ddim"]) < SAMPLE_TOLERANCE


def test_nothing_but_forward_and_sample_changes(released: Released) -> None:
    def snapshot() -> dict[str, Any]:
        return {
            "attributes": {k: v for k, v in released.__dict__.items() if k not in ("forward", "sample")},
            "modules": [(name, type(part), id(part), part.training) for name, part in released.named_modules()],
            "parameters": [(name, id(p), p.data_ptr(), p.stride()) for name, p in released.named_parameters()],
            "state": {name: (t.data_ptr(), t.stride()) for name, t in released.state_dict().items()},
            "buffers": list(released.named_buffers()),
        }

    before = snapshot()
    assert madformer.accelerate(released) is released
    loss_of(released).backward()
    released.zero_grad(set_to_none=True)
    released.sample(DDIMScheduler(), 2, (1, 4, 64, 4), dtype=torch.float)
    assert snapshot() == before
    assert isinstance(released, Released)
    assert type(released) is Released


def test_restore_brings_back_the_own_forward(released: Released) -> None:
    madformer.restore(madformer.accelerate(released))
    assert not {"forward", "sample"} & released.__dict__.keys()
    with pytest.raises(AssertionError, match="no forward of its own"):
        released(*arguments())
    with pytest.raises(ValueError, match="this Released is not accelerated"):
        madformer.restore(released)
    madformer.accelerate(released)(*arguments())


def test_again_changes_the_backends_alone(released: Released) -> None:
    native = madformer.accelerate(released, backend="reference").forward.__self__.native
    assert (native.layers[0].backend, native.attention_backend) == ("reference", "reference")
    assert madformer.accelerate(released, attention_backend="sdpa").forward.__self__.native is native
    assert (native.layers[0].backend, native.attention_backend) == ("auto", "sdpa")
    assert madformer.restore(released).__dict__.get("forward") is None


def test_unavailable_backend_leaves_the_module_alone(released: Released) -> None:
    with pytest.raises(BackendUnavailableError, match="flash_attn"):
        madformer.accelerate(released, attention_backend="flash_attn")
    assert "forward" not in released.__dict__


def test_our_own_class_takes_the_backends() -> None:
    compat = make_compat()
    assert madformer.accelerate(compat, attention_backend="reference") is compat
    assert compat.to_native().attention_backend == "reference"
    assert "forward" not in compat.__dict__


def test_replaced_weights_are_followed(released: Released) -> None:
    """``load_state_dict(assign=True)``, casts and functional calls put other tensors in the parameters' places."""
    madformer.accelerate(released)
    doubled = {name: nn.Parameter(2 * p.detach()) for name, p in released.named_parameters()}
    expected = madformer.accelerate(Released(make_compat()))
    expected.load_state_dict(doubled)
    wanted = expected(*arguments())[0]
    before = released(*arguments())[0]
    assert relative_error(torch.func.functional_call(released, doubled, arguments())[0], wanted) < 1e-6
    assert torch.equal(released(*arguments())[0], before)
    released.load_state_dict(doubled, assign=True)
    assert torch.equal(released(*arguments())[0], wanted)
    released.double()
    clean, noised, t = arguments()
    result = released(clean.double(), noised.double(), t)[0]
    assert result.dtype == torch.float64
    assert relative_error(result, wanted) < OUTPUT_TOLERANCE


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_are_accelerated_and_stand_alone(released: Released, duplicate: Callable[..., nn.Module]) -> None:
    madformer.accelerate(released)
    before = released(*arguments())[0]
    double = duplicate(released)
    assert type(double) is Released
    assert torch.equal(double(*arguments())[0], before)
    with torch.no_grad():
        for parameter in double.parameters():
            parameter.zero_()
    assert not double(*arguments())[0].any()
    assert torch.equal(released(*arguments())[0], before)
    with pytest.raises(AssertionError, match="no forward of its own"):
        madformer.restore(double)(*arguments())


def test_hooks_and_optimiser_made_before(released: Released) -> None:
    seen: list[str] = []
    released.register_forward_pre_hook(lambda *_: seen.append("before"))
    released.register_forward_hook(lambda *_: seen.append("after"))
    optimizer = torch.optim.AdamW(released.parameters(), lr=1e-5)
    madformer.accelerate(released)
    first = loss_of(released)
    first.backward()
    optimizer.step()
    assert seen == ["before", "after"]
    assert loss_of(released) < first


def with_other_names(model: Released) -> nn.Module:
    model.upsampler.extra = nn.Linear(2, 2)
    return model


def with_fewer_parts(model: Released) -> nn.Module:
    del model.downsampler
    return model


def with_other_shape(model: Released) -> nn.Module:
    model.blocks[1].self_attn.proj_list[0].bias = nn.Parameter(torch.zeros(7))
    return model


def with_gelu(model: Released) -> nn.Module:
    model.blocks[2].mlp_list[1].act_fn = nn.GELU()
    return model


def with_adapter(model: Released) -> nn.Module:
    class Adapter(nn.Linear):
        pass

    model.blocks[0].self_attn.qkv_list[0].__class__ = Adapter
    return model


def with_hook(model: Released) -> nn.Module:
    model.blocks[3].register_forward_hook(lambda *_: None)
    return model


def with_other_epsilon(model: Released) -> nn.Module:
    model.blocks[1].post_attention_layernorm_list[0].variance_epsilon = 1e-3
    return model


def with_dropout(model: Released) -> nn.Module:
    model.blocks[0].self_attn.proj_drop = nn.Dropout(0.1)
    return model


def with_other_order(model: Released) -> nn.Module:
    model.position_ids_precompute = torch.zeros(2, model.spatial_len, dtype=torch.long)
    return model


def with_wrapper(model: Released) -> nn.Module:
    return nn.DataParallel(model)


def with_own_forward(model: Released) -> nn.Module:
    model.forward = lambda *_: None
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_fewer_parts, "Released is no released MADFormer: it has no downsampler$"),
        (with_wrapper, r"DataParallel is no .* it has no boi_block, .*; pass the Released inside it$"),
        (with_own_forward, "forward of this Released was replaced by something else"),
        (with_other_names, r"unknown parameter upsampler.extra.weight; unknown parameter upsampler.extra.bias$"),
        (with_other_shape, r"blocks.1.self_attn.proj_list.0.bias has shape \(7,\), not \(128,\)$"),
        (with_gelu, r"blocks.2.mlp_list.1.act_fn is not SiLU$"),
        (with_adapter, r"blocks.0.self_attn.qkv_list.0 is a Adapter, not a Linear$"),
        (with_hook, r"blocks.3 has hooks, which would not run$"),
        (with_other_epsilon, r"blocks.1.post_attention_layernorm_list.0 is no RMS norm with variance_epsilon=1e-05$"),
        (with_dropout, r"blocks.0.self_attn.proj_drop drops 0.1 of its input$"),
        (with_other_order, r"position_ids_precompute numbers the tokens in another order$"),
    ],
)
def test_what_is_not_recognised_is_one_line(
    released: Released, change: Callable[[Released], nn.Module], message: str
) -> None:
    model = change(released)
    before = dict(model.__dict__)
    with pytest.raises(ValueError, match=message) as error:
        madformer.accelerate(model)
    assert len(str(error.value).splitlines()) == 1
    assert model.__dict__ == before


# The released code itself


@pytest.mark.skipif("MADFORMER_RELEASED" not in os.environ, reason="MADFORMER_RELEASED does not name a clone")
@pytest.mark.parametrize("flags", [{}, {"clear_clean": True}, {"clear_cond": True}, {"denoising_mlp": True}], ids=str)
def test_released_class(flags: dict[str, bool], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("einops")
    from released import LATENT_CHANNELS, TINY, load_released

    path = tmp_path / "model.json"
    path.write_text(json.dumps(TINY.model_config()))
    module = load_released(Path(os.environ["MADFORMER_RELEASED"]), "cpu")
    torch.manual_seed(0)
    model = module.MADFormer(
        **TINY.constructor_arguments(),
        in_channels=LATENT_CHANNELS,
        model_config_path=str(tmp_path / "model.json"),
        **flags,
    )
    # FlexAttention cannot train on a CPU; the same masks as tensors.
    allowed = model.build_attention_mask(model.ar_len, model.block_size, torch.device("cpu"))
    own = torch.arange(len(allowed)) // model.block_size
    model.flex_attnmask, model.flex_attnmask_mlp = allowed, own[:, None] == own
    clean, noised = torch.randn(2, *TINY.latents)
    t = torch.randint(0, 1000, TINY.latents[:2])

    def run() -> tuple[list[Tensor], dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        outputs = [output for output in model(clean, noised, t) if output is not None]
        sum(output.square().mean() for output in outputs).backward()
        return [output.detach() for output in outputs], {n: p.grad.clone() for n, p in model.named_parameters()}

    expected, expected_gradients = run()
    madformer.accelerate(model)
    actual, gradients = run()
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-5
    scale = max(gradient.norm().item() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm().item() < 1e-4 * gradient.norm().item() + 1e-6 * scale, name
    model = madformer.restore(model)
    restored, _ = run()
    assert all(torch.equal(r, e) for r, e in zip(restored, expected, strict=True))
