"""Settings for every test: how many threads, and what happens to tests that need a GPU."""

from __future__ import annotations

import os
import signal

# Before torch loads OpenMP: threads that spin at a barrier while another process holds their core make a
# microsecond's op take milliseconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, so before anything of madformer is.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs tests in the background ignores it for them, and for every process that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)

DIFFUSERS_MARKERS = (
    "attention autoround big_accelerator bitsandbytes cache compile context_parallel cpu_offload gguf group_offload "
    "ip_adapter lora memory modelopt quantization quanto sdnq single_file tensor_parallel torchao training"
)
NO_GPU = "no CUDA device: the GPU tier is NOT tested here"


def pytest_configure(config: pytest.Config) -> None:
    # Test tensors are small; on a large machine more threads only wait for each other.
    torch.set_num_threads(min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4))
    if "MADFORMER_DIFFUSERS" in os.environ:
        for marker in DIFFUSERS_MARKERS.split():
            config.addinivalue_line("markers", f"{marker}: of diffusers' testers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if NO_GPU in str(r.longrepr)]
    if skipped:
        terminalreporter.section("GPU tier skipped", sep="!", red=True, bold=True)
        terminalreporter.line(f"{len(skipped)} tests: {NO_GPU}")
