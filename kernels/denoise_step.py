"""The update of a denoising step: prediction type, clamp and multistep solver in one pass, in place.

Shape legend: B samples, each at its own step of its own schedule; ... any further dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from madformer.kernels import dispatch

OP = "denoise_step"
NUM_COEFFICIENTS = 6
OUTPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def denoise_step_ref(
    sample: Tensor, model_output: Tensor, previous: Tensor, coefficients: Tensor, clip: float | None = None
) -> None:
    """:func:`denoise_step` in plain PyTorch, in the dtype of ``sample``: in float64 it is the oracle."""
    c = coefficients.to(sample.dtype).unflatten(1, (NUM_COEFFICIENTS, *(1,) * (sample.dim() - 1)))
    to_x0_sample, to_x0_output, to_sample, to_output, to_x0, to_previous = c.unbind(1)
    m = model_output.to(sample.dtype)
    x0 = to_x0_sample * sample + to_x0_output * m
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    # 0 * NaN is NaN: where its coefficient is 0, previous may hold anything.
    history = torch.where(to_previous == 0, 0, to_previous * previous)
    sample.copy_(to_sample * sample + to_output * m + to_x0 * x0 + history)
    previous.copy_(x0)


# The compiled kernels register themselves under their device; without them the op is the reference.
library.define(
    "madformer::denoise_step_",
    "(Tensor(a!) sample, Tensor model_output, Tensor(b!) previous, Tensor coefficients, float? clip=None) -> ()",
)
library.impl("madformer::denoise_step_", "CompositeExplicitAutograd", denoise_step_ref)
dispatch.register(OP, "reference")
dispatch.register(OP, "cpp", ("cpu",))


@library.register_fake("madformer::denoise_step_")
def _(*args: object, clip: float | None = None) -> None:
    """Nothing is returned, and writing in place changes no shape."""


def denoise_step(
    sample: Tensor,
    model_output: Tensor,
    previous: Tensor,
    coefficients: Tensor,
    *,
    clip: float | None = None,
    backend: str = "auto",
) -> None:
    """One step of a deterministic sampler, in place and in float32, each sample with its own coefficients.

    With ``c`` the sample's row of coefficients::

        x0     = clamp(c[0] * sample + c[1] * model_output, -clip, clip)
        sample = c[2] * sample + c[3] * model_output + c[4] * x0 + c[5] * previous
        previous = x0

    This covers DDIM (arXiv:2010.02502, eq. 12) and DPM-Solver++ of orders one and two (arXiv:2211.01095,
    algorithm 2) for every prediction type; ``madformer.engine.schedule.tabulate`` makes the coefficients.

    Args:
        sample: (B, ...) float32, the noisy sample; replaced by that of the next step.
        model_output: (B, ...) float32, bfloat16 or float16, on the same device.
        previous: (B, ...) float32, the clean sample predicted at the previous step; replaced by this step's.
            It is not read where ``c[5]`` is 0, so at a first step it may be uninitialised.
        coefficients: (B, 6) float32.
        clip: bound of the predicted clean sample; None for no bound.
        backend: ``"auto"``, ``"reference"`` or ``"cpp"``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or the backend is unknown.
        RuntimeError: the backend that was asked for cannot run here.
    """
    _validate(sample, model_output, previous, coefficients, clip)
    if dispatch.resolve(OP, backend, sample.device) == "reference":
        denoise_step_ref(sample, model_output, previous, coefficients, clip)
    else:
        torch.ops.madformer.denoise_step_(sample, model_output, previous, coefficients, clip)


def _validate(sample: Tensor, model_output: Tensor, previous: Tensor, coefficients: Tensor, clip: float | None) -> None:
    if sample.dim() < 1:
        raise ValueError("sample must have a batch dimension, got a scalar")
    expected = {
        "sample": (sample, sample.shape, (torch.float32,)),
        "model_output": (model_output, sample.shape, OUTPUT_DTYPES),
        "previous": (previous, sample.shape, (torch.float32,)),
        "coefficients": (coefficients, (sample.shape[0], NUM_COEFFICIENTS), (torch.float32,)),
    }
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if tensor.device != sample.device:
            raise ValueError(f"{name} must be on {sample.device} as sample is, got {tensor.device}")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient: denoise_step has no backward")
    for name, written in (("sample", sample), ("previous", previous)):
        strides = written.stride()
        if any(stride == 0 and size > 1 for stride, size in zip(strides, written.shape, strict=True)):
            raise ValueError(f"{name} is written in place and must not be expanded, got strides {strides}")
    if clip is not None and not clip > 0:  # Not `clip <= 0`, which lets NaN pass.
        raise ValueError(f"clip={clip} must be positive, or None for no bound")
