"""The stages of a GPU visit that measure kernels, rehearsed on whatever device the kernels are tested on."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_stages, kernel_record, kernel_speed, timing, visit
from benchmarks.ops.case import Case
from madformer.kernels.launch import Target
from madformer.kernels.rms_norm import rms_norm
from madformer.kernels.swiglu import swiglu, swiglu_ref
from tests.helpers.testing import DEVICE, needs_triton

group_norm_silu: Any = importlib.import_module("madformer.kernels.group_norm_silu")

pytestmark = needs_triton


def rows_of(count: int) -> Any:
    def inputs(device: torch.device) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        return tuple(torch.randn(4, 32, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(count))

    return inputs


def case(label: str, **changes: Any) -> Case:
    values = {"op": "swiglu", "label": label, "inputs": rows_of(2), "run": swiglu, "forward_bytes": 768}
    return Case(**{**values, "backward_bytes": 1280, "peers": {"eager": swiglu_ref}, **changes})


def wrong(gate: torch.Tensor, up: torch.Tensor, *, backend: str) -> torch.Tensor:
    return swiglu(gate, up, backend=backend) * (1.1 if backend == "triton" else 1.0)


def norm(x: torch.Tensor, *, backend: str) -> torch.Tensor:
    return rms_norm(x, torch.ones(32, device=x.device), eps=1e-6, backend=backend)


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> visit.Journal:
    """Where the stages find and leave entries, as in a visit."""
    journal = visit.Journal(tmp_path / "visit.jsonl")
    monkeypatch.setenv(visit.JOURNAL, str(journal.path))
    monkeypatch.setattr(gpu_stages, "emit", journal.append)
    monkeypatch.setattr(kernel_speed, "SECONDS_A_ROW", 0.0)
    monkeypatch.setattr(kernel_speed, "roofs", lambda device: {"copy_tb_per_s": 4.0, "matmul_tflops": 800.0})

    class Eager:
        def __init__(self, run: timing.Run) -> None:
            self.run = run

        def time(self) -> float:
            return timing.seconds(self.run, DEVICE)

    def capture(prepare: Any, calls: int) -> Eager:
        run = prepare()
        run()
        return Eager(run)

    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernel_speed, "capture", capture)
    return journal


def measured(journal: visit.Journal, kind: str) -> Counter[tuple[str, str, str]]:
    return Counter((e["op"], e["label"], e["direction"]) for e in journal.entries if e["kind"] == kind)


def test_a_wrong_op_is_said_and_not_timed(journal: visit.Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    good = case("x", op="rms_norm", inputs=rows_of(1), run=norm, backward_bytes=0, peers={})
    monkeypatch.setattr(gpu_stages, "cases", lambda: [case("right"), case("wrong", run=wrong), good])
    gpu_stages.kernels(DEVICE)
    assert measured(journal, "row") == Counter([("rms_norm", "x", "forward")])
    checks = {(e["op"], e["label"]): e["ok"] for e in journal.entries if e["kind"] == "check"}
    assert checks == {("swiglu", "right"): True, ("swiglu", "wrong"): False, ("rms_norm", "x"): True}
    assert kernel_record.record_of(journal.entries)["red"] == ["swiglu"]


def test_a_second_run_measures_what_is_missing_and_last_what_broke_the_first(
    journal: visit.Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_stages, "cases", lambda: [case("a"), case("b")])
    real, order = kernel_speed.measure, []

    def measure(case: Case, direction: str, device: torch.device, *, peers: bool) -> dict[str, Any]:
        order.append((case.label, direction))
        if order == [("a", "forward"), ("a", "backward")]:
            raise KeyboardInterrupt  # as a kill would
        return real(case, direction, device, peers=peers)

    monkeypatch.setattr(kernel_speed, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        gpu_stages.kernels(DEVICE)
    gpu_stages.kernels(DEVICE)
    assert order[2:] == [("b", "forward"), ("b", "backward"), ("a", "backward")]
    gpu_stages.peers(DEVICE)
    gpu_stages.kernels(DEVICE)
    assert len(order) == 9
    rows = kernel_record.record_of(journal.entries)["rows"]
    assert len(rows) == 4
    assert all(row["seconds"].keys() == {"ours", "eager"} for row in rows)


def test_no_row_is_begun_without_time(journal: visit.Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages, "cases", lambda: [case("a")])
    monkeypatch.setenv(visit.LIMIT, "1")
    gpu_stages.kernels(DEVICE)
    assert {entry["kind"] for entry in journal.entries} == {"roof"}


def test_an_error_of_ours_is_data(journal: visit.Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is named with its reason, and the next row is measured."""
    monkeypatch.setattr(gpu_stages, "check_all", lambda device, chosen: set())

    def failing(gate: torch.Tensor, up: torch.Tensor, *, backend: str) -> torch.Tensor:
        raise RuntimeError("too many resources")

    monkeypatch.setattr(gpu_stages, "cases", lambda: [case("a", run=failing, backward_bytes=0), case("b")])
    gpu_stages.kernels(DEVICE)
    first = next(entry for entry in journal.entries if entry["kind"] == "row")
    assert first["failed"] == {"ours": "RuntimeError: too many resources"}
    assert first["seconds"] == {}
    assert len(measured(journal, "row")) == 3


def test_every_case_has_a_place() -> None:
    cases = gpu_stages.cases()
    few = [c for c in cases if gpu_stages.is_few(c) and c.op == "cached_attention"]
    assert cases[0].op == "block_causal_attention"
    assert 4 <= len(few) <= 12
    assert len({(c.op, c.label) for c in cases}) == len(cases)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_stages.main(["kernels"]) == 1
    assert capsys.readouterr().err == "gpu-check: PyTorch sees no CUDA device\n"


def test_settings_that_an_op_might_choose(journal: visit.Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = group_norm_silu.choose_settings

    def measure(case: Case, direction: str, device: torch.device, *, peers: bool) -> dict[str, Any]:
        settings = group_norm_silu.choose_settings(8, 1024, 64, Target(90, 132), backward=True)
        return {"direction": direction, "kept": settings.keep, "chunk": settings.chunk}

    small = [case(label, op="group_norm_silu") for label in ("16 x 512 in small", "2 x 512")]
    monkeypatch.setattr(gpu_stages, "cases", lambda: small)
    monkeypatch.setattr(gpu_stages, "_attention_variants", lambda: ())
    monkeypatch.setattr(kernel_speed, "check", lambda case, device: {"ok": True})
    monkeypatch.setattr(kernel_speed, "measure", measure)
    for _ in range(2):  # the second has nothing to do
        gpu_stages.tiles(DEVICE)
        entries = [entry for entry in journal.entries if entry["kind"] == "tile"]
        assert [entry["settings"] for entry in entries] == [f"16 x 512 in small, keep={keep}" for keep in (True, False)]
    assert [entry["kept"] for entry in entries] == [True, False]
    default = chosen(8, 1024, 64, Target(90, 132), backward=True)
    assert {entry["chunk"] for entry in entries} == {default.chunk}
    assert group_norm_silu.choose_settings is chosen
