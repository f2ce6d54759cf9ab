"""Turns the records under ``benchmarks/results`` into the README's table and into plots.

python -m benchmarks.report            # rewrites the tables between their markers, and docs/images/kernels-*.png
python -m benchmarks.report --check    # exit status 1 where a table is not what the records say
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.kernel_record import gain, median
from benchmarks.record import RESULTS

BEGIN, END = "<!-- kernels: written by benchmarks/report.py -->", "<!-- end of kernels -->"
PAGES = ("README.md", "kernels/README.md")
NOTHING = "No record yet: the kernels are tested in Triton's interpreter and compiled for sm_80, sm_90 and sm_100.\n"

Record = Mapping[str, Any]


def load(results: Path) -> dict[str, Record]:
    """The kernel records by the name of their device's folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(results.glob("*/kernels.json"))}


def rate(row: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """What a row reaches, in the unit that bounds it, and as a share of the roof measured in the same run."""
    own = median(row, "ours")
    if row["flops"]:
        reached = row["flops"] / own / 1e12
        return f"{reached:.0f} TFLOP/s ({reached / metrics['matmul_tflops']:.0%} of a matmul)"
    if not row["bytes"]:
        return ""
    reached = row["bytes"] / own / 1e12
    return f"{reached:.2f} TB/s ({reached / metrics['copy_tb_per_s']:.0%} of a copy)"


def table(record: Record) -> str:
    """One line a row: how long, how close to the roof, how many times as fast as each peer."""
    lines = ["| op | shape | | median | reaches | against |", "|---|---|---|---|---|---|"]
    for row in record["rows"]:
        against = ", ".join(f"{gain(row, peer):.2f}x {peer}" for peer in row["seconds"] if peer != "ours")
        own = f"{median(row, 'ours') * 1e6:.0f} µs"
        reaches = rate(row, record["metrics"])
        lines.append(f"| `{row['op']}` | {row['label']} | {row['direction']} | {own} | {reaches} | {against} |")
    return "\n".join(lines) + "\n"


def section(records: Mapping[str, Record]) -> str:
    """What stands between the markers."""
    if not records:
        return NOTHING
    parts = []
    for folder, record in records.items():
        versions = ", ".join(
            f"{name} {record['versions'][name]}" for name in ("torch", "triton") if name in record["versions"]
        )
        parts.append(
            f"{record['device']}, {versions}, commit `{record['commit'][:12]}`; a copy moves "
            f"{record['metrics']['copy_tb_per_s']:.2f} TB/s, a matmul runs at {record['metrics']['matmul_tflops']:.0f} "
            f"TFLOP/s. Record: `benchmarks/results/{folder}/kernels.json`.\n\n{table(record)}"
        )
    return "\n".join(parts)


def replaced(text: str, new: str) -> str:
    """The page with the section between the markers exchanged; a page without them stays as it is."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    return f"{head}{begin}\n{new}{end}{tail}" if begin and end else text


def plot(record: Record, path: Path) -> None:
    """Ours against every peer, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = record["rows"]
    peers = sorted({name for row in rows for name in row["seconds"]} - {"ours"})
    figure, axes = plt.subplots(figsize=(9, 1 + 0.32 * len(rows)), layout="constrained")
    for peer in peers:
        known = [(index, gain(row, peer)) for index, row in enumerate(rows) if peer in row["seconds"]]
        axes.plot([x for _, x in known], [index for index, _ in known], "o", label=peer)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [f"{row['op']} {row['direction']}, {row['label']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the peer")
    axes.set_title(record["device"])
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit status 1 where a page is out of date"
    )
    options = parser.parse_args(arguments)
    records = load(RESULTS)
    new = section(records)
    pages = {ROOT / name: (ROOT / name).read_text() for name in PAGES}
    stale = [page for page, text in pages.items() if replaced(text, new) != text]
    if options.check:
        for page in stale:
            print(f"report: {page.relative_to(ROOT)} does not show the records; run python -m benchmarks.report")
        return bool(stale)
    for page in stale:
        page.write_text(replaced(pages[page], new))
    for folder, record in records.items():
        plot(record, ROOT / "docs" / "images" / f"kernels-{folder}.png")
    print(f"{len(records)} records, {len(stale)} pages rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
