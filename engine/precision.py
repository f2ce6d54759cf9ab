"""How precisely a model samples: fp32, bf16, or FP8 in the large products.

What stays in fp32 in ``default`` and ``fp8``, and where: the sums and reciprocal roots of every norm and SwiGLU
(``madformer.kernels``, which round once, at the store), softmax (inside attention), the timestep MLP (until its result
is added to bf16 maps, ``model/unet.py``), the rotary tables (``model/rope.py``), the latents and the scheduler's
updates (``kernels/denoise_step.py``). The residual stream and the cache are bf16.

FP8 is e4m3 with one scale for each output channel of a weight, found once, and for each row of activations, found at
every call on the device. torchao's ``Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())`` is the same
arithmetic around the same ``torch._scaled_mm``; what it would add is a dependency that has to match torch's version,
and what it cannot do is quantise the input of gate and up once for both.

Shape legend: R rows (all dimensions but the last), K inputs, N outputs.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from madformer.engine import joined
from madformer.engine.structure import plain
from madformer.kernels import swiglu
from madformer.kernels.dispatch import BackendUnavailableError
from madformer.model import MADFormer
from madformer.model.layer import SwiGLU, Tower

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
FP8_CAPABILITY = (9, 0)
"""Hopper's. Ada (8.9) multiplies FP8 too, but PyTorch's row-wise kernel for it ignores the current stream before 2.12
(pytorch/pytorch#177651), and so could not be captured."""
FP8_MULTIPLE = 16
"""What inputs and outputs of a layer must be multiples of: 16 bytes of FP8."""


@dataclass(frozen=True)
class Precision:
    """One mode.

    Attributes:
        tier: the quality to expect, in one line.
        needs: what it runs on, in one line.
        dtype: of the weights that are not quantised, and what the autoencoder should run in.
    """

    name: str
    tier: str
    needs: str
    dtype: torch.dtype


PRECISIONS = {
    mode.name: mode
    for mode in (
        Precision("exact", "fp32 throughout: what the others are held against", "any device", torch.float32),
        Precision(
            "default",
            "49 dB PSNR to exact, the worst of 64 pictures 36 dB, measured on the demo model: not told apart by eye",
            "any device; fast on GPUs and on CPUs that multiply bf16",
            torch.bfloat16,
        ),
        Precision(
            "fp8",
            "35 dB PSNR to exact, the worst of 64 pictures 24 dB, measured on the demo model: small details differ",
            "compute capability 9.0 (Hopper) or later; a CPU computes it slowly, to test it",
            torch.bfloat16,
        ),
    )
}
"""The modes by name, from the most precise on. ``benchmarks/precision.py`` measures; the tiers leave a little room,
since a rounding more or less moves a picture. The demo model is ``assets/emoji64``, 25 steps under guidance of 3, whose
weights are stored in bf16: rounding them costs ``default`` nothing there."""


def apply(model: MADFormer, precision: str, *, join_mlp: bool | None = None) -> MADFormer:
    """The model for sampling in this precision, a snapshot; ``model`` itself is left as it is.

    Tensors that need no change are shared with ``model``, the others are made once of what they are now, and the
    modules are its own: what becomes of ``model`` later is to be applied anew. On a GPU convolutions are
    ``channels_last``, which cuDNN is fastest with, and gate and up of the MLPs lie together in memory, which makes them
    one product (:mod:`madformer.engine.joined`).

    ``fp8`` is ``default`` but for the linear layers of the towers. Those whose sizes do not fit stay bf16, and so do
    those that are more than their weights (hooks, adapters, a forward of their own): with a warning, and
    :func:`unquantized` lists them. It is not for :meth:`~madformer.model.MADFormer.save_pretrained`.

    ``exact`` turns TF32 off for the whole process, for cuBLAS and for cuDNN, which has it on by default, and leaves
    it off: PyTorch has no narrower switch that would also hold while a graph is captured and for the autoencoder.

    Args:
        join_mlp: whether they do; None for on GPUs alone. On two cores one product takes as long as two at the paper's
            size, and an eighth less at that of the demonstration model.

    Raises:
        ValueError: there is no such precision, or the model is quantised already.
        BackendUnavailableError: it cannot run on the model's device.
    """
    if (why := refusal(precision, model.device)) is not None:
        raise BackendUnavailableError(f"precision={precision!r} cannot run on {model.device}: {why}")
    if any(isinstance(module, FP8Linear) for module in model.modules()):
        raise ValueError("the model is in fp8 already: apply the precision to the one that it was made of")
    if precision == "exact":
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    result = _cast(model, PRECISIONS[precision].dtype)
    joined.disjoin(result)
    if precision == "fp8":
        _quantize_towers(result, model)
        if kept := unquantized(result):
            names = ", ".join(kept[:2]) + (", ..." if kept[2:] else "")
            warnings.warn(
                f"{len(kept)} linear layers stay bf16, having sizes that are no multiples of {FP8_MULTIPLE}, hooks or "
                f"adapters: {names}",
                stacklevel=2,
            )
    if join_mlp or (join_mlp is None and model.device.type == "cuda"):
        joined.join(result)
    if model.device.type == "cuda":
        for module in result.modules():
            if isinstance(module, nn.Conv2d):
                # a parameter of its own: the one at hand may be the model's
                weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
                module.weight = nn.Parameter(weight, requires_grad=False)
    return result.eval()


def refusal(precision: str, device: torch.device | str) -> str | None:
    """Why a mode cannot run on ``device``, in one line; None where it can.

    Raises:
        ValueError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} must be one of {', '.join(PRECISIONS)}")
    device = torch.device(device)
    if precision != "fp8" or device.type == "cpu":
        return None
    if device.type != "cuda":
        return "it is for CUDA devices, and for CPUs to test it"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if (capability := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        return f"compute capability {'.'.join(map(str, capability))} is below {'.'.join(map(str, FP8_CAPABILITY))}"
    return None


def unquantized(model: MADFormer) -> list[str]:
    """The names of the linear layers in the towers that are not FP8."""
    return [
        name for name, module in model.named_modules() if name.startswith("layers.") and isinstance(module, nn.Linear)
    ]


def _cast(model: MADFormer, dtype: torch.dtype) -> MADFormer:
    """A copy of the module tree over parameters of ``dtype``: its own where the dtype changes, else the same memory.

    Buffers are tables in fp32, and stay so.
    """
    tensors: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        tensors[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    return copy.deepcopy(model, tensors)


def _quantize_towers(result: MADFormer, source: MADFormer) -> None:
    """Puts FP8 layers into ``result``, made of the weights of ``source``, which may be more precise."""
    for name, tower in source.named_modules():
        if type(tower) not in (Tower, joined.JoinedTower) or not plain(tower):
            continue
        quantized = result.get_submodule(name)
        if _fits(tower.qkv):
            quantized.register_module("qkv", FP8Linear(tower.qkv))
            quantized.__class__ = FP8Tower
        if _fits(tower.proj):
            quantized.register_module("proj", FP8Linear(tower.proj))
        mlp = tower.mlp
        if (
            type(mlp) in (SwiGLU, joined.JoinedSwiGLU)
            and plain(mlp)
            and _fits(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        ):
            quantized.register_module("mlp", FP8SwiGLU(mlp))


def _fits(*layers: nn.Module) -> bool:
    """Whether FP8 layers of their weights may stand in for them."""
    return all(
        type(layer) is nn.Linear
        and plain(layer)
        and not layer.in_features % FP8_MULTIPLE
        and not layer.out_features % FP8_MULTIPLE
        for layer in layers
    )


def quantize_rows(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in e4m3 and its scale: ``(R, K)``, and ``(R, 1)`` in fp32, whose product is about the row.

    The largest value of a row becomes the largest of e4m3. A value is then off by at most 2^-4 of itself, or by 2^-10
    scales where it is below 2^-6 of them. A row of zeros stays zero; NaN and infinity make their row NaN.
    """
    scale_R1 = (x_RK.abs().amax(dim=-1, keepdim=True).float() / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (x_RK / scale_R1).to(FP8), scale_R1


@functools.cache
def _quantize_rows_fused() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """One kernel in place of four launches that write the row in fp32 and read it again.

    Not made at import: ``torch.compile`` takes two seconds to be loaded.
    """
    return torch.compile(quantize_rows, dynamic=True)


def _product_on_cpu(
    x_RK: Tensor, weight_KN: Tensor, scale_R1: Tensor, scale_1N: Tensor, bias_N: Tensor | None
) -> Tensor:
    """What ``torch._scaled_mm`` computes, which on a CPU takes one scale a tensor before 2.13."""
    y_RN = (x_RK.float() @ weight_KN.float()) * scale_R1 * scale_1N
    return (y_RN if bias_N is None else y_RN + bias_N.float()).bfloat16()


class FP8Linear(nn.Module):
    """``nn.Linear`` in FP8, with bf16 results; of several layers on one input it gives the outputs side by side.

    Products are summed in the matrix units' 22-bit numbers (``use_fast_accum``), not moved to fp32 after every 128 of
    them: e4m3 has 10 bits fewer, and the row-wise kernel is a good deal slower otherwise (pytorch/ao#1325,
    pytorch/pytorch#147971). CPUs sum in fp32.
    """

    weight_NK: Tensor
    scale_N1: Tensor
    bias_N: Tensor | None

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_rows(torch.cat([layer.weight.detach() for layer in layers]))
        self.register_buffer("weight_NK", weight)
        self.register_buffer("scale_N1", scale)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.register_buffer("bias_N", torch.cat(biases).bfloat16() if biases else None)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """The outputs from ``first`` on: ``(..., K)`` to ``(..., N - first)`` in bf16."""
        x_RK = x.flatten(0, -2)
        quantized_RK, scale_R1 = (_quantize_rows_fused() if x.is_cuda else quantize_rows)(x_RK)
        weight_KN, scale_1N = self.weight_NK[first:].t(), self.scale_N1[first:].t()
        bias_N = None if self.bias_N is None else self.bias_N[first:]
        if x.device.type == "cpu":
            y_RN = _product_on_cpu(quantized_RK, weight_KN, scale_R1, scale_1N, bias_N)
        else:
            y_RN = torch._scaled_mm(
                quantized_RK, weight_KN, scale_R1, scale_1N, bias=bias_N, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        return y_RN.unflatten(0, x.shape[:-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # To another device, never to another dtype: model.to(torch.bfloat16) would take FP8 and scales for weights.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class FP8SwiGLU(nn.Module):
    """``SwiGLU`` that quantises its input once and multiplies it by gate and up in one product."""

    def __init__(self, mlp: SwiGLU) -> None:
        super().__init__()
        self.backend = mlp.backend
        self.gate_up_proj = FP8Linear(mlp.gate_proj, mlp.up_proj)
        self.down_proj = FP8Linear(mlp.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(swiglu(gate, up, backend=self.backend))


class FP8Tower(Tower):
    """A tower whose ``qkv`` is an :class:`FP8Linear`."""

    def key_value(self, x_BLC: Tensor) -> Tensor:
        return self.qkv(self.input_norm(x_BLC), first=x_BLC.shape[-1])
