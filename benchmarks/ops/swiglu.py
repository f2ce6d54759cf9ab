"""SwiGLU at the FFHQ-1024 model's MLP."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from benchmarks.ops.case import Case, Operation, random
from madformer.kernels.swiglu import swiglu, swiglu_ref

ROWS, COLS = 8192, 4096


def _peers() -> dict[str, Operation]:
    peers: dict[str, Operation] = {"eager": swiglu_ref, "compile": torch.compile(swiglu_ref)}
    if importlib.util.find_spec("liger_kernel") is not None:
        peers["liger"] = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply
    return peers


def cases() -> list[Case]:
    return [
        Case(
            op="swiglu",
            label=f"batch {batch}, {ROWS} x {COLS}, bf16",
            inputs=lambda device, batch=batch: (random(device, batch, ROWS, COLS), random(device, batch, ROWS, COLS)),
            run=swiglu,
            forward_bytes=3 * batch * ROWS * COLS * 2,
            backward_bytes=5 * batch * ROWS * COLS * 2,
            peers=_peers(),
        )
        for batch in (1, 4)
    ]
