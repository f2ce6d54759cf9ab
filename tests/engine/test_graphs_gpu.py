"""Captured passes on a GPU: a replay is the eager pass, and a run neither waits nor allocates, nor steps in Python."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from madformer.config import tiny
from madformer.engine.batching import InFlightBatcher
from madformer.engine.graphs import EagerLauncher, GraphLauncher, Launcher, loop_refusal
from madformer.engine.options import SamplingOptions
from madformer.engine.plan import Plan
from madformer.engine.sampler import Sampler
from tests.helpers.engine_cases import BATCH, CASES, draw_noise, draw_prompt, make_model
from tests.helpers.testing import DEVICE, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device"),
]
STEPS = 5
FP32_BUDGET = 1e-4
"""What other orders of addition make of a few blocks, as for other batch sizes in flight."""


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def make_plan(name: str, launcher: Launcher | None, dtype: torch.dtype = torch.float32) -> Plan:
    config = CASES[name]
    scheduler = DPMSolverMultistepScheduler(prediction_type=config.prediction_type)
    model = make_model(config).to(DEVICE, dtype)
    return Sampler(model, scheduler, launcher=launcher).plan(BATCH, SamplingOptions(STEPS))


def launcher(kind: str) -> Launcher:
    if kind == "eager":
        return EagerLauncher()
    if kind == "one launch" and (why := loop_refusal()):
        pytest.skip(why)
    return GraphLauncher(DEVICE, one_launch=kind == "one launch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["replay", "one launch"])
@pytest.mark.parametrize("name", CASES)
def test_replay_equals_eager(name: str, kind: str, dtype: torch.dtype) -> None:
    """At every block, and again for a second request with other noise."""
    eager, captured = make_plan(name, EagerLauncher(), dtype), make_plan(name, launcher(kind), dtype)
    for seed in (1, 2):
        noise = draw_noise(CASES[name], seed=seed).to(DEVICE)
        prompt = draw_prompt(CASES[name], seed=seed)
        expected, actual = eager.run(noise, prompt), captured.run(noise, prompt)
        if torch.equal(actual, expected):
            continue
        budget = FP32_BUDGET
        if dtype != torch.float32:
            budget += 2 * relative_error(expected, make_plan(name, EagerLauncher()).run(noise, prompt))
        for block in range(CASES[name].num_blocks):
            assert_same(actual[:, block], expected[:, block], budget, f"seed {seed}, block {block}")


def assert_same(actual: Tensor, expected: Tensor, budget: float, what: str) -> None:
    """The same bits; or, where a library takes another algorithm under capture, no further apart than roundings are.

    A difference is warned of with its size, which pytest shows.
    """
    if not torch.equal(actual, expected):
        error = relative_error(actual, expected)
        warnings.warn(f"{what}: not the eager bits, relative difference {error:.1e} of {budget:.1e}", stacklevel=2)
        assert error <= budget, what


@pytest.mark.parametrize("kind", ["replay", "one launch"])
def test_a_run_neither_waits_nor_allocates(kind: str, no_waiting: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    plan = make_plan("both", launcher(kind)).warmup()
    noise = draw_noise(tiny()).to(DEVICE)
    out = torch.empty_like(noise)
    plan.run(noise, out=out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["num_device_alloc"], torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    plan.run(noise, out=out, check=False)
    torch.cuda.set_sync_debug_mode("default")
    assert (torch.cuda.memory_stats()["num_device_alloc"], torch.cuda.memory_allocated()) == before
    plan.check()


def test_on_block_tells_what_is_done() -> None:
    plan = make_plan("both", None)
    seen: list[tuple[int, Tensor]] = []
    drawn = plan.run(draw_noise(tiny()).to(DEVICE), on_block=lambda *done: seen.append(done))
    assert [place for place, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(torch.stack([latents for _, latents in seen], dim=1), drawn)


@pytest.mark.parametrize("steps", [1, 4, 5])
@pytest.mark.parametrize("kind", ["replay", "one launch"])
def test_layers_in_every_second_step(kind: str, steps: int) -> None:
    noise = draw_noise(tiny()).to(DEVICE)
    drawn = []
    for how in (launcher(kind), EagerLauncher()):
        sampler = Sampler(make_model(tiny()).to(DEVICE), DDIMScheduler(), launcher=how)
        drawn.append(sampler.plan(len(noise), SamplingOptions(steps, refresh_every=2)).run(noise))
    assert_same(*drawn, FP32_BUDGET, f"{steps} steps")


@pytest.mark.parametrize("name", ["both", "condition only", "block-local"])
def test_in_flight(name: str) -> None:
    """Five requests through three slots: each as a plan draws it alone."""
    config = CASES[name]
    sampler = Sampler(make_model(config).to(DEVICE), DPMSolverMultistepScheduler())
    batcher = InFlightBatcher(sampler, 3, max_steps=4).warmup()
    noise = draw_noise(config, batch=5)
    steps = (3, 1, 4, 2, 3)
    futures = [batcher.submit(noise[index], SamplingOptions(count)) for index, count in enumerate(steps)]
    batcher.run_until_idle()
    for index, (future, count) in enumerate(zip(futures, steps, strict=True)):
        alone: Tensor = sampler.plan(1, SamplingOptions(count)).run(noise[index : index + 1])[0]
        assert relative_error(future.result(timeout=0), alone) < FP32_BUDGET
