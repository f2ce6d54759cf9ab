"""The record of the kernels: its rows and checks, its metrics from rows, and the page and plot made of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, kernel_record, kernel_speed, report, timing
from benchmarks.ops.case import Case, every_case
from madformer.kernels.swiglu import swiglu, swiglu_ref
from tests.helpers.testing import DEVICE, needs_triton

ROOF = {"copy_tb_per_s": 4.0, "matmul_tflops": 800.0}


def row(op: str, direction: str, label: str, *, bytes: int = 0, flops: int = 0, **seconds: float) -> dict[str, Any]:
    spread = {name: {"median": value} for name, value in seconds.items()}
    head = {"kind": "row", "op": op, "direction": direction, "label": label, "source": kernel_record.source_of(op)}
    return {**head, "bytes": bytes, "flops": flops, "seconds": spread, "failed": {}}


ROWS = [
    row("block_causal_attention", "forward", "batch 1, 8192", flops=400 * 10**9, ours=1e-3, flex=1.5e-3),
    row("block_causal_attention", "forward", "batch 4, 8192", flops=1600 * 10**9, ours=5e-3, flex=6e-3),
    row("rms_norm", "backward", "batch 1", bytes=2 * 10**9, ours=1e-3, eager=4e-3),
    row("rms_norm", "backward", "batch 4", bytes=6 * 10**9, ours=2e-3, eager=5e-3),
    row("cached_attention", "forward", "batch 1, prefix 0", flops=1, bytes=4, ours=5e-6, sdpa=5e-6),
    row("cached_attention", "forward", "batch 1, prefix 256", flops=1, bytes=4, ours=6e-6, sdpa=12e-6),
    row("cached_attention", "forward", "batch 16, prefix 256", flops=1, bytes=4 * 10**9, ours=2e-3, sdpa=1e-3),
    row("layer", "forward", "batch 1", ours=1.0, compile=1.0),
    row("layer", "backward", "batch 1", ours=1.0, compile=2.0),
]


def test_metrics_are_the_worst_of_an_ops_shapes() -> None:
    """Of a row that the roof allows less than a launch takes, microseconds; its rate would say nothing."""
    metrics = kernel_record.metrics(ROWS, ROOF)
    assert metrics == pytest.approx(
        {
            **ROOF,
            "attention_forward_tflops": 320.0,
            "attention_forward_vs_flex": 1.2,
            "rms_norm_backward_bandwidth_fraction": 0.5,
            "rms_norm_backward_vs_eager": 2.5,
            "cached_attention_forward_us": 6.0,
            "cached_attention_forward_bandwidth_fraction": 0.5,
            "cached_attention_forward_vs_sdpa": 0.5,
            "cached_attention_vs_sdpa_b1": 1.5,
            "layer_vs_compile": 1.5,
        }
    )


def test_rows_are_merged_by_op_shape_direction_and_source() -> None:
    first = {**row("swiglu", "forward", "batch 1", ours=1.0), "failed": {"compile": "no time"}}
    other = row("swiglu", "backward", "batch 1", ours=3.0)
    older = {**first, "source": "0123"}
    later = row("swiglu", "forward", "batch 1", ours=2.0, compile=4.0)
    merged = kernel_record.merged([first, other, older, later])
    assert [(r["direction"], r["source"] == "0123") for r in merged] == [
        ("forward", False),
        ("backward", False),
        ("forward", True),
    ]
    assert merged[0]["seconds"] == {"ours": {"median": 2.0}, "compile": {"median": 4.0}}
    assert merged[0]["failed"] == {}
    assert merged[2]["failed"] == {"compile": "no time"}


def check_of(op: str, *, ok: bool, source: str | None = None) -> dict[str, Any]:
    source = source or kernel_record.source_of(op)
    return {"kind": "check", "op": op, "label": "batch 1", "source": source, "ok": ok, "why": "" if ok else "wrong"}


def test_a_wrong_op_has_no_speed_and_others_have() -> None:
    rows = [row("swiglu", "forward", "batch 1", bytes=10**10, ours=1.0), ROWS[2]]
    roof = {"kind": "roof", "roof": ROOF}
    record = kernel_record.record_of([roof, *rows, check_of("swiglu", ok=False), check_of("rms_norm", ok=True)])
    assert record["red"] == ["swiglu"]
    assert len(record["rows"]) == 2
    assert not any(name.startswith("swiglu") for name in record["metrics"])
    assert record["metrics"]["rms_norm_backward_bandwidth_fraction"] == 0.5
    mended = kernel_record.record_of([roof, *rows, check_of("swiglu", ok=False, source="0123")])
    assert mended["red"] == []
    assert "swiglu_forward_bandwidth_fraction" in mended["metrics"]


def test_rows_of_other_sources_are_no_figures() -> None:
    old = {**row("swiglu", "forward", "batch 1", bytes=10**10, ours=1.0), "source": "0123"}
    record = kernel_record.record_of([{"kind": "roof", "roof": ROOF}, old])
    assert record["rows"] == []
    assert record["older_rows"] == [{**old}]
    assert record["metrics"] == ROOF


def test_a_source_is_the_ops_own(tmp_path: Path) -> None:
    for name in ("kernels/swiglu.py", "kernels/rms_norm.py", "kernels/launch.py", "kernels/rope/a.py", "engine/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")

    def sources() -> list[str]:
        kernel_record.source_of.cache_clear()
        return [kernel_record.source_of(op, tmp_path) for op in ("swiglu", "rope_cached", "layer")]

    before = sources()
    for name, changed in {
        "kernels/rms_norm.py": [False, False, True],
        "kernels/swiglu.py": [True, False, True],
        "kernels/rope/a.py": [False, True, True],
        "kernels/launch.py": [True, True, True],
        "engine/a.py": [False, False, True],
    }.items():
        (tmp_path / name).write_text(name)
        after = sources()
        assert [old != new for old, new in zip(before, after, strict=True)] == changed, name
        before = after
    kernel_record.source_of.cache_clear()


def test_a_second_visit_leaves_out_the_stages_that_were_whole(tmp_path: Path) -> None:
    """A stage that ended badly is run again; one that is done is not, unless sources have changed."""
    counts = tmp_path / "counts"
    script = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(sys.argv[2] == 'b')"
    chosen = [gpu_check.Stage(name, (sys.executable, "-c", script, str(counts), name), 20) for name in "ab"]
    assert [gpu_check.visit(chosen, tmp_path / "out", 60) for _ in range(2)] == [1, 1]
    assert counts.read_text() == "abb"
    visit_record = json.loads((tmp_path / "out" / "visit.json").read_text())
    assert [(stage["stage"], stage["status"]) for stage in visit_record["stages"]] == [("a", "done"), ("b", "failed")]


def test_records_of_scripts_are_joined() -> None:
    def entry(source: str, figures: Sequence[tuple[str, int, float]], **answers: Any) -> dict[str, Any]:
        rows = [{"name": name, "batch": batch, "steps": 5, "seconds": value} for name, batch, value in figures]
        record = {"benchmark": "sampling", "figures": rows, "answers": answers}
        return {"kind": "record", "name": "sampling", "source": source, "record": record}

    now = kernel_record.source_of(kernel_record.WHOLE)
    entries = [
        entry("0123", [("ours", 9, 9.0)]),
        entry(now, [("ours", 1, 1.0), ("theirs", 1, 5.0)], idle=1),
        entry(now, [("ours", 1, 2.0), ("ours", 16, 3.0)], sweep=2),
    ]
    joined = gpu_check.joined(entries, "sampling")
    assert {(r["name"], r["batch"]): r["seconds"] for r in joined["figures"]} == {
        ("ours", 1): 2.0,
        ("theirs", 1): 5.0,
        ("ours", 16): 3.0,
    }
    assert joined["answers"] == {"idle": 1, "sweep": 2}
    assert gpu_check.joined(entries, "training") == {}


def test_no_more_than_eight_files(tmp_path: Path) -> None:
    entries = [
        {"kind": "tile", "settings": "x", "source": "1"},
        *({"kind": "record", "name": name, "source": "1", "record": {"rows": []}} for name in ("sampling", "training")),
    ]
    assert len(gpu_check.records(entries)) + len(("visit.jsonl", "visit.log")) <= 8


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpu_check.main([]) == 1
    assert capsys.readouterr().err.startswith("gpu-check: no GPU: ")


def test_a_stage_that_there_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_check, "device_name", lambda: "NVIDIA Example")
    with pytest.raises(SystemExit):
        gpu_check.main(["--stages", "canaries,bread"])
    assert "no stage bread; there are canaries, kernels" in capsys.readouterr().err


def swiglu_case(**changes: Any) -> Case:
    def inputs(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        gate, up = torch.randn(2, 4, 32, device=device, dtype=torch.bfloat16)
        return gate.requires_grad_(), up.requires_grad_()

    values = {"op": "swiglu", "label": "batch 1", "inputs": inputs, "run": swiglu}
    return Case(**{**values, "forward_bytes": 768, "backward_bytes": 1280, "peers": {"eager": swiglu_ref}, **changes})


@needs_triton
def test_a_wrong_result_is_red() -> None:
    """Compared in results and in gradients, whichever is wrong."""
    right = kernel_speed.check(swiglu_case(), DEVICE)
    assert right["ok"]
    assert 0 < right["error"] < 1e-2

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

    def raising(gate: torch.Tensor, up: torch.Tensor, *, backend: str) -> torch.Tensor:
        raise RuntimeError("no kernel\nand more")

    for wrong, why in ((off, "error "), (off_backward, "error "), (raising, "RuntimeError: no kernel")):
        result = kernel_speed.check(swiglu_case(run=wrong), DEVICE)
        assert not result["ok"]
        assert result["why"].startswith(why)


def test_what_is_written_in_place_is_checked() -> None:
    """A sixteenth of a cache, in a tensor that is right in the rest whatever was written."""

    def inputs(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        return torch.randn(16, 64, device=device), torch.randn(16, 1024, device=device)

    def write(wrong: float, x: torch.Tensor, cache: torch.Tensor, *, backend: str) -> torch.Tensor:
        cache[:, :64] = x * (wrong if backend == "triton" else 1)
        return x

    for wrong, ok in ((1.0, True), (1.02, False), (float("nan"), False)):
        case = swiglu_case(inputs=inputs, run=lambda *args, wrong=wrong, **options: write(wrong, *args, **options))
        assert kernel_speed.check(case, DEVICE)["ok"] == ok, wrong


def test_a_cache_that_is_hardly_filled_does_not_displace_itself() -> None:
    """How many sets of inputs a replay needs is told by what a call touches, not by what it was given."""
    (case,) = [c for c in every_case() if c.label.startswith("batch 1, prefix 0,") and "cached" in c.label]
    assert kernel_speed.touched_bytes(case, "forward", DEVICE) == case.forward_bytes
    training = next(c for c in every_case() if c.op == "block_causal_attention")
    assert training.forward_bytes == 0
    assert kernel_speed.touched_bytes(training, "forward", torch.device("cpu")) == 3 * 8192 * 18 * 64 * 2


@needs_triton
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
        monkeypatch.setattr(kernel_speed, "capture", lambda prepare, calls: Eager(prepare()))
    monkeypatch.setattr(kernel_speed, "SECONDS_A_ROW", 0.01)
    # Prepared outside of a capture a forward pass runs inside of it.
    peers = {"eager": swiglu_ref} | ({"broken": broken} if direction == "backward" else {})
    measured = kernel_speed.measure(swiglu_case(peers=peers), direction, DEVICE)
    assert measured["seconds"].keys() == {"ours", "eager"}
    assert all(spread["median"] > 0 for spread in measured["seconds"].values())
    assert measured["failed"] == ({"broken": "RuntimeError: no kernel for this"} if "broken" in peers else {})
    assert set(kernel_record.metrics([measured], ROOF)) == {
        *ROOF,
        f"swiglu_{direction}_us",
        f"swiglu_{direction}_vs_eager",
    }
    assert kernel_record.line(measured, ROOF).startswith(f"swiglu                  {direction:<9}batch 1 ")
    alone = kernel_speed.measure(swiglu_case(peers=peers), direction, DEVICE, peers=False)
    assert alone["seconds"].keys() == {"ours"}


def record() -> dict[str, Any]:
    return {
        "device": "NVIDIA Example",
        "commit": "0123456789abcdef",
        "versions": {"torch": "2.13", "triton": "3.7.1"},
        "rows": ROWS,
        "metrics": kernel_record.metrics(ROWS, ROOF),
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
