"""Block-by-block sampling with every key and value computed once.

A *plan* (:mod:`.plan`) holds what depends on batch size and step count: cache, slots, and on a GPU the captured passes.
Running it costs, for each block, one pass of the clean predecessor through the layers that read it, one pass of the
condition through the autoregressive layers, and for each step the diffusion layers on the noisy tokens alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from madformer.arguments import whole_number
from madformer.conditioning.prompt import check_guidable
from madformer.engine import memory
from madformer.engine.graphs import Launcher
from madformer.engine.options import SamplingOptions
from madformer.engine.packing import PackedWeights, packed
from madformer.engine.passes import Passes
from madformer.engine.plan import Plan
from madformer.engine.pool import ModelKind, PlanKey
from madformer.engine.schedule import Schedule
from madformer.engine.structure import around_the_whole, over_the_same, unwrapped
from madformer.model.madformer import MADFormer


class Sampler:
    """Samples ``model`` under ``scheduler``.

    Args:
        model: in eval mode, on the device and in the dtype to compute in.
        scheduler: any diffusers scheduler; it is copied. DDIM and DPM-Solver++ (orders 1 and 2) are tabulated and
            applied by the fused kernel, every other runs through its own ``step``.
        backend: of the fused update; see :func:`madformer.kernels.denoise_step.denoise_step`.
        pack_weights: on a CPU, compute with a second copy of the weights in oneDNN's layout where that is possible
            (:mod:`madformer.engine.packing`).
        compile_unet: run the U-Net's halves through ``torch.compile``, which takes minutes at the first run.
        compile_step: on a processor, run a step's network as one compiled program (:mod:`.compiled`) where one is kept
            for such a model, batch and machine; :meth:`.plan.Plan.warmup` makes those that there are not, in minutes.
        launcher: how passes are launched; None for CUDA graphs on a GPU, else Python.
        passes: what is launched; a subclass computes something else.
        grid: rows and columns of blocks, for images of another size than the model's own.
        shares: on a processor, into how many parts a batch is divided at most, each drawn by a thread of its own
            (:mod:`.sharing`); None for one a thread of PyTorch's, or as many as :meth:`.plan.Plan.warmup` finds best.

    The model stays as it is, and every run computes with what it is by then: weights, hooks, adapters and attributes
    may change in any way between two runs, and in what a run calls. On a GPU convolutions run fastest where they are
    ``channels_last``; :func:`madformer.engine.precision.apply` makes them so.
    """

    def __init__(
        self,
        model: MADFormer,
        scheduler: Any,
        *,
        backend: str = "auto",
        pack_weights: bool = True,
        compile_unet: bool = False,
        compile_step: bool = False,
        launcher: Launcher | None = None,
        passes: type[Passes] = Passes,
        grid: tuple[int, int] | None = None,
        shares: int | None = None,
    ) -> None:
        self.shares = None if shares is None else whole_number("shares", shares, 1)
        self.source = unwrapped(model)
        if (what := around_the_whole(self.source)) is not None:
            warnings.warn(
                f"{what} on the model as a whole: sampling calls its parts, and never this; put it on a part of it",
                stacklevel=2,
            )
        self.passes = passes
        self.compile_unet, self.compile_step = compile_unet, compile_step
        self.pack_weights = pack_weights
        self.scheduler = copy.deepcopy(scheduler)
        self.backend = backend
        self.launcher = launcher
        self.grid = grid

    def kind(self) -> ModelKind:
        """What the model asks of a plan now."""
        return ModelKind.of(self.source, self.grid)

    def current_model(self, weights: PackedWeights | None = None) -> MADFormer:
        """The model as it is now, to compute with until somebody may have changed it: packed into ``weights``, if any.

        It shares all tensors with the model. What is asked for anew after a change is right whatever changed.
        """
        model = self.source if self.grid is None else _of_size(self.source, self.grid)
        return model if weights is None or not self.pack_weights else packed(model, weights)

    def lasting_model(self) -> MADFormer:
        """The model to compute with while it is built as it is, whatever its tensors hold: compiled, if asked for."""
        model = self.current_model()
        if not self.compile_unet:
            return model
        halves: list[nn.Module] = [over_the_same(half) for half in (model.downsampler, model.upsampler)]
        for half in halves:
            half.compile(fullgraph=True, dynamic=False)
        names = ("downsampler", "upsampler")
        return over_the_same(model, {**model._modules, **dict(zip(names, halves, strict=True))})

    def plan(
        self, batch: int, options: SamplingOptions, *, reuse: Callable[[PlanKey], Plan | None] | None = None
    ) -> Plan:
        """Allocate and tabulate for ``batch`` images.

        Args:
            reuse: gives a plan of a kind that nobody uses, if there is one, to use in place of a new one.

        Raises:
            ValueError: a step count that the scheduler does not have, an empty batch, or guidance of a model that has
                no condition to leave out.
            OutOfMemoryError: the batch does not fit; the message names the largest one that does.
        """
        batch = whole_number("batch", batch, 1)
        SamplingOptions.check(options)
        if options.guided:
            check_guidable(self.source.config)
        device, kind = self.source.device, self.kind()
        schedule = Schedule.of(self.scheduler, options.steps, device)

        def make(size: int) -> Plan:
            plan = Plan(self, PlanKey.of(size, schedule, kind, options), schedule, options)
            if device.type == "cuda":
                plan.try_passes()
            return plan

        if reuse is not None and (plan := reuse(PlanKey.of(batch, schedule, kind, options))) is not None:
            plan.settle(self, schedule, options)
            return plan
        per_image = bytes_per_image(
            self.source,
            len(schedule.timesteps),
            guided=options.guided,
            refresh_every=options.refresh_every,
            grid=self.grid,
        )
        return memory.largest_fit(make, batch, per_image, device)


def _of_size(model: MADFormer, grid: tuple[int, int]) -> MADFormer:
    """A model over the same tensors that draws images of another size."""
    rope = over_the_same(model.rope)
    rope._buffers = dict(rope._buffers)
    return over_the_same(model, {**model._modules, "rope": rope}).set_grid(*grid)


def bytes_per_image(
    model: MADFormer,
    num_steps: int,
    *,
    guided: bool = False,
    refresh_every: int = 1,
    grid: tuple[int, int] | None = None,
) -> int:
    """Of the state that outlasts a pass; what a pass needs besides is not in it."""
    kind = replace(ModelKind.of(model, grid), device=torch.device("meta"), backend="reference")
    slots, cache = kind.allocate(1, num_steps, guided=guided)
    added = cache.condition_RLC.nbytes if refresh_every > 1 else 0
    return cache.nbytes + slots.nbytes + added
