"""By which threads a step of images in flight is computed: measured once, and watched while images are drawn.

On a processor there are three ways. One thread computes all images; or PyTorch's threads share every operator; or the
images are shared out among threads (:mod:`.sharing`). Where operators are short the second is the fastest for a few
images on an idle machine, and beside one other busy process many times slower than the others, because threads wait
for each other at every operator, and the one that waits keeps its core busy. So it is taken where it was measured to
be faster, and left as soon as its steps are not.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import math
import time
from collections.abc import Callable
from typing import Self

import torch

from madformer.engine.sharing import Workers

logger = logging.getLogger("madformer.engine")

TRIALS = 8
"""Steps by which a way is measured, of which the fastest counts."""
TRIAL_SECONDS = 0.3
"""After so long there are no more of them, but for the second: the first may make something ready."""
GAIN = 0.95
"""Of the time of the other ways, what operators that are shared must take at most to be worth their risk."""
TOLERATED = 1.25
"""How many times as long as by the best other way a step by all threads may take for as long as one likes."""
MOST_EXCESS, LIMIT = 4.0, 8.0
"""Of what is beyond that a step counts so much at most; with so much in sum operators are not shared any more, which is
after two steps of a busy machine. A processor that has rested takes up to 1.8 times as long for a while, by any way."""
WEIGHT = 0.1
"""Of the last step in what the other ways are thought to take."""
PAUSE, LONGEST_PAUSE = 5.0, 40.0
"""Seconds until they are tried again: at first, and after trials that failed, each of which doubles them."""


class Way(enum.Enum):
    ONE = "one thread"
    ALL = "all threads"
    SHARES = "shares"


class Ways:
    """Chooses for each step, by what was measured and how long steps took; for one thread at a time.

    Steps by all threads are left, for a while that doubles with each trial that fails, as soon as they have been slower
    than the best other way by too much in sum. A single one does not matter. What the others take is learnt meanwhile.

    Args:
        unmeasured: the way for a number of images, where none was measured.
    """

    def __init__(self, unmeasured: Callable[[int], Way], clock: Callable[[], float] = time.monotonic) -> None:
        self._unmeasured, self._clock = unmeasured, clock
        self.seconds: dict[int, dict[Way, float]] = {}
        self._excess, self._pause, self._away_until = 0.0, PAUSE, -math.inf

    def of(self, count: int) -> Way:
        """The way of a step of so many images, by the times of the next size up that was measured."""
        times = self._times(count)
        if times is None:
            return self._unmeasured(count)
        other = _best_other(times)
        if other is None or (times.get(Way.ALL, math.inf) < GAIN * times[other] and self._clock() >= self._away_until):
            return Way.ALL
        return other

    def took(self, count: int, way: Way, seconds: float) -> None:
        """A step of so many images took so long."""
        times = self._times(count)
        other = None if times is None else _best_other(times)
        if times is None or other is None or way not in times:
            return
        if way is not Way.ALL:
            times[way] += WEIGHT * (seconds - times[way])
            return
        self._excess = max(0.0, self._excess + min(seconds / times[other] - TOLERATED, MOST_EXCESS))
        if self._excess >= LIMIT:
            self._away_until = self._clock() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._excess = LIMIT - MOST_EXCESS  # a single step of a busy machine is enough the next time
        elif not self._excess:
            self._pause = PAUSE

    def _times(self, count: int) -> dict[Way, float] | None:
        return next((self.seconds[size] for size in sorted(self.seconds) if size >= count), None)


def _best_other(times: dict[Way, float]) -> Way | None:
    return min((way for way in times if way is not Way.ALL), key=times.__getitem__, default=None)


class StepThreads:
    """Threads that passes over some rows are computed by, each in one of the :class:`Ways`.

    A context: its threads begin with it, and none is left when it ends. Those that share operators are PyTorch's own,
    of whoever calls; nobody's number of threads is changed.

    Args:
        count: of threads that images are shared out among, each with an equal part of PyTorch's.
        short: operators of an image's step are so short that one thread may be faster than several.
    """

    def __init__(self, count: int, *, short: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._shared, self._alone = Workers(count), Workers(1, threads=1)
        self._short, self._clock = short, clock
        self.ways = Ways(self._unmeasured, clock)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._shared)
            if self.threads_each == 1:
                self._alone = self._shared
            else:
                stack.enter_context(self._alone)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def count(self) -> int:
        return self._shared.count

    @property
    def threads_each(self) -> int:
        """Threads of PyTorch's that each has."""
        return self._shared.threads_each

    @property
    def lone(self) -> set[int]:
        """By how many of PyTorch's threads a single image may be computed, besides."""
        return {torch.get_num_threads(), *([1] if self._short else [])}

    def run(self, work: Callable[[list[int]], object], rows: list[int], *, watched: bool = False) -> None:
        """``work`` on these rows, in the way for so many. watched: its time tells whether the way still is the best."""
        way, started = self.ways.of(len(rows)), self._clock()
        self._run_by(way, work, rows)
        if watched:
            self.ways.took(len(rows), way, self._clock() - started)

    def do(self, work: Callable[[], object]) -> None:
        """``work`` that is done between steps, by one thread or all: as a step of one image is."""
        if self.ways.of(1) is Way.ALL:
            work()
        else:
            self._alone.each(lambda _: work(), range(1))

    def measure(self, work: Callable[[list[int]], object], rows: list[int]) -> None:
        """Have ``work``, which may be done again and again, run in each way; from now on the fastest is the choice."""
        candidates = [Way.ONE] if self._short else []
        if len(rows) > 1 or (self._short and 1 < self.threads_each < torch.get_num_threads()):
            candidates.append(Way.SHARES)
        if not candidates:
            return  # all threads, as where it was not measured
        times = {way: self._seconds(way, work, rows) for way in (*candidates, Way.ALL)}
        self.ways.seconds[len(rows)] = times
        listed = ", ".join(f"{way.value}: {1e3 * seconds:.1f} ms" for way, seconds in times.items())
        logger.info("a step of %d images is computed by %s; %s", len(rows), self.ways.of(len(rows)).value, listed)

    def _seconds(self, way: Way, work: Callable[[list[int]], object], rows: list[int]) -> float:
        taken: list[float] = []
        while len(taken) < 2 or (len(taken) < TRIALS and sum(taken) < TRIAL_SECONDS):
            started = self._clock()
            self._run_by(way, work, rows)
            taken.append(self._clock() - started)
        return min(taken)

    def _run_by(self, way: Way, work: Callable[[list[int]], object], rows: list[int]) -> None:
        if way is Way.ALL:
            work(rows)
        elif way is Way.ONE:
            self._alone.each(lambda _: work(rows), range(1))
        else:
            shares = min(self.count, len(rows))
            ends = [len(rows) * index // shares for index in range(shares + 1)]
            self._shared.each(lambda index: work(rows[ends[index] : ends[index + 1]]), range(shares))

    def _unmeasured(self, count: int) -> Way:
        if count > 1:
            return Way.SHARES
        return Way.ONE if self._short else Way.ALL
