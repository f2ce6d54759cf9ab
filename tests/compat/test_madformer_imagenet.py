"""The compat class with text, and the native model with the quirk fields, against what the released code computed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compat_cases import OUTPUT_TOLERANCE, SAMPLE_TOLERANCE, SCHEDULERS, assert_golden_gradients
from diffusers import DDIMScheduler
from torch import Tensor

from madformer.compat.madformer_imagenet import MADFormer
from madformer.engine.prompts import Prompt
from madformer.engine.sampler import Sampler
from madformer.model import MADFormer as NativeMADFormer
from madformer.model.blocks import to_maps
from testing import GoldenCase, golden_cases, relative_error

HIDDEN_WEIGHT, TEXT_WEIGHT = 0.1, 0.5
CASES = golden_cases("imagenet")
BASELINE = CASES[0]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def make_model(case: GoldenCase = BASELINE) -> MADFormer:
    model = MADFormer(latent_size=4, in_channels=4, model_config_path=case.model_config, **case.geometry, **case.flags)
    model.load_state_dict(case.weights())
    return model


def arguments(case: GoldenCase = BASELINE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = case.inputs()
    return inputs["input_ids"], inputs["clean"], inputs["noised"], inputs["t"]


@each_case
def test_forward_losses_and_gradients(case: GoldenCase) -> None:
    model, inputs, golden = make_model(case), case.inputs(), case.tensors()
    prediction, condition, clean, logits = model(*arguments(case))
    assert (clean is None) == ("clean_tower" not in golden)
    named = {"prediction": prediction, "condition": condition, "clean_tower": clean, "logits": logits}
    for name, output in named.items():
        if output is not None:
            assert relative_error(output, golden[name]) < OUTPUT_TOLERANCE, name

    image = F.mse_loss(prediction, to_maps(inputs["noise"]))
    hidden = F.mse_loss(condition, to_maps(inputs["clean"])) * (not case.flags.get("clear_cond", False))
    text = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    loss = image + HIDDEN_WEIGHT * hidden + TEXT_WEIGHT * text
    for name, value in {"image_loss": image, "hidden_loss": hidden, "text_loss": text, "loss": loss}.items():
        assert value.item() == pytest.approx(golden[name].item(), rel=OUTPUT_TOLERANCE, abs=1e-9), name
    loss.backward()
    assert_golden_gradients(model, golden)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@each_case
def test_samples(case: GoldenCase, scheduler: str) -> None:
    model, expected = make_model(case).eval(), case.tensors()[f"sample.{scheduler}"]
    generator = torch.Generator().manual_seed(case.sampler_seed)
    shape = tuple(expected.shape)
    for _ in range(2):  # nothing of an image is left for the next one
        latents = model.sample(
            case.inputs()["input_ids"], SCHEDULERS[scheduler](), case.steps, shape, generator, torch.float
        )
        assert relative_error(latents, expected) < SAMPLE_TOLERANCE
        generator.manual_seed(case.sampler_seed)


@each_case
def test_native_model_with_quirk_fields(case: GoldenCase, tmp_path: Path) -> None:
    """Saved, loaded and run by the native classes alone; what the sampler does block-locally is compat's alone."""
    make_model(case).to_native().save_pretrained(tmp_path)
    native, golden = NativeMADFormer.from_pretrained(tmp_path), case.tensors()
    text, *latents = arguments(case)
    with torch.no_grad():
        output = native(*latents, text, return_logits=True)
    assert relative_error(to_maps(output.prediction), golden["prediction"]) < OUTPUT_TOLERANCE
    assert output.logits is not None
    assert relative_error(output.logits, golden["logits"]) < OUTPUT_TOLERANCE
    for scheduler, make_scheduler in SCHEDULERS.items():
        noise = golden[f"sample_noise.{scheduler}"]
        drawn = Sampler(native, make_scheduler()).plan(len(noise), case.steps).run(noise, Prompt(text))
        error = relative_error(drawn, golden[f"sample.{scheduler}"])
        assert (error < SAMPLE_TOLERANCE) == (case.name != "denoising_mlp")


def test_names_and_shapes_are_the_released_ones() -> None:
    weights, model = BASELINE.weights(), make_model()
    assert {name: t.shape for name, t in model.state_dict().items()} == {n: t.shape for n, t in weights.items()}
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters == {name for name in weights if not name.endswith("inv_freq")}


@pytest.mark.parametrize("case", [BASELINE, next(c for c in CASES if c.name == "clear_cond")], ids=lambda c: c.name)
def test_copies_and_casts_keep_the_native_models_in_step(case: GoldenCase) -> None:
    model = make_model(case)
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
    model = make_model()
    model(*arguments())[0].square().mean().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"lm_head.weight"}


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    model = make_model()
    ids, *latents = arguments()
    with pytest.raises(ValueError, match="this model takes texts of 2 tokens, got 1"):
        model(ids[:, 1:], *latents)
    with pytest.raises(ValueError, match=r"text must be ids of the shape \(3, 2\), got the shape \(3, 1\)"):
        model.sample(ids[:, 1:], DDIMScheduler(), 2, (3, 4, 64, 4))
    with pytest.raises(ValueError, match="model_config must name the released model configuration"):
        MADFormer.from_released(tmp_path / "ckpts.pt")
