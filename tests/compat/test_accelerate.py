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
from diffusers import DDIMScheduler
from torch import Tensor, nn

import madformer
from madformer.kernels.dispatch import BackendUnavailableError
from tests.helpers.compat_cases import (
    BASELINE,
    CASES,
    OUTPUT_TOLERANCE,
    TEXT_BASELINE,
    TEXT_CASES,
    Released,
    arguments,
    assert_golden_samples,
    assert_golden_training,
    loss_of,
    make_compat,
    samples,
)
from tests.helpers.testing import GoldenCase, relative_error


def name_of(case: GoldenCase) -> str:
    return f"{case.folder.name}-{case.name}"


@pytest.fixture(params=[BASELINE, TEXT_BASELINE], ids=name_of)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return request.param


@pytest.fixture
def released(case: GoldenCase) -> Released:
    return Released(make_compat(case))


@pytest.mark.parametrize("case", [*CASES, *TEXT_CASES], ids=name_of)
def test_outputs_losses_and_gradients_are_the_released_ones(case: GoldenCase) -> None:
    assert_golden_training(madformer.accelerate(Released(make_compat(case))), case)


@samples([BASELINE, *TEXT_CASES], name_of)
def test_samples_are_the_released_ones(case: GoldenCase, scheduler: str) -> None:
    """What the sampler of the model with text does block-locally included."""
    assert_golden_samples(madformer.accelerate(Released(make_compat(case))), case, scheduler)


def test_nothing_but_forward_and_sample_changes(released: Released, case: GoldenCase) -> None:
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
    loss_of(released, case).backward()
    released.zero_grad(set_to_none=True)
    released.sample(*arguments(case)[:-3], DDIMScheduler(), 2, (3, 4, 64, 4), dtype=torch.float)
    assert snapshot() == before
    assert isinstance(released, Released)
    assert type(released) is Released


def test_restore_brings_back_the_own_forward(released: Released, case: GoldenCase) -> None:
    madformer.restore(madformer.accelerate(released))
    assert not {"forward", "sample"} & released.__dict__.keys()
    with pytest.raises(AssertionError, match="no forward of its own"):
        released(*arguments(case))
    with pytest.raises(ValueError, match="this Released is not accelerated"):
        madformer.restore(released)
    madformer.accelerate(released)(*arguments(case))


def test_again_changes_the_backends_alone(released: Released) -> None:
    model = madformer.accelerate(released, backend="reference").forward.__self__.model
    native = model.to_native()
    assert (native.layers[0].backend, native.attention_backend) == ("reference", "reference")
    assert madformer.accelerate(released, attention_backend="sdpa").forward.__self__.model is model
    assert (native.layers[0].backend, native.attention_backend) == ("auto", "sdpa")
    assert madformer.restore(released).__dict__.get("forward") is None


def test_unavailable_backend_leaves_the_module_alone(released: Released) -> None:
    with pytest.raises(BackendUnavailableError, match="flash_attn"):
        madformer.accelerate(released, attention_backend="flash_attn")
    assert "forward" not in released.__dict__


@pytest.mark.parametrize("case", [*CASES, *TEXT_CASES], ids=name_of)
def test_our_own_class_takes_the_backends(case: GoldenCase) -> None:
    """Also the network that predicts the condition where the diffusion layers do not ask for it."""
    compat = make_compat(case)
    assert madformer.accelerate(compat, attention_backend="reference") is compat
    networks = [compat.to_native(), compat.__dict__.get("conditioning", compat.to_native())]
    assert [network.attention_backend for network in networks] == ["reference", "reference"]
    assert "forward" not in compat.__dict__


def test_replaced_weights_are_followed(released: Released, case: GoldenCase) -> None:
    """``load_state_dict(assign=True)``, casts and functional calls put other tensors in the parameters' places."""
    madformer.accelerate(released)
    doubled = {name: nn.Parameter(2 * p.detach()) for name, p in released.named_parameters()}
    state = released.state_dict() | doubled
    expected = madformer.accelerate(Released(make_compat(case)))
    expected.load_state_dict(state)
    wanted = expected(*arguments(case))[0]
    before = released(*arguments(case))[0]
    assert relative_error(torch.func.functional_call(released, doubled, arguments(case))[0], wanted) < 1e-6
    assert torch.equal(released(*arguments(case))[0], before)
    released.load_state_dict(state, assign=True)
    assert torch.equal(released(*arguments(case))[0], wanted)
    released.double()
    *text, clean, noised, t = arguments(case)
    result = released(*text, clean.double(), noised.double(), t)[0]
    assert result.dtype == torch.float64
    assert relative_error(result, wanted) < OUTPUT_TOLERANCE


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_are_accelerated_and_stand_alone(
    released: Released, case: GoldenCase, duplicate: Callable[..., nn.Module]
) -> None:
    madformer.accelerate(released)
    before = released(*arguments(case))[0]
    double = duplicate(released)
    assert type(double) is Released
    assert torch.equal(double(*arguments(case))[0], before)
    with torch.no_grad():
        for parameter in double.parameters():
            parameter.zero_()
    assert not double(*arguments(case))[0].any()
    assert torch.equal(released(*arguments(case))[0], before)
    with pytest.raises(AssertionError, match="no forward of its own"):
        madformer.restore(double)(*arguments(case))


def test_hooks_and_optimiser_made_before(released: Released, case: GoldenCase) -> None:
    seen: list[str] = []
    released.register_forward_pre_hook(lambda *_: seen.append("before"))
    released.register_forward_hook(lambda *_: seen.append("after"))
    optimizer = torch.optim.AdamW(released.parameters(), lr=1e-5)
    madformer.accelerate(released)
    first = loss_of(released, case)
    first.backward()
    optimizer.step()
    assert seen == ["before", "after"]
    assert loss_of(released, case) < first


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
    model.blocks[2].register_forward_hook(lambda *_: None)
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


def without_logits(model: Released) -> nn.Module:
    del model.lm_head
    return model


def with_other_text_order(model: Released) -> nn.Module:
    model.text_position_ids = torch.zeros(1, model.max_len, dtype=torch.long)
    return model


def with_other_frequencies(model: Released) -> nn.Module:
    model.text_rope.inv_freq /= 4
    return model


def with_rope_of_its_own(model: Released) -> nn.Module:
    rope = copy.deepcopy(model.text_rope)
    rope.inv_freq = rope.inv_freq[:-1]
    model.blocks[1].self_attn.text_rope = rope
    return model


def with_tied_logits(model: Released) -> nn.Module:
    model.lm_head.weight = model.embed_tokens.weight
    return model


DIFFERENCES = [
    (with_fewer_parts, "Released is no released MADFormer: it has no downsampler$"),
    (with_wrapper, r"DataParallel is no .* it has no boi_block, .*; pass the Released inside it$"),
    (with_own_forward, "forward of this Released was replaced by something else"),
    (with_other_names, r"unknown parameter upsampler.extra.weight; unknown parameter upsampler.extra.bias$"),
    (with_other_shape, r"blocks.1.self_attn.proj_list.0.bias has shape \(7,\), not \(128,\)$"),
    (with_gelu, r"blocks.2.mlp_list.1.act_fn is not SiLU$"),
    (with_adapter, r"blocks.0.self_attn.qkv_list.0 is a Adapter, not a Linear$"),
    (with_hook, r"blocks.2 has hooks, which would not run$"),
    (with_other_epsilon, r"blocks.1.post_attention_layernorm_list.0 is no RMS norm with variance_epsilon=1e-05$"),
    (with_dropout, r"blocks.0.self_attn.proj_drop drops 0.1 of its input$"),
    (with_other_order, r"position_ids_precompute numbers the tokens in another order$"),
]
TEXT_DIFFERENCES = [
    (without_logits, "Released is no released MADFormer: it has no lm_head$"),
    (with_other_text_order, r"text_position_ids numbers the tokens in another order$"),
    (with_other_frequencies, r": text_rope.inv_freq has other frequencies than those of text_rope.base=10000$"),
    (with_rope_of_its_own, r": blocks.1.self_attn.text_rope.inv_freq has other frequencies than .*=10000$"),
    (with_tied_logits, r"no parameter lm_head.weight$"),
]


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        *((case, *difference) for case in (BASELINE, TEXT_BASELINE) for difference in DIFFERENCES),
        *((TEXT_BASELINE, *difference) for difference in TEXT_DIFFERENCES),
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


# The released code itself: clones of its branches

CLONES = {"ffhq": "MADFORMER_RELEASED", "imagenet": "MADFORMER_RELEASED_IMAGENET"}
VOCABULARY = {"vocab_size": 11, "pad_token_id": 3, "max_position_embeddings": 3, "rope_theta": 100.0}


@pytest.mark.parametrize("flags", [{}, {"clear_clean": True}, {"clear_cond": True}, {"denoising_mlp": True}], ids=str)
@pytest.mark.parametrize("branch", CLONES)
def test_released_class(branch: str, flags: dict[str, bool], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("einops")
    if CLONES[branch] not in os.environ:
        pytest.skip(f"{CLONES[branch]} does not name a clone")
    from benchmarks.released import LATENT_CHANNELS, TINY, load_released

    has_text = branch == "imagenet"
    path = tmp_path / "model.json"
    path.write_text(json.dumps(TINY.model_config() | (VOCABULARY if has_text else {})))
    module = load_released(Path(os.environ[CLONES[branch]]), "cpu")
    # transformers 5 calls it by another name, and the released code by this one
    module.MADFormerConfig.rope_theta = VOCABULARY["rope_theta"]
    torch.manual_seed(0)
    model = module.MADFormer(
        **TINY.constructor_arguments(), in_channels=LATENT_CHANNELS, model_config_path=str(path), **flags
    )
    # FlexAttention cannot train on a CPU; the same masks as tensors.
    for name in ("flex_attnmask", "flex_attnmask_mlp"):
        mask = getattr(model, name)
        queries, keys = (torch.arange(length) for length in mask.seq_lengths)
        setattr(model, name, mask.mask_mod(0, 0, queries[:, None], keys[None]))
    clean, noised = torch.randn(2, *TINY.latents)
    t = torch.randint(0, 1000, TINY.latents[:2])
    text = [torch.randint(0, 11, (len(t), 3))] if has_text else []

    def run() -> tuple[list[Tensor], dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        outputs = [output for output in model(*text, clean, noised, t) if output is not None]
        sum(output.square().mean() for output in outputs).backward()
        return [output.detach() for output in outputs], {n: p.grad.clone() for n, p in model.named_parameters()}

    def sample() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return model.sample(*text, DDIMScheduler(), 3, TINY.latents, generator=generator, dtype=torch.float)

    expected, expected_gradients = run()
    expected_sample = sample()
    madformer.accelerate(model)
    actual, gradients = run()
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-5
    scale = max(gradient.norm().item() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm().item() < 1e-4 * gradient.norm().item() + 1e-6 * scale, name
    assert relative_error(sample(), expected_sample) < 1e-4
    model = madformer.restore(model)
    restored, _ = run()
    assert all(torch.equal(r, e) for r, e in zip(restored, expected, strict=True))
