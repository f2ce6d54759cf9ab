"""The update of a denoising step: guidance, prediction type, clamp and multistep solver in one pass, in place.

Shape legend: B samples, each at its own step of its own schedule; ... any further dimensions, L together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from madformer.kernels import dispatch
from madformer.kernels.checks import DTYPES, check_floating, check_no_gradient, check_shape, with_contiguous_columns
from madformer.kernels.launch import jit, tl
from madformer.kernels.plans import Launch, once_a_kind, plain_kind, planned, taken_as
from madformer.kernels.registration import register

OP = "denoise_step"
NUM_COEFFICIENTS = 6
NAMES = ("sample", "model_output", "previous", "coefficients", "unconditional", "guidance_scale")


def denoise_step_ref(
    sample: Tensor,
    model_output: Tensor,
    previous: Tensor,
    coefficients: Tensor,
    clip: float | None = None,
    unconditional: Tensor | None = None,
    guidance_scale: Tensor | None = None,
) -> None:
    """:func:`denoise_step` in plain PyTorch, in the dtype of ``sample``: in float64 it is the oracle."""
    per_sample = (1,) * (sample.dim() - 1)
    c = coefficients.to(sample.dtype).unflatten(1, (NUM_COEFFICIENTS, *per_sample))
    to_x0_sample, to_x0_output, to_sample, to_output, to_x0, to_previous = c.unbind(1)
    m = model_output.to(sample.dtype)
    if unconditional is not None and guidance_scale is not None:
        u = unconditional.to(sample.dtype)
        m = u + guidance_scale.to(sample.dtype).unflatten(0, (-1, *per_sample)) * (m - u)
    x0 = to_x0_sample * sample + to_x0_output * m
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    # 0 * NaN is NaN: where its coefficient is 0, previous may hold anything.
    history = torch.where(to_previous == 0, 0, to_previous * previous)
    sample.copy_(to_sample * sample + to_output * m + to_x0 * x0 + history)
    previous.copy_(x0)


@jit
def _step_kernel(
    sample_ptr, output_ptr, previous_ptr, coefficients_ptr, unconditional_ptr, scale_ptr, row_size, clip,
    stride_s, stride_o, stride_p, stride_c, stride_u, stride_g, GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = cols < row_size
    x = tl.load(sample_ptr + row * stride_s + cols, live, 0.0)
    m = tl.load(output_ptr + row * stride_o + cols, live, 0.0).to(tl.float32)
    if GUIDED:
        u = tl.load(unconditional_ptr + row * stride_u + cols, live, 0.0).to(tl.float32)
        m = u + tl.load(scale_ptr + row * stride_g) * (m - u)
    coefficients_ptr += row * stride_c
    to_previous = tl.load(coefficients_ptr + 5)
    # Not read where its coefficient is 0: there it may be uninitialised, and 0 * NaN is NaN.
    previous = tl.load(previous_ptr + row * stride_p + cols, cols < tl.where(to_previous == 0, 0, row_size), 0.0)
    x0 = tl.load(coefficients_ptr) * x + tl.load(coefficients_ptr + 1) * m
    # Comparisons in this order let a NaN through, as torch.clamp does.
    x0 = tl.where(x0 < -clip, -clip, tl.where(x0 > clip, clip, x0))
    next_x = tl.load(coefficients_ptr + 2) * x + tl.load(coefficients_ptr + 3) * m
    next_x += tl.load(coefficients_ptr + 4) * x0 + to_previous * previous
    tl.store(sample_ptr + row * stride_s + cols, next_x, live)
    tl.store(previous_ptr + row * stride_p + cols, x0, live)


# A step of one sample is latency and nothing else: short programs spread its few kilobytes over many multiprocessors.
BLOCK, NUM_WARPS = 512, 4


def _rows(tensor: Tensor) -> Tensor:
    """As (B, L) rows with contiguous columns: a view where its layout allows one, else a copy."""
    return with_contiguous_columns(tensor.reshape(len(tensor), -1))


@planned(lambda: (BLOCK, NUM_WARPS))
def _denoise_step_triton(
    sample: Tensor,
    model_output: Tensor,
    previous: Tensor,
    coefficients: Tensor,
    clip: float | None = None,
    unconditional: Tensor | None = None,
    guidance_scale: Tensor | None = None,
) -> Callable[..., None]:
    if sample.numel() == 0:
        return lambda *_: None
    # Without guidance the kernel does not look at its arguments.
    examples = (sample, model_output, previous, model_output if unconditional is None else unconditional)
    take_x, take_m, take_x0, take_u = (taken_as(_rows, x) for x in examples)
    take_c = taken_as(with_contiguous_columns, coefficients)
    x, m, x0, u = map(_rows, examples)
    strides = [rows.stride(0) for rows in (x, m, x0, with_contiguous_columns(coefficients), u)]
    launch = Launch(
        _step_kernel, (len(x), -(-x.shape[1] // BLOCK)), x.device,
        (x.shape[1], float("inf") if clip is None else clip, *strides,
         0 if guidance_scale is None else guidance_scale.stride(0)),
        GUIDED=unconditional is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip

    def run(sample, model_output, previous, coefficients, clip=None, unconditional=None, guidance_scale=None):
        x, x0, m, c = take_x(sample), take_x0(previous), take_m(model_output), take_c(coefficients)
        u = m if unconditional is None else take_u(unconditional)
        launch(x, m, x0, c, u, c if guidance_scale is None else guidance_scale)
        for written, rows in ((sample, x), (previous, x0)):
            if rows is not written:
                written.copy_(rows.view(written.shape))

    return run


def _nothing(*args: object, **kwargs: object) -> None:
    """Nothing is returned, and writing in place changes no shape."""


_SCHEMA = (
    "(Tensor(a!) sample, Tensor model_output, Tensor(b!) previous, Tensor coefficients, float? clip=None, "
    "Tensor? unconditional=None, Tensor? guidance_scale=None) -> ()"
)
# C++ registers itself, for the CPU and, where it was built with CUDA, for that; without it this op is the reference.
library.define("madformer::denoise_step_", _SCHEMA)
library.impl("madformer::denoise_step_", "CompositeExplicitAutograd", denoise_step_ref)
library.register_fake("madformer::denoise_step_", _nothing)
# An op of its own, because on the CPU, interpreted, it stands beside the other.
_call_triton = register("denoise_step_triton_", _SCHEMA, _denoise_step_triton, _nothing)
dispatch.register(OP, "reference")
dispatch.register(OP, "cpp", dispatch.COMPILED_DEVICES, auto=("cpu",))
dispatch.register(OP, "triton", auto=("cuda",))


def denoise_step(
    sample: Tensor,
    model_output: Tensor,
    previous: Tensor,
    coefficients: Tensor,
    *,
    clip: float | None = None,
    unconditional: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of a deterministic sampler, in place and in float32, each sample with its own coefficients.

    With ``c`` the sample's row of coefficients, and ``s`` its guidance scale::

        m        = unconditional + s * (model_output - unconditional)    (model_output where there is no guidance)
        x0       = clamp(c[0] * sample + c[1] * m, -clip, clip)
        sample   = c[2] * sample + c[3] * m + c[4] * x0 + c[5] * previous
        previous = x0

    This covers DDIM (arXiv:2010.02502, eq. 12) and DPM-Solver++ of orders one and two (arXiv:2211.01095,
    algorithm 2) for every prediction type; ``madformer.engine.schedule.tabulate`` makes the coefficients. Guidance is
    classifier-free (arXiv:2207.12598; the scale is diffusers' ``guidance_scale``, 1 for none). Nothing is read on the
    host, so a CUDA graph can hold the step.

    Args:
        sample: (B, ...) float32, the noisy sample; replaced by that of the next step.
        model_output: (B, ...) float32, bfloat16 or float16, on the same device.
        previous: (B, ...) float32, the clean sample predicted at the previous step; replaced by this step's.
            It is not read where ``c[5]`` is 0, so at a first step it may be uninitialised.
        coefficients: (B, 6) float32.
        clip: bound of the predicted clean sample; None for no bound.
        unconditional: the model's output without the condition, like ``model_output``; with ``guidance_scale`` or not
            at all.
        guidance_scale: (B,) float32.
        backend: ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or the backend is unknown.
        RuntimeError: the backend that was asked for cannot run here.
    """
    tensors = sample, model_output, previous, coefficients, unconditional, guidance_scale
    kind = plain_kind((*tensors, clip, backend))
    op = _choose(kind, tensors, clip, backend)
    if torch.is_grad_enabled():
        check_no_gradient(OP, dict(zip(NAMES, tensors, strict=True)))
    arguments = sample, model_output, previous, coefficients, clip, unconditional, guidance_scale
    if op is _call_triton:
        op(*arguments, kind=kind)
    else:
        op(*arguments)


@once_a_kind
def _choose(tensors: tuple[Any, ...], clip: float | None, backend: str) -> Callable[..., None]:
    """The implementation that runs these, where they can be run."""
    sample = tensors[0]
    op = denoise_step_op(backend, sample.device)
    _validate(tensors, clip)
    return op


def denoise_step_op(backend: str, device: torch.device) -> Callable[..., None]:
    """What :func:`denoise_step` calls, with its arguments in order and none of its checks.

    For loops whose arguments are always of one kind: on a CPU the checks cost more than the step of a small block.
    """
    chosen = dispatch.resolve(OP, backend, device)
    ops: dict[str, Callable[..., None]] = {"triton": _call_triton, "cpp": torch.ops.madformer.denoise_step_}
    return ops.get(chosen, denoise_step_ref)


def _validate(tensors: tuple[Any, ...], clip: float | None) -> None:
    sample, model_output, previous, coefficients, unconditional, guidance_scale = tensors
    if sample.dim() < 1:
        raise ValueError("sample must have a batch dimension, got a scalar")
    expected = {
        "sample": (sample, sample.shape, (torch.float32,)),
        "model_output": (model_output, sample.shape, DTYPES),
        "previous": (previous, sample.shape, (torch.float32,)),
        "coefficients": (coefficients, (len(sample), NUM_COEFFICIENTS), (torch.float32,)),
    }
    if (unconditional is None) != (guidance_scale is None):
        raise ValueError("unconditional and guidance_scale must be given together, got one of them")
    if unconditional is not None and guidance_scale is not None:
        expected["unconditional"] = (unconditional, sample.shape, (model_output.dtype,))
        expected["guidance_scale"] = (guidance_scale, (len(sample),), (torch.float32,))
    for name, (tensor, shape, dtypes) in expected.items():
        check_shape(name, tensor, shape)
        check_floating(name, tensor, dtypes)
        if tensor.device != sample.device:
            raise ValueError(f"{name} must be on {sample.device} as sample is, got {tensor.device}")
    for name, written in (("sample", sample), ("previous", previous)):
        strides = written.stride()
        if any(stride == 0 and size > 1 for stride, size in zip(strides, written.shape, strict=True)):
            raise ValueError(f"{name} is written in place and must not be expanded, got strides {strides}")
    if clip is not None and not clip > 0:  # Not `clip <= 0`, which lets NaN pass.
        raise ValueError(f"clip={clip} must be positive, or None for no bound")
