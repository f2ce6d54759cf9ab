"""pytest-benchmark's table of what sampling is made of, on the CPU: ``make bench``.

For looking at a change: ``make bench`` before and after with ``--benchmark-save`` and ``--benchmark-compare``. What a
user waits for is ``madformer bench``'s to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from madformer.config import preset
from madformer.engine.batching import InFlightBatcher
from madformer.engine.options import SamplingOptions
from madformer.engine.plan import Plan
from madformer.engine.sampler import Sampler
from madformer.engine.schedulers import default_scheduler
from madformer.kernels.denoise_step import NUM_COEFFICIENTS, denoise_step
from madformer.model import MADFormer
from madformer.vae import decode

Benchmark = Callable[..., Any]
PRESETS = ("tiny", "emoji64")
BATCH, STEPS = 4, 3


@pytest.fixture(scope="module", params=PRESETS)
def sampler(request: pytest.FixtureRequest) -> Sampler:
    torch.manual_seed(0)
    model = MADFormer(preset(request.param)).eval()
    return Sampler(model, default_scheduler(model.config.prediction_type))


@pytest.fixture(scope="module")
def plan(sampler: Sampler) -> Plan:
    """Drawn with once: its passes stand behind the last step of the last block."""
    plan = sampler.plan(BATCH, SamplingOptions(STEPS))
    plan.run(torch.randn(plan.slots.canvas_RMLC.shape))
    return plan


@torch.inference_mode()
def test_denoise_pass(benchmark: Benchmark, plan: Plan) -> None:
    benchmark(plan.prepared.denoise)
    assert plan.slots.latents_RLC.isfinite().all()


@torch.inference_mode()
def test_next_block_pass(benchmark: Benchmark, plan: Plan) -> None:
    """The pass that ends block 2 and begins block 3, over and over."""
    before_last = plan.config.num_blocks - 2

    def put_back() -> None:
        plan.slots.block_R.fill_(before_last)
        plan.cache.reset()
        plan.cache.advance(before_last * plan.config.block_size)

    benchmark.pedantic(plan.prepared.next_block, setup=put_back, rounds=20, warmup_rounds=1)  # type: ignore[attr-defined]
    assert plan.slots.block_R.eq(before_last + 1).all()


def test_plan_run(benchmark: Benchmark, plan: Plan) -> None:
    noise = torch.randn(plan.slots.canvas_RMLC.shape)
    assert benchmark(plan.run, noise).shape == noise.shape


def test_in_flight_step(benchmark: Benchmark, sampler: Sampler) -> None:
    """Of images that came one after the other and stand at different steps and blocks."""
    batcher = InFlightBatcher(sampler, BATCH, max_steps=STEPS)
    noise = torch.randn(batcher.slots.canvas_RMLC.shape[1:])

    def keep_full() -> None:
        if batcher.num_running + batcher.num_waiting < BATCH:
            batcher.submit(noise, SamplingOptions(STEPS))
            batcher.step()

    for _ in range(2 * BATCH):
        keep_full()
    benchmark.pedantic(batcher.step, setup=keep_full, rounds=20)  # type: ignore[attr-defined]
    assert batcher.num_running


@pytest.mark.parametrize("shape", [(BATCH, 64, 4), (16, 1024, 4)], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_denoise_step_op(benchmark: Benchmark, shape: tuple[int, ...], backend: str) -> None:
    sample, output, previous = (torch.randn(shape) for _ in range(3))
    coefficients = torch.full((shape[0], NUM_COEFFICIENTS), 0.25)
    benchmark(denoise_step, sample, output, previous, coefficients, backend=backend)
    assert sample.isfinite().all()


@torch.inference_mode()
def test_vae_decode(benchmark: Benchmark) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
    ).eval()
    vae = vae.to(memory_format=torch.channels_last)
    assert benchmark(decode, vae, torch.randn(BATCH, 4, 16, 16)).shape == (BATCH, 3, 64, 64)
