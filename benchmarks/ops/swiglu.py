"""SwiGLU at the FFHQ-1024 model's MLP."""

from __future__ import annotations

import torch

from madformer.kernels.swiglu import swiglu, swiglu_ref
from ops.case import Case, random

ROWS, COLS = 8192, 4096


def cases() -> list[Case]:
    return [
        Case(
            op="swiglu",
            label=f"batch {batch}, {ROWS} x {COLS}, bf16",
            inputs=lambda device, batch=batch: (random(device, batch, ROWS, COLS), random(device, batch, ROWS, COLS)),
            run=swiglu,
            forward_bytes=3 * batch * ROWS * COLS * 2,
            backward_bytes=5 * batch * ROWS * COLS * 2,
            peers={"eager": swiglu_ref, "compile": torch.compile(swiglu_ref)},
        )
        for batch in (1, 4)
    ]
