"""What a :class:`GraphLauncher` asks of CUDA, by a stand-in on a CPU, and what it does where CUDA refuses.

A capture of the stand-in records the one call that is captured; a replay makes it again.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from madformer.engine import graphs
from madformer.engine.graphs import GraphLauncher

CPU = torch.device("cpu")


class Stream:
    cuda_stream = 0

    def __init__(self, *_: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def synchronize(self) -> None: ...


class Graph:
    """Replays whatever ``captured`` is."""

    def __init__(self, keep_graph: bool) -> None:
        assert keep_graph
        self.captured: Callable[[], object] = lambda: None

    def instantiate(self) -> None: ...

    def replay(self) -> None:
        self.captured()

    def raw_cuda_graph(self) -> Graph:
        return self


class Loop:
    """``madformer._C.CapturedLoop`` over such a graph; ``refuses`` says at what."""

    refuses: str | None = None

    def __init__(self, graph: Graph, counter: int, bound: int, cap: int, device: int) -> None:
        if self.refuses == "construction":
            raise ValueError('graph holds a node of the kind "host function"')
        # as the C++ does: the graph is copied, not kept
        self.replay, self.cap, self.counter = graph.captured, cap, ctypes.c_int32.from_address(counter)

    def launch(self, stream: int) -> None:
        if self.refuses == "launch":
            raise RuntimeError("cudaGraphLaunch: operation not supported")
        while self.counter.value < self.cap:
            self.replay()
            self.counter.value += 1


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA as far as the launcher knows it; what captures were asked for."""
    asked: list[str] = []

    @contextmanager
    def capture(graph: Graph, *, pool: Any, stream: Any, capture_error_mode: str = "global") -> Iterator[None]:
        asked.append(capture_error_mode)
        yield

    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": lambda: (0, 1),
        "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graphs, "loop_refusal", lambda: "")
    monkeypatch.setitem(sys.modules, "madformer._C", SimpleNamespace(CapturedLoop=Loop))
    monkeypatch.setattr(Loop, "refuses", None)
    return asked


def prepared(launcher: GraphLauncher, work: Callable[[], object]) -> Any:
    launch = launcher.prepare("step", work, lambda: None)
    launch.graph.captured = work  # type: ignore[attr-defined]
    return launch


def counting() -> tuple[list[int], Callable[[], None]]:
    calls: list[int] = []
    return calls, lambda: calls.append(1)


def test_a_loop_is_one_launch_of_all_steps(modes: list[str]) -> None:
    launcher = GraphLauncher(CPU)
    calls, work = counting()
    loop = launcher.loop(prepared(launcher, work), 5)
    calls.clear()  # of the warm-up; making the loop took no step
    loop()
    assert len(calls) == 5
    loop()
    assert len(calls) == 10


def test_other_threads_may_use_the_device_during_a_capture(modes: list[str]) -> None:
    launcher = GraphLauncher(CPU)
    prepared(launcher, lambda: None)
    assert modes == ["thread_local"]


@pytest.mark.parametrize(
    ("refuses", "reason"), [("construction", "host function"), ("launch", "operation not supported")]
)
def test_a_loop_that_the_driver_refuses_is_replayed(
    refuses: str, reason: str, modes: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Loop, "refuses", refuses)
    launcher = GraphLauncher(CPU)
    calls, work = counting()
    with caplog.at_level(logging.WARNING, "madformer.engine"):
        loop = launcher.loop(prepared(launcher, work), 4)
    assert reason in caplog.text
    assert "replayed one by one" in caplog.text
    calls.clear()
    loop()
    assert len(calls) == 4


@pytest.mark.parametrize("refuses", ["construction", "launch"])
def test_a_loop_that_was_insisted_on_is_not_replaced(
    refuses: str, modes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loop, "refuses", refuses)
    launcher = GraphLauncher(CPU, one_launch=True)
    with pytest.raises(RuntimeError, match="one launch for a block's steps cannot be had: "):
        launcher.loop(prepared(launcher, lambda: None), 4)


def test_a_capture_goes_with_its_launches(modes: list[str]) -> None:
    """A second warm-up must not leave the first one's graphs and their memory; a loop keeps what it works in."""
    launcher = GraphLauncher(CPU)
    launch = prepared(launcher, lambda: None)
    loop = launcher.loop(launch, 3)
    graph = weakref.ref(launch.graph)
    del launch
    gc.collect()
    assert graph() is not None
    del loop
    gc.collect()
    assert graph() is None
