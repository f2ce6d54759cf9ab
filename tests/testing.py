"""What tests share: the error budget, the golden cases. Import it as ``from testing import ...``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The Euclidean norm of the difference over that of ``expected``, in float64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


def assert_within_budget(actual: Tensor, oracle: Tensor, eager: Tensor, *, name: str = "result") -> None:
    """Asserts that a kernel is about as accurate as eager PyTorch is in the kernel's working dtype.

    The largest error may be twice that of ``eager`` plus one rounding of the largest value. A fixed tolerance
    that is wide enough for bfloat16 passes a broken kernel; this one is measured on the very case.

    Args:
        actual: the kernel's result.
        oracle: the same computed in float64 (or float32 for a kernel that works in less).
        eager: the same computed by plain PyTorch in the working dtype of the kernel.
        name: what the message calls the result.
    """
    assert actual.shape == oracle.shape == eager.shape, (actual.shape, oracle.shape, eager.shape)
    assert actual.isfinite().all(), f"{name} is not finite"
    if actual.numel() == 0:
        return
    error = _largest(actual.double() - oracle.double())
    eager_error = _largest(eager.double() - oracle.double())
    band = torch.finfo(actual.dtype).eps * _largest(oracle.double())
    budget = 2 * eager_error + band
    assert error <= budget, f"{name}: error {error:.3e} > 2 x eager's {eager_error:.3e} + rounding {band:.3e}"


def _largest(values: Tensor) -> float:
    return values.abs().max().item()


GOLDEN = Path(__file__).parent / "golden"


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


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter off its initial value, so that zero biases and unit norms matter too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()
