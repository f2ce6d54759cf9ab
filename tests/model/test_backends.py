"""The whole model on our kernels against the same model on plain PyTorch, in training and in sampling."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from madformer.config import MADFormerConfig, tiny
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.kernels import launch
from madformer.kernels.dispatch import BackendUnavailableError
from madformer.model import MADFormer
from madformer.model.layer import set_backend
from tests.helpers.testing import DEVICE, Move, assert_within_noise, float32_noise, needs_triton, perturb

SMALL = tiny().replace(num_layers=2, diffusion_layers=1, num_blocks=3, block_grid=(1, 3))
CASES: dict[str, MADFormerConfig] = {
    "both contexts, axial": SMALL,
    "no clean stream, released pairing": SMALL.replace(
        context="condition", rope_pairing="released", num_blocks=4, block_grid=(2, 2)
    ),
    "block-local, no QK norm": SMALL.replace(cross_block_attention=False, qk_norm=False),
}


def on_triton(model: MADFormer) -> MADFormer:
    """All kernels; in the interpreter all but the U-Net's, which are thousands of small programs and take minutes."""
    model.set_backend("triton")
    if launch.INTERPRETED:
        set_backend(model.downsampler, "reference")
        set_backend(model.upsampler, "reference")
    return model


def make_model(config: MADFormerConfig) -> MADFormer:
    torch.manual_seed(0)
    model = MADFormer(config)
    perturb(model)
    return model.to(DEVICE)


def results(model: MADFormer, config: MADFormerConfig, move: Move = torch.clone) -> dict[str, Tensor]:
    """What a training pass gives, and every gradient of it."""
    generator = torch.Generator().manual_seed(1)
    shape = (1 if launch.INTERPRETED else 2, config.num_blocks, config.latents_per_block, config.latent_channels)
    clean, noisy, weight = (move(torch.randn(shape, generator=generator).to(DEVICE, model.dtype)) for _ in range(3))
    timestep = torch.randint(0, 1000, shape[:2], generator=generator).to(DEVICE)
    output = model(clean, noisy, timestep, return_clean=config.has_clean_stream)
    named = {"prediction": output.prediction, "condition": output.condition, "clean": output.clean}
    named = {name: x for name, x in named.items() if x is not None}
    torch.stack([(x * weight).sum() for x in named.values()]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in (named | gradients).items()}


@needs_triton
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow if "block-local" in name else ()) for name in CASES]
)
def test_training_pass(case: str) -> None:
    config = CASES[case]
    model = make_model(config).set_backend("reference")
    truth, noise = float32_noise(lambda model, move: results(model, config, move), model)
    assert_within_noise(results(on_triton(copy.deepcopy(model)), config), truth, noise)


def test_noise_is_what_float32_makes_and_no_more() -> None:
    """The budget above holds for plain PyTorch; not for one matrix of 11 significant bits, as TF32 would have it."""
    config = tiny().replace(context="condition")
    model = make_model(config).set_backend("reference")
    truth, noise = float32_noise(lambda model, move: results(model, config, move), model)
    assert_within_noise(results(copy.deepcopy(model), config), truth, noise)
    weight = model.layers[-1].towers["noise"].proj.weight.data
    weight.copy_(weight.half())
    with pytest.raises(AssertionError, match="float32's noise"):
        assert_within_noise(results(model, config), truth, noise)


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_sampling(case: str) -> None:
    """Keys and values written at positions that are on the device, the denoise update in Triton: the same images."""
    config = CASES[case]
    model = make_model(config).eval()
    shape = (1, config.num_blocks, config.latents_per_block, config.latent_channels)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    images = []
    for chosen, update in ((on_triton(copy.deepcopy(model)), "triton"), (model, "reference")):
        sampler = Sampler(chosen, DPMSolverMultistepScheduler(), backend=update)
        images.append(sampler.plan(1, SamplingOptions(2)).run(noise))
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend='cuda' must be one of auto, triton, cpp, reference"):
        MADFormer(tiny()).set_backend("cuda")
    with pytest.raises(ValueError, match="backend='fast' must be one of auto, triton, cpp, sdpa, flex"):
        MADFormer(tiny()).set_backend("auto", attention="fast")


def test_backend_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    model = MADFormer(tiny())
    with pytest.raises(BackendUnavailableError, match="backend='triton' cannot run cached_attention on cpu"):
        model.set_backend("triton")
    assert model.layers[0].backend == "auto"
