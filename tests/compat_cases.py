"""A stand-in for the released FFHQ class, and a training step on the golden inputs.

The stand-in's own ``forward`` and ``sample`` raise, so whatever comes out of it was computed by ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from madformer.compat.accelerate import SIZES, SWITCHES
from madformer.compat.madformer_ffhq import MADFormer as CompatMADFormer
from madformer.model.blocks import to_maps
from madformer.model.layer import RMSNorm, SwiGLU
from madformer.model.unet import ResnetBlock
from testing import GoldenCase, golden_cases, relative_error

CASES = golden_cases("ffhq")
BASELINE = CASES[0]
HIDDEN_WEIGHT = 0.1
# of the golden README
OUTPUT_TOLERANCE, SAMPLE_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 3e-3, 1e-2
GRADIENT_NOISE = 1e-6
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpmpp": lambda: DPMSolverMultistepScheduler.from_config(DDIMScheduler().config),
}


def make_compat(case: GoldenCase = BASELINE) -> CompatMADFormer:
    model = CompatMADFormer(model_config_path=case.model_config, **case.geometry, **case.flags)
    model.load_state_dict(case.weights())
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
    if isinstance(part, ResnetBlock):
        part.__class__ = ResnetBlock2D
    for name, child in part.named_children():
        setattr(part, name, foreign(child))
    return part


class Released(nn.Module):
    """Attributes, names and shapes of the released class, with the weights of one of ours."""

    def __init__(self, model: CompatMADFormer) -> None:
        super().__init__()
        for name in (*SIZES, *SWITCHES):
            setattr(self, name, getattr(model, name))
        self.boi_block = model.boi_block
        for name in ("downsampler", "upsampler", "blocks"):
            setattr(self, name, foreign(getattr(model, name)))

    def forward(self, *_: Any) -> None:
        raise AssertionError("the stand-in has no forward of its own")

    sample = forward


def arguments(case: GoldenCase = BASELINE, images: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``forward``: clean and noisy latents, and timesteps."""
    inputs = case.inputs()
    return inputs["clean"][images], inputs["noised"][images], inputs["t"][images]


def loss_of(model: nn.Module, case: GoldenCase = BASELINE, images: slice = slice(None)) -> Tensor:
    """The loss of the released training loop."""
    clean, noised, t = arguments(case, images)
    prediction, condition, _ = model(clean, noised, t)
    hidden_weight = 0 if case.flags.get("clear_cond") else HIDDEN_WEIGHT
    image = F.mse_loss(prediction, to_maps(case.inputs()["noise"][images]))
    return image + hidden_weight * F.mse_loss(condition, to_maps(clean))


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
