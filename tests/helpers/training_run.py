"""A run for tests: ten small images, a VAE for them, six steps; and, as a program, the same in processes of its own.

python -m tests.helpers.training_run FOLDER CONFIG.json STOP_AFTER PROCESSES
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from madformer.training.config import TrainingConfig
from madformer.training.costs import costs_of
from madformer.training.parallel import leave
from madformer.training.trainer import Trainer
from tests.helpers import environment
from tests.helpers.testing import small_config, small_vae

# Relative, of losses summed in another order: 1.0e-5 was seen, since Adam's first steps are as long for a gradient that
# is all rounding as for any other.
ROUNDING = 1e-4
MODEL = small_config(block_size=16)


def make_config(folder: Path) -> TrainingConfig:
    """Writes images and VAE into ``folder``; six steps over them."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(10):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    small_vae().save_pretrained(folder / "vae")
    return TrainingConfig(
        model=MODEL, data=str(folder / "images"), vae=str(folder / "vae"), image_size=16,
        num_workers=0, steps=6, batch_size=4, learning_rate=1e-3, precision="fp32", ema_decays=(0.9, 0.5), log_every=1,
        save_every=4, keep_checkpoints=2, sample_every=0, device="cpu", tensorboard=False,
    )  # fmt: skip


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in metrics(folder)]


def stop_after(trainer: Trainer, step: int) -> None:
    """End the run in good order after a step, as SIGTERM does."""
    train_step = trainer._train_step

    def stopping(batches: Any) -> dict[str, torch.Tensor]:
        record = train_step(batches)
        if trainer.step == step:
            trainer.stop()
        return record

    trainer._train_step = stopping  # type: ignore[method-assign]


def run_apart(
    folder: Path,
    config: TrainingConfig,
    processes: int = 1,
    stop: int = 0,
    timeout: float = 300,
    *,
    torchrun: bool = False,
) -> None:
    """In processes of its own, which SIGKILL ends after ``timeout`` seconds; forked from one unless by ``torchrun``."""
    file = folder.with_suffix(".json")
    file.write_text(config.to_json())
    start = [sys.executable]
    if torchrun:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*start, "-m", __name__, str(folder), str(file), str(stop), "1" if torchrun else str(processes)]
    subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), check=True, timeout=timeout)


def fork(processes: int) -> list[int]:
    """What torchrun tells its processes; gives the others' to the first one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    children = []
    for rank in reversed(range(processes)):
        os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        if rank:
            children.append(os.fork())
            if not children[-1]:
                return []
    return children


def main(folder: str, file: str, stop: int, processes: int) -> None:
    config = TrainingConfig.from_dict(json.loads(Path(file).read_text()))
    if torch.version.cuda is None:
        costs_of(config)  # once for all of them
    # Before the first backward pass: a build with CUDA starts threads in it, which no fork has.
    children = fork(processes) if processes > 1 else []
    run = Trainer(config, folder, resume=True)
    if stop:
        stop_after(run, stop)
    run.run()
    leave()
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
