"""The whole model on our kernels against the same model on plain PyTorch, in training and in sampling."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from madformer.config import MADFormerConfig, tiny
from madformer.engine.sampler import Sampler
from madformer.kernels import launch
from madformer.kernels.dispatch import BackendUnavailableError
from madformer.model import MADFormer
from madformer.model.madformer import set_backend
from testing import DEVICE, assert_within_budget, perturb

CASES: dict[str, MADFormerConfig] = {
    "both contexts, axial": tiny(),
    "no clean stream, released pairing": tiny().replace(context="condition", rope_pairing="released"),
    "block-local, no QK norm": tiny().replace(cross_block_attention=False, qk_norm=False),
}
needs_triton = pytest.mark.skipif(not launch.HAS_TRITON, reason="Triton is not installed")


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


@torch.no_grad()
def rounded_otherwise(model: MADFormer, seed: int) -> MADFormer:
    """A copy with each weight up or down by its dtype's epsilon, relatively; for seed 0 as it is."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for weight in model.parameters() if seed else ():
        signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
        weight.mul_(1 + torch.finfo(weight.dtype).eps * signs.to(weight))
    return model


def results(model: MADFormer, config: MADFormerConfig) -> dict[str, Tensor]:
    """What a training pass gives, and every gradient of it."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, config.num_blocks, config.latents_per_block, config.latent_channels)
    clean, noisy, weight = (torch.randn(shape, generator=generator).to(DEVICE, model.dtype) for _ in range(3))
    timestep = torch.randint(0, 1000, shape[:2], generator=generator).to(DEVICE)
    output = model(clean, noisy, timestep, return_clean=config.has_clean_stream)
    named = {"prediction": output.prediction, "condition": output.condition, "clean": output.clean}
    named = {name: x for name, x in named.items() if x is not None}
    torch.stack([(x * weight).sum() for x in named.values()]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in (named | gradients).items()}


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_training_pass(case: str) -> None:
    config = CASES[case]
    model = make_model(config)
    actual = results(on_triton(copy.deepcopy(model)), config)
    # Kernels round where eager does not, and a small gradient of large terms shows it: how much, eager itself tells
    # with every weight moved by one rounding.
    eagers = [results(rounded_otherwise(model, seed).set_backend("reference"), config) for seed in range(4)]
    oracle = results(model.double().set_backend("reference"), config)
    assert actual.keys() == oracle.keys()
    for name in oracle:
        eager = max((each[name] for each in eagers), key=lambda x: (x.double() - oracle[name]).abs().max())
        # Gradients of weights are sums over all rows, which each side adds up in an order of its own.
        assert_within_budget(actual[name], oracle[name], eager, name=name, rows=64 * 64)


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
        images.append(sampler.plan(1, 2).run(noise))
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend='cuda' must be one of auto, triton, reference"):
        MADFormer(tiny()).set_backend("cuda")
    with pytest.raises(ValueError, match="backend='fast' must be one of auto, triton, sdpa, flex"):
        MADFormer(tiny()).set_backend("auto", attention="fast")


def test_backend_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    model = MADFormer(tiny())
    with pytest.raises(BackendUnavailableError, match="backend='triton' cannot run cached_attention on cpu"):
        model.set_backend("triton")
    assert model.layers[0].backend == "auto"
