"""The passes of a plan, ready to be launched."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from madformer.engine.graphs import EagerLauncher, Launchable, Launcher
from madformer.engine.passes import Passes
from madformer.engine.structure import Signature

logger = logging.getLogger("madformer.engine")


@dataclass(frozen=True)
class Prepared:
    """Launches of a plan's passes, and what they are good for.

    Attributes:
        signature: of the model that they were captured or compiled for; empty where Python runs whatever the model is
            by then, None where it may change without being seen, so that they are good for one look at it.
        first_block, next_block, denoise: of the passes of these names. reuse: a step without diffusion layers.
        loop: all whole rounds of steps of a block.
    """

    signature: Signature | None
    first_block: Launchable
    next_block: Launchable
    denoise: Launchable
    reuse: Launchable
    loop: Launchable

    @classmethod
    def of(cls, passes: Passes, steps: int, launcher: Launcher | None, signature: Signature | None = None) -> Prepared:
        """All launches of the passes, for so many steps of a block.

        Args:
            launcher: runs each pass to get there; for None Python will run them, and none is run now.
        """
        started, batch, every = time.perf_counter(), len(passes.slots.block_R), passes.refresh_every

        def prepare(name: str, work: Callable[[None], None]) -> Launchable:
            launch = functools.partial(work, None)
            if launcher is None:
                return launch
            return launcher.prepare(f"{name}, batch {batch}", launch, passes.reset)

        first_block = prepare("first block", passes.first_block)
        denoise = prepare("denoising step", passes.denoise)
        next_block = prepare("next block", passes.next_block) if passes.config.num_blocks > 1 else first_block
        reuse, step_round = denoise, denoise
        if every > 1:
            reuse = prepare("step without layers", functools.partial(passes.denoise, refresh=False))
            step_round = prepare("round of steps", passes.denoise_round)
        loop = (launcher or EagerLauncher()).loop(step_round, steps // every)
        if launcher is not None:
            logger.info("plan for batch %d ready in %.2f s", batch, time.perf_counter() - started)
        return cls(signature, first_block, next_block, denoise, reuse, loop)
