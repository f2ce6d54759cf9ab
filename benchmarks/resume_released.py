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
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim import lr_scheduler

import madformer
from benchmarks.record import CannotCompare, environment, finish, git_commit
from benchmarks.released import SEED, Shape, load_released, positive
from benchmarks.train_released import SMALL, TINY, Factory, Run, load_script, train
from madformer.compat import madformer_ffhq, madformer_imagenet

MAX_LOSS_DIFFERENCE = 1e-5
TEXT = {"vocab_size": 11, "pad_token_id": 10, "max_position_embeddings": 2}
ROPE_THETA = 10_000.0


def factories(module: ModuleType, shape: Shape, folder: Path) -> dict[str, Factory]:
    """The model of each run at ``shape``'s sizes; all begin with the same random numbers."""
    sizes = {"hidden_size": shape.hidden_size, "depth": shape.num_layers, "num_heads": shape.num_heads}
    (folder / "model.json").write_text(json.dumps(shape.model_config() | TEXT | {"rope_theta": ROPE_THETA}))
    # transformers 5 calls it by another name, and the released code by this one
    module.MADFormerConfig.rope_theta = ROPE_THETA
    ours = madformer_imagenet if hasattr(module, "RotaryEmbedding") else madformer_ffhq

    def released(**arguments: Any) -> nn.Module:
        torch.manual_seed(SEED)
        model = module.MADFormer(**arguments, **sizes)
        # FlexAttention cannot train on a CPU: the same mask as numbers to add
        mask = model.flex_attnmask
        queries, keys = (torch.arange(length) for length in mask.seq_lengths)
        allowed = mask.mask_mod(0, 0, queries[:, None], keys[None])
        model.flex_attnmask = torch.zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)
        return model

    def seeded(make: Factory) -> Factory:
        def factory(**arguments: Any) -> nn.Module:
            model = make(**arguments)
            # constructors draw differently many numbers
            torch.manual_seed(SEED + 1)
            return model

        return factory

    makers: dict[str, Factory] = {
        "released": released,
        "compat": lambda **arguments: ours.MADFormer(**arguments, **sizes),
        "accelerate": lambda **arguments: madformer.accelerate(released(**arguments)),
    }
    return {name: seeded(make) for name, make in makers.items()}


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
    shape, steps = TINY if options.tiny else SMALL, options.steps
    if options.threads:
        torch.set_num_threads(options.threads)
    script, module = load_script(options.released), load_released(options.released, "cpu")
    resumes = hasattr(module, "RotaryEmbedding")
    runs = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        makers = factories(module, shape, folder)
        first = train(script, makers["released"], shape, 2 * steps, folder, "--id=0", f"--ckpt_every={steps}")
        (file,) = (folder / "results").glob(f"*/checkpoints/{steps:07d}.pt")
        file = file.rename(folder / "half.pt")
        for variant, make in makers.items():
            print(f"resume_released: {steps} steps, {variant}", file=sys.stderr, flush=True)
            runs[variant] = resume(script, make, shape, steps, folder, file, resumes)
    differences = {
        variant: max(abs(a - b) for a, b in zip(run.losses, runs["released"].losses, strict=True))
        for variant, run in runs.items()
    }
    branch = "imagenet" if resumes else "main"
    print(f"{f'{branch}, resumed with':<24}{'first loss':>12}{'last loss':>12}{'difference':>12}")
    for variant, resumed in runs.items():
        print(
            f"  {variant:<22}{resumed.losses[0]:>12.6f}{resumed.losses[-1]:>12.6f}{differences[variant]:>12.1e}",
            flush=True,
        )
    if not max(differences.values()) <= MAX_LOSS_DIFFERENCE:
        raise CannotCompare(f"losses differ by more than {MAX_LOSS_DIFFERENCE:g}: {differences}")
    return {
        **environment("resume_released", torch.device("cpu"), ("diffusers", "transformers")),
        "branch": branch,
        "released_commit": git_commit(options.released),
        "shape": asdict(shape),
        "steps": steps,
        "losses_before": first.losses[:steps],
        "losses": {variant: resumed.losses for variant, resumed in runs.items()},
        "metrics": {"max_loss_difference": max(differences.values())},
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--released", type=Path, required=True, metavar="PATH", help="clone of the released code")
    parser.add_argument("--steps", type=positive, default=5, help="optimiser steps of each half (5)")
    parser.add_argument("--threads", type=positive, help="CPU threads (PyTorch's choice)")
    parser.add_argument("--tiny", action="store_true", help="a toy geometry, to try the script out")
    parser.add_argument("--out", type=Path, metavar="RECORD.json", help="also write the record there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return finish("resume_released", lambda: run(options), options.out, shown=None)


if __name__ == "__main__":
    sys.exit(main())
