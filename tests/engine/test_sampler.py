"""Cached sampling against the training pass, which knows no cache: at every block and step, for every case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from madformer.config import MADFormerConfig, tiny
from madformer.engine.cache import KeyValueCache
from madformer.engine.sampler import Progress, Sampler
from madformer.model import MADFormer
from madformer.model.layer import Projections
from testing import DEVICE, perturb, relative_error

BATCH, STEPS = 2, 3
TOLERANCE = 1e-4

CASES: dict[str, MADFormerConfig] = {
    "both": tiny(),
    "clean only": tiny().replace(context="clean"),
    "condition only": tiny().replace(context="condition"),
    "noisy blocks only": tiny().replace(context="noise"),
    "block-local": tiny().replace(cross_block_attention=False),
    "block-local, condition only": tiny().replace(cross_block_attention=False, context="condition"),
    "block-local, clean only": tiny().replace(cross_block_attention=False, context="clean"),
    "shared towers": tiny().replace(shared_towers=True),
    "one block": tiny().replace(num_blocks=1),
    "one block, condition only": tiny().replace(num_blocks=1, context="condition"),
    "all layers diffusion": tiny().replace(diffusion_layers=3),
    "one layer diffusion": tiny().replace(diffusion_layers=1),
    "nine blocks": tiny().replace(num_blocks=9),
    "released quirks": tiny().replace(rope_pairing="released", clean_timestep="noisy", square_blocks=False),
    "released quirks, condition only": tiny().replace(
        rope_pairing="released", clean_timestep="noisy", context="condition"
    ),
    "no QK-norm": tiny().replace(qk_norm=False),
    "sample prediction": tiny().replace(prediction_type="sample"),
    "v prediction": tiny().replace(prediction_type="v_prediction"),
}


def make_model(config: MADFormerConfig) -> MADFormer:
    torch.manual_seed(0)
    model = perturb(MADFormer(config))
    assert isinstance(model, MADFormer)
    return model


def draw_noise(config: MADFormerConfig, batch: int = BATCH, seed: int = 1) -> Tensor:
    shape = (batch, config.num_blocks, config.latents_per_block, config.latent_channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample_uncached(model: MADFormer, scheduler: Any, steps: int, noise: Tensor) -> Tensor:
    """Every step is a whole training pass over all blocks, updated by the scheduler's own ``step``.

    A finished block counts with its clean latents, and, where there is no clean stream, with what its last step saw.
    """
    clean, noisy = torch.zeros_like(noise), torch.zeros_like(noise)
    scheduler.set_timesteps(steps)
    timestep = torch.full(noise.shape[:2], int(scheduler.timesteps[-1]))
    for block in range(noise.shape[1]):
        scheduler.set_timesteps(steps)
        latents = noise[:, block] * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            noisy[:, block], timestep[:, block] = scheduler.scale_model_input(latents, t), t
            prediction = model(clean, noisy, timestep).prediction[:, block]
            latents = scheduler.step(prediction, t, latents).prev_sample
        clean[:, block] = latents
    return clean


@pytest.mark.parametrize("name", CASES)
def test_cached_equals_uncached(name: str) -> None:
    config = CASES[name]
    model, noise = make_model(config), draw_noise(config)
    scheduler = DDIMScheduler(prediction_type=config.prediction_type)
    expected = sample_uncached(model, scheduler, STEPS, noise)
    latents = Sampler(model, scheduler).plan(BATCH, STEPS).run(lambda block: noise[:, block])
    for block in range(config.num_blocks):
        assert relative_error(latents[:, block], expected[:, block]) < TOLERANCE, f"block {block}"


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "dpmpp": lambda: DPMSolverMultistepScheduler.from_config(DDIMScheduler().config),
    "dpmpp order 3": lambda: DPMSolverMultistepScheduler(solver_order=3),
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
    "ddim thresholding": lambda: DDIMScheduler(thresholding=True),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler(name: str) -> None:
    """Tabulated or through its own ``step``: as the uncached loop has it."""
    model = make_model(tiny())
    noise = draw_noise(tiny())
    expected = sample_uncached(model, SCHEDULERS[name](), 4, noise)
    latents = Sampler(model, SCHEDULERS[name]()).plan(BATCH, 4).run(lambda block: noise[:, block])
    assert relative_error(latents, expected) < TOLERANCE


def test_a_stochastic_scheduler_draws_from_the_generators() -> None:
    model, noise = make_model(tiny()), draw_noise(tiny())
    plan = Sampler(model, EulerAncestralDiscreteScheduler()).plan(BATCH, STEPS)

    def draw(seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return plan.run(lambda block: noise[:, block], generator=generators)

    first, again, other = draw([1, 2]), draw([1, 2]), draw([1, 3])
    assert torch.equal(first, again)
    assert torch.equal(first[0], other[0])
    assert not torch.allclose(first[1], other[1])


@pytest.mark.parametrize("context", ["clean+condition", "condition"])
def test_a_plan_is_reused(context: str) -> None:
    """A second request, with other inputs in between, leaves no trace in the cache."""
    config = tiny().replace(context=context)
    model = make_model(config)
    plan = Sampler(model, DDIMScheduler()).plan(BATCH, STEPS)
    noise, other = draw_noise(config), draw_noise(config, seed=2)
    first = plan.run(lambda block: noise[:, block])
    different = plan.run(lambda block: other[:, block])
    again = plan.run(lambda block: noise[:, block])
    assert torch.equal(first, again)
    assert not torch.allclose(first, different)


def test_the_users_scheduler_and_weights_are_untouched() -> None:
    model, scheduler = make_model(tiny()), DDIMScheduler()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = dict(scheduler.config)
    Sampler(model, scheduler).plan(1, STEPS).run(lambda block: draw_noise(tiny(), 1)[:, block])
    assert scheduler.num_inference_steps is None
    assert dict(scheduler.config) == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_progress_tells_every_step() -> None:
    model, noise = make_model(tiny()), draw_noise(tiny())
    seen: list[tuple[int, int]] = []
    last: list[Tensor] = []

    def callback(progress: Progress) -> None:
        seen.append((progress.block, progress.step))
        if progress.step == STEPS - 1:
            last.append(progress.latents_BLC.clone())

    latents = Sampler(model, DDIMScheduler()).plan(BATCH, STEPS).run(lambda b: noise[:, b], callback=callback)
    assert seen == [(block, step) for block in range(4) for step in range(STEPS)]
    assert torch.equal(torch.stack(last, dim=1), latents)


def test_bf16_follows_fp32() -> None:
    """Each layer rounds to 8 bits; what the model says must survive that."""
    config, noise = tiny(), draw_noise(tiny())
    exact = Sampler(make_model(config), DDIMScheduler()).plan(BATCH, STEPS).run(lambda block: noise[:, block])
    low = make_model(config).to(torch.bfloat16)
    latents = Sampler(low, DDIMScheduler()).plan(BATCH, STEPS).run(lambda block: noise[:, block])
    assert latents.dtype == torch.float32
    assert relative_error(latents, exact) < 0.05


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_nonsensical_step_counts(steps: int) -> None:
    with pytest.raises(
        ValueError, match=rf"num_inference_steps={steps} must be between 1 and num_train_timesteps=1000"
    ):
        Sampler(make_model(tiny()), DDIMScheduler()).plan(1, steps)


def test_empty_batch() -> None:
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        Sampler(make_model(tiny()), DDIMScheduler()).plan(0, 1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_cache_overwrites_until_it_advances(backend: str) -> None:
    """Attention sees the finished prefix and the newest write, whatever the memory held before."""
    cache = KeyValueCache(1, 2, 3, 6, 8, dtype=torch.float32, device=DEVICE, backend=backend)
    cache.keys_BHSD.fill_(float("nan"))
    cache.values_BHSD.fill_(float("nan"))
    generator = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(2, 3, 6, 8, generator=generator).to(DEVICE) for _ in range(3))
    for start in (0, 2, 4):
        block = slice(start, start + 2)
        cache.attend(0, unrotated(*torch.full((3, 2, 3, 2, 8), 7.0, device=DEVICE), backend=backend))
        attended = cache.attend(0, unrotated(q[:, :, block], k[:, :, block], v[:, :, block], backend=backend))
        expected = F.scaled_dot_product_attention(q[:, :, block], k[:, :, : start + 2], v[:, :, : start + 2])
        assert attended is not None
        torch.testing.assert_close(attended, expected)
        cache.advance(2)
    with pytest.raises(AssertionError):
        cache.advance(1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_cache_takes_keys_and_values_without_queries(backend: str) -> None:
    cache = KeyValueCache(1, 1, 3, 4, 8, dtype=torch.float32, device=DEVICE, backend=backend)
    k, v = torch.randn(2, 1, 3, 2, 8, device=DEVICE)
    assert cache.attend(0, unrotated(k, v, backend=backend)) is None
    torch.testing.assert_close(cache.keys_BHSD[0, :, :, :2], k)
    torch.testing.assert_close(cache.values_BHSD[0, :, :, :2], v)


def unrotated(*heads_BHLD: Tensor, backend: str) -> Projections:
    """A projection to these heads, with neither norm nor rotation to come."""
    packed = torch.stack([x.transpose(1, 2) for x in heads_BHLD], dim=2).flatten(2)
    ones = torch.ones(heads_BHLD[0].shape[2], heads_BHLD[0].shape[3], device=packed.device)
    return Projections([packed], [None], [None], [(ones, torch.zeros_like(ones))], 3, axes=1, backend=backend)
