"""What a run says of itself: a line and a bar on the terminal, ``metrics.jsonl``, event files, W&B."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from tqdm import tqdm

from madformer.files.atomic import atomic_path, naming
from madformer.training.config import TrainingConfig
from madformer.training.costs import Costs

logger = logging.getLogger("madformer.training")


class Sink(Protocol):
    """Takes numbers and pictures of a step."""

    def numbers(self, step: int, record: dict[str, float]) -> None: ...

    def picture(self, step: int, image: Image.Image) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def numbers(self, step: int, record: dict[str, float]) -> None:
        for name, value in record.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, image: Image.Image) -> None:
        import numpy as np

        self.writer.add_image("samples", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, config: TrainingConfig, folder: Path) -> None:
        import wandb

        # one run for a folder, however often it is resumed
        self.run = wandb.init(
            project=config.wandb, dir=str(folder), id=folder.name, resume="allow", config=json.loads(config.to_json())
        )

    def numbers(self, step: int, record: dict[str, float]) -> None:
        self.run.log(record, step=step)

    def picture(self, step: int, image: Image.Image) -> None:
        import wandb

        self.run.log({"samples": wandb.Image(image)}, step=step)

    def close(self) -> None:
        self.run.finish()


def check_sinks(config: TrainingConfig) -> None:
    """Whether what the configuration asks for is installed.

    Raises:
        ImportError: W&B was named and is not. TensorBoard, which is on by default, is left out with a line.
    """
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ImportError(f"wandb={config.wandb!r} needs the package: pip install wandb")


def open_sinks(config: TrainingConfig, folder: Path) -> list[Sink]:
    """Those that the configuration asks for and that are installed."""
    sinks: list[Sink] = []
    if config.tensorboard:
        try:
            sinks.append(TensorBoard(folder / "tensorboard"))
        except ImportError:
            logger.warning("no event files: pip install tensorboard, or --no-tensorboard")
    if config.wandb:
        sinks.append(WeightsAndBiases(config, folder))
    return sinks


class Reporter:
    """Reports every ``log_every`` steps, from the one process that is first.

    Args:
        roof: operations a second of a large matrix product here; MFU is the share of it that a run's own operations
            reach, on ``processes`` devices.
    """

    def __init__(
        self, config: TrainingConfig, folder: Path, first_step: int, costs: Costs, roof: float, processes: int
    ) -> None:
        self.config, self.folder, self.costs, self.roof, self.processes = config, folder, costs, roof, processes
        self.file = folder / "metrics.jsonl"
        self._forget_after(first_step)
        self.stream = self.file.open("a", buffering=1)
        self.sinks = open_sinks(config, folder)
        # last: behind an error it would be shown once more
        self.bar = tqdm(total=config.steps, initial=first_step, unit="step", smoothing=0.1)
        self.begun, self.begun_at = time.perf_counter(), first_step

    def pause(self, seconds: float) -> None:
        """Time that was not training: of sampling, or of a checkpoint."""
        self.begun += seconds

    def numbers(self, step: int, record: dict[str, float], device: torch.device) -> None:
        """Of the last steps; adds what they took."""
        seconds = time.perf_counter() - self.begun
        rate = (step - self.begun_at) * self.config.batch_size / seconds
        record |= {
            "images_per_second": rate,
            "tflops": rate * self.costs.flops / self.processes / 1e12,
            "mfu": rate * self.costs.flops / self.processes / self.roof,
        }
        if device.type == "cuda":
            record["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        with naming(str(self.file)):
            self.stream.write(json.dumps({"step": step, **record}) + "\n")
        self.bar.update(step - self.bar.n)
        shown = {name: record[name] for name in ("loss", "image", "hidden", "images_per_second") if name in record}
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()} | {"mfu": f"{record['mfu']:.1%}"})
        for sink in self.sinks:
            with naming(str(self.folder)):
                sink.numbers(step, record)
        self.begun, self.begun_at = time.perf_counter(), step

    def picture(self, step: int, image: Image.Image) -> None:
        with atomic_path(self.folder / "samples" / f"step-{step:08d}.png") as path:
            image.save(path, "PNG")
        for sink in self.sinks:
            with naming(str(self.folder)):
                sink.picture(step, image)

    def close(self) -> None:
        with naming(str(self.folder)), contextlib.ExitStack() as closing:
            for sink in self.sinks:
                closing.callback(sink.close)
            closing.callback(self.stream.close)
            closing.callback(self.bar.close)

    def _forget_after(self, step: int) -> None:
        """Drop what a killed run reported beyond the checkpoint that this one goes on from, and a half-written line."""
        if not self.file.exists():
            return
        lines = [line for line in self.file.read_text().splitlines() if _step_of(line) <= step]
        with atomic_path(self.file) as path:
            path.write_text("".join(f"{line}\n" for line in lines))


def _step_of(line: str) -> float:
    try:
        record: dict[str, Any] = json.loads(line)
        return float(record["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
