"""How a pass is launched: as Python runs it, or captured once as a CUDA graph and replayed."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

logger = logging.getLogger("madformer.engine")

Work = Callable[[], object]


class Launcher(Protocol):
    """Makes launches of passes; a launch returns nothing and leaves its results in the state that the pass works on.

    Attributes:
        captures: whether a launch repeats what the pass did when it was prepared, shapes included.
    """

    captures: bool

    def prepare(self, name: str, work: Work, reset: Work) -> Work:
        """A launch of ``work``, which may be run a few times to get there, each time after ``reset``."""

    def loop(self, step: Work, num_steps: int) -> Work:
        """A launch of ``num_steps`` launches of a prepared ``step``."""


class EagerLauncher:
    """Python runs every pass."""

    captures = False

    def prepare(self, name: str, work: Work, reset: Work) -> Work:
        started = time.perf_counter()
        reset()
        work()
        logger.info("%s: first run in %.2f s", name, time.perf_counter() - started)
        return work

    def loop(self, step: Work, num_steps: int) -> Work:
        def run() -> None:
            for _ in range(num_steps):
                step()

        return run


class GraphLauncher:
    """Passes are captured, and a loop over steps is one launch where the driver has conditional graph nodes.

    All graphs draw their scratch memory from one pool, because they never run at the same time; what outlasts a pass is
    not in it.

    Args:
        device: a CUDA device.
        one_launch: None for a conditional WHILE node where it can be had, else replays; True insists on it.

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
        self.graphs: dict[Work, torch.cuda.CUDAGraph] = {}
        refusal = loop_refusal() if one_launch is not False else "it was not asked for"
        if one_launch and refusal:
            raise RuntimeError(f"one launch for a block's steps cannot be had: {refusal}")
        self.one_launch = not refusal
        if refusal and one_launch is None:
            logger.info("a block's steps are replayed one by one: %s", refusal)

    def prepare(self, name: str, work: Work, reset: Work) -> Work:
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
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            work()
        graph.instantiate()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        captured = time.perf_counter()
        logger.info("%s: warm-up %.2f s, capture %.2f s", name, warm - started, captured - warm)

        def launch() -> None:
            graph.replay()

        self.graphs[launch] = graph
        return launch

    def loop(self, step: Work, num_steps: int) -> Work:
        if not self.one_launch:
            return EagerLauncher().loop(step, num_steps)
        counter, bound = torch.tensor([0, num_steps], dtype=torch.int32, device=self.device).split(1)
        captured_loop = importlib.import_module("madformer._C").CapturedLoop(
            graph=self.graphs[step].raw_cuda_graph(),
            counter=counter.data_ptr(),
            bound=bound.data_ptr(),
            cap=num_steps,
            device=counter.get_device(),
        )

        def run() -> None:
            counter.zero_()
            captured_loop.launch(torch.cuda.current_stream(self.device).cuda_stream)

        return run


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
