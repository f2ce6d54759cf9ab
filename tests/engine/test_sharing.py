"""A batch that is drawn in shares, each by a thread of its own, is the batch that is drawn whole."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from madformer.conditioning.prompt import Prompt
from madformer.config import MADFormerConfig
from madformer.engine import sharing
from madformer.engine.options import SamplingOptions
from madformer.engine.passes import Passes
from madformer.engine.plan import Plan
from madformer.engine.progress import Change, Progress
from madformer.engine.sampler import Sampler
from madformer.measuring.bare import Work
from madformer.measuring.sampling import Roof, measure
from madformer.model import MADFormer
from tests.helpers.engine_cases import CASES, draw_noise, draw_prompt, make_model
from tests.helpers.testing import relative_error

BATCH, STEPS, BLOCKS = 3, 3, 2
RICH = CASES["text and classes"].replace(num_blocks=BLOCKS, block_grid=(1, 2))
PLAIN = CASES["both"].replace(num_blocks=BLOCKS, block_grid=(1, 2))
OPTIONS = SamplingOptions(STEPS)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2, "the caller's setting was changed"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("madformer-share")]
    torch.set_num_threads(before)


def plan_of(model: MADFormer, shares: int, batch: int = BATCH, options: SamplingOptions = OPTIONS, **how: Any) -> Plan:
    scheduler = how.pop("scheduler", DDIMScheduler)
    plan = Sampler(model, scheduler(), shares=shares, **how).plan(batch, options)
    assert plan.shares == shares
    return plan


def part(prompt: Prompt, rows: slice) -> Prompt:
    fields = (prompt.text, prompt.negative_text, prompt.label)
    return Prompt(*(None if ids is None else ids[rows] for ids in fields))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (RICH, SamplingOptions(STEPS, guidance=3.0, guidance_interval=(100, 900))),
        (RICH, SamplingOptions(STEPS, refresh_every=2)),
        (PLAIN.replace(context="condition"), OPTIONS),
        pytest.param(PLAIN.replace(block_order="random"), OPTIONS, marks=pytest.mark.slow),
        pytest.param(
            CASES["spiral"].replace(num_blocks=2, block_grid=(1, 2)),
            SamplingOptions(STEPS, guidance=2.0),
            marks=pytest.mark.slow,
        ),
        (CASES["text, block-local"].replace(num_blocks=2, block_grid=(1, 2)), OPTIONS),
        pytest.param(CASES["DiT"], SamplingOptions(STEPS, guidance=2.0), marks=pytest.mark.slow),
    ],
    ids=["guided", "refreshed", "condition only", "any order", "spiral", "block-local", "DiT"],
)
def test_pictures(config: MADFormerConfig, options: SamplingOptions) -> None:
    """To rounding those of the whole batch, bit for bit those of each share alone; and again from the same plan."""
    model = make_model(config)
    prompt = draw_prompt(config, BATCH, guided=options.guided)
    order = [1, 0] if config.block_order == "random" else None
    plan = plan_of(model, 2, options=options)
    assert isinstance(plan.slots, sharing.SharedSlots)
    for seed in (1, 2):
        noise = draw_noise(config, BATCH, seed)
        shared = plan.run(noise, prompt, order=order)
        assert torch.equal(plan.run(noise, prompt, order=order), shared)
        assert relative_error(plan_of(model, 1, options=options).run(noise, prompt, order=order), shared) < 1e-5
        torch.set_num_threads(1)
        for rows in plan.slots.shares:
            alone = Sampler(model, DDIMScheduler()).plan(rows.stop - rows.start, options)
            drawn = alone.run(noise[rows], part(prompt, rows), order=order)
            # classes are embedded for the whole batch at once
            assert relative_error(drawn, shared[rows]) < (1e-5 if config.num_classes else 1e-30)
        torch.set_num_threads(2)


@pytest.mark.parametrize(
    "scheduler",
    [
        pytest.param(DPMSolverMultistepScheduler, marks=pytest.mark.slow),
        pytest.param(HeunDiscreteScheduler, marks=pytest.mark.slow),
        EulerAncestralDiscreteScheduler,
    ],
)
def test_schedulers(scheduler: Callable[[], Any]) -> None:
    """Those without a table step the whole batch, and draw what they add from each image's generator."""
    model, noise = make_model(RICH), draw_noise(RICH, BATCH)
    prompt, options = draw_prompt(RICH, BATCH, guided=True), SamplingOptions(STEPS, guidance=2.0)

    def draw(shares: int) -> Tensor:
        generators = [torch.Generator().manual_seed(index) for index in range(BATCH)]
        return plan_of(model, shares, options=options, scheduler=scheduler).run(noise, prompt, generator=generators)

    assert relative_error(draw(1), draw(2)) < 1e-5


def test_what_a_run_calls() -> None:
    """Callbacks see the whole batch after every step and change it; blocks and progress are told in order."""
    model, prompt = make_model(RICH), draw_prompt(RICH, BATCH, guided=True)
    told: dict[int, list[Any]] = {}

    def draw(shares: int, *, stop: bool) -> Tensor:
        seen = told.setdefault(shares, [])

        def callback(progress: Progress) -> Change | None:
            assert threading.current_thread() is threading.main_thread()
            seen.append((progress.block, progress.step, progress.latents_BLC.clone()))
            if progress.step == 0:
                model.layers[-1].tower("noise").proj.weight.data *= 1.01  # type: ignore[operator]
                return Change(images_BMLC=progress.images() * 0.9, guidance=1.5 + progress.block)
            return Change(stop=stop and progress.block == 1)

        return plan_of(model, shares, options=SamplingOptions(STEPS, guidance=2.0)).run(
            lambda place: draw_noise(RICH, BATCH)[:, place],
            prompt,
            callback=callback,
            on_block=lambda place, latents: seen.append((place, "done", latents.clone())),
            progress=lambda steps: seen.append((0, steps, torch.ones(1))),
        )

    kept = model.layers[-1].tower("noise").proj.weight.detach().clone()  # type: ignore[operator]
    for stop in (False, True):
        drawn = []
        for shares in (1, 2):
            model.layers[-1].tower("noise").proj.weight.data.copy_(kept)  # type: ignore[operator]
            drawn.append(draw(shares, stop=stop))
        assert relative_error(*drawn) < 1e-5
    assert [event[:2] for event in told[1]] == [event[:2] for event in told[2]]
    assert all(relative_error(one[2], two[2]) < 1e-5 for one, two in zip(told[1], told[2], strict=True))


def counting(plan: Plan, monkeypatch: pytest.MonkeyPatch, before: Callable[[int, int], object]) -> list[int]:
    """How many steps each share has made; ``before`` one of them is told of share and number."""
    made, original = [0] * plan.shares, Passes.denoise

    def denoise(self: Passes, rows_B: Tensor | None, *, refresh: bool = True) -> None:
        index = plan.passes.parts.index(self)  # type: ignore[attr-defined]
        before(index, made[index])
        original(self, rows_B, refresh=refresh)
        made[index] += 1

    monkeypatch.setattr(Passes, "denoise", denoise)
    return made


@pytest.mark.parametrize(("batch", "refresh_every"), [(4, 1), (3, 1), (3, 4)])
def test_threads_meet_where_somebody_looks(batch: int, refresh_every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's steps in one go, or a fifth at a time with a report after them."""
    steps, told, ahead = 11, list[int](), threading.Event()
    model, options = make_model(PLAIN), SamplingOptions(steps, refresh_every=refresh_every)
    plan, noise = plan_of(model, 2, batch, options), draw_noise(PLAIN, batch)
    expected = plan_of(model, 1, batch, options).run(noise)

    def before(share: int, number: int) -> None:
        # of uneven shares the first makes the first step alone
        if (share, number) == (0, 1):
            assert ahead.wait(60), "the other thread waits for this one"
        if (share, number) == (1, 3):
            ahead.set()

    made = counting(plan, monkeypatch, before)
    assert relative_error(plan.run(noise), expected) < 1e-5
    assert made == [BLOCKS * steps] * 2

    made[:] = [0, 0]
    ahead.set()
    assert relative_error(plan.run(noise, progress=told.append), expected) < 1e-5
    assert told == [3, 3, 3, 2] * BLOCKS
    assert made == [BLOCKS * steps] * 2

    made[:] = [0, 0]
    plan.run(noise, progress=lambda _: Change(stop=made[0] >= 6))
    assert made == [6, 6]


def test_given_blocks() -> None:
    model, noise = make_model(PLAIN), draw_noise(PLAIN, BATCH)
    given = draw_noise(PLAIN, BATCH, 7)
    one, two = (plan_of(model, shares).run(noise, given=given, blocks=[1]) for shares in (1, 2))
    assert torch.equal(two[:, 0], given[:, 0])
    assert relative_error(one, two) < 1e-5


@pytest.mark.parametrize("change", ["weights", pytest.param("parameter", marks=pytest.mark.slow), "layer"])
def test_follows_the_model(change: str) -> None:
    """Between two runs of one plan, as a plan of the changed model would draw."""
    model, noise = make_model(PLAIN), draw_noise(PLAIN, BATCH)
    plan = plan_of(model, 2)
    before, tower = plan.run(noise), model.layers[-1].tower("noise")  # type: ignore[operator]
    if change == "weights":
        tower.qkv.weight.detach().numpy()[...] *= 2
        model.downsampler.conv_in.weight.data *= 1.5  # type: ignore[operator, union-attr]
    elif change == "parameter":
        tower.proj.weight = torch.nn.Parameter(tower.proj.weight.detach() * 3)
    else:
        tower.proj = torch.nn.Linear(tower.proj.in_features, tower.proj.out_features)
    after = plan.run(noise)
    assert relative_error(before, after) > 1e-3
    assert torch.equal(after, plan_of(model, 2).run(noise))


class _Broken(Exception):
    pass


@pytest.mark.parametrize(
    "at",
    [
        pytest.param("first_block", marks=pytest.mark.slow),
        "denoise",
        pytest.param("next_block", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_a_share(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is raised where the run was called; the others are done by then, and the plan draws again."""
    model, noise = make_model(PLAIN), draw_noise(PLAIN, BATCH)
    plan = plan_of(model, 2)
    expected = plan.run(noise)
    assert isinstance(plan.passes, sharing.SharedPasses)

    def fail(*_: object, **__: object) -> None:
        raise _Broken(threading.current_thread().name)

    with monkeypatch.context() as patch:
        patch.setattr(plan.passes.parts[1], at, fail)
        with pytest.raises(_Broken, match="madformer-share"):
            plan.run(noise)
    assert torch.equal(plan.run(noise), expected)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.run(noise, progress=interrupt)
    drawing = plan.blocks(noise)
    next(drawing)
    drawing.close()
    assert torch.equal(plan.run(noise), expected)
    noise[2, 1, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="image 2, block 1"):
        plan.run(lambda place: noise[:, place])


def interrupt() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@pytest.mark.parametrize("refresh_every", [1, 50])
@pytest.mark.parametrize("error", [_Broken, KeyboardInterrupt])
def test_a_block_ends_with_an_error(
    error: type[BaseException], refresh_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one thread, or Ctrl-C in the caller's: the others leave after the step that they are at."""
    options = SamplingOptions(50, refresh_every=refresh_every)
    plan = plan_of(make_model(PLAIN), 2, 4, options)

    def before(share: int, number: int) -> None:
        if (share, number) == (1, 5):
            if error is _Broken:
                raise _Broken
            interrupt()

    made = counting(plan, monkeypatch, before)
    with pytest.raises(error):
        plan.run(draw_noise(PLAIN, 4))
    assert max(made) < 40
    monkeypatch.undo()
    noise = draw_noise(PLAIN, 4, 3)
    assert torch.equal(plan.run(noise), plan_of(plan.sampler.source, 2, 4, options).run(noise))


def test_no_thread_outlasts_a_second_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would write to what the next run draws in."""
    plan, noise = plan_of(make_model(PLAIN), 2, 4), draw_noise(PLAIN, 4)
    expected, interrupted = plan.run(noise), threading.Event()

    def before(share: int, number: int) -> None:
        if (share, number) == (1, 1):
            for _ in range(3):
                interrupt()
                time.sleep(0.1)
            interrupted.set()

    counting(plan, monkeypatch, before)
    with pytest.raises(KeyboardInterrupt):
        plan.run(noise)
    assert interrupted.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("madformer-share")]
    monkeypatch.undo()
    assert torch.equal(plan.run(noise), expected)

    # nor where threads stay for more than one run
    interrupted.clear()
    with plan.passes.at_work():  # type: ignore[attr-defined]
        counting(plan, monkeypatch, before)
        with pytest.raises(KeyboardInterrupt):
            plan.run(noise)
        assert interrupted.is_set()
        monkeypatch.undo()
        assert torch.equal(plan.run(noise), expected)


def test_threads_of_others() -> None:
    """Each worker has its part of the caller's threads; those of a thread that begins later are the caller's."""
    torch.set_num_threads(5)
    with sharing.Workers(2) as workers:
        assert workers.each(lambda _: torch.get_num_threads(), range(2)) == [2, 2]
        torch.ones(100_000).sum()  # the workers' setting is their own
        assert torch.get_num_threads() == 5
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(torch.get_num_threads).result() == 5
        assert workers.each(lambda _: torch.get_num_threads(), range(2)) == [2, 2]

    def of_a_thread_with_its_own() -> list[int]:
        sharing.keep_to(3)
        with sharing.Workers(3) as workers, ThreadPoolExecutor(1) as other:
            within = other.submit(torch.get_num_threads).result()
            return [torch.get_num_threads(), *workers.each(lambda _: torch.get_num_threads(), range(3)), within]

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(of_a_thread_with_its_own).result() == [3, 1, 1, 1, 5]
    assert torch.get_num_threads() == 5
    torch.set_num_threads(2)


def test_what_is_not_shared() -> None:
    """One image or thread, a sampler's own passes, and whatever would see that it is called in parts."""
    model = make_model(PLAIN)

    class Own(Passes):
        pass

    def shares(batch: int = BATCH, **how: Any) -> int:
        return Sampler(model, DDIMScheduler(), **how).plan(batch, OPTIONS).shares

    assert (shares(), shares(2), shares(1)) == (2, 2, 1)
    assert shares(passes=Own) == shares(compile_unet=True) == shares(backend="triton") == shares(shares=1) == 1
    with torch.device("cpu"):
        assert shares() == 2
    with FlopCounterMode(display=False):
        assert shares() == 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert shares() == 1
    plan = Sampler(model, DDIMScheduler()).plan(BATCH, OPTIONS)
    torch.set_num_threads(1)
    plan.run(draw_noise(PLAIN, BATCH))
    assert plan.shares == 1
    torch.set_num_threads(2)
    sizes: list[int] = []
    hook = model.upsampler.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    plan.run(draw_noise(PLAIN, BATCH))
    assert plan.shares == 1
    assert set(sizes) == {BATCH}
    hook.remove()
    plan.run(draw_noise(PLAIN, BATCH))
    assert plan.shares == 2


def test_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """One a thread; of a small model fewer, of a large one none, unless it is compiled or as many were asked for."""
    torch.set_num_threads(8)
    model, found = make_model(PLAIN), []
    sampler = Sampler(model, DDIMScheduler())
    operations = sharing.RATE * sharing._computing(sampler, sampler.kind(), 1, guided=False)
    for seconds in (1e-9, 0.05, 1.0):
        monkeypatch.setattr(sharing, "RATE", operations / seconds)
        for how in ({}, {"compile_step": True}, {"shares": 5}):
            found.append(Sampler(model, DDIMScheduler(), **how).plan(8, OPTIONS).shares)  # type: ignore[arg-type]
    torch.set_num_threads(2)
    assert found == [2, 8, 5, 8, 8, 5, 1, 8, 5]


def test_a_hook_from_within() -> None:
    """One that a callback puts on is called by the run's own thread, of one share after the other."""
    model, noise, called = make_model(PLAIN), draw_noise(PLAIN, BATCH), []
    plan = plan_of(model, 2)
    expected = plan.run(noise)

    def callback(progress: Progress) -> None:
        if (progress.block, progress.step) == (1, 0):
            hook = lambda _, inputs, __: called.append((threading.current_thread(), len(inputs[0])))  # noqa: E731
            handles.append(model.upsampler.register_forward_hook(hook))

    handles: list[Any] = []
    assert relative_error(expected, plan.run(noise, callback=callback)) < 1e-5
    assert called == [(threading.main_thread(), size) for _ in range(STEPS - 1) for size in (1, 2)]
    handles[0].remove()
    assert torch.equal(plan.run(noise), expected)

    def on_block(place: int, _: Tensor) -> None:
        if place == 0:
            callback(Progress(1, 0, noise[:, 0], noise))

    # nobody looks at the steps of a block, which are in order all the same
    for reported in ({}, {"progress": lambda _: None}):
        called.clear()
        assert relative_error(expected, plan.run(noise, on_block=on_block, **reported)) < 1e-5
        assert called == [(threading.main_thread(), size) for _ in range(STEPS) for size in (1, 2)]
        handles.pop().remove()


def test_warmup_measures(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which way is faster, for as long as there are so many threads; and pictures do not tell."""
    model, noise = make_model(PLAIN), draw_noise(PLAIN, 4)
    whole = Sampler(model, DDIMScheduler(), shares=1).plan(4, OPTIONS).run(noise)
    clock = iter(range(10_000))
    torch.set_num_threads(4)
    for fastest in (1, 2, 4):
        plan = Sampler(model, DDIMScheduler()).plan(4, OPTIONS)
        with monkeypatch.context() as patch:
            seconds: Callable[..., float] = lambda _: next(clock) + 100_000 * (plan.shares != fastest)  # noqa: B023, E731
            patch.setattr("madformer.engine.following._seconds", seconds)
            with caplog.at_level(logging.INFO, "madformer.engine"):
                plan.warmup()
        assert f"batch 4 is drawn in {fastest} share" in caplog.text
        assert relative_error(whole, plan.run(noise)) < 1e-5
        used = [plan.shares]
        for threads in (3, 4):
            torch.set_num_threads(threads)
            plan.run(noise)
            used.append(plan.shares)
        assert used == [fastest, 2, fastest]
    torch.set_num_threads(2)
    assert Sampler(model, DDIMScheduler()).plan(4, OPTIONS).warmup().shares in (1, 2)


def test_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a choice against the rule too, in either direction, and none where a number was asked for since."""
    model = make_model(PLAIN)
    for long, fastest in ((0.0, 2), (1e9, 1)):
        monkeypatch.setattr(sharing, "LONG", long)
        plan = Sampler(model, DDIMScheduler()).plan(BATCH, OPTIONS)
        rule, clock = plan.shares, iter(range(10_000))
        with monkeypatch.context() as patch:
            seconds: Callable[..., float] = lambda _: next(clock) + 100_000 * (plan.shares != fastest)  # noqa: B023, E731
            patch.setattr("madformer.engine.following._seconds", seconds)
            plan.warmup()
        plan.run(draw_noise(PLAIN, BATCH))
        assert (rule, plan.shares) == (3 - fastest, fastest)
        plan.settle(Sampler(model, DDIMScheduler(), shares=rule), plan.schedule, plan.options)
        plan.run(draw_noise(PLAIN, BATCH))
        assert plan.shares == rule


def test_is_measured_as_a_whole_batch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bare passes are made in the same shares, which the parts of a step's time are told by."""
    plan = Sampler(make_model(PLAIN), DPMSolverMultistepScheduler()).plan(4, OPTIONS)
    monkeypatch.setattr(plan, "_measure_shares", lambda: None)
    row = measure(plan, Roof(1e9, 1e9), Work.of(plan.sampler.source), repeats=1)
    assert plan.shares == 2
    assert row.bare_seconds.median > 0
    assert row.split["ar"] > 0
    assert row.split["unet"] > 0
