"""The compat class with text, and the native model with the quirk fields, against what the released code computed."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from madformer import from_released
from madformer.compat.madformer_ffhq import read_model_config
from madformer.compat.madformer_imagenet import MADFormer
from madformer.conditioning.prompt import Prompt
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.model import MADFormer as NativeMADFormer
from madformer.model.blocks import to_maps
from tests.helpers.compat_cases import (
    OUTPUT_TOLERANCE,
    SAMPLE_TOLERANCE,
    SCHEDULERS,
    arguments,
    assert_golden_samples,
    assert_golden_training,
    make_compat,
    samples,
)
from tests.helpers.compat_cases import TEXT_BASELINE as BASELINE
from tests.helpers.compat_cases import TEXT_CASES as CASES
from tests.helpers.testing import GoldenCase, relative_error

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_case
def test_forward_losses_and_gradients(case: GoldenCase) -> None:
    assert_golden_training(make_compat(case), case)


@samples(CASES)
def test_samples(case: GoldenCase, scheduler: str) -> None:
    assert_golden_samples(make_compat(case), case, scheduler, times=2 if case is BASELINE else 1)


@each_case
def test_native_model_with_quirk_fields(case: GoldenCase, tmp_path: Path) -> None:
    """Saved, loaded and run by the native classes alone; what the sampler does block-locally is compat's alone."""
    make_compat(case).to_native().save_pretrained(tmp_path)
    native, golden = NativeMADFormer.from_pretrained(tmp_path), case.tensors()
    text, *latents = arguments(case)
    with torch.no_grad():
        output = native(*latents, text, return_logits=True)
    assert relative_error(to_maps(output.prediction), golden["prediction"]) < OUTPUT_TOLERANCE
    assert output.logits is not None
    assert relative_error(output.logits, golden["logits"]) < OUTPUT_TOLERANCE
    for scheduler, make_scheduler in SCHEDULERS.items():
        noise = golden[f"sample_noise.{scheduler}"]
        drawn = Sampler(native, make_scheduler()).plan(len(noise), SamplingOptions(case.steps)).run(noise, Prompt(text))
        error = relative_error(drawn, golden[f"sample.{scheduler}"])
        assert (error < SAMPLE_TOLERANCE) == (case.name != "denoising_mlp")


@each_case
def test_from_released(case: GoldenCase, tmp_path: Path) -> None:
    """Its family is told by its weights: the native class reads it as the drop-in does."""
    sizes = {name: case.geometry[name] for name in ("block_size", "ar_len", "spatial_len", "diff_depth")}
    content = {"ema": case.weights(), "args": argparse.Namespace(**sizes, **case.flags)}
    torch.save(content, tmp_path / "ckpts.pt")
    text, *latents = arguments(case)
    native = from_released(tmp_path / "ckpts.pt", model_config=case.model_config)
    model = MADFormer.from_released(tmp_path / "ckpts.pt", model_config=case.model_config)
    assert native.config == model.config == make_compat(case).config
    with torch.no_grad():
        predictions = to_maps(native(*latents, text).prediction), model(text, *latents)[0]
    for prediction in predictions:
        assert relative_error(prediction, case.tensors()["prediction"]) < OUTPUT_TOLERANCE
    for read in (from_released, MADFormer.from_released):
        with pytest.raises(ValueError, match="a model with text needs model_config"):
            read(tmp_path / "ckpts.pt")


def test_texts_rotated_by_another_base_are_refused(tmp_path: Path) -> None:
    """The weights hold the frequencies, and the configuration says what they were made of."""
    sizes = {name: BASELINE.geometry[name] for name in ("block_size", "ar_len", "spatial_len", "diff_depth")}
    torch.save({"ema": BASELINE.weights(), "args": argparse.Namespace(**sizes)}, tmp_path / "ckpts.pt")
    other = {**read_model_config(BASELINE.model_config), "rope_theta": 123.0}
    refusal = r"inv_freq has other frequencies than those of the model configuration's rope_theta=123$"
    for read in (from_released, MADFormer.from_released):
        with pytest.raises(ValueError, match=refusal):
            read(tmp_path / "ckpts.pt", model_config=other)
    model = make_compat(BASELINE).bfloat16()
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def test_names_and_shapes_are_the_released_ones() -> None:
    weights, model = BASELINE.weights(), make_compat(BASELINE)
    assert {name: t.shape for name, t in model.state_dict().items()} == {n: t.shape for n, t in weights.items()}
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters == {name for name in weights if not name.endswith("inv_freq")}


@pytest.mark.parametrize("case", [BASELINE, next(c for c in CASES if c.name == "clear_cond")], ids=lambda c: c.name)
def test_copies_and_casts_keep_the_native_models_in_step(case: GoldenCase) -> None:
    model = make_compat(case)
    before = model(*arguments(case))
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    after, zeros = model(*arguments(case)), duplicate(*arguments(case))
    for index in (0, 1, 3):
        assert torch.equal(after[index], before[index])
        assert not zeros[index].any()
    ids, clean, noised, t = arguments(case)
    low = copy.deepcopy(model).to(torch.bfloat16)(ids, clean.bfloat16(), noised.bfloat16(), t)
    for index in (0, 1, 3):
        assert low[index].dtype == torch.bfloat16
        assert relative_error(low[index], before[index]) < 0.05


def test_a_loss_without_the_text_gives_zero_gradients() -> None:
    """The text's last layer makes nothing but logits, and the released code has its gradients at zero, not None."""
    model = make_compat(BASELINE)
    model(*arguments(BASELINE))[0].square().mean().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"lm_head.weight"}


def test_bad_arguments_are_named() -> None:
    model = make_compat(BASELINE)
    ids, *latents = arguments(BASELINE)
    with pytest.raises(ValueError, match="this model takes texts of 2 tokens, got 1"):
        model(ids[:, 1:], *latents)
    with pytest.raises(ValueError, match=r"text must be ids of the shape \(3, 2\), got the shape \(3, 1\)"):
        model.sample(ids[:, 1:], DDIMScheduler(), 2, (3, 4, 64, 4))
