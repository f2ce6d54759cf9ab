"""RMSNorm at the FFHQ-1024 model's width, without and with the residual addition."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.case import Case, Operation, random
from madformer.kernels.rms_norm import rms_norm, rms_norm_ref

ROWS, COLS, EPS = 8192, 1152, 1e-6


def _normalise(x: Tensor, weight: Tensor, residual: Tensor | None = None, **backend: str) -> Any:
    return rms_norm(x, weight, eps=EPS, residual=residual, **backend)


def _reference(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
    return rms_norm_ref(x, weight, eps=EPS, residual=residual)


def _peers(with_residual: bool) -> Mapping[str, Operation]:
    norms: dict[str, Operation] = {"torch": lambda x, weight: F.rms_norm(x, (COLS,), weight, EPS)}
    if importlib.util.find_spec("liger_kernel") is not None:
        liger = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        # Not in place: the benchmark gives the same gradient to every run.
        norms["liger"] = lambda x, weight: liger.apply(x, weight, EPS, 0.0, "llama", False)

    def added(norm: Operation) -> Operation:
        def add_and_normalise(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            total = x + residual
            return norm(total, weight), total

        return add_and_normalise

    norms = {name: added(norm) for name, norm in norms.items()} if with_residual else norms
    return {"eager": _reference, "compile": torch.compile(_reference), **norms}


def cases() -> list[Case]:
    return [
        Case(
            op="rms_norm",
            label=f"batch {batch}, {ROWS} x {COLS}{', residual' if with_residual else ''}, bf16",
            inputs=lambda device, batch=batch, with_residual=with_residual: (
                random(device, batch, ROWS, COLS),
                random(device, COLS),
                *([random(device, batch, ROWS, COLS)] if with_residual else []),
            ),
            run=_normalise,
            # x, residual and their sum's gradient come in, y, the sum and the one gradient of both go out.
            forward_bytes=((4 if with_residual else 2) * batch * ROWS * COLS + COLS) * 2,
            backward_bytes=((4 if with_residual else 3) * batch * ROWS * COLS + 2 * COLS) * 2,
            peers=_peers(with_residual),
        )
        for batch in (1, 4)
        for with_residual in (False, True)
    ]
