"""What a plan has ready, and how that follows the model, the schedule and the thread that it is asked from."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from madformer.conditioning.prompt import Prompt
from madformer.config import MADFormerConfig
from madformer.engine.cache import ConditioningCache
from madformer.engine.compiled import CompiledPasses, may_compile, seen
from madformer.engine.graphs import EagerLauncher, Launchable, Launcher, Prepared, launcher_for
from madformer.engine.options import SamplingOptions
from madformer.engine.packing import PackedWeights
from madformer.engine.passes import Passes
from madformer.engine.pool import ModelKind, PlanKey
from madformer.engine.running import Exclusive, computing
from madformer.engine.schedule import Schedule
from madformer.engine.sharing import SharedPasses, most_shares, shareable, shares_for
from madformer.engine.slots import ScheduleRows, Slots
from madformer.engine.structure import Signature, UnknownPartError, signature
from madformer.model.blocks import block_order
from madformer.model.madformer import MADFormer

if TYPE_CHECKING:
    from madformer.engine.sampler import Sampler

logger = logging.getLogger("madformer.engine")

TRIALS, TRIAL_STEPS = 3, 3
"""How often ways to share a batch are tried, of which the fastest counts, and over how many steps."""


class Following:
    """Slots, cache and passes of a batch size and a step count, looked at again whenever anything may have changed.

    Nothing that is made of the model's weights outlasts a run unless it is compared with them.
    """

    launcher: Launcher
    slots: Slots
    cache: ConditioningCache
    passes: Passes
    model: MADFormer
    shares: int
    compiled: bool
    _frozen: bool
    _prompt: Prompt

    def __init__(self, sampler: Sampler, key: PlanKey, schedule: Schedule, options: SamplingOptions) -> None:
        self._alone = Exclusive("this plan is drawing already: of several runs at a time each needs a plan of its own")
        self._drawing, self._touched = False, False
        self.packed = PackedWeights()
        # threads that PyTorch had, and in how many shares a step was fastest
        self._measured: tuple[int, int] | None = None
        self.key = key
        self.settle(sampler, schedule, options)
        self._allocate(key, self._shares(key.kind))

    def settle(self, sampler: Sampler, schedule: Schedule, options: SamplingOptions) -> None:
        """Draw from now on with these, of a plan's own kind."""
        self.sampler, self.schedule, self.options = sampler, schedule, options
        self._options = options  # of the run at hand: a callback may change them

    def rest(self) -> None:
        """Let go of the model, until :meth:`settle`, as far as it was not captured."""
        del self.sampler
        if not self._frozen:
            vars(self).pop("model", None)
            self.passes.rest()

    @property
    def config(self) -> MADFormerConfig:
        return self.key.kind.config

    @property
    def batch(self) -> int:
        return self.key.batch

    @property
    def timesteps(self) -> Tensor:
        return self.schedule.timesteps

    def _allocate(self, key: PlanKey, shares: int) -> None:
        self.key, self.shares, kind = key, shares, key.kind
        self.compiled = may_compile(self.sampler, kind)
        # of one kind with what passes make, or a compiled one would be compiled for both
        with torch.inference_mode():
            self.slots, self.cache = kind.allocate(key.batch, key.num_steps, guided=key.guided, shares=shares)
            self.model = self.sampler.current_model()
            passes: Any = CompiledPasses if self.compiled else self.sampler.passes
            if shares > 1:
                passes = partial(SharedPasses, passes=passes)
            options = (key.clip, self.sampler.backend, key.refresh_every)
            self.passes = passes(self.model, self.cache, self.slots, *options)
        # what a scheduler's own step needs of the host is not in a graph
        self.launcher = self.sampler.launcher or launcher_for(kind.device) if key.tabulated else EagerLauncher()
        self._frozen = self.launcher.captures or self.sampler.compile_unet
        self._reports = torch.cuda.Stream(kind.device) if kind.device.type == "cuda" else None
        self.prepared: Prepared | None = None
        self._order = block_order(kind.config)
        self._told = ""

    def warmup(self, *, measure_shares: bool = True) -> Self:
        """Make ready what the first run would: compile, pack, capture. Logged with its times as ``madformer.engine``.

        Args:
            measure_shares: on a processor find out, besides, in how many shares the batch is drawn fastest
                (:mod:`.sharing`), which runs keep to for as long as PyTorch has so many threads.

        Raises:
            InUseError: it is drawing.
        """
        with self._alone, computing(self.key.kind.device):
            self._measured = None
            self._follow(try_out=True)
            # compiled steps do not wait for each other, and each number of shares would be compiled anew
            may_share = most_shares(self.sampler, self.key, self.key.kind) > 1
            if measure_shares and may_share and self.sampler.shares is None and not self.compiled:
                self._measure_shares()
        return self

    def _measure_shares(self) -> None:
        times: dict[int, float] = {}
        most = most_shares(self.sampler, self.key, self.key.kind)
        for shares in (*(1 << power for power in range((most - 1).bit_length())), most):
            self._measured = torch.get_num_threads(), shares
            self._follow(try_out=True)
            assert self.prepared is not None
            with self.passes.at_work():
                times[shares] = min(self._step_seconds() for _ in range(TRIALS))
        best = min(times, key=times.__getitem__)
        self._measured = torch.get_num_threads(), best
        self._follow(try_out=True)
        listed = ", ".join(f"{shares}: {1e3 * time:.1f} ms" for shares, time in times.items())
        logger.info("batch %d is drawn in %d shares; a step in each number of shares: %s", self.batch, best, listed)

    def _step_seconds(self) -> float:
        assert self.prepared is not None
        self.prepared.first_block()
        count = min(TRIAL_STEPS, len(self.timesteps))
        # as a run launches them
        return _seconds(partial(self.prepared.steps, 0, count)) / count

    def _shares(self, kind: ModelKind) -> int:
        """In how many shares the next run draws."""
        compiled, threads = may_compile(self.sampler, kind), torch.get_num_threads()
        of_choice = self.sampler.shares is None and not compiled
        if of_choice and self._measured is not None and self._measured[0] == threads:
            return min(self._measured[1], most_shares(self.sampler, self.key, kind))
        return shares_for(self.sampler, self.key, kind, compiled=compiled)

    def try_passes(self) -> None:
        """Run every pass once, which shows whether its scratch memory is there."""
        with self._alone, computing(self.key.kind.device):
            self.slots.assign(self._rows(), self.model)
            self.passes.reset()
            self.passes.first_block(None)
            self.passes.denoise(None)
            if self.config.num_blocks > 1:
                self.passes.next_block(None)

    def _follow(self, *, try_out: bool = False) -> None:
        """Make the passes those of the model as it is now, and run each once where that makes anything ready."""
        kind = self.sampler.kind()
        if self._drawing:
            if kind != self.key.kind:
                raise RuntimeError("the model's configuration, dtype, device or backend changed while it was drawing")
        else:
            shares, compiled = self._shares(kind), may_compile(self.sampler, kind)
            if (kind, shares, compiled) != (self.key.kind, self.shares, self.compiled):
                self._allocate(replace(self.key, kind=kind), shares)
        if isinstance(self.passes, SharedPasses):
            # what was put into the model since the run began is called by one thread, though for some images at a time
            self.passes.in_turn = self._drawing and not shareable(self.sampler.source)
        self._touched, steps = False, len(self.timesteps)
        if not self._frozen:
            self._look_through(self.sampler.current_model(self.packed))
            if self.compiled:
                self._look_for_programs(try_out=try_out)
            if self.prepared is None:
                self.prepared = Prepared.of(self.passes, steps, self.launcher if try_out else None, ())
            return
        known = None if self.prepared is None else self.prepared.signature
        built: Signature | None = None
        try:
            built = signature(self.sampler.source)
        except UnknownPartError as unknown:
            self._tell(f"not captured or compiled: {unknown}")
        if built is None or (self._drawing and built != known):
            # as it stands, and for a run that has begun: preparing would overwrite what it holds
            self._look_through(self.sampler.current_model())
            self.prepared = Prepared.of(self.passes, steps, None)
        elif built != known:
            self._look_through(self.sampler.lasting_model())
            self.slots.assign(self._rows(), self.model)
            launcher = self.launcher if try_out or self.launcher.captures else None
            self.prepared = Prepared.of(self.passes, steps, launcher, built)
        else:
            self._look_through(self.model)

    def _look_for_programs(self, *, try_out: bool) -> None:
        model = self.sampler.current_model()
        built, threads = seen(model), max(1, torch.get_num_threads() // self.shares)
        for passes in self.passes.parts if isinstance(self.passes, SharedPasses) else (self.passes,):
            assert isinstance(passes, CompiledPasses)
            passes.look_at(model, built, threads, try_out=try_out)

    def _look_through(self, model: MADFormer) -> None:
        self.model = model
        self.passes.follow(model)
        if self._drawing:
            self.slots.tabulate(self._rows(), model)
            self.slots.condition_on(self._prompt, model)
        elif self.prepared is None or self.prepared.signature is None:
            self.slots.assign(self._rows(), model)

    def _rows(self) -> ScheduleRows:
        coefficients = None if self.schedule.table is None else self.schedule.table.coefficients
        return ScheduleRows.of(self.config, self.timesteps, coefficients, len(self.timesteps), self._options)

    def _tell(self, message: str) -> None:
        if message != self._told:
            logger.warning("%s", message)
        self._told = message


def _seconds(launch: Launchable) -> float:
    started = time.perf_counter()
    launch()
    return time.perf_counter() - started
