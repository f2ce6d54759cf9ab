"""The record of the kernels: its metrics from rows, its gate, and the page and plot made of it."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_check
import report
import timing
from madformer.kernels import launch
from madformer.kernels.swiglu import swiglu, swiglu_ref
from ops.case import Case
from testing import DEVICE

ROOF = {"copy_tb_per_s": 4.0, "matmul_tflops": 800.0}


def row(op: str, direction: str, label: str, *, bytes: int = 0, flops: int = 0, **seconds: float) -> dict[str, Any]:
    spread = {name: {"median": value} for name, value in seconds.items()}
    return {"op": op, "direction": direction, "label": label, "bytes": bytes, "flops": flops, "seconds": spread}


ROWS = [
    row("block_causal_attention", "forward", "batch 1, 8192", flops=400 * 10**9, ours=1e-3, flex=1.5e-3),
    row("block_causal_attention", "forward", "batch 4, 8192", flops=1600 * 10**9, ours=5e-3, flex=6e-3),
    row("rms_norm", "backward", "batch 1", bytes=2 * 10**9, ours=1e-3, eager=4e-3),
    row("rms_norm", "backward", "batch 4", bytes=6 * 10**9, ours=2e-3, eager=5e-3),
    row("cached_attention", "forward", "batch 1, prefix 0", flops=1, bytes=4, ours=1.0, sdpa=1.0),
    row("cached_attention", "forward", "batch 1, prefix 256", flops=1, bytes=4, ours=1.0, sdpa=2.0),
    row("cached_attention", "forward", "batch 16, prefix 256", flops=1, bytes=4, ours=1.0, sdpa=0.5),
    row("layer", "forward", "batch 1", ours=1.0, compile=1.0),
    row("layer", "backward", "batch 1", ours=1.0, compile=2.0),
]


def test_metrics_are_the_worst_of_an_ops_shapes() -> None:
    metrics = gpu_check.metrics(ROWS, ROOF)
    assert metrics == pytest.approx(
        {
            **ROOF,
            "attention_forward_tflops": 320.0,
            "attention_forward_vs_flex": 1.2,
            "rms_norm_backward_bandwidth_fraction": 0.5,
            "rms_norm_backward_vs_eager": 2.5,
            "cached_attention_forward_bandwidth_fraction": 1e-12,
            "cached_attention_forward_vs_sdpa": 0.5,
            "cached_attention_vs_sdpa_b1": 1.5,
            "layer_vs_compile": 1.5,
        }
    )


def test_no_speed_on_a_red_test(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a GPU pretended: the tests run first, and their failure ends it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **kwargs: argparse.Namespace(returncode=1, stdout="1 failed", stderr="")
    )
    monkeypatch.setattr(gpu_check, "roofs", lambda device: pytest.fail("timed on a red test"))
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().err == "gpu-check: a test failed: no speed is reported\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().err == "gpu-check: PyTorch sees no CUDA device\n"


def swiglu_case(**changes: Any) -> Case:
    def inputs(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        gate, up = torch.randn(2, 4, 32, device=device, dtype=torch.bfloat16)
        return gate.requires_grad_(), up.requires_grad_()

    values = {"op": "swiglu", "label": "batch 1", "inputs": inputs, "run": swiglu}
    return Case(**{**values, "forward_bytes": 768, "backward_bytes": 1280, "peers": {"eager": swiglu_ref}, **changes})


@pytest.mark.skipif(not launch.HAS_TRITON, reason="Triton is not installed")
def test_a_wrong_result_is_red() -> None:
    """Compared in results and in gradients, whichever is wrong."""
    assert 0 < gpu_check.check(swiglu_case(), DEVICE) < 1e-2

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return 1.1 * grad

    def off(gate: torch.Tensor, up: torch.Tensor, *, backend: str) -> torch.Tensor:
        out = swiglu(gate, up, backend=backend)
        return out * 1.1 if backend == "triton" else out

    def off_backward(gate: torch.Tensor, up: torch.Tensor, *, backend: str) -> torch.Tensor:
        return swiglu(Wrong.apply(gate) if backend == "triton" else gate, up, backend=backend)

    for wrong in (off, off_backward):
        with pytest.raises(gpu_check.RedError, match="swiglu, batch 1: error"):
            gpu_check.check(swiglu_case(run=wrong), DEVICE)


@pytest.mark.skipif(not launch.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_row_of_the_record(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With calls timed as they are where there is no GPU to capture them on; a peer that fails is named."""

    class Eager:
        def __init__(self, run: timing.Run) -> None:
            self.run = run

        def time(self) -> float:
            return timing.seconds(self.run, DEVICE)

    def broken(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this\nand more")

    if DEVICE.type == "cpu":
        monkeypatch.setattr(gpu_check, "capture", lambda prepare, calls: Eager(prepare()))
    monkeypatch.setattr(gpu_check, "SECONDS_A_ROW", 0.01)
    # Prepared outside of a capture a forward pass runs inside of it.
    peers = {"eager": swiglu_ref} | ({"broken": broken} if direction == "backward" else {})
    measured = gpu_check.measure(swiglu_case(peers=peers), direction, DEVICE)
    assert measured["seconds"].keys() == {"ours", "eager"}
    assert all(spread["median"] > 0 for spread in measured["seconds"].values())
    assert measured["failed"] == ({"broken": "RuntimeError: no kernel for this"} if "broken" in peers else {})
    assert set(gpu_check.metrics([measured], ROOF)) == {
        *ROOF,
        f"swiglu_{direction}_bandwidth_fraction",
        f"swiglu_{direction}_vs_eager",
    }
    gpu_check.print_row(measured, ROOF)


def record() -> dict[str, Any]:
    return {
        "device": "NVIDIA Example",
        "commit": "0123456789abcdef",
        "versions": {"torch": "2.13", "triton": "3.7.1"},
        "rows": ROWS,
        "metrics": gpu_check.metrics(ROWS, ROOF),
    }


def test_table_shows_every_row_against_its_roof() -> None:
    text = report.section({"nvidia-example": record()})
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(lines) == len(ROWS)
    assert lines[0] == (
        "| `block_causal_attention` | batch 1, 8192 | forward | 1000 µs | 400 TFLOP/s (50% of a matmul) | 1.50x flex |"
    )
    assert "2.00 TB/s (50% of a copy)" in lines[2]
    assert report.section({}) == report.NOTHING


def test_only_what_is_between_the_markers_is_replaced() -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.replaced(page, "new\n") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.replaced("no markers\n", "new\n") == "no markers\n"


def test_pages_show_the_records_in_the_tree() -> None:
    assert report.main(["--check"]) == 0


def test_plot_is_drawn(tmp_path: Path) -> None:
    report.plot(record(), tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
