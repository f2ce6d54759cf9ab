"""Whether the ranking of ``madformer advise`` agrees with what was measured: Spearman's rank correlation.

    python -m benchmarks.experiments.advised emoji-split emoji-blocks --data LATENTS [--steps 8 32] [--out RECORD.json]

Candidates are the numbers of blocks and diffusion layers of these sweeps' models, ranked from ``LATENTS`` (of
``madformer data latents``, or ``latents/`` of the sweeps' folder) for a budget of so many steps of a block, and by
their measured KID at so many. 1 is full agreement, 0 none.

The last line on stdout is the metrics as JSON. Exit status 1: no table or no latents, or fewer than three candidates.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import scipy.stats
import torch

from benchmarks.experiments import FIGURE, SWEEPS, TABLES
from benchmarks.record import CannotCompare, environment, finish
from madformer.advice import advise
from madformer.config import MADFormerConfig
from madformer.sweeps import Sweep, lines, read_table

LEAST = 3
"""Candidates, of fewer of which a rank correlation says nothing."""


def measured(names: Sequence[str]) -> tuple[dict[int, dict[tuple[int, int], float]], MADFormerConfig]:
    """By number of steps and ``(blocks, diffusion layers)`` the mean KID; and one of the models."""
    found: dict[int, dict[tuple[int, int], float]] = {}
    configs: dict[str, MADFormerConfig] = {}
    for name in names:
        sweep = Sweep.of(tomllib.loads((SWEEPS / f"{name}.toml").read_text()))
        configs = {model.label: model.config.model for model in sweep.all_models if model.config}
        for line in lines(read_table(TABLES / f"{name}.parquet"), FIGURE):
            config = configs[line.model]
            for point in line.points:
                values = found.setdefault(point.steps, {})
                values[config.num_blocks, config.diffusion_layers] = point.estimate.value
    return found, next(iter(configs.values()))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    by_steps, config = measured(options.sweeps)
    rows: list[dict[str, Any]] = []
    for steps in options.steps:
        values = by_steps.get(steps, {})
        if len(values) < LEAST:
            raise CannotCompare(f"{len(values)} candidates were measured at {steps} steps, and it takes {LEAST}")
        candidates = sorted(values)
        blocks = sorted({blocks for blocks, _ in candidates})
        advice = advise(options.data, steps, unit="steps", model=config, num_blocks=blocks)
        scores = advice.rank(candidates)
        kid = [values[candidate] for candidate in candidates]
        found = scipy.stats.spearmanr(scores, [-value for value in kid])
        row = {"steps": steps, "candidates": candidates, "scores": list(scores), "kid": kid}
        rows.append(row | {"spearman": float(found.statistic), "p": float(found.pvalue)})
    metrics = {f"spearman_{row['steps']}_steps": row["spearman"] for row in rows}
    about = environment("advised", torch.device("cpu"), ("scipy",))
    return about | {"sweeps": options.sweeps, "rows": rows, "metrics": metrics}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sweeps", nargs="+", help="names of sweeps that have a table")
    parser.add_argument("--data", type=Path, required=True, help="latents")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--out", type=Path, help="where to write the record")
    options = parser.parse_args(arguments)
    return finish("advised", lambda: measure(options), options.out, errors=(CannotCompare, ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
