"""What more workers of a sweep bring: the same sweep from nothing with one single-threaded process and with several.

    python -m benchmarks.sweep_workers [--file SWEEP.toml] [--workers 2] [--rounds 1] [--out RECORD.json]

Each run is the command in a process of its own, with a folder and a cache of features of its own; they take turns.
Seconds of the wall clock count, so nothing else is to run; seconds of the processors, of all processes together, say
what the same work costs more with several. Unless given, the sweep is the demonstration model at 4, 8, 16 and 25 steps
with 128 pictures each, held against 256 emoji.

The last line on stdout is the metrics as JSON: ``speedup`` is cells a second with several workers over those with one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.record import CannotCompare, environment, finish

SWEEP: dict[str, Any] = {
    "models": ["assets/emoji64"],
    "sample": {"steps": [4, 8, 16, 25], "guidance": [1, 2], "batch_size": 16, "precision": "exact"},
    "evaluate": {"reference": "emoji:64", "num_images": 128, "num_reference": 256, "metrics": ["kid"]},
}


def run(file: Path, workers: int) -> dict[str, float]:
    """One sweep from nothing; wall-clock and processor seconds."""
    with tempfile.TemporaryDirectory() as name:
        words = ["sweep", str(file), "--out", f"{name}/out", "--cache", f"{name}/cache", "--device", "cpu", "--json"]
        command = [sys.executable, "-m", "madformer.cli.main", *words, "--workers", str(workers)]
        begun, before = time.perf_counter(), _processor_seconds()
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=ROOT
        )
        seconds = time.perf_counter() - begun
        if done.returncode:
            raise CannotCompare(done.stderr.strip().splitlines()[-1])
        cells = len(list(Path(name, "out", "cells").glob("*.json")))
        return {"seconds": seconds, "processor_seconds": _processor_seconds() - before, "cells": cells}


def _processor_seconds() -> float:
    """Of processes that have ended, and theirs."""
    of = resource.getrusage(resource.RUSAGE_CHILDREN)
    return of.ru_utime + of.ru_stime


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = args.file.resolve() if args.file else Path(folder, "sweep.json")
        if args.file is None:
            file.write_text(json.dumps(SWEEP))
        runs: dict[int, list[dict[str, float]]] = {1: [], args.workers: []}
        for _ in range(args.rounds):
            for workers, found in runs.items():
                found.append(run(file, workers))
                print(f"{workers} workers: {found[-1]}", file=sys.stderr)
    one, several = (median(run["seconds"] for run in found) for found in runs.values())
    return environment("sweep_workers", torch.device("cpu")) | {
        "sweep": SWEEP if args.file is None else str(args.file.name),
        "runs": {str(workers): found for workers, found in runs.items()},
        "metrics": {"speedup": one / several, "seconds_of_one": one, "seconds_of_several": several},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    return finish("sweep_workers", lambda: measure(args), args.out)


if __name__ == "__main__":
    sys.exit(main())
