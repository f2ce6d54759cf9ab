"""Settings for every test: how many threads, and what happens to tests that need a GPU."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys

# Before torch loads OpenMP: threads that spin at a barrier while another process holds their core make a
# microsecond's op take milliseconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import benchmarks  # noqa: F401 (it puts the project's root last on the path, however pytest was started)
from tests.helpers.interpreting import remember_builtins

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
LONGEST_FIRST = {
    f"tests/{file}.py": place
    for place, file in enumerate((
        "compat/test_training_use", "test_pipeline_files", "test_bulk", "training/test_trainer", "sweeps/test_running",
        "benchmarks/test_visit", "training/test_ending", "training/test_parallel", "test_lora", "test_cli",
        "compat/test_madformer_ffhq", "test_bench", "benchmarks/test_kernel_check", "model/test_backends",
        "test_latents", "kernels/test_optional", "model/test_madformer", "test_combinations", "test_packaging",
        "test_pipeline", "engine/test_schedulers", "benchmarks/test_elastic", "training/test_lora_training",
        "training/test_data", "kernels/test_block_causal_attention", "compat/test_parts", "training/test_export",
        "test_command_line", "benchmarks/test_precision", "training/test_costs", "training/test_fitting",
        "engine/test_sampler", "kernels/test_launch", "model/test_modules",
    ))
}  # fmt: skip
"""Two processes that take file after file end together where a long one is not the last."""
NO_GPU = "no CUDA device: the GPU tier is NOT tested here"
ABSENT = {
    "GPU tier": NO_GPU,
    "Triton's kernels": "Triton is not installed",
    "C++ extension": "madformer._C is not built",
    "Page in a browser": "no Chromium",
    "Accessibility of the page": "no axe-core",
}
"""What may be missing, by the reason that every test gives which is skipped without it."""


def pytest_configure(config: pytest.Config) -> None:
    # Test tensors are small, and each of pytest's processes has a core: more threads only wait for each other.
    torch.set_num_threads(1)
    # Until all tests are imported there is nothing to throw away, and looking for it takes a sixth of that time.
    gc.disable()
    if "MADFORMER_DIFFUSERS" in os.environ:
        for marker in DIFFUSERS_MARKERS.split():
            config.addinivalue_line("markers", f"{marker}: of diffusers' testers")


def pytest_sessionstart(session: pytest.Session) -> None:
    # Not the thousands of messages that PyTorch writes to itself about every checkpoint. The option `log_level` would
    # set the root logger's level, too, six times a test, at which each of a thousand loggers forgets what it knew.
    logging_plugin = session.config.pluginmanager.get_plugin("logging-plugin")
    for handler in (logging_plugin.caplog_handler, logging_plugin.report_handler):
        handler.setLevel(logging.WARNING)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST_FIRST.get(item.nodeid.partition("::")[0], len(LONGEST_FIRST)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_collection_finish() -> None:
    if "triton.runtime.interpreter" in sys.modules:
        remember_builtins(sys.modules["triton.runtime.interpreter"])
    # Modules and thousands of tests outlive the session: looking through them for garbage took a twentieth of its time.
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers do not find out what a step costs, which takes as long as dozens of them for every new model."""
    from madformer.training import costs  # Not above: tests of kernels need not wait for it.

    unknown = costs.Costs(parameters=1, unread=frozenset(), flops=1, activation_bytes=1)
    monkeypatch.setattr(costs, "_costs", lambda *_: unknown)


@pytest.fixture
def soon_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``DataLoader`` that waits for a batch looks every fifth of a second, not every five, who is alive."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Loader

    monkeypatch.setattr(Loader._try_get_data, "__defaults__", (0.2,))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for part, reason in ABSENT.items():
        skipped = [report for report in terminalreporter.stats.get("skipped", []) if reason in str(report.longrepr)]
        if skipped:
            terminalreporter.section(f"{part} skipped", sep="!", red=True, bold=True)
            terminalreporter.line(f"{len(skipped)} tests and files: {reason}")
