"""By which threads a batcher's steps are computed: the choice by given times, and images that do not tell it."""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from madformer.conditioning.prompt import Prompt
from madformer.engine import sharing, ways
from madformer.engine.batching import InFlightBatcher
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.engine.ways import PAUSE, StepThreads, Way, Ways
from madformer.model import MADFormer
from tests.helpers.engine_cases import CASES, draw_noise, draw_prompt, make_model, one_of
from tests.helpers.testing import relative_error

RICH = CASES["text and classes"].replace(num_blocks=2, block_grid=(1, 2))
IMAGES, STEPS = 4, 3
IDLE = {Way.ONE: 1.0, Way.ALL: 0.8, Way.SHARES: 1.5}


class Machine:
    """A clock that steps move on, each by what its way takes now."""

    def __init__(self, seconds: dict[Way, float] = IDLE) -> None:
        self.now = 0.0
        self.seconds = dict(seconds)
        self.ways = Ways(lambda _: Way.SHARES, lambda: self.now)
        self.ways.seconds[4] = dict(seconds)

    def steps(self, count: int) -> list[Way]:
        taken = []
        for _ in range(count):
            taken.append(way := self.ways.of(3))
            self.now += self.seconds[way]
            self.ways.took(3, way, self.seconds[way])
        return taken


def test_the_fastest_of_the_next_size_up() -> None:
    chosen = Ways(lambda count: Way.ONE if count == 1 else Way.SHARES)
    assert [chosen.of(count) for count in (1, 2)] == [Way.ONE, Way.SHARES]
    chosen.seconds = {
        1: {Way.ONE: 2.0, Way.ALL: 1.0},
        2: {Way.ONE: 2.0, Way.ALL: 1.95, Way.SHARES: 3.0},  # not so much faster that it would be worth the risk
        4: {Way.ONE: 3.0, Way.ALL: 2.0, Way.SHARES: 2.5},
        8: {Way.ALL: 4.0, Way.SHARES: 3.0},
    }
    expected = [Way.ALL, Way.ONE, *[Way.ALL] * 2, *[Way.SHARES] * 4]
    assert [chosen.of(count) for count in range(1, 9)] == expected
    assert chosen.of(9) is Way.SHARES


def test_a_busy_machine_and_an_idle_one_again() -> None:
    machine = Machine()
    assert set(machine.steps(1000)) == {Way.ALL}
    machine.seconds = {Way.ONE: 1.1, Way.ALL: 20.0, Way.SHARES: 2.0}
    assert machine.steps(6) == [Way.ALL] * 2 + [Way.ONE] * 4
    # a single step each time, and each time after twice as long
    left, trials = machine.now, []
    while machine.now < left + 500:
        if machine.steps(1) == [Way.ALL]:
            trials.append(machine.now)
    pauses = [later - earlier - 20.0 for earlier, later in itertools.pairwise(trials)]
    assert pauses == [
        pytest.approx(pause, abs=1.2) for pause in (2 * PAUSE, 4 * PAUSE, *[8 * PAUSE] * (len(pauses) - 2))
    ]
    assert len(pauses) > 4
    machine.seconds = dict(IDLE)
    while machine.steps(1) != [Way.ALL]:
        assert machine.now < trials[-1] + 9 * PAUSE
    assert set(machine.steps(100)) == {Way.ALL}
    # and the pause is a short one again
    machine.seconds[Way.ALL] = 20.0
    assert machine.steps(3) == [Way.ALL, Way.ALL, Way.ONE]
    machine.now += PAUSE
    assert machine.steps(2) == [Way.ALL, Way.ONE]


def test_slow_steps_among_fast_ones() -> None:
    """One is nothing, whatever it took, and every other one is too many."""
    machine = Machine()

    def step(seconds: float) -> Way:
        machine.seconds[Way.ALL] = seconds
        return machine.steps(1)[0]

    for _ in range(20):
        assert step(1000.0) is Way.ALL
        assert [step(0.8) for _ in range(15)] == [Way.ALL] * 15
    assert 10 < sum(step(2.5 if index % 2 else 0.8) is Way.ALL for index in range(24)) < 24


def test_all_threads_without_a_gain() -> None:
    """As where another pool of threads keeps them from spinning: not many times slower, and slower all the same."""
    machine = Machine()
    machine.seconds[Way.ALL] = 1.6
    taken = machine.steps(1000)
    assert taken[:10] == [Way.ALL] * 10
    assert set(taken[40:43]) == {Way.ONE}
    assert taken.count(Way.ALL) < 300


def test_a_machine_that_is_slower_on_the_whole() -> None:
    """It goes back to all threads as soon as it has seen that the other way is slow now, too."""
    machine = Machine()
    machine.seconds = {way: 1.9 * seconds for way, seconds in IDLE.items()}
    machine.steps(200)
    assert set(machine.steps(1000)) == {Way.ALL}


def test_shares_are_the_other_way_where_they_are_faster() -> None:
    machine = Machine({Way.ONE: 2.0, Way.ALL: 1.0, Way.SHARES: 1.5})
    machine.seconds[Way.ALL] = 9.0
    assert machine.steps(3) == [Way.ALL, Way.ALL, Way.SHARES]


def test_long_operators_have_no_other_way() -> None:
    machine = Machine({Way.ALL: 1.0})
    machine.seconds[Way.ALL] = 99.0
    assert machine.steps(5) == [Way.ALL] * 5


# Threads


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    assert _of_a_new_thread() == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("madformer-share")]
    torch.set_num_threads(threads)


def _of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("way", [Way.ALL, Way.ONE])
def test_work_between_steps(two_threads: None, way: Way) -> None:
    """It is done when the call returns, by as many threads as a step of one image."""
    found: list[tuple[int, bool]] = []
    mine = threading.get_ident()
    with StepThreads(2, short=True) as threads:
        threads.ways.seconds[1] = {Way.ONE: 1.0, Way.ALL: 0.5 if way is Way.ALL else 2.0}
        threads.do(lambda: found.append((torch.get_num_threads(), threading.get_ident() == mine)))
    assert found == [(2, True) if way is Way.ALL else (1, False)]


def fastest(monkeypatch: pytest.MonkeyPatch, way: Callable[[int], Way]) -> None:
    """Have this way measured to be faster than the others, each of which is run once."""

    def seconds(threads: Any, each: Way, work: Callable[[list[int]], object], rows: list[int]) -> float:
        threads._run_by(each, work, rows)
        return 1e9 if each is not way(len(rows)) else 1e8

    monkeypatch.setattr(StepThreads, "_seconds", seconds)
    monkeypatch.setattr(sharing, "SHORT", math.inf)


def draw(batcher: InFlightBatcher, *, between: Callable[[int], object] | None = None, **callbacks: Any) -> list[Tensor]:
    noise, prompts = draw_noise(batcher.config, IMAGES), draw_prompt(batcher.config, IMAGES, guided=True)
    futures = [
        batcher.submit(
            noise[index], SamplingOptions(STEPS + index, guidance=1.5 + index), one_of(prompts, index), **callbacks
        )
        for index in range(IMAGES)
    ]
    for number in itertools.count():
        if not batcher.step(unchanged=between is None):
            break
        if between is not None:
            between(number)
    return [future.result(timeout=0) for future in futures]


def drawn_alone(model: MADFormer) -> list[Tensor]:
    """By plans of one image and one thread."""
    noise, prompts = draw_noise(RICH, IMAGES), draw_prompt(RICH, IMAGES, guided=True)
    images = []
    for index in range(IMAGES):
        plan = Sampler(model, DDIMScheduler(), shares=1).plan(1, SamplingOptions(STEPS + index, guidance=1.5 + index))
        prompt = Prompt(*(None if part is None else part[index : index + 1] for part in vars(prompts).values()))
        images.append(plan.run(noise[index : index + 1], prompt)[0])
    return images


def make_batcher(model: MADFormer, **options: Any) -> InFlightBatcher:
    return InFlightBatcher(Sampler(model, DDIMScheduler(), **options), IMAGES, max_steps=STEPS + IMAGES, guided=True)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("way", [*Way, None], ids=lambda way: way.name if way else "mixed")
def test_images_do_not_tell_the_way(
    way: Way | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever was in cache and slots before; and nobody who is called sees another number of threads."""
    model = make_model(RICH)
    expected = drawn_alone(model)
    order = itertools.cycle(Way)
    fastest(monkeypatch, lambda size: way or (Way.ALL, Way.ONE, Way.SHARES)[size % 3])
    if way is None:
        monkeypatch.setattr(Ways, "of", lambda *_: next(order))
    batcher, seen, used = make_batcher(model), set(), set()
    denoise = batcher.passes.denoise

    def noted(rows_B: Tensor | None) -> None:
        used.add((threading.get_ident() == threading.main_thread().ident, torch.get_num_threads()))
        denoise(rows_B)

    def on_step(*_: int) -> None:
        seen.add((torch.get_num_threads(), _of_a_new_thread()))

    with torch.inference_mode():
        for cached in (*batcher.cache.keys_RHSD, *batcher.cache.values_RHSD):
            cached.fill_(torch.nan)
    with batcher.at_work(), caplog.at_level(logging.INFO, "madformer.engine"):
        batcher.warmup()
        monkeypatch.setattr(batcher.passes, "denoise", noted)
        for _ in range(2):
            drawn = draw(batcher, on_step=on_step)
            assert max(map(relative_error, drawn, expected)) < 1e-5
    assert seen == {(2, 2)}
    inline, worker = (True, 2), (False, 1)
    assert used == {Way.ALL: {inline}, None: {inline, worker}}.get(way, {worker})
    if way is not None and way is not Way.SHARES:  # an image alone is no share
        assert [record.message.split(";")[0] for record in caplog.records if "is computed by" in record.message] == [
            f"a step of {size} images is computed by {way.value}" for size in (1, 2, 4)
        ]


@pytest.mark.usefixtures("two_threads")
def test_measured_by_itself() -> None:
    """Whichever way that finds."""
    model = make_model(RICH)
    batcher = make_batcher(model)
    with batcher.at_work():
        batcher.warmup()
        measured = batcher._threads.ways.seconds  # type: ignore[union-attr]
        assert {size: set(times) for size, times in measured.items()} == {
            1: {Way.ONE, Way.ALL}, 2: set(Way), 4: set(Way)
        }  # fmt: skip
        assert all(0 < seconds < 10 for times in measured.values() for seconds in times.values())
        assert max(map(relative_error, draw(batcher), drawn_alone(model))) < 1e-5


class Failure(Exception):
    pass


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("way", list(Way), ids=lambda way: way.name)
def test_errors(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reach the caller from every way, and the next images are drawn; the threads are as they were (the fixture)."""
    model = make_model(RICH)
    fastest(monkeypatch, lambda _: way)
    batcher = make_batcher(model)
    denoise = batcher.passes.denoise

    def fail(*_: Any) -> None:
        raise Failure

    with pytest.raises(Failure), batcher.at_work():  # noqa: PT012
        batcher.warmup()
        monkeypatch.setattr(batcher.passes, "denoise", fail)
        with pytest.raises(Failure):
            draw(batcher)
        monkeypatch.setattr(batcher.passes, "denoise", denoise)
        assert max(map(relative_error, draw(batcher), drawn_alone(model))) < 1e-5
        monkeypatch.setattr(batcher.passes, "denoise", fail)
        batcher.warmup()
    assert batcher._threads is None


def test_more_threads_than_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread is one of PyTorch's, even where a share has several; and a single slot has two ways, too."""
    monkeypatch.setattr(ways, "TRIAL_SECONDS", 0.0)
    found: dict[str, set[int]] = {}
    torch.set_num_threads(6)
    try:
        for count in (2, 1):
            with StepThreads(count, short=True) as threads:
                for way in Way:
                    numbers: set[int] = set()
                    threads._run_by(way, lambda _: numbers.add(torch.get_num_threads()), [0, 1])  # noqa: B023
                    found[f"{way.name} {count}"] = numbers
                threads.measure(lambda _: None, [0])
                assert set(threads.ways.seconds[1]) == ({Way.ONE, Way.ALL} | ({Way.SHARES} if count == 2 else set()))
        assert torch.get_num_threads() == _of_a_new_thread() == 6
    finally:
        torch.set_num_threads(1)
    assert found == {"ONE 2": {1}, "ALL 2": {6}, "SHARES 2": {3}, "ONE 1": {1}, "ALL 1": {6}, "SHARES 1": {6}}
