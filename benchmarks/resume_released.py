"""Whether the released ``train.py`` goes on from its own checkpoint with our class in place of its own.

    python -m benchmarks.resume_released --released PATH [--steps 5] [--out RECORD.json]

``PATH`` is your own clone of ``Junhaoo-Chen/MADFormer``, branch ``main`` or ``imagenet``; running it needs
``pip install transformers einops``. Its ``train.py`` takes twice as many steps with its own model, and leaves a
checkpoint halfway. From that it goes on to the end three times: with its own model, with our drop-in, and with its own
model accelerated. An optimiser's state goes by the order of the parameters: with another one these runs would not
agree, or crash.

ImageNet's script resumes by itself. FFHQ's has no code for that: its model, AdamW and schedule are given the
checkpoint's state as they are made. What cannot run on a CPU is replaced as in ``train_released.py``.

The last line on stdout is the record as JSON. Exit status 1: something is missing, or a loss differs by more than 1e-5.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim import lr_scheduler

from benchmarks.record import environment, finish, git_commit
from benchmarks.released import Shape
from benchmarks.train_released import Factory, Run, compare, factories, is_imagenet, parse, prepare, table, train

MAX_LOSS_DIFFERENCE = 1e-5


@contextlib.contextmanager
def states_of(checkpoint: Mapping[str, Any]) -> Iterator[None]:
    """AdamW and the schedule begin where the checkpoint ends."""

    class AdamW(torch.optim.AdamW):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.load_state_dict(checkpoint["opt"])

    class LambdaLR(lr_scheduler.LambdaLR):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.load_state_dict(checkpoint["lrs"])
            for group, rate in zip(self.optimizer.param_groups, self.get_last_lr(), strict=True):
                group["lr"] = rate

    with mock.patch.object(torch.optim, "AdamW", AdamW), mock.patch.object(lr_scheduler, "LambdaLR", LambdaLR):
        yield


def resume(script: Any, make: Factory, shape: Shape, steps: int, folder: Path, file: Path, resumes: bool) -> Run:
    """The second half, from the checkpoint in ``file``."""
    shutil.rmtree(folder / "results")
    if resumes:
        target = folder / "results" / "000-MADFormer" / "checkpoints" / "latest.pt"
        target.parent.mkdir(parents=True)
        shutil.copyfile(file, target)
        return train(script, make, shape, 2 * steps, folder, "--id=0", taken=steps)
    checkpoint = torch.load(file, weights_only=False)

    def loaded(**arguments: Any) -> nn.Module:
        model = make(**arguments)
        model.load_state_dict(checkpoint["model"])
        return model

    with states_of(checkpoint):
        return train(script, loaded, shape, steps, folder)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train once and resume three times, compare, print the table; returns the record.

    Raises:
        CannotCompare, OSError: see the message.
    """
    shape, script, module = prepare(options)
    steps, resumes, runs = options.steps, is_imagenet(module), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        makers = factories(module, shape, folder)
        first = train(script, makers["released"], shape, 2 * steps, folder, "--id=0", f"--ckpt_every={steps}")
        (file,) = (folder / "results").glob(f"*/checkpoints/{steps:07d}.pt")
        file = file.rename(folder / "half.pt")
        for variant, make in makers.items():
            print(f"resume_released: {steps} steps, {variant}", file=sys.stderr, flush=True)
            runs[variant] = resume(script, make, shape, steps, folder, file, resumes)
    differences = compare(runs, MAX_LOSS_DIFFERENCE)
    print(table(runs, differences), flush=True)
    return {
        **environment("resume_released", torch.device("cpu"), ("diffusers", "transformers")),
        "branch": "imagenet" if resumes else "main",
        "released_commit": git_commit(options.released),
        "shape": asdict(shape),
        "steps": steps,
        "losses_before": first.losses[:steps],
        "losses": {variant: resumed.losses for variant, resumed in runs.items()},
        "metrics": {"max_loss_difference": max(differences.values())},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(__doc__, 5, arguments)
    return finish("resume_released", lambda: run(options), options.out, shown=None)


if __name__ == "__main__":
    sys.exit(main())
