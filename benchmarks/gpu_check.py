"""One visit to a GPU, as ``make gpu-check``: is the engine right there, and how fast is it.

Stages run in the order of their worth, each in a process of its own under a hard limit: an error of CUDA's, a hang or
a red check ends that stage alone, and a wrong op has no speed. Everything that is found is on the disk at once, in
``benchmarks/results/<device>``: a visit that is cut has lost nothing, and the next goes on from there. What each stage
is for, and how its results are read, is in ``docs/gpu-visit.md``.

Exit status 1: no GPU, or a stage that was begun did not end well.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.gpu_bundle import BUNDLE
from benchmarks.kernel_record import WHOLE, record_of, source_of
from benchmarks.visit import Entry, Stage, Visit

BENCHMARKS = ROOT / "benchmarks"
RELEASED, CACHE = BUNDLE / "released", BUNDLE / "triton"
TESTS = ("tests/csrc", "tests/kernels", "tests/engine", "tests/model")


def stages(released: Path | None) -> list[Stage]:
    """In the order of their worth. Together their limits are more than a visit: what ends early leaves its time."""

    def own(name: str, limit: float, least: float = 15) -> Stage:
        return Stage(name, (sys.executable, "-m", "benchmarks.gpu_stages", name), limit, least, restarts=3)

    def script(name: str, module: str, limit: float, *options: str) -> Stage:
        where = ["--released", str(released)] if released is not None else []
        budget = ["--budget", f"{limit - 5:.0f}"]
        return Stage(name, (sys.executable, "-m", f"benchmarks.{module}", *where, *budget, *options), limit, 30)

    def tests(name: str, marker: str, limit: float) -> Stage:
        processes = ["-n", "8", "--dist", "load"] if importlib.util.find_spec("xdist") else []
        options = ("-p", "benchmarks.gpu_tests", "-q", "--tb=short", "-m", marker, *processes, "--rootdir", str(ROOT))
        folders = (str(ROOT / folder) for folder in TESTS)
        return Stage(name, (sys.executable, "-m", "pytest", *options, *folders), limit)

    training = [script("training", "training", 100)] if released is not None else []
    return [
        own("canaries", 90),
        own("kernels", 120),
        script("sampling", "sampling", 110, "--questions", "headline"),
        *training,
        tests("gpu tests", "gpu and not slow", 120),
        own("peers", 150),
        own("tiles", 60),
        script("sampling, the rest", "sampling", 120, "--questions", "rest"),
        tests("tests", "not gpu and not slow", 150),
        own("others", 120),
    ]


def records(entries: Sequence[Entry]) -> dict[str, Any]:
    """The files beside the journal, of all its entries."""
    last: dict[str, Entry] = {entry["stage"]: entry for entry in entries if entry["kind"] == "stage"}
    tests = {entry["test"]: entry for entry in entries if entry["kind"] == "test"}
    failures = [entry for entry in tests.values() if entry["outcome"] == "failed"]
    launches = [entry for entry in entries if entry["kind"] == "launches"]
    tiles = {(entry["settings"], entry["source"]): entry for entry in entries if entry["kind"] == "tile"}
    visit = {
        "stages": list(last.values()),
        "tests": {"passed": sum(entry["outcome"] == "passed" for entry in tests.values()), "failed": failures},
        "launches": launches[-1] if launches else None,
    }
    scripts = {f"{name}.json": joined(entries, name) for name in ("sampling", "training")}
    files = {"visit.json": visit, "kernels.json": record_of(entries), "tiles.json": list(tiles.values()), **scripts}
    return {name: record for name, record in files.items() if record}


# By what rows of a script's record are the same.
ROW_KEYS = {"figures": ("name", "batch", "steps"), "rows": ("name", "batch")}


def joined(entries: Sequence[Entry], name: str) -> dict[str, Any]:
    """A script's record, of all that its runs over these sources have found: of the same row the last figure."""
    records = [entry for entry in entries if entry["kind"] == "record" and entry["name"] == name]
    source = source_of(WHOLE)
    current = [entry["record"] for entry in records if entry["source"] == source]
    current = current or [entry["record"] for entry in records[-1:]]
    result: dict[str, Any] = {}
    for record in current:
        before, result = result, {**result, **record}
        for part in ("answers", "metrics", "errors"):
            if part in result:
                result[part] = {**before.get(part, {}), **record.get(part, {})}
        for part, keys in ROW_KEYS.items():
            if part in result:
                rows = [*before.get(part, []), *record.get(part, [])]
                result[part] = list({tuple(row[key] for key in keys): row for row in rows}.values())
    return result


def undone(chosen: Sequence[Stage], entries: Sequence[Entry]) -> list[Stage]:
    """The stages that have not ended well with the sources as they are."""
    source = source_of(WHOLE)
    done = {entry["stage"] for entry in entries if entry["kind"] == "whole" and entry["source"] == source}
    return [stage for stage in chosen if stage.name not in done]


def device_name() -> str:
    """Of the first GPU; asked in a process of its own, because the driver may hang.

    Raises:
        OSError, subprocess.SubprocessError: there is none.
    """
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]


def visit(chosen: Sequence[Stage], folder: Path, budget: float, make_records: Any = records) -> int:
    """Run the stages that are not done; the number of those that did not end well."""
    visiting = Visit(folder, make_records, budget)
    left = undone(chosen, visiting.journal.entries)
    for stage in chosen:
        if stage not in left:
            print(f"== {stage.name}: done by an earlier visit")
    bad = 0
    for stage in left:
        ((_, outcome),) = visiting.run([stage])
        if outcome.status == "done":
            visiting.add({"kind": "whole", "stage": stage.name, "source": source_of(WHOLE)})
        bad += outcome.status not in ("done", "not begun")
    print(summary(visiting.journal.entries))
    return bad


def summary(entries: Sequence[Entry]) -> str:
    """What the visit found, in a few lines."""
    record: Mapping[str, Any] = record_of(entries)
    wrong = [f"WRONG: {check['op']}, {check['label']}: {check['why']}" for check in record["checks"] if not check["ok"]]
    figures = [f"{name} {value:.4g}" for name, value in record["metrics"].items()]
    return "\n".join([*wrong, f"{len(record['rows'])} rows", *figures])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=float, default=570, metavar="SECONDS", help="of all stages (570)")
    parser.add_argument("--stages", type=lambda text: text.split(","), metavar="NAME,NAME", help="only these")
    carried = RELEASED if RELEASED.is_dir() else None
    parser.add_argument(
        "--released", type=Path, metavar="PATH", default=carried, help="clone of the released code, or the bundle's"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="in place of benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    try:
        name = device_name()
    except (OSError, IndexError, subprocess.SubprocessError) as error:
        print(f"gpu-check: no GPU: {error}", file=sys.stderr)
        return 1
    folder = options.out or BENCHMARKS / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    everything = stages(options.released)
    if unknown := set(options.stages or ()) - {stage.name for stage in everything}:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in everything)}")
    chosen = [stage for stage in everything if not options.stages or stage.name in options.stages]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # of the stages
    os.environ.pop("TRITON_INTERPRET", None)
    if CACHE.is_dir():
        os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    return int(visit(chosen, folder, options.budget) > 0)


if __name__ == "__main__":
    sys.exit(main())
