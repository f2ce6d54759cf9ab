"""How passes are launched: as Python runs them, or captured once as CUDA graphs and replayed; a plan's, ready."""

from __future__ import annotations

import functools
import importlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from madformer.engine.passes import Passes
from madformer.engine.structure import Signature

logger = logging.getLogger("madformer.engine")

Launchable = Callable[[], object]


class Launcher(Protocol):
    """Makes launches of passes; a launch returns nothing and leaves its results in the state that the pass works on.

    Attributes:
        captures: whether a launch repeats what the pass did when it was prepared, shapes included.
    """

    captures: bool

    def prepare(self, name: str, work: Launchable, reset: Launchable) -> Launchable:
        """A launch of ``work``, which may be run a few times to get there, each time after ``reset``."""

    def loop(self, step: Launchable, num_steps: int) -> Launchable:
        """A launch of ``num_steps`` launches of a prepared ``step``, of a launcher that captures."""


class EagerLauncher:
    """Python runs every pass."""

    captures = False

    def prepare(self, name: str, work: Launchable, reset: Launchable) -> Launchable:
        started = time.perf_counter()
        reset()
        work()
        logger.info("%s: first run in %.2f s", name, time.perf_counter() - started)
        return work

    def loop(self, step: Launchable, num_steps: int) -> Launchable:
        def run() -> None:
            for _ in range(num_steps):
                step()

        return run


@dataclass(frozen=True, eq=False)
class Replay:
    """A launch of a captured pass; the graph and its scratch memory go when nothing names it any more."""

    graph: torch.cuda.CUDAGraph

    def __call__(self) -> None:
        self.graph.replay()


@dataclass(frozen=True, eq=False)
class OneLaunch:
    """A launch of a loop over ``step``, in whose scratch memory it works; ``counter`` counts on the device."""

    step: Replay
    counter: Tensor
    loop: Any

    def __call__(self) -> None:
        self.launch(first=0)

    def launch(self, first: int) -> None:
        self.counter.fill_(first)
        self.loop.launch(torch.cuda.current_stream(self.counter.device).cuda_stream)


@dataclass
class Captured:
    """A batcher's pass, and the rows that it works on: ``rows_B``, on the device, holds ``rows``."""

    launch: Launchable
    rows_B: Tensor
    rows: list[int] = field(default_factory=list)

    def run(self, rows: list[int]) -> None:
        if rows != self.rows:
            # Pinned, or the copy would wait; of its own, because the last one may still be read.
            host = torch.tensor(rows, pin_memory=self.rows_B.is_cuda)
            self.rows_B.copy_(host, non_blocking=True)
            self.rows = rows
        self.launch()


class GraphLauncher:
    """Passes are captured, and a loop over steps is one launch where the driver has conditional graph nodes.

    All graphs draw their scratch memory from one pool, because they never run at the same time; what outlasts a pass is
    not in it. Other threads may use the device meanwhile, also while a pass is captured.

    Args:
        device: a CUDA device.
        one_launch: None for a conditional WHILE node where it can be had, else replays, and a warning where the driver
            refuses this very loop; True insists on it.

    Raises:
        RuntimeError: ``one_launch=True``, and why it cannot be.
    """

    captures = True
    # Triton compiles and cuDNN chooses at the first run; the second is what is captured.
    WARM_UP_RUNS = 2

    def __init__(self, device: torch.device, *, one_launch: bool | None = None) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.insists = one_launch is True
        refusal = loop_refusal() if one_launch is not False else "it was not asked for"
        if one_launch and refusal:
            raise RuntimeError(f"one launch for a block's steps cannot be had: {refusal}")
        self.one_launch = not refusal
        if refusal and one_launch is None:
            logger.info("a block's steps are replayed one by one: %s", refusal)

    def prepare(self, name: str, work: Launchable, reset: Launchable) -> Replay:
        started = time.perf_counter()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for _ in range(self.WARM_UP_RUNS):
                reset()
                work()
            reset()
        self.stream.synchronize()
        warm = time.perf_counter()
        # kept, so that a loop can take it as its body
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        # Under the default, "global", a data loader that pins memory in a thread of its own makes the capture invalid.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            work()
        graph.instantiate()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        captured = time.perf_counter()
        logger.info("%s: warm-up %.2f s, capture %.2f s", name, warm - started, captured - warm)
        return Replay(graph)

    def loop(self, step: Launchable, num_steps: int) -> Launchable:
        """As the protocol says.

        Raises:
            RuntimeError: ``one_launch=True``, and the driver refuses this loop.
        """
        if self.one_launch:
            try:
                return self._one_launch(step, num_steps)
            except (RuntimeError, ValueError) as error:
                if self.insists:
                    raise RuntimeError(f"one launch for a block's steps cannot be had: {error}") from error
                logger.warning("a block's steps are replayed one by one: %s", error)
        return EagerLauncher().loop(step, num_steps)

    def _one_launch(self, step: Launchable, num_steps: int) -> Launchable:
        assert isinstance(step, Replay), "prepared by another launcher"
        counter, bound = torch.tensor([0, num_steps], dtype=torch.int32, device=self.device).split(1)
        captured_loop = importlib.import_module("madformer._C").CapturedLoop(
            graph=step.graph.raw_cuda_graph(),
            counter=counter.data_ptr(),
            bound=bound.data_ptr(),
            cap=num_steps,
            device=counter.get_device(),
        )

        loop = OneLaunch(step, counter, captured_loop)
        loop.launch(first=num_steps)  # No step is left: whether the driver launches it at all.
        torch.cuda.current_stream(self.device).synchronize()
        return loop


def loop_refusal() -> str:
    """Why a block's steps cannot be one launch here; empty where they can."""
    try:
        extension = importlib.import_module("madformer._C")
    except ImportError as error:
        return f"madformer._C is not there: {error}"
    return extension.loop_support()


def launcher_for(device: torch.device) -> Launcher:
    """Graphs on a GPU, Python elsewhere."""
    return GraphLauncher(device) if device.type == "cuda" else EagerLauncher()


@dataclass(frozen=True)
class Prepared:
    """Launches of a plan's passes, and what they are good for.

    Attributes:
        signature: of the model that they were captured or compiled for; empty where Python runs whatever the model is
            by then, None where it may change without being seen, so that they are good for one look at it.
        first_block, next_block, denoise: of the passes of these names. reuse: a step without diffusion layers.
        steps: of a block from one on, so many, which Python runs. loop: all whole rounds of ``refresh_every`` steps.
    """

    signature: Signature | None
    first_block: Launchable
    next_block: Launchable
    denoise: Launchable
    reuse: Launchable
    steps: Callable[[int, int], None]
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
        loop: Launchable = functools.partial(passes.denoise_steps, 0, steps - steps % every)
        if launcher is not None and launcher.captures:
            loop = launcher.loop(step_round, steps // every)
        if launcher is not None:
            logger.info("plan for batch %d ready in %.2f s", batch, time.perf_counter() - started)
        return cls(signature, first_block, next_block, denoise, reuse, passes.denoise_steps, loop)
