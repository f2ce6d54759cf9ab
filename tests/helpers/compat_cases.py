"""Stand-ins for the released FFHQ and ImageNet classes, and a training step on the golden inputs.

A stand-in's own ``forward`` and ``sample`` raise, so whatever comes out of it was computed by ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from madformer.compat import madformer_ffhq, madformer_imagenet
from madformer.compat.accelerate import SIZES, SWITCHES
from madformer.compat.acdit import ACDiT
from madformer.compat.madformer_ffhq import MADFormer as CompatMADFormer
from madformer.model.blocks import to_maps
from madformer.model.layer import RMSNorm, SwiGLU
from madformer.model.plain import PreciseLinear
from madformer.model.unet import ResnetBlock
from tests.helpers.testing import GoldenCase, golden_case, golden_cases, relative_error

CASES, TEXT_CASES = golden_cases("ffhq"), golden_cases("imagenet")
BASELINE, TEXT_BASELINE = CASES[0], TEXT_CASES[0]
CLASS_CASE = golden_case("acdit", "class_conditional")
HIDDEN_WEIGHT, TEXT_WEIGHT = 0.1, 0.5
# of the golden README
OUTPUT_TOLERANCE, SAMPLE_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 3e-3, 1e-2
GRADIENT_NOISE = 1e-6
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpmpp": lambda: DPMSolverMultistepScheduler.from_config(DDIMScheduler().config),
}


def samples(
    cases: Iterable[GoldenCase], ids: Callable[[GoldenCase], str] = lambda case: case.name
) -> pytest.MarkDecorator:
    """Draw the first case under each scheduler, the others under one: the native model draws them under each."""
    return pytest.mark.parametrize(
        ("case", "scheduler"),
        [
            pytest.param(case, name, id=f"{ids(case)}-{name}", marks=pytest.mark.slow if number and later else ())
            for number, case in enumerate(cases)
            for later, name in enumerate(SCHEDULERS)
        ],
    )


def make_compat(case: GoldenCase = BASELINE) -> CompatMADFormer:
    family = {"ffhq": madformer_ffhq, "imagenet": madformer_imagenet}[case.folder.name]
    sizes = {"latent_size": 4, "in_channels": 4, **case.geometry}
    model = family.MADFormer(model_config_path=case.model_config, **sizes, **case.flags)
    model.load_state_dict(case.weights())
    return model


def make_acdit(**changes: object) -> ACDiT:
    """No label is dropped."""
    model = ACDiT(in_channels=4, **(CLASS_CASE.geometry | changes))
    model.load_state_dict(CLASS_CASE.weights())
    model.y_embedder.dropout_prob = 0
    return model


class ForeignNorm(nn.Module):
    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.eps


class ForeignMLP(nn.Module):
    def __init__(self, mlp: SwiGLU) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = nn.SiLU()


def foreign(part: nn.Module) -> nn.Module:
    """The same weights and names under classes that are not ours."""
    if isinstance(part, RMSNorm):
        return ForeignNorm(part)
    if isinstance(part, SwiGLU):
        return ForeignMLP(part)
    for ours, theirs in ((ResnetBlock, ResnetBlock2D), (PreciseLinear, nn.Linear)):
        if isinstance(part, ours):
            part.__class__ = theirs
    for name, child in part.named_children():
        setattr(part, name, foreign(child))
    return part


class Released(nn.Module):
    """Attributes, names and shapes of a released class, with the weights of one of ours."""

    def __init__(self, model: CompatMADFormer) -> None:
        super().__init__()
        for name in (*SIZES, *SWITCHES):
            setattr(self, name, getattr(model, name))
        self.boi_block = model.boi_block
        if (text := model.config.text) is not None:
            self.max_len, self.text_rope = text.length, model.text_rope
            self.text_rope.base = text.rope_theta
            self.embed_tokens, self.lm_head = model.embed_tokens, model.lm_head
        for name in ("downsampler", "upsampler", "blocks"):
            setattr(self, name, foreign(getattr(model, name)))

    def forward(self, *_: Any) -> None:
        raise AssertionError("the stand-in has no forward of its own")

    sample = forward


def arguments(case: GoldenCase = BASELINE, images: slice = slice(None)) -> tuple[Tensor, ...]:
    """Of ``forward``: the text, if there is one, clean and noisy latents, and timesteps."""
    inputs = case.inputs()
    return tuple(inputs[name][images] for name in ("input_ids", "clean", "noised", "t") if name in inputs)


def losses_of(case: GoldenCase, outputs: tuple[Tensor, ...], images: slice = slice(None)) -> dict[str, Tensor]:
    """Those of the released training loop, by their golden names."""
    inputs = {name: tensor[images] for name, tensor in case.inputs().items()}
    prediction, condition, _, *logits = outputs
    losses = {"image_loss": F.mse_loss(prediction, to_maps(inputs["noise"]))}
    has_condition = not case.flags.get("clear_cond", False)
    losses["hidden_loss"] = F.mse_loss(condition, to_maps(inputs["clean"])) * has_condition
    losses["loss"] = losses["image_loss"] + HIDDEN_WEIGHT * losses["hidden_loss"]
    if logits:
        following = inputs["input_ids"][:, 1:].flatten()
        losses["text_loss"] = F.cross_entropy(logits[0][:, :-1].flatten(0, 1), following)
        losses["loss"] = losses["loss"] + TEXT_WEIGHT * losses["text_loss"]
    return losses


def loss_of(model: nn.Module, case: GoldenCase = BASELINE, images: slice = slice(None)) -> Tensor:
    return losses_of(case, model(*arguments(case, images)), images)["loss"]


def golden_samples(case: GoldenCase) -> dict[str, Tensor]:
    """``cache_clean`` crashes in the released code: it has to equal the case without a cache."""
    tensors = case.tensors()
    return tensors if "sample.ddim" in tensors else BASELINE.tensors()


def assert_golden_training(model: nn.Module, case: GoldenCase) -> None:
    """Outputs, losses and gradients are those of the released code."""
    golden, outputs = case.tensors(), model(*arguments(case))
    named = dict(zip(("prediction", "condition", "clean_tower", "logits"), outputs, strict=False))
    assert {name for name, output in named.items() if output is not None} == named.keys() & golden.keys()
    for name in named.keys() & golden.keys():
        assert relative_error(named[name], golden[name]) < OUTPUT_TOLERANCE, name
    losses = losses_of(case, outputs)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(golden[name].item(), rel=OUTPUT_TOLERANCE, abs=1e-9), name
    losses["loss"].backward()
    assert_golden_gradients(model, golden)


def assert_golden_samples(model: nn.Module, case: GoldenCase, scheduler: str, times: int = 1) -> None:
    """Drawn again, nothing of an image may be left for the next one."""
    expected, inputs = golden_samples(case)[f"sample.{scheduler}"], case.inputs()
    text = [inputs["input_ids"]] if "input_ids" in inputs else []
    for _ in range(times):
        generator = torch.Generator().manual_seed(case.sampler_seed)
        latents = model.eval().sample(
            *text, SCHEDULERS[scheduler](), case.steps, tuple(expected.shape), generator=generator, dtype=torch.float
        )
        assert relative_error(latents, expected) < SAMPLE_TOLERANCE


def assert_golden_gradients(model: nn.Module, golden: Mapping[str, Tensor]) -> None:
    """After ``backward``: the released code's parameters, norms and, where they were kept, gradients."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {name for name in golden if name.startswith("gradnorm.")} == {f"gradnorm.{name}" for name in gradients}
    for name, gradient in gradients.items():
        assert gradient is not None, f"{name}: the released code gives unused parameters zero gradients"
        norm = golden[f"gradnorm.{name}"].item()
        if norm < GRADIENT_NOISE:
            assert gradient.norm() < GRADIENT_NOISE, name
            continue
        assert gradient.norm().item() == pytest.approx(norm, rel=GRADIENT_TOLERANCE), name
        if f"grad.{name}" in golden:
            assert relative_error(gradient, golden[f"grad.{name}"]) < GRADIENT_TOLERANCE, name
