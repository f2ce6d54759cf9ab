"""The losses of training in bf16 beside those in fp32: one run twice, with the same seed, data and steps.

    madformer data emoji --out data/emoji64
    python -m benchmarks.training_precision [--data data/emoji64] [--steps 500] [--out RECORD.json]

It trains the preset ``emoji64`` with its learning rate warmed up and decayed over so many steps. Products are in bf16,
weights, their gradients and the optimiser's state in fp32 both times. What is compared are the means of the losses of
the last steps, a tenth of all: 50 of 500. A processor without bf16 units takes some fifty times as long in bf16.

The last line on stdout is the metrics as JSON. Exit status 1: something is missing, or the means differ by more than
a hundredth.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import CannotCompare, environment, finish, train_whole
from benchmarks.released import positive
from madformer.machine import device_of
from madformer.training.config import PRESETS, TrainingConfig
from madformer.training.trainer import Trainer

MAX_DIFFERENCE = 0.01
"""Relative, of the means."""


def losses_of(config: TrainingConfig, precision: str, folder: Path) -> list[float]:
    """The loss of every step of a run into ``folder``."""
    train_whole(Trainer(dataclasses.replace(config, precision=precision), folder))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def compare(config: TrainingConfig) -> dict[str, Any]:
    """What the record says of the two runs.

    Raises:
        CannotCompare: the means differ by more than :data:`MAX_DIFFERENCE`, or are no numbers; a run was stopped.
    """
    config = dataclasses.replace(config, log_every=1, save_every=config.steps, sample_every=0)
    with tempfile.TemporaryDirectory() as folder:
        losses = {name: losses_of(config, name, Path(folder) / name) for name in ("fp32", "bf16")}
    last = max(1, config.steps // 10)
    means = {name: statistics.fmean(values[-last:]) for name, values in losses.items()}
    difference = abs(means["bf16"] / means["fp32"] - 1)
    if not difference <= MAX_DIFFERENCE:
        raise CannotCompare(
            f"the mean loss of the last {last} steps is {means['bf16']:.4f} in bf16 and {means['fp32']:.4f} in fp32"
        )
    metrics = {f"last_loss_{name}": mean for name, mean in means.items()} | {"last_loss_difference": difference}
    return {"steps": config.steps, "last_steps": last, "losses": losses, "metrics": metrics}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train twice and compare; returns the record.

    Raises:
        CannotCompare, OSError: see the message.
    """
    config = dataclasses.replace(PRESETS["emoji64"](), data=options.data, steps=options.steps)
    device = torch.device(device_of(config.device))
    try:
        compared = compare(config)
    except ValueError as error:
        raise CannotCompare(str(error)) from error
    return {**environment("training_precision", device, ("diffusers",)), **compared}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="data/emoji64", help="of `madformer data emoji` (data/emoji64)")
    parser.add_argument("--steps", type=positive, default=500, help="of each run (500)")
    parser.add_argument("--out", type=Path, metavar="RECORD.json", help="also write the record there")
    options = parser.parse_args(arguments)
    return finish("training_precision", functools.partial(run, options), options.out)


if __name__ == "__main__":
    sys.exit(main())
