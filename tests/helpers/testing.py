"""What tests share: the error budget, the golden cases."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from madformer.config import MADFormerConfig, UNetConfig, tiny
from madformer.kernels import dispatch, launch
from tests.helpers import ROOT

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The Euclidean norm of the difference over that of ``expected``, in float64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


def assert_within_budget(actual: Tensor, oracle: Tensor, eager: Tensor, *, name: str = "result", rows: int = 1) -> None:
    """Asserts that a kernel is about as accurate as eager PyTorch is in the kernel's working dtype.

    The largest error may be twice that of ``eager`` plus one rounding of the largest value. A fixed tolerance
    that is wide enough for bfloat16 passes a broken kernel; this one is measured on the very case.

    Args:
        actual: the kernel's result.
        oracle: the same computed in float64 (or float32 for a kernel that works in less).
        eager: the same computed by plain PyTorch in the working dtype of the kernel.
        name: what the message calls the result.
        rows: how many rows were summed into it in float32, in an order that is the kernel's own: the rounding
            grows with its square root.
    """
    assert actual.shape == oracle.shape == eager.shape, (actual.shape, oracle.shape, eager.shape)
    assert actual.isfinite().all(), f"{name} is not finite"
    if actual.numel() == 0:
        return
    error = _largest(actual.double() - oracle.double())
    eager_error = _largest(eager.double() - oracle.double())
    rounding = torch.finfo(actual.dtype).eps + (rows**0.5 if rows > 1 else 0) * torch.finfo(torch.float32).eps
    band = rounding * _largest(oracle.double())
    budget = 2 * eager_error + band
    assert error <= budget, f"{name}: error {error:.3e} > 2 x eager's {eager_error:.3e} + rounding {band:.3e}"


Move = Callable[[Tensor], Tensor]
"""What a computation does to its inputs before it uses them."""


def float32_noise(
    results: Callable[[nn.Module, Move], dict[str, Tensor]], model: nn.Module, seeds: int = 4
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The truth by name, and by how much float32 may miss it: how well the computation is conditioned says it.

    Where every weight and every input moves by one rounding of float64, results of float64 move by what these, and all
    roundings that follow them, make of it. In float32 it is the same, 2^29 times as large. That holds for results which
    are sums of large terms, too, and for those which are zero but for roundings. Where plain PyTorch misses the truth
    by more in float32, that counts: it rounds at every operation, and what is moved are the inputs alone.

    Args:
        results: computes them by plain PyTorch in the dtype of its model, whose gradients it may leave behind, of
            inputs that it moves.
        model: of any dtype; it is left as it is.
        seeds: how many times all is moved, each number at random up or down. The largest movement counts.
    """
    exact = copy.deepcopy(model).double()
    truth = results(copy.deepcopy(exact), torch.clone)
    noise = dict.fromkeys(truth, 0.0)
    for seed in range(seeds):
        generator, moved = torch.Generator().manual_seed(seed), copy.deepcopy(exact)

        def move(x: Tensor, generator: torch.Generator = generator) -> Tensor:
            signs = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
            return x * (1 + torch.finfo(torch.float64).eps * signs.to(x))

        for weight in moved.parameters():
            weight.data = move(weight.data)
        for name, value in results(moved, move).items():
            noise[name] = max(noise[name], _largest(value - truth[name]))
    larger = torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
    plain = results(copy.deepcopy(model).float(), torch.clone)
    missed = {name: _largest(value.double() - truth[name]) for name, value in plain.items()}
    return truth, {name: max(movement * larger, missed[name]) for name, movement in noise.items()}


def assert_within_noise(actual: Mapping[str, Tensor], truth: Mapping[str, Tensor], noise: Mapping[str, float]) -> None:
    """Asserts that no result of float32 is further from the truth than twice its :func:`float32_noise`."""
    assert actual.keys() == truth.keys()
    for name, value in actual.items():
        error = _largest(value.double() - truth[name])
        assert error <= 2 * noise[name], f"{name}: error {error:.3e} > 2 x float32's noise {noise[name]:.3e}"


def _largest(values: Tensor) -> float:
    return values.abs().max().item()


needs_triton = pytest.mark.skipif(not launch.HAS_TRITON, reason="Triton is not installed")
needs_cpp = pytest.mark.skipif(
    "cpp" in dispatch._UNAVAILABLE or torch.cuda.is_available(),
    reason=dispatch._UNAVAILABLE.get("cpp", "kernels for CPUs are tested where there is no GPU"),
)
OUR_BACKENDS = [pytest.param("triton", marks=needs_triton), pytest.param("cpp", marks=needs_cpp)]
"""Those whose results are held to the error budget."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels are tested: compiled on a GPU where there is one, else in Triton's interpreter on the CPU."""

KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)

# Tracing is what a test on the CPU is about, and takes a second; Inductor's code is for the GPU.
COMPILER = "inductor" if DEVICE.type == "cuda" else "aot_eager"


def assert_op_matches(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    rows: Mapping[str, int] | None = None,
    grads: Callable[[Tensor], Tensor] = torch.clone,
) -> None:
    """Asserts that results and gradients of a kernel are within the error budget.

    Args:
        op: called as ``op(**inputs)``; gives a tensor or a tuple of tensors.
        reference: the same in plain PyTorch, which works in the dtype of its inputs: it is run in float64 for the
            truth and as it is for the budget.
        inputs: arguments by name. Tensors that require a gradient are differentiated, with the layout they have
            here.
        rows: by the name of an input, how many rows were summed into its gradient.
        grads: gives the incoming gradient of a result the layout to test, as in ``lambda g: g.mT.clone().mT``.
    """
    actual, dtypes = _run(op, inputs, grads)
    eager, _ = _run(reference, inputs, grads, dtypes)
    oracle, _ = _run(reference, inputs, grads, dtypes, double=True)
    assert oracle.keys() == actual.keys()
    for name in oracle:
        summed = (rows or {}).get(name.removeprefix("grad of "), 1)
        assert_within_budget(actual[name], oracle[name], eager[name], name=name, rows=summed)


def _run(
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    grads: Callable[[Tensor], Tensor],
    dtypes: list[torch.dtype] | None = None,
    *,
    double: bool = False,
) -> tuple[dict[str, Tensor], list[torch.dtype]]:
    """Results and gradients by name; incoming gradients are random values that ``dtypes`` can hold."""

    def prepare(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and any(isinstance(x, Tensor) for x in value):
            return type(value)(prepare(x) for x in value)
        if not isinstance(value, Tensor):
            return value
        floating = value.dtype.is_floating_point
        return (value.double() if double and floating else value).detach().requires_grad_(value.requires_grad)

    arguments = {name: prepare(value) for name, value in inputs.items()}
    outputs = function(**arguments)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    named = {f"result {index}": output for index, output in enumerate(outputs) if output is not None}
    differentiable = [x for x in named.values() if x.requires_grad]
    dtypes = dtypes or [x.dtype for x in differentiable]
    if differentiable:
        generator = torch.Generator().manual_seed(1)
        incoming = [torch.randn(x.shape, generator=generator) for x in differentiable]
        incoming = [grads(g.to(dtype).to(x)) for g, dtype, x in zip(incoming, dtypes, differentiable, strict=True)]
        torch.autograd.backward(differentiable, incoming)
    for name, value in arguments.items():
        for index, x in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(x, Tensor) and x.requires_grad:
                assert x.grad is not None, f"{name} got no gradient"
                named[f"grad of {name}" + (f" {index}" if isinstance(value, (list, tuple)) else "")] = x.grad
    return {name: x.detach() for name, x in named.items()}, dtypes


GOLDEN = ROOT / "tests" / "golden"


@dataclass(frozen=True)
class GoldenCase:
    """One case that a released implementation computed, as ``tests/golden/README.md`` describes."""

    folder: Path
    name: str
    flags: dict[str, bool]
    steps: int
    sampler_seed: int

    @property
    def geometry(self) -> dict[str, int]:
        return json.loads((self.folder / "geometry.json").read_text())

    @property
    def model_config(self) -> Path:
        return self.folder / "model_config.json"

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / f"{self.name}.safetensors")

    def inputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    def weights(self) -> dict[str, Tensor]:
        """In fp32, as the golden tensors were computed."""
        return {name: tensor.float() for name, tensor in load_file(self.folder / "weights.safetensors").items()}


def golden_cases(folder: str) -> list[GoldenCase]:
    cases = json.loads((GOLDEN / folder / "cases.json").read_text())
    return [
        GoldenCase(GOLDEN / folder, name, case["flags"], case["steps"], case["sampler_seed"])
        for name, case in cases.items()
    ]


def golden_case(folder: str, name: str) -> GoldenCase:
    """Of a folder that has one case alone, and in its ``cases.json`` how it was sampled."""
    case = json.loads((GOLDEN / folder / "cases.json").read_text())
    return GoldenCase(GOLDEN / folder, name, {}, case["steps"], case["sampler_seed"])


def perturb(model: nn.Module, seed: int = 0, scale: float = 0.05) -> nn.Module:
    """Move every parameter off its initial value, so that zero biases and unit norms matter too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def small_config(**changes: Any) -> MADFormerConfig:
    """A model with a U-Net of one level and one layer of each kind: a third of ``tiny``'s operations.

    For tests of what is around a model.
    """
    unet = UNetConfig((8,), layers_per_block=(1,), attention=(False,), norm_groups=4, time_embed_dim=16)
    return tiny().replace(**({"num_layers": 2, "diffusion_layers": 1, "unet": unet} | changes))


def small_vae(*, seed: int = 0, block_out_channels: tuple[int, ...] = (8, 8), **changes: Any) -> AutoencoderKL:
    """Random weights; every level but the first halves the resolution."""
    # not above: it takes seconds, for which tests of kernels need not wait
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    levels = len(block_out_channels)
    return AutoencoderKL(
        block_out_channels=block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        **changes,
    ).eval()
