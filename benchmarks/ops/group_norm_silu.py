"""GroupNorm and SiLU at the FFHQ-1024 U-Net's maps, for 1, 16 and 64 blocks of latents."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.case import Case, random
from madformer.kernels.group_norm_silu import group_norm_silu

NUM_GROUPS, EPS = 8, 1e-6


def make_inputs(device: torch.device, maps: int, channels: int, side: int, *, temb: bool) -> tuple[Tensor, ...]:
    x = random(device, maps, channels, side, side, grad=False).to(memory_format=torch.channels_last).requires_grad_()
    inputs = x, random(device, channels), random(device, channels)
    return (*inputs, random(device, maps, channels)) if temb else inputs


def run(x: Tensor, weight: Tensor, bias: Tensor, temb: Tensor | None = None, **backend: Any) -> Tensor:
    return group_norm_silu(x, NUM_GROUPS, weight, bias, eps=EPS, temb_NC=temb, **backend)


def eager(x: Tensor, weight: Tensor, bias: Tensor, temb: Tensor | None = None) -> Tensor:
    x = x if temb is None else x + temb[:, :, None, None]
    return F.silu(F.group_norm(x, NUM_GROUPS, weight, bias, EPS))


# Maps, channels, side and whether the time embedding is added: the second norm of a residual block has it, the first,
# which on the way up is given the skip connection's channels too, has not. A training batch of 1 or 4 images is 16 or
# 64 maps; one map is one block of one image being sampled, 1 MiB, which the caches hold and launches dominate.
SHAPES = [
    (1, 512, 32, True),
    (1, 1024, 16, True),
    (16, 512, 32, True),
    (16, 1024, 16, True),
    (16, 1536, 32, False),
    (64, 512, 32, True),
    (64, 1024, 32, False),
    (64, 2048, 16, False),
]


def cases() -> list[Case]:
    return [
        Case(
            op="group_norm_silu",
            label=f"{maps} x {channels} x {side} x {side}, bf16" + (", time embedding" if temb else ""),
            inputs=lambda device, shape=(maps, channels, side), temb=temb: make_inputs(device, *shape, temb=temb),
            run=run,
            forward_bytes=2 * maps * channels * side**2 * 2,
            backward_bytes=3 * maps * channels * side**2 * 2,
            peers={"eager": eager, "compile": torch.compile(eager)},
        )
        for maps, channels, side, temb in SHAPES
    ]
