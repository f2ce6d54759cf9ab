"""Programs of AOTInductor, called without Python's lock: values, memory, other threads, and what is refused."""

import gc
import threading
import time
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from madformer.engine.program import Program, _library

ROWS, WIDTH, LAYERS = 64, 256, 40


class Stack(nn.Module):
    def forward(self, weights: dict[str, Tensor], x: Tensor, others: list[tuple[Tensor, Tensor]]) -> Tensor:
        for _ in range(LAYERS):
            x = torch.tanh(x @ weights["weight"] + weights["bias"])
        return sum((a - b for a, b in others), x)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x * 2


class Checked(nn.Module):
    def forward(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        torch.ops.aten._assert_async.msg((x >= 0).all(), "a root of what is negative")
        return x.sqrt() * weights["weight"]


def arguments(seed: int) -> tuple[dict[str, Tensor], Tensor, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    x, *others = torch.randn(5, ROWS, WIDTH, generator=generator)
    weights = {
        "weight": torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5,
        "bias": torch.randn(WIDTH, generator=generator),
    }
    return weights, x, [(others[0], others[1]), (others[2], others[3])]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(Stack(), arguments(0), tmp_path_factory.mktemp("package") / "stack.pt2")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def compiled(module: nn.Module, inputs: tuple[object, ...], path: Path) -> Path:
    with torch.inference_mode(mode=False), torch.no_grad():
        exported = torch.export.export(module, inputs, strict=False)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
    return path


@pytest.mark.slow
def test_values_and_memory(package: Path) -> None:
    """As the module's own, of what tensors hold by then; neither inputs nor results are kept."""
    programs = [Program(package), Program(package)]
    storages = []
    for seed, program in ((1, programs[0]), (2, programs[1]), (1, programs[1])):
        weights, x, others = arguments(seed)
        for factor in (1.0, 0.5):
            weights["weight"].mul_(factor)
            result = program(weights, x, others)
            torch.testing.assert_close(result, Stack()(weights, x, others), rtol=1e-5, atol=1e-5)
            of_call = (*weights.values(), x, others[1][0], result)
            storages += [weakref.ref(tensor.untyped_storage()) for tensor in of_call]
    del weights, x, others, result, of_call
    gc.collect()
    assert [storage() for storage in storages] == [None] * len(storages)


@pytest.mark.slow
def test_others_compute_meanwhile(package: Path) -> None:
    """A thread that wakes again and again is not held up by a program in another one."""
    program, inputs, calls, started, wakes = Program(package), arguments(1), 20, threading.Event(), 0

    def draw() -> None:
        with torch.inference_mode():
            started.set()
            for _ in range(calls):
                program(*inputs)

    thread = threading.Thread(target=draw)
    thread.start()
    started.wait()
    while thread.is_alive():
        time.sleep(1e-4)
        wakes += 1
    # with the lock held about one a call
    assert wakes > 3 * calls


@pytest.mark.slow
def test_what_is_not_called(package: Path, tmp_path: Path) -> None:
    program, (weights, x, others) = Program(package), arguments(1)
    with pytest.raises(ValueError, match="of 7 tensors was given 5"):
        program(weights, x, others[:1])
    with torch.inference_mode(mode=False):
        linear = compiled(nn.Linear(4, 4), (torch.zeros(2, 4),), tmp_path / "linear.pt2")
    pair = compiled(Pair(), (torch.zeros(2, 4),), tmp_path / "pair.pt2")
    for path, message in ((linear, "tensors of its own"), (pair, "one tensor")):
        with pytest.raises(RuntimeError, match=message):
            Program(path)


@pytest.mark.slow
def test_failure(tmp_path: Path) -> None:
    """A program that fails raises what it says, keeps nothing of the call, and computes again after it."""
    weights, x = {"weight": torch.ones(4)}, torch.full((2, 4), 4.0)
    program = Program(compiled(Checked(), (weights, x), tmp_path / "checked.pt2"))
    bad = -x
    storage = weakref.ref(bad.untyped_storage())
    with pytest.raises(RuntimeError, match="RunSingleThreaded of a compiled program failed: ") as raised:
        program(weights, bad)
    del bad, raised
    gc.collect()
    assert storage() is None
    assert program(weights, x).eq(2).all()


def test_what_is_no_package(tmp_path: Path) -> None:
    text = tmp_path / "text.pt2"
    text.write_text("no archive")
    with pytest.raises(OSError, match="zip"):
        Program(text)
    with pytest.raises(FileNotFoundError):
        Program(tmp_path / "missing.pt2")
    for number, (names, error, message) in enumerate(
        [
            ([], RuntimeError, "no library for this system"),
            (["a.wrapper.so", "a.wrapper_metadata.json", "b.so"], RuntimeError, "no library for this system"),
            (["a.wrapper.so"], OSError, "a.wrapper.so"),
            (["a.wrapper.so", "a.wrapper.json"], RuntimeError, "only PyTorch's loader can call"),
        ]
    ):
        path = tmp_path / f"{number}.pt2"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/version", "1")
            for name in names:
                archive.writestr(f"x/data/aotinductor/model/{name}", "no library")
        with pytest.raises(error, match=message):
            Program(path)


@pytest.mark.slow
def test_another_pytorch(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What this PyTorch lacks is said when a package is loaded, not in the middle of a picture."""
    path = tmp_path / "stack.pt2"
    path.write_bytes(package.read_bytes())
    monkeypatch.delattr(torch._C._aoti, "alloc_tensors_by_stealing_from_void_ptrs")
    with pytest.raises(RuntimeError, match="has no alloc_tensors_by_stealing_from_void_ptrs"):
        Program(path)


@pytest.mark.slow
def test_a_package_in_the_place_of_another(package: Path, tmp_path: Path) -> None:
    """A library is loaded once, and again where its file is another one."""
    path = tmp_path / "stack.pt2"
    path.write_bytes(package.read_bytes())
    first = _library(path)
    assert _library(path) is first
    path.unlink()
    path.write_bytes(package.read_bytes())
    assert _library(path) is not first
