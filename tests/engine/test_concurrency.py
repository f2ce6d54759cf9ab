"""A plan draws one batch at a time, and nothing that two plans share is written to: pictures are those drawn alone."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from madformer.engine.batching import InFlightBatcher
from madformer.engine.options import SamplingOptions
from madformer.engine.pool import PlanPool
from madformer.engine.running import InUseError
from madformer.engine.sampler import Sampler
from madformer.streaming import reports
from tests.helpers.engine_cases import FLAT, draw_noise, make_model

STEPS = 2
CONFIG = FLAT.replace(num_blocks=2, block_grid=(1, 2))
NOISE = [draw_noise(CONFIG, 1, seed) for seed in range(4)]
SCHEDULERS: list[Callable[[], Any]] = [DDIMScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler]


def in_threads(work: Callable[[int], Tensor], count: int = 4) -> list[Tensor]:
    """All begin at once."""
    gate = threading.Barrier(2)

    def begin(index: int) -> Tensor:
        gate.wait()
        return work(index)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(begin, range(count)))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_plans_of_one_sampler_in_threads(scheduler: Callable[[], Any]) -> None:
    """Schedulers that remember their steps, too; and a pool's plans, each used by several threads in turn."""
    sampler, pool = Sampler(make_model(CONFIG), scheduler()), PlanPool()
    alone = [sampler.plan(1, SamplingOptions(STEPS)).run(noise) for noise in NOISE]

    def pooled(index: int) -> Tensor:
        with pool.plan(sampler, 1, SamplingOptions(STEPS)) as plan:
            return plan.run(NOISE[index])

    for work in (lambda index: sampler.plan(1, SamplingOptions(STEPS)).run(NOISE[index]), pooled):
        assert all(map(torch.equal, in_threads(work), alone))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_runs_that_take_turns(scheduler: Callable[[], Any]) -> None:
    """Block by block, of one sampler; and one that begins and ends within another's callback."""
    sampler = Sampler(make_model(CONFIG), scheduler())
    alone = [sampler.plan(1, SamplingOptions(STEPS)).run(noise) for noise in NOISE[:2]]
    drawing = [sampler.plan(1, SamplingOptions(STEPS)).blocks(noise) for noise in NOISE[:2]]
    ends: list[Tensor] = []
    while len(ends) < 2:
        for run in drawing:
            try:
                next(run)
            except StopIteration as end:
                ends.append(end.value)
    assert all(map(torch.equal, ends, alone))
    inner: list[Tensor] = []
    outer = sampler.plan(1, SamplingOptions(STEPS)).run(
        NOISE[0], callback=lambda _: inner.append(sampler.plan(1, SamplingOptions(STEPS)).run(NOISE[1]))
    )
    assert torch.equal(outer, alone[0])
    assert all(torch.equal(other, alone[1]) for other in inner)


def test_a_plan_that_draws_refuses_to_draw() -> None:
    """From a callback, from another thread, in the middle of its blocks; and goes on as if nothing had been asked."""
    sampler = Sampler(make_model(CONFIG), DDIMScheduler())
    plan, refused = sampler.plan(1, SamplingOptions(STEPS)), "this plan is drawing already"
    alone = plan.run(NOISE[0])

    def ask(_: object) -> None:
        for call in (lambda: plan.run(NOISE[1]), plan.warmup, plan.try_passes):
            with pytest.raises(InUseError, match=refused):
                call()
            with ThreadPoolExecutor(1) as thread, pytest.raises(InUseError, match=refused):
                thread.submit(call).result()

    assert torch.equal(plan.run(NOISE[0], callback=ask), alone)
    drawing = plan.blocks(NOISE[1])
    next(drawing)
    with pytest.raises(InUseError, match=refused):
        plan.run(NOISE[0])
    drawing.close()
    assert torch.equal(plan.run(NOISE[0]), alone)


def test_a_plan_is_free_after_an_error() -> None:
    plan = Sampler(make_model(CONFIG), DDIMScheduler()).plan(1, SamplingOptions(STEPS))
    alone = plan.run(NOISE[0])

    def fail(*_: object) -> None:
        raise KeyError("mine")

    for options in ({"callback": fail}, {"on_block": fail}, {"progress": fail}):
        with pytest.raises(KeyError) as error:
            plan.run(NOISE[1], **options)
        assert torch.equal(plan.run(NOISE[0]), alone)
        del error
    with pytest.raises(KeyError):
        plan.run(fail)  # type: ignore[arg-type]
    assert torch.equal(plan.run(NOISE[0]), alone)


# The pool


def test_a_pool_keeps_what_was_used_last() -> None:
    pool, sampler = PlanPool(most_idle=2), Sampler(make_model(CONFIG), DDIMScheduler())
    seen = []
    for steps in (1, 2, 3, 2, 1):
        with pool.plan(sampler, 1, SamplingOptions(steps)) as plan:
            seen.append(plan)
    assert seen[3] is seen[1]
    assert seen[4] is not seen[0]
    with pool.plan(sampler, 1, SamplingOptions(2)) as one, pool.plan(sampler, 1, SamplingOptions(2)) as other:
        assert one is not other
    pool.clear()
    with pool.plan(sampler, 1, SamplingOptions(2)) as plan:
        assert plan not in seen


def test_a_pool_gives_a_plan_other_schedules_and_models() -> None:
    """Of one kind: what a plan remembers of the last ones is seen in no picture."""
    pool = PlanPool()
    models = [make_model(CONFIG), make_model(CONFIG)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.1)
    schedulers = [DDIMScheduler(), DDIMScheduler(beta_start=0.001), DDIMScheduler(timestep_spacing="trailing")]
    used = set()
    for model in models:
        for scheduler in schedulers:
            sampler = Sampler(model, scheduler)
            with pool.plan(sampler, 1, SamplingOptions(STEPS)) as plan:
                used.add(plan)
                assert torch.equal(plan.run(NOISE[0]), sampler.plan(1, SamplingOptions(STEPS)).run(NOISE[0]))
    assert len(used) == 1


def test_an_idle_plan_holds_no_model() -> None:
    pool, model = PlanPool(), make_model(CONFIG)
    with pool.plan(Sampler(model, DDIMScheduler()), 1, SamplingOptions(STEPS)) as plan:
        plan.run(NOISE[0])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_copy_of_a_pool_is_empty() -> None:
    pool, sampler = PlanPool(most_idle=3), Sampler(make_model(CONFIG), DDIMScheduler())
    with pool.plan(sampler, 1, SamplingOptions(STEPS)) as plan:
        plan.run(NOISE[0])
    for other in (copy.copy(pool), copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert other.most_idle == 3
        with other.plan(sampler, 1, SamplingOptions(STEPS)) as another:
            assert another is not plan


# Whoever takes turns with a thread


def test_work_and_its_reader_take_turns() -> None:
    seen: list[str] = []

    def work(report: Callable[[int], None]) -> None:
        for number in range(3):
            seen.append(f"made {number}")
            report(number)

    for number in reports(work):
        seen.append(f"read {number}")
    assert seen == ["made 0", "read 0", "made 1", "read 1", "made 2", "read 2"]


def test_leaving_ends_the_work_at_once() -> None:
    ended: list[str] = []

    def work(report: Callable[[int], None]) -> None:
        try:
            report(0)
            report(1)
        finally:
            ended.append("yes")

    reading = reports(work)
    assert next(reading) == 0
    assert not ended
    reading.close()  # type: ignore[attr-defined]
    assert ended == ["yes"]


def test_errors_come_after_the_last_report() -> None:
    def work(report: Callable[[int], None]) -> None:
        report(0)
        raise KeyError("mine")

    reading = reports(work)
    assert next(reading) == 0
    with pytest.raises(KeyError, match="mine"):
        next(reading)


# In flight


def test_requests_from_threads() -> None:
    batcher = InFlightBatcher(Sampler(make_model(CONFIG), DDIMScheduler()), 2, max_steps=STEPS)
    alone = []
    for noise in NOISE:
        future = batcher.submit(noise[0], SamplingOptions(STEPS))
        batcher.run_until_idle()
        alone.append(future.result())
    with ThreadPoolExecutor(3) as threads:
        futures = list(threads.map(lambda noise: batcher.submit(noise[0], SamplingOptions(STEPS)), NOISE))
    batcher.run_until_idle()
    for future, expected in zip(futures, alone, strict=True):
        assert torch.allclose(future.result(), expected, atol=1e-4)


def test_a_batcher_steps_once_at_a_time() -> None:
    """A future's callback may ask for more, and not step."""
    batcher = InFlightBatcher(Sampler(make_model(CONFIG), DDIMScheduler()), 2, max_steps=STEPS)
    expected = batcher.submit(NOISE[1][0], SamplingOptions(STEPS))
    batcher.run_until_idle()
    more, refused = [], []

    def done(_: object) -> None:
        more.append(batcher.submit(NOISE[1][0], SamplingOptions(STEPS)))
        with pytest.raises(InUseError, match="at a step already") as error:
            batcher.step()
        refused.append(error)

    batcher.submit(NOISE[0][0], SamplingOptions(STEPS)).add_done_callback(done)
    batcher.run_until_idle()
    assert len(refused) == 1
    assert torch.equal(more[0].result(), expected.result())


def test_a_stochastic_scheduler_in_threads() -> None:
    sampler = Sampler(make_model(CONFIG), EulerAncestralDiscreteScheduler())

    def draw(index: int) -> Tensor:
        generator = [torch.Generator().manual_seed(index)]
        return sampler.plan(1, SamplingOptions(STEPS)).run(NOISE[index], generator=generator)

    alone = [draw(index) for index in range(4)]
    assert all(map(torch.equal, in_threads(draw), alone))
