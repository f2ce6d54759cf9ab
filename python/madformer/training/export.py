"""Models out of a run's checkpoints, in one process, whatever number of them trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from madformer.model import MADFormer
from madformer.training.checkpoint import checkpoint_name, whole_checkpoints
from madformer.training.config import TrainingConfig

RAW = "raw"


def load_checkpoint(run: str | Path, *, step: int | None = None, weights: str | None = None) -> MADFormer:
    """A model of a run, in eval mode and fp32 on the CPU.

    Args:
        run: its folder.
        step: of a checkpoint; None for the newest.
        weights: the decay of an average, as in ``ema_decays``, or ``raw``; None for the first average.

    Raises:
        FileNotFoundError: no such run or checkpoint. ValueError: no such weights, or a damaged checkpoint.
    """
    folder, config = Path(run) / "checkpoints", config_of(run)
    available = whole_checkpoints(folder)
    if not available:
        raise FileNotFoundError(f"{run} holds no checkpoint")
    path = available[-1] if step is None else folder / checkpoint_name(step)
    if path not in available:
        raise FileNotFoundError(
            f"{run} holds no checkpoint of step {step}, only {', '.join(p.name for p in available)}"
        )
    names = [RAW, *map(str, config.ema_decays)]
    chosen = weights or names[1]
    if chosen not in names:
        raise ValueError(f"weights={chosen!r} must be one of {', '.join(names)}")
    model = MADFormer(config.model)
    state = model.state_dict()
    stored: dict[str, Any] = {"model": state} if chosen == RAW else {"ema": {chosen: state}}
    try:
        dcp.load(stored, checkpoint_id=path, no_dist=True)
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    with torch.no_grad():
        model.load_state_dict(state)
    return model.eval()


def config_of(run: str | Path) -> TrainingConfig:
    """The configuration of a run.

    Raises:
        FileNotFoundError: no run there.
    """
    file = Path(run) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run} holds no run: no config.json")
    return TrainingConfig.from_dict(json.loads(file.read_text()))
