"""What ``kernels.json`` says: rows merged by op, shape, direction and source, and metrics made of them.

Nothing here imports torch.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT

SHARED = ("kernels/launch.py", "kernels/dispatch.py", "kernels/norm_common", "benchmarks/timing.py")
"""What every kernel is launched and timed by."""
NO_OPS = ("__init__", "checks", "dispatch", "interpreter", "launch", "norm_common", "optional")
LATENCY = 5e-6
"""Seconds: where the roof says that a call takes less, what is measured is a launch, and its rate says nothing."""

WHOLE = "all that computes"
"""No op: :func:`source_of` it hashes all sources."""

Row = Mapping[str, Any]


@functools.cache
def source_of(op: str, root: Path = ROOT) -> str:
    """A hash of the files that an op's rows depend on; of all that computes for what is not a kernel's.

    They are read once: a process computes with what it has loaded.
    """
    names = [path.stem for path in (root / "kernels").iterdir() if path.stem not in NO_OPS]
    own = max((name for name in names if op == name or op.startswith(f"{name}_")), key=len, default=None)
    if own is None:
        folders: Sequence[str] = ("kernels", "csrc", "engine", "python/madformer", "benchmarks")
    else:
        compiled = (f"csrc/{own}{suffix}" for suffix in (".cpp", ".cu", ".h"))
        folders = (*SHARED, f"kernels/{own}", f"kernels/{own}.py", *compiled, f"benchmarks/ops/{own}.py")
    digest = hashlib.sha256()
    for path in sorted(file for folder in folders for file in _files(root / folder)):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return [file for file in path.rglob("*") if file.suffix in (".py", ".cpp", ".cu", ".h")]
    return [path] if path.is_file() else []


def key_of(row: Row) -> tuple[str, str, str, str]:
    return row["op"], row["label"], row["direction"], row["source"]


def merged(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row for each op, shape, direction and source: every variant's last figure, and no failure that was mended."""
    result: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        before = result.get(key_of(row), {"seconds": {}, "failed": {}})
        seconds = {**before["seconds"], **row["seconds"]}
        failed = {name: why for name, why in {**before["failed"], **row["failed"]}.items() if name not in seconds}
        result[key_of(row)] = {**before, **row, "seconds": seconds, "failed": failed}
    return list(result.values())


def median(row: Row, variant: str) -> float:
    return row["seconds"][variant]["median"]


def gain(row: Row, peer: str) -> float:
    """How many times as fast as the peer ours is."""
    return median(row, peer) / median(row, "ours")


def bound(row: Row, roof: Mapping[str, float]) -> float:
    """Seconds that the roof allows."""
    return max(row["bytes"] / roof["copy_tb_per_s"] / 1e12, row["flops"] / roof["matmul_tflops"] / 1e12)


def metrics(rows: Sequence[Row], roof: Mapping[str, float]) -> dict[str, float]:
    """The flat figures of a record; where an op has several shapes, the worst.

    Rates and ratios are of those rows that take more than a launch does; of the others, microseconds.
    """
    values = dict(roof)
    rows = [row for row in rows if "ours" in row["seconds"]]

    def worst(name: str, figures: Iterator[float], pick: Any = min) -> None:
        if (known := list(figures)) != []:
            values[name] = pick(known)

    def of(op: str, direction: str) -> list[Row]:
        return [row for row in rows if (row["op"], row["direction"]) == (op, direction)]

    for op, direction in sorted({(row["op"], row["direction"]) for row in rows}):
        name = {"block_causal_attention": "attention"}.get(op, op) + f"_{direction}"
        chosen = of(op, direction)
        if op == "layer":
            continue
        short = [row for row in chosen if bound(row, roof) < LATENCY]
        long = [row for row in chosen if bound(row, roof) >= LATENCY]
        worst(f"{name}_us", (median(row, "ours") * 1e6 for row in short), max)
        if chosen[0]["flops"] and op != "cached_attention":
            worst(f"{name}_tflops", (row["flops"] / median(row, "ours") / 1e12 for row in long))
        elif chosen[0]["bytes"]:
            bandwidth = roof["copy_tb_per_s"] * 1e12
            worst(f"{name}_bandwidth_fraction", (row["bytes"] / median(row, "ours") / bandwidth for row in long))
        for peer in sorted({name for row in chosen for name in row["seconds"]} - {"ours"}):
            worst(f"{name}_vs_{peer}", (gain(row, peer) for row in chosen if peer in row["seconds"]))
    single = [
        gain(row, "sdpa")
        for row in of("cached_attention", "forward")
        if row["label"].startswith("batch 1,") and "sdpa" in row["seconds"]
    ]
    if single:
        values["cached_attention_vs_sdpa_b1"] = sum(single) / len(single)
    pairs = [
        (forward, backward)
        for forward, backward in itertools.product(of("layer", "forward"), of("layer", "backward"))
        if forward["label"] == backward["label"] and all("compile" in row["seconds"] for row in (forward, backward))
    ]
    worst(
        "layer_vs_compile",
        ((median(f, "compile") + median(b, "compile")) / (median(f, "ours") + median(b, "ours")) for f, b in pairs),
    )
    return values


def line(row: Row, roof: Mapping[str, float]) -> str:
    """A row as it is printed."""
    own = median(row, "ours")
    rate = f"{row['flops'] / own / 1e12:7.0f} TFLOP/s" if row["flops"] else ""
    if row["bytes"]:
        share = row["bytes"] / own / roof["copy_tb_per_s"] / 1e10
        rate += f" {row['bytes'] / own / 1e9:7.0f} GB/s {share:4.0f} % of copy"
    peers = ", ".join(f"{gain(row, name):.2f}x {name}" for name in row["seconds"] if name != "ours")
    return f"{row['op']:<24}{row['direction']:<9}{row['label']:<44}{own * 1e6:>10.1f} us{rate}  {peers}"


def record_of(entries: Sequence[Mapping[str, Any]], root: Path = ROOT) -> dict[str, Any]:
    """``kernels.json`` of a journal. An op whose last check failed has rows, but no metric is made of them.

    Rows of an older source than the tree's are kept by themselves.
    """
    rows = merged([entry for entry in entries if entry["kind"] in ("row", "row with peers")])
    checks = {(c["op"], c["label"], c["source"]): c for c in entries if c["kind"] == "check"}
    current = {op: source_of(op, root) for op in {entry["op"] for entry in (*rows, *checks.values())}}
    red = {check["op"] for check in checks.values() if not check["ok"] and check["source"] == current[check["op"]]}
    heads = [entry for entry in entries if entry["kind"] == "environment"]
    roof = next((entry["roof"] for entry in reversed(entries) if entry["kind"] == "roof"), None)
    newest = [row for row in rows if row["source"] == current[row["op"]]]
    return {
        **({name: value for name, value in heads[-1].items() if name != "kind"} if heads else {}),
        "checks": list(checks.values()),
        "red": sorted(red),
        "rows": newest,
        "older_rows": [row for row in rows if row not in newest],
        "metrics": metrics([row for row in newest if row["op"] not in red], roof) if roof else {},
    }
