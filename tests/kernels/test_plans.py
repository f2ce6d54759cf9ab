"""Plans: what is kept from call to call is never used for arguments of another kind, and nothing listens in vain."""

from __future__ import annotations

import gc
import importlib
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from madformer.kernels import launch, plans
from madformer.kernels.adaln import adaln
from madformer.kernels.block_causal_attention import BlockLayout, block_causal_attention
from madformer.kernels.block_causal_attention import op as attention_op
from madformer.kernels.cached_attention import op as cached_op
from madformer.kernels.group_norm_silu import group_norm_silu
from madformer.kernels.norm_common import op as norm_op
from madformer.kernels.qk_norm_rope import qk_norm_rope
from madformer.kernels.rms_norm import rms_norm as norm
from madformer.kernels.swiglu import swiglu as gated
from tests.helpers.testing import DEVICE, needs_triton

swiglu = importlib.import_module("madformer.kernels.swiglu")
pytestmark = needs_triton
IMPLEMENTATIONS = {
    "swiglu": swiglu._forward,
    "swiglu backward": swiglu._backward,
    "norm": norm_op._forward,
    "attention": attention_op._forward,
    "cached": cached_op._forward,
}


@pytest.fixture(autouse=True)
def no_plans() -> None:
    for implementation in IMPLEMENTATIONS.values():
        implementation.plans.clear()


def spread(rows: int, cols: int, *, stride: int = 0, offset: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows ``stride`` apart, ``offset`` elements from an aligned address."""
    stride = stride or cols
    memory = torch.randn(offset + rows * stride, device=DEVICE).to(dtype)
    return memory.as_strided((rows, cols), (stride, 1), offset)


KINDS: dict[str, dict[str, Any]] = {
    "first": {},
    "more rows": {"rows": 5},
    "other columns": {"cols": 24},
    "other strides": {"stride": 80},
    "not aligned": {"offset": 1},
    "other dtype": {"dtype": torch.bfloat16},
    "first again": {},
}


def test_no_kind_of_arguments_is_served_by_the_plan_of_another() -> None:
    """The same call over and over, one thing changed each time; every result against the reference in float64."""
    kinds = [{"rows": 3, "cols": 40, **kind} for kind in KINDS.values()]
    for kind in [*kinds, *kinds]:
        gate, up = spread(**kind), spread(**kind | {"offset": 0})
        for first, second in ((gate, up), (up, gate)):
            expected = swiglu.swiglu_ref(first.double(), second.double())
            actual = gated(first, second, backend="triton")
            assert actual.dtype == first.dtype
            tolerance = 1e-2 if first.dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    # One for each kind, two where only one of the arguments is not aligned.
    assert len(swiglu._forward.plans) == len(KINDS)


def test_optional_arguments_and_numbers_make_kinds() -> None:
    x, residual, weight = (torch.randn(*shape, device=DEVICE) for shape in ((4, 48), (4, 48), (48,)))
    for eps in (1e-6, 0.5, 1e-6):
        for given_weight in (None, weight):
            plain = norm(x, given_weight, eps=eps, backend="triton")
            torch.testing.assert_close(plain, norm(x, given_weight, eps=eps, backend="reference"))
            added = norm(x, given_weight, eps=eps, residual=residual, backend="triton")
            torch.testing.assert_close(added, norm(x, given_weight, eps=eps, residual=residual, backend="reference"))
    assert len(norm_op._forward.plans) == 8


def test_settings_that_are_replaced_are_those_of_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    start = launch.launch

    def record(kernel: Any, grid: Any, device: Any, *args: Any, **settings: Any) -> Any:
        used.append(settings["BLOCK"])
        return start(kernel, grid, device, *args, **settings)

    monkeypatch.setattr(launch, "launch", record)
    x = torch.randn(2, 64, device=DEVICE)
    for block in (32, 128):
        monkeypatch.setattr(swiglu, "choose_settings", lambda cols, block=block: swiglu.SwigluSettings(block, 1))
        torch.testing.assert_close(gated(x, x, backend="triton"), swiglu.swiglu_ref(x, x))
    assert used == [32, 128]


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_PLANS", 3)
    for rows in range(1, 6):
        x = torch.randn(rows, 8, device=DEVICE)
        torch.testing.assert_close(gated(x, x, backend="triton"), swiglu.swiglu_ref(x, x))
    assert len(swiglu._forward.plans) == 2


def calls_of_every_op() -> dict[str, Callable[[], Any]]:
    def heads(length: int) -> Tensor:
        return torch.randn(1, 1, length, 16, device=DEVICE)

    x, rows = torch.randn(2, 3, 32, device=DEVICE), torch.randn(2, 32, device=DEVICE)
    lengths, channels = torch.tensor([3], device=DEVICE), torch.randn(8, device=DEVICE)
    maps, ones, layout = torch.randn(1, 8, 2, 2, device=DEVICE), torch.ones(16, device=DEVICE), BlockLayout(4, 2)
    return {
        "swiglu": lambda: gated(x, x, backend="triton"),
        "rms_norm": lambda: norm(x, rows[0], eps=1e-6, residual=x, backend="triton"),
        "adaln": lambda: adaln(x, rows, rows, residual=x, gate=rows, backend="triton"),
        "attention": lambda: block_causal_attention(heads(8), heads(8), heads(8), layout, backend="triton"),
        "cached": lambda: cached_op.cached_attention_triton(
            heads(4), heads(8), heads(8), lengths, heads(4), heads(4), None, 0.25, None
        ),
        "group norm": lambda: group_norm_silu(maps, 2, channels, channels, eps=1e-6, backend="triton"),
        "qk": lambda: qk_norm_rope(
            [torch.randn(1, 4, 48, device=DEVICE)],
            [ones],
            [ones],
            [None],
            [None],
            num_heads=1,
            axes=1,
            backend="triton",
        ),
    }


def test_plans_keep_no_tensor() -> None:
    """Of what the ops are given and of what they make: all of it is gone when its owner is."""
    gc.collect()
    before = {id(x) for x in gc.get_objects() if type(x) is Tensor}
    calls = calls_of_every_op()
    for call in calls.values():
        call()
    owned = [weakref.ref(x) for x in gc.get_objects() if type(x) is Tensor and id(x) not in before]
    assert owned
    del calls, call
    gc.collect()
    assert not [x().shape for x in owned if x() is not None]


def test_threads_make_and_use_plans_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a bound throws plans away all the time, no call is given the plan of another."""
    monkeypatch.setattr(plans, "MAX_PLANS", 3)

    @plans.planned()
    def size_of(x: Tensor, _: int) -> Callable[..., tuple[torch.Size, int]]:
        shape = x.shape
        return lambda x, number: (shape, number)

    wrong: list[str] = []

    def work(seed: int) -> None:
        for step in range(2000):
            x, number = torch.empty(1 + (seed + step) % 7), step % 3
            if size_of(x, number) != (x.shape, number):
                wrong.append(f"{seed}, {step}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(size_of.plans) <= 3 + len(threads)


def test_a_check_survives_that_another_thread_empties_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every look at a kind."""
    monkeypatch.setattr(plans, "MAX_PLANS", 1)
    checked = plans.once_a_kind(lambda number: number)

    class Kind:
        looks = 0

        def __hash__(self) -> int:
            self.looks += 1
            if self.looks > 1:
                checked((self.looks,), 1)
            return 0

    kind = (Kind(),)
    assert [checked(kind, 0) for _ in range(4)] == [0] * 4
    assert kind[0].looks > 4


class Listener(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


def test_who_listens_to_ops_hears_them() -> None:
    x = torch.randn(2, 16, device=DEVICE)
    with Listener() as listener:
        gated(x, x, backend="triton")
    assert "madformer.swiglu.default" in listener.heard
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gated(x, x, backend="triton")
    assert "madformer::swiglu" in {event.key for event in profile.key_averages()}
    assert torch.compile(lambda x: gated(x, x, backend="triton"), backend="eager", fullgraph=True)(x).shape == x.shape


def test_the_short_way_is_for_plain_tensors_alone() -> None:
    class Subclass(Tensor):
        pass

    x = torch.randn(4)
    assert plans.plain_kind([x, None, 1.0, [x, torch.nn.Parameter(x)]]) is not None
    assert plans.plain_kind([x, x.as_subclass(Subclass)]) is None
    assert plans.plain_kind([[x.as_subclass(Subclass)]]) is None
    assert plans.plain_kind([x.to("meta")]) is None
    assert plans.plain_kind([torch._neg_view(x)]) is None
    seen: list[Any] = []
    torch.func.vmap(lambda row: (seen.append(plans.plain_kind([x])), row)[1])(x)
    with torch.autograd.forward_ad.dual_level():
        seen.append(plans.plain_kind([x]))
    with Listener():
        seen.append(plans.plain_kind([x]))
    with torch.device("cpu"):
        seen.append(plans.plain_kind([x]))
    torch.jit.trace(lambda x: (seen.append(plans.plain_kind([x])), x + 1)[1], x, check_trace=False)
    assert not any(seen)


@pytest.mark.parametrize("short", [True, False])
def test_both_ways_have_the_same_gradients(short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_short_way", short)
    calls = {
        "norm": lambda x: norm(x, None, eps=1e-6, backend="triton"),
        "qk": lambda x: sum(
            part.square().sum() for part in qk_norm_rope(
                [x[None], x[None]], [None] * 2, [None] * 2, [None] * 2, [None] * 2,
                num_heads=1, axes=1, backend="triton",
            )
        ),
    }  # fmt: skip
    for call in calls.values():
        x = torch.randn(3, 48, device=DEVICE, requires_grad=True)
        (grad,) = torch.autograd.grad(call(x).sum(), x)
        y = x.detach().double().requires_grad_()
        reference = norm(y, None, eps=1e-6, backend="reference") if call is calls["norm"] else 2 * y.square().sum()
        torch.testing.assert_close(grad.double(), torch.autograd.grad(reference.sum(), y)[0], rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_refused_or_recorded_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """No way gives a gradient that looks like a constant."""
    for short in (True, False):
        monkeypatch.setattr(plans, "_short_way", short)
        x = torch.randn(2, 16, device=DEVICE, requires_grad=True)
        (grad,) = torch.autograd.grad(gated(x, x, backend="triton").sum(), x, create_graph=True)
        with (
            pytest.warns(UserWarning, match="autograd kernel was not registered"),
            pytest.raises(RuntimeError),
        ):
            torch.autograd.grad(grad.sum(), x)


class FakeKernel:
    """As much of Triton's interface as a launch uses."""

    params = (SimpleNamespace(name="x", is_constexpr=False), SimpleNamespace(name="BLOCK", is_constexpr=True))

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.started: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        if len(grid) == 3:
            return lambda *arguments, stream: self.started.append((grid, arguments, stream))
        return lambda *arguments, **settings: (self.found.append((grid, arguments, settings)), self)[1]


def test_what_is_compiled_is_started_where_the_address_is_aligned() -> None:
    kernel, memory = FakeKernel(), torch.zeros(64, dtype=torch.float32)
    start = plans.Launch(kernel, (7,), torch.device("cpu"), (3, 0.5), BLOCK=8)
    aligned, other = (memory[i:] for i in (4, 5))
    start(other, None)
    start(aligned, None)
    assert [arguments[2:] for _, arguments, _ in kernel.found] == [(3, 0.5)] * 2
    start(aligned, None)
    start(memory, None)
    start(other, None)
    assert len(kernel.found) == 3
    addresses = [aligned.data_ptr(), memory.data_ptr()]
    assert kernel.started == [((7, 1, 1), (address, None, 3, 0.5, 8), 0) for address in addresses]
    plans.Launch(kernel, (4, 0), torch.device("cpu"))(memory)
    assert len(kernel.found) == 3


def test_hooks_of_triton_see_every_launch_they_are_there_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled kernel is started past them only while there are none, and by a launcher that is known."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    started: list[tuple[Any, ...]] = []

    class Compiled:
        function, packed_metadata = "function", "packed"

        def run(self, *arguments: Any) -> None:
            started.append(arguments)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            return lambda *arguments, stream: started.append(("by Triton", grid, stream, arguments))

    monkeypatch.setattr(triton.compiler, "CompiledKernel", Compiled)
    start, hook = launch._started(Compiled(), (3, 2, 1)), lambda *_: None
    straight = (3, 2, 1, 9, "function", "packed", None, None, None, "x", 5)
    start(9, "x", 5)
    for chain in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        chain.add(hook)
        start(9, "x", 5)
        chain.remove(hook)
    start(9, "x", 5)
    described = ("by Triton", (3, 2, 1), 9, ("x", 5))
    alone = straight if launch.TRITON_VERSION in launch._KNOWN_LAUNCHERS else described
    assert started == [alone, described, described, alone]


def test_fresh_tensors_are_like_their_example() -> None:
    for example in (torch.zeros(2, 3, 4, dtype=torch.bfloat16).transpose(1, 2), torch.zeros(0), torch.zeros(0, 3)):
        new = plans.fresh(example)
        first, second = new(), new()
        assert (first.shape, first.stride(), first.dtype) == (example.shape, example.stride(), example.dtype)
        assert first.isnan().all()
        assert example.numel() == 0 or first.data_ptr() != second.data_ptr()


def test_checks_are_made_for_every_kind() -> None:
    """What passed for one kind of arguments says nothing of another; what failed fails again."""
    x = torch.randn(2, 16, device=DEVICE)
    for _ in range(2):
        assert gated(x, x, backend="triton").shape == x.shape
        with pytest.raises(ValueError, match="up must have gate's shape"):
            gated(x, x[:, :8], backend="triton")
        with pytest.raises(ValueError, match="up must have gate's dtype"):
            gated(x, x.bfloat16(), backend="triton")
        with pytest.raises(ValueError, match="eps must be positive"):
            norm(x, None, eps=-1.0, backend="triton")
        with pytest.raises(ValueError, match="backend='none'"):
            gated(x, x, backend="none")


def test_the_dispatcher_is_heard_where_it_is_asked_for() -> None:
    x = torch.randn(2, 16)
    assert plans.plain_kind([x]) is not None
    with plans.through_dispatcher():
        assert plans.plain_kind([x]) is None
    assert plans.plain_kind([x]) is not None
