"""The denoising update at the FFHQ-1024 model's blocks of latents: 4,096 numbers a sample.

One sample is 72 KiB to move, a few tens of nanoseconds of an H200's bandwidth: what is measured is the latency of a
launch, of the loads and of the stores, so its fraction of the bandwidth says nothing at any of these batches. What the
one pass saves is the ten or so launches of the eager update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.case import Case, random
from madformer.kernels.denoise_step import NUM_COEFFICIENTS, denoise_step, denoise_step_ref

SHAPE = (4, 32, 32)
CLIP = 1.0


def make_inputs(device: torch.device, batch: int) -> tuple[Tensor, ...]:
    sample, previous = (random(device, batch, *SHAPE, dtype=torch.float32, grad=False) for _ in range(2))
    model_output, unconditional = (random(device, batch, *SHAPE, grad=False) for _ in range(2))
    coefficients = torch.full((batch, NUM_COEFFICIENTS), 0.25, device=device)
    return sample, model_output, previous, coefficients, unconditional, torch.full((batch,), 2.0, device=device)


def run(*tensors: Tensor, **backend: Any) -> None:
    sample, model_output, previous, coefficients, unconditional, scale = tensors
    guidance = {"unconditional": unconditional, "guidance_scale": scale}
    denoise_step(sample, model_output, previous, coefficients, clip=CLIP, **guidance, **backend)


def eager(*tensors: Tensor) -> None:
    denoise_step_ref(*tensors[:4], CLIP, *tensors[4:])


def cases() -> list[Case]:
    return [
        Case(
            op="denoise_step",
            label=f"{batch} x {' x '.join(map(str, SHAPE))}, guided, bf16",
            inputs=lambda device, batch=batch: make_inputs(device, batch),
            run=run,
            # sample and previous, float32, both ways; two outputs of the model in bf16
            forward_bytes=batch * 4096 * (2 * 2 * 4 + 2 * 2),
            peers={"eager": eager, "compile": torch.compile(eager)},
        )
        for batch in (1, 16, 64)
    ]
