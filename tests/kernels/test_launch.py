"""What all kernels stand on: the interpreter, launches, which backend runs, and life without Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from madformer import kernels
from madformer.kernels import dispatch, launch
from madformer.kernels.launch import jit, tl
from madformer.kernels.swiglu import swiglu
from tests.helpers.interpreting import SEARCH
from tests.helpers.testing import DEVICE, needs_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@jit
def _round_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(tl.bfloat16))


@jit
def _matmul_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets))
    tl.store(out_ptr + offsets, product)


def test_ops_are_imported_from_the_package() -> None:
    """Also where their files, which have their names, have been imported before: the report imports all."""
    assert {op for status in dispatch.report() for op in status.ops} <= set(kernels.__all__)
    assert [getattr(kernels, name).__name__ for name in kernels.__all__] == kernels.__all__
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)


def test_memory_is_poisoned() -> None:
    assert torch.empty(5, device=DEVICE).isnan().all()
    assert torch.zeros(2, device=DEVICE, dtype=torch.bfloat16).new_empty(3).isnan().all()


@needs_triton
def test_cast_to_bfloat16_rounds_to_nearest_even() -> None:
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[:4] = torch.tensor([float("nan"), float("inf"), 1 + 2**-8, 1 + 3 * 2**-8])
    out = torch.empty(1024, dtype=torch.bfloat16, device=DEVICE)
    launch.launch(_round_kernel, (1,), DEVICE, x, out, SIZE=1024)
    assert torch.equal(out[1:], x.bfloat16()[1:])
    assert out[0].isnan()


@needs_triton
def test_dot_of_bfloat16_accumulates_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).bfloat16().to(DEVICE) for _ in range(2))
    out = torch.empty(32, 32, device=DEVICE)
    launch.launch(_matmul_kernel, (1,), DEVICE, a, b, out, SIZE=32)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)


def test_empty_grid_is_no_launch() -> None:
    launch.launch(None, (3, 0), DEVICE)


@needs_triton
def test_compiling_takes_the_place_of_launching() -> None:
    calls = []
    target = launch.Target(90, num_sms=132)
    with launch.compiling_for(target, lambda *args, **settings: calls.append((args, settings))):
        assert launch.target(CPU) == target
        swiglu(torch.zeros(2, 8), torch.zeros(2, 8), backend="triton")
    ((_, grid, *tensors), settings), *rest = calls
    assert not rest
    assert grid == (2, 1)
    assert [x.shape for x in tensors[:3]] == [(2, 8)] * 3
    assert settings["BLOCK"] >= 8
    assert launch.target(CPU) != target


def test_auto_prefers_triton_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "refusal", lambda device: None)
    monkeypatch.delitem(dispatch._UNAVAILABLE, "triton", raising=False)
    assert dispatch.resolve("swiglu", "auto", CUDA) == "triton"
    assert dispatch.resolve("swiglu", "auto", CUDA, torch.float64) == "reference"
    assert dispatch.resolve("swiglu", "auto", CPU) != "triton"
    assert dispatch.resolve("swiglu", "triton", CPU) == "triton"


def test_a_backend_asked_for_by_name_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    x = torch.zeros(2, 8)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run swiglu on cpu: "):
        swiglu(x, x, backend="triton")
    assert swiglu(x, x).shape == (2, 8)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_apples_gpu_is_refused_in_one_line(backend: str) -> None:
    with pytest.raises(dispatch.BackendUnavailableError, match=r"swiglu cannot run on mps: Apple's GPUs .* 'cpu'$"):
        dispatch.resolve("swiglu", backend, torch.device("mps"))


def test_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "target", lambda device: launch.Target(75, num_sms=40))
    assert launch.refusal(CUDA) == "compute capability 7.5 is below 8.0"


@needs_triton
def test_the_interpreter_patches_what_a_search_at_every_launch_finds() -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    exec(SEARCH, searching := dict(vars(interpreter)))
    language = interpreter.tl

    def patched(patch: Callable[..., None], package: Any) -> list[tuple[Any, ...]]:
        scope = interpreter._LangPatchScope()
        patch(package, interpreter.interpreter_builder, scope)
        changes = list(scope._changes)
        scope.restore()
        return changes

    for package in (language, language.core, language.math, language.tensor, language.core.tensor_descriptor_base):
        expected = patched(searching["_patch_builtin"], package)
        assert expected
        assert patched(interpreter._patch_builtin, package) == expected
