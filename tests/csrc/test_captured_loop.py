"""madformer._C.CapturedLoop against the same steps called one by one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("madformer._C", reason="madformer._C is not built")
NO_LOOP = _C.loop_support()
needs_loop = pytest.mark.skipif(bool(NO_LOOP), reason=NO_LOOP or "-")
with_cuda = pytest.mark.skipif(not _C.cuda_architectures, reason="madformer._C was built without CUDA")


@pytest.mark.skipif(bool(_C.cuda_architectures), reason="madformer._C was built with CUDA")
def test_a_build_without_cuda_says_so() -> None:
    assert _C.loop_support() == "madformer._C was built without CUDA"
    assert not hasattr(_C, "CapturedLoop")


@with_cuda
def test_what_is_missing_is_said_in_one_line() -> None:
    assert "\n" not in NO_LOOP
    assert torch.cuda.is_available() or NO_LOOP


@with_cuda
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"graph": 0}, "graph, counter and bound must not be null"),
        ({"counter": 0}, "graph, counter and bound must not be null"),
        ({"bound": 0}, "graph, counter and bound must not be null"),
        ({"cap": 0}, "cap=0 must be positive"),
    ],
)
def test_bad_arguments(change: dict[str, int], message: str) -> None:
    arguments = {"graph": 8, "counter": 8, "bound": 8, "cap": 1, "device": 0}
    with pytest.raises(ValueError, match=message):
        _C.CapturedLoop(**arguments | change)


class Sum:
    """Steps that look up what they add by the counter, as a denoising step looks up its coefficients."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(64, 257, generator=generator).cuda()
        self.x = torch.randn(257, generator=generator).cuda()
        self.y = torch.zeros_like(self.x)
        self.counter, self.bound = torch.zeros(2, dtype=torch.int32, device="cuda").split(1)
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)  # A loop works on its memory.

    def step(self) -> None:
        added = self.table.index_select(0, self.counter)[0]  # Memory of the graph's own.
        self.x.mul_(0.75).add_(added)
        self.y.copy_(torch.tanh(self.x) * added)

    def eager(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()
            self.counter += 1

    def results(self) -> tuple[Tensor, Tensor, int]:
        return self.x.clone(), self.y.clone(), int(self.counter)

    def loop(self, cap: int = 64) -> Any:
        before = self.x.clone(), self.y.clone()
        self.step()  # Loads the kernels.
        capture(self.graph, self.step)
        self.x.copy_(before[0])
        self.y.copy_(before[1])
        return make_loop(self, self.graph, cap=cap)


def capture(graph: torch.cuda.CUDAGraph, step: Callable[[], None]) -> None:
    with torch.cuda.graph(graph):
        step()


def make_loop(sum_: Sum, graph: torch.cuda.CUDAGraph, *, cap: int = 1, device: int = 0) -> Any:
    addresses = {"counter": sum_.counter.data_ptr(), "bound": sum_.bound.data_ptr()}
    return _C.CapturedLoop(graph=graph.raw_cuda_graph(), **addresses, cap=cap, device=device)


def launch(loop: Any, sum_: Sum, bound: int) -> None:
    sum_.bound.fill_(bound)
    loop.launch(torch.cuda.current_stream().cuda_stream)


def assert_equal(actual: Sum, expected: Sum) -> None:
    for one, other in zip(actual.results(), expected.results(), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.gpu
@needs_loop
def test_equals_single_steps_for_one_bound_after_another() -> None:
    looped, single = Sum(), Sum()
    loop = looped.loop()
    for bound in (3, 0, 1, 50, 2):
        for sum_ in (looped, single):
            sum_.counter.zero_()
        launch(loop, looped, bound)
        single.eager(bound)
        assert looped.results()[2] == bound
        assert_equal(looped, single)


@pytest.mark.gpu
@needs_loop
def test_starts_where_the_counter_stands() -> None:
    looped, single = Sum(), Sum()
    loop = looped.loop()
    for bound in (5, 9, 9, 4):
        launch(loop, looped, bound)
        single.eager(max(0, bound - int(single.counter)))
        assert_equal(looped, single)


@pytest.mark.gpu
@needs_loop
def test_no_launch_runs_more_steps_than_its_cap() -> None:
    looped, single = Sum(), Sum()
    loop = looped.loop(cap=5)
    for _ in range(2):  # The cap is that of a launch.
        launch(loop, looped, 2**31 - 1)
        single.eager(5)
        assert_equal(looped, single)
    launch(loop, looped, 12)
    single.eager(2)
    assert_equal(looped, single)


@pytest.mark.gpu
@needs_loop
def test_is_in_order_on_its_stream_and_leaves_the_graph_alone() -> None:
    looped, single = Sum(), Sum()
    loop = looped.loop()
    looped.graph.instantiate()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            looped.counter.zero_()
            launch(loop, looped, 20)
        looped.counter.zero_()
        looped.graph.replay()
        looped.counter += 1
        del loop  # While it may still be running.
    torch.cuda.current_stream().wait_stream(stream)
    for num_steps in (20, 20, 20, 1):
        single.counter.zero_()
        single.eager(num_steps)
    assert_equal(looped, single)


@pytest.mark.gpu
@needs_loop
def test_counts_the_nodes_of_the_step() -> None:
    nodes = Sum().loop().nodes
    assert nodes["kernel"] >= 4, nodes
    assert set(nodes) <= {"kernel", "memcpy", "memset", "empty"}, nodes


@pytest.mark.gpu
@needs_loop
def test_a_step_that_a_loop_cannot_hold_is_refused() -> None:
    sum_, event = Sum(), torch.cuda.Event(external=True)

    def step() -> None:
        sum_.x.add_(1)
        event.record()

    capture(sum_.graph, step)
    with pytest.raises(ValueError, match='a node of the kind "event record"') as caught:
        make_loop(sum_, sum_.graph)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@needs_loop
def test_errors_of_cuda_name_the_call() -> None:
    sum_ = Sum()
    capture(sum_.graph, sum_.step)
    with pytest.raises(RuntimeError, match=r"cudaSetDevice\(device\): "):
        make_loop(sum_, sum_.graph, device=torch.cuda.device_count())
    torch.cuda.synchronize()  # Nothing of it is left for the next call.
