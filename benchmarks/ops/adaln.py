"""AdaLN-Zero at the FFHQ-1024 model's width: gated residual, norm, modulation by block from one projection."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.case import Case, random
from madformer.kernels.adaln import adaln, adaln_ref

BLOCKS, TOKENS, COLS, EPS = 32, 256, 1152, 1e-6
LENGTH = BLOCKS * TOKENS


def _inputs(device: torch.device, batch: int) -> tuple[Tensor, ...]:
    """Branch, shift, scale, residual, gate; modulation is three of the six parts of DiT's projection."""
    parts = random(device, batch, BLOCKS, 6 * COLS, grad=False).chunk(6, dim=-1)
    shift, scale, gate = (part.requires_grad_() for part in parts[:3])
    return random(device, batch, LENGTH, COLS), shift, scale, random(device, batch, LENGTH, COLS), gate


def _run(x: Tensor, shift: Tensor, scale: Tensor, residual: Tensor, gate: Tensor, **options: str) -> Any:
    return adaln(x, shift, scale, residual=residual, gate=gate, eps=EPS, **options)


def _reference(x: Tensor, shift: Tensor, scale: Tensor, residual: Tensor, gate: Tensor, *, norm: Any) -> Any:
    return adaln_ref(x, shift, scale, residual=residual, gate=gate, norm=norm, eps=EPS)


def _torch(x: Tensor, shift: Tensor, scale: Tensor, residual: Tensor, gate: Tensor, *, norm: str) -> Any:
    """As DiT writes it: torch's fused norm, the rest in bfloat16."""

    def by_block(x: Tensor) -> Tensor:
        return x.unflatten(1, (BLOCKS, TOKENS))

    total = by_block(residual) + gate[:, :, None] * by_block(x)
    normalise = F.layer_norm if norm == "layer" else F.rms_norm
    y = normalise(total, (COLS,), eps=EPS) * (1 + scale[:, :, None]) + shift[:, :, None]
    return y.flatten(1, 2), total.flatten(1, 2)


def cases() -> list[Case]:
    return [
        Case(
            op="adaln",
            label=f"batch {batch}, {BLOCKS} blocks of {TOKENS} x {COLS}, {norm} norm, gated residual, bf16",
            inputs=functools.partial(_inputs, batch=batch),
            run=functools.partial(_run, norm=norm),
            # x, residual and three rows a block come in, y and the sum go out.
            forward_bytes=(4 * LENGTH + 3 * BLOCKS) * batch * COLS * 2,
            # Gradients of y and of the sum, the sum, x and two rows come in, two gradients and three rows' go out.
            backward_bytes=(6 * LENGTH + 5 * BLOCKS) * batch * COLS * 2,
            peers={
                "eager": functools.partial(_reference, norm=norm),
                "compile": torch.compile(functools.partial(_reference, norm=norm)),
                "torch": functools.partial(_torch, norm=norm),
                "torch, compiled": torch.compile(functools.partial(_torch, norm=norm)),
            },
        )
        for batch in (1, 4)
        for norm in ("layer", "rms")
    ]
