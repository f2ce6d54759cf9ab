"""Programs that need no compiler: in place of each the step that it would be made of, run by Python."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import Tensor

from madformer.engine import compiled
from madformer.engine.compiled import Step


class Interpreted:
    """In place of a compiled program: the step as Python runs it."""

    steps: ClassVar[dict[Path, Step]] = {}
    calls, packed = 0, 0
    lengths: ClassVar[list[int]] = []
    sizes: ClassVar[list[int]] = []
    alone: ClassVar[Any] = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.step = self.steps[path]

    def __call__(self, *inputs: Any) -> Tensor:
        type(self).calls += 1
        type(self).packed = sum(weight.is_mkldnn for weight in inputs[0].values())
        self.lengths.append(inputs[-1][0][0].shape[2])
        self.sizes.append(len(inputs[1]))
        # weights are put into one module and taken out again, which threads must not do at a time
        with self.alone:
            return self.step(*inputs)


def interpret(monkeypatch: pytest.MonkeyPatch, folder: Path) -> type[Interpreted]:
    """Have programs made so for the rest of a test, and kept in a folder of its own."""

    def compile_(step: Step, _: object, path: Path, *__: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        Interpreted.steps[path] = step

    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(compiled, "_compile", compile_)
    monkeypatch.setattr(compiled, "Program", Interpreted)
    Interpreted.calls = 0
    Interpreted.lengths.clear()
    Interpreted.sizes.clear()
    return Interpreted
