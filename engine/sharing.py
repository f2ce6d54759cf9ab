"""A batch shared out among threads: on a processor each of them passes a few of the images, on cores of its own.

PyTorch's threads share every single operator. Most operators of a denoising step are too short for that, and images
need nothing of each other: here threads meet at the end of a pass alone, and of a block's steps where nobody looks at
them on the way.

A share is some neighbouring images. Its slots and its rows of the cache are those of the whole batch, in the same
memory, so that whatever a plan does besides its passes (noise, callbacks, checks, the ``step`` of a scheduler without a
table) it does to the whole batch, in the thread of its caller. All threads compute with the same model.

Shape legend: R rows (slots), N rows of the cache (R, or under guidance 2 R), B images of a pass, L latents of a block,
C channels, E time embedding.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from madformer.conditioning.prompt import Prompt
from madformer.engine.cache import ConditioningCache
from madformer.engine.passes import Passes
from madformer.engine.running import computing
from madformer.engine.slots import ScheduleRows, Slots
from madformer.engine.structure import all_plain
from madformer.model import MADFormer
from madformer.model.layer import TransformerLayer

if TYPE_CHECKING:
    from madformer.engine.pool import ModelKind, PlanKey
    from madformer.engine.sampler import Sampler

T = TypeVar("T")

_BEGINNING = threading.Lock()


class Workers:
    """Threads that compute, each with an equal part of the threads that PyTorch has for their caller.

    A context: they begin with it, and none is left when it ends.

    Args:
        threads: of PyTorch's, that each has in place of its part.

    Attributes:
        threads_each: how many that is, once they have begun.
        ended: whether work that was given out last is to be left early, for it cannot succeed any more.
    """

    def __init__(self, count: int, threads: int | None = None) -> None:
        self.count, self._asked, self.threads_each = count, threads, 0
        self._threads: list[ThreadPoolExecutor] = []
        self.ended = threading.Event()

    def __enter__(self) -> Self:
        threads = max(1, torch.get_num_threads() // self.count) if self._asked is None else self._asked
        # of one thread each: a share stays on its core
        self._threads = [ThreadPoolExecutor(1, "madformer-share") for _ in range(self.count)]
        self.each(lambda _: keep_to(threads), range(self.count))
        self.threads_each = threads
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)
        self._threads = []

    def each(self, work: Callable[[int], T], numbers: Iterable[int]) -> list[T]:
        """``work`` of the threads of these numbers, at a time; when all are done, what they gave.

        ``ended`` is set as soon as one of them raises, or the caller's thread is interrupted: long work then leaves.

        Raises:
            Whatever the first of them raised that did; an interruption, however many there were, when all are done.
        """
        futures: list[Future[T]] = []
        late: BaseException | None = None
        self.ended.clear()

        def guarded(number: int) -> T:
            try:
                return work(number)
            except BaseException:
                self.ended.set()
                raise

        try:
            for number in numbers:
                futures.append(self._threads[number].submit(guarded, number))
            wait(futures)
        except BaseException as error:
            self.ended.set()
            late = error
        while not all(future.done() for future in futures):
            try:
                wait(futures)
            except BaseException as error:  # another Ctrl-C: none may be left in what the next run writes to
                late = error
        if late is not None:
            raise late
        return [future.result() for future in futures]


def keep_to(threads: int) -> None:
    """Have the calling thread compute with so many threads, and threads to come with as many as before."""
    with _BEGINNING:
        # a thread that is new to PyTorch takes over the process's number when it first asks: now, not later
        torch.get_num_threads()
        others = in_new_thread(torch.get_num_threads)
        torch.set_num_threads(threads)
        # what a thread is given becomes the process's
        in_new_thread(lambda: torch.set_num_threads(others))


@contextlib.contextmanager
def kept_to(threads: int) -> Iterator[None]:
    """:func:`keep_to` within it."""
    before = torch.get_num_threads()
    keep_to(threads)
    try:
        yield
    finally:
        keep_to(before)


def leave_room() -> None:
    """Have the calling thread compute with half of the threads, beside those that draw; threads to come do not."""
    keep_to(max(1, torch.get_num_threads() // 2))


def in_new_thread(work: Callable[[], T]) -> T:
    """``work()`` in a thread that ends with it, and with it the threads that operators were shared among.

    GNU's OpenMP keeps those of each caller, and lets threads that wait for each other sleep at once, not spin for a
    while, as soon as there are more of them than cores: then all threads together are no faster than one.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


class SharedSlots(Slots):
    """The state of images that are passed in shares.

    Attributes:
        shares: the rows of each. parts: their slots, which are this one's memory but for where in it a row stands, and
            for text and class, of which each part has its conditional rows first.
    """

    def __init__(self, shares: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        rows = len(self.block_R)
        ends = [rows * index // shares for index in range(shares + 1)]
        self.shares = [slice(first, end) for first, end in itertools.pairwise(ends)]
        self.parts = [self._part(share, *arguments, **options) for share in self.shares]

    def _part(self, share: slice, config: Any, rows: int, *arguments: Any, **options: Any) -> Slots:
        part = Slots(config, share.stop - share.start, *arguments, **options)
        for name in ("canvas_RMLC", "latents_RLC", "previous_RLC", "block_R", "sound_R", "schedule_RTW", "order_RM"):
            setattr(part, name, getattr(self, name)[share])
        return part

    def assign(self, schedule: ScheduleRows, model: MADFormer, row: int | None = None) -> None:
        super().assign(schedule, model, row)
        for part in self.parts:
            part.end_R.copy_(part.start_R + schedule.num_steps)

    def condition_on(self, prompt: Prompt, model: MADFormer, row: int | None = None) -> None:
        super().condition_on(prompt, model, row)
        for share, part in zip(self.shares, self.parts, strict=True):
            for name in ("text_NP", "class_NC"):
                by_branch = getattr(self, name).unflatten(0, (self.branches, -1))
                getattr(part, name).copy_(by_branch[:, share].flatten(0, 1))

    def reset(self, row: int | None = None) -> None:
        super().reset(row)
        for part in self.parts:
            part.reset()

    def schedule(self, rows_B: Tensor | None) -> list[Tensor]:
        columns = zip(*(part.schedule(None) for part in self.parts), strict=True)
        return [torch.cat(column) for column in columns]

    def finish_step(self, rows_B: Tensor | None, latents_BLC: Tensor, previous_BLC: Tensor) -> None:
        assert previous_BLC is self.previous_RLC
        for share, part in zip(self.shares, self.parts, strict=True):
            part.finish_step(None, latents_BLC[share], part.previous_RLC)


class SharedPasses(Passes):
    """The passes of a batch in shares: of all rows, in threads while :meth:`at_work`, else one share after the other.

    Attributes:
        in_turn: one share after the other in any case, in the caller's thread.
    """

    slots: SharedSlots

    def __init__(
        self,
        model: MADFormer,
        cache: ConditioningCache,
        slots: SharedSlots,
        *options: Any,
        passes: type[Passes] = Passes,
    ) -> None:
        super().__init__(model, cache, slots, *options)
        self.in_turn = False
        self._workers: Workers | None = None
        self._packed: set[str] = set()
        self._uneven = len({len(part.block_R) for part in slots.parts}) > 1
        self.parts = [
            passes(model, cache.part(slice(slots.branches * share.start, slots.branches * share.stop)), part, *options)
            for share, part in zip(slots.shares, slots.parts, strict=True)
        ]

    @property
    def is_at_work(self) -> bool:
        """Whether each share is passed by a thread of its own."""
        return self._workers is not None and not self.in_turn

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        if self._workers is not None:
            yield
            return
        with Workers(len(self.parts)) as self._workers:
            try:
                yield
            finally:
                self._workers = None

    def follow(self, model: MADFormer) -> None:
        self.model = model
        self._packed.clear()
        for part in self.parts:
            part.follow(model)

    def rest(self) -> None:
        super().rest()
        for part in self.parts:
            part.rest()

    def first_block(self, rows_B: Tensor | None) -> None:
        self.each("first_block", lambda index: self.parts[index].first_block(None))

    def next_block(self, rows_B: Tensor | None) -> None:
        self.each("next_block", lambda index: self.parts[index].next_block(None))

    def denoise(self, rows_B: Tensor | None, *, refresh: bool = True) -> None:
        self.each(f"denoise {refresh}", lambda index: self.parts[index].denoise(None, refresh=refresh))

    def denoise_steps(self, first: int, count: int) -> None:
        def of_share(index: int) -> None:
            part = self.parts[index]
            for step in range(first, first + at_once):
                if workers is not None and workers.ended.is_set():
                    return
                part.denoise(None, refresh=step % part.refresh_every == 0)

        workers = self._workers if self.is_at_work else None
        while count:
            # threads that meet after every step wait for the slower one each time; but the first packs weights
            packs = self._uneven and "denoise steps" not in self._packed
            at_once = count if workers is not None and not packs else 1
            self.each("denoise steps", of_share)
            first, count = first + at_once, count - at_once

    def predict(
        self,
        rows_B: Tensor | None,
        latents_BLC: Tensor,
        down_BE: Tensor,
        up_BE: Tensor,
        time_BC: Tensor,
        *,
        refresh: bool = True,
    ) -> tuple[Tensor, ...]:
        def of_share(index: int) -> tuple[Tensor, ...]:
            own = (tensor[self.slots.shares[index]] for tensor in (latents_BLC, down_BE, up_BE, time_BC))
            return self.parts[index].predict(None, *own, refresh=refresh)

        return tuple(map(torch.cat, zip(*self.each(f"denoise {refresh}", of_share), strict=True)))

    def each(self, name: str, work: Callable[[int], T]) -> list[T]:
        """``work`` of every share, by its number, which is a pass of that name; what they gave."""
        shares, device = range(len(self.parts)), self.model.device

        def compute(index: int) -> T:
            with computing(device):
                return work(index)

        if not self.is_at_work:
            return list(map(work, shares))
        assert self._workers is not None
        # weights are packed for the number of images that comes first: always that of the same share
        alone = 1 if self._uneven and name not in self._packed else 0
        self._packed.add(name)
        return self._workers.each(compute, shares[:alone]) + self._workers.each(compute, shares[alone:])


CALLING = 2.2e-3
"""Seconds of a step in which a thread holds Python's lock, to call some 160 operators; measured on an EPYC."""
SHORT = 3
"""How many times as long as that a step computes which threads had better not share."""
LONG = 1e-2
"""Seconds of an image's step, of all threads together, from which on they share its operators as well as images."""
RATE = 5e10
"""Operations a second of a core, about: AVX2 in fp32 at the sizes of a step."""


def shares_for(sampler: Sampler, key: PlanKey, kind: ModelKind, *, compiled: bool) -> int:
    """In how many shares a batch is drawn unless it was measured: one for each thread, or 1 where it is to stay whole.

    Fewer where threads would wait for each other: only one at a time calls operators. One where operators are long
    enough to be shared themselves, which reads the weights once for all images. The number hangs on sizes alone, so
    that the same command draws the same bits.
    """
    shares = most_shares(sampler, key, kind)
    if sampler.shares is not None or shares == 1 or compiled:
        return shares
    if _computing(sampler, kind, 1, guided=key.guided) > LONG * torch.get_num_threads():
        return 1
    return min(shares, useful_shares(sampler, kind, key.batch, guided=key.guided))


def useful_shares(sampler: Sampler, kind: ModelKind, batch: int, *, guided: bool) -> int:
    """In how many shares of so many images threads do not wait for each other to call operators; 2 at least."""
    return max(2, round(math.sqrt(_computing(sampler, kind, batch, guided=guided) / CALLING)))


def is_short(sampler: Sampler, kind: ModelKind, *, guided: bool) -> bool:
    """Whether one image's step is better left to a single thread.

    PyTorch's threads wait for each other at every operator: where these are short, two threads of an idle machine are
    about a tenth faster than one, and on a machine with other work half as fast, or a tenth as fast where they spin.
    """
    return _computing(sampler, kind, 1, guided=guided) < SHORT * CALLING


def _computing(sampler: Sampler, kind: ModelKind, batch: int, *, guided: bool) -> float:
    """Seconds of a step in which a core computes, about."""
    noise_towers = (
        parameter
        for layer in sampler.source.layers[kind.config.ar_layers :]
        for parameter in cast(TransformerLayer, layer).tower("noise").parameters()
    )
    unet = (*sampler.source.downsampler.parameters(), *sampler.source.upsampler.parameters())
    weights = sum(parameter.numel() for parameter in itertools.chain(noise_towers, unet))
    # each weight and token once: convolutions at full resolution are more
    return 2 * weights * kind.config.block_size * batch * (1 + guided) / RATE


def most_shares(sampler: Sampler, key: PlanKey, kind: ModelKind) -> int:
    """In how many shares a batch can be drawn."""
    wanted = torch.get_num_threads() if sampler.shares is None else sampler.shares
    shares = min(wanted, key.batch)
    return shares if shares > 1 and may_share(sampler, kind) else 1


def may_share(sampler: Sampler, kind: ModelKind) -> bool:
    """Whether passes of a sampler may run in several threads."""
    apart = (
        kind.device.type != "cpu"
        or sampler.compile_unet
        or sampler.passes is not Passes
        or (sampler.launcher is not None and sampler.launcher.captures)
        or "triton" in (kind.backend, kind.attention_backend, sampler.backend)
    )
    return not apart and shareable(sampler.source)


def shareable(model: nn.Module) -> bool:
    """Whether nobody sees that the model's parts are called from other threads, for some of the images at a time.

    Hooks, a ``forward`` of an instance's own and classes that are not known here would, as would the modes and the
    profiler of the calling thread.
    """
    return (
        all_plain(model)
        and not torch._C._len_torch_dispatch_stack()
        and all(isinstance(mode, DeviceContext) for mode in torch.overrides._get_current_function_mode_stack())
        and not torch.autograd._profiler_enabled()
    )
