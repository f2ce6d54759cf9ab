"""Models out of a run's checkpoints, in one process, whatever number of them trained."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from madformer.model import MADFormer
from madformer.model.pretrained import staging
from madformer.pipeline import MADFormerPipeline
from madformer.pipeline_files import MODEL_INDEX
from madformer.training.checkpoint import checkpoint_name, read_checkpoint, whole_checkpoints
from madformer.training.config import TrainingConfig
from madformer.training.folder import make_folders, remove_empty
from madformer.training.initial import adapted

RAW = "raw"
PARTS = ("transformer", "vae", "scheduler", "tokenizer")


def load_checkpoint(run: str | Path, *, step: int | None = None, weights: str | None = None) -> MADFormer:
    """A model of a run, in eval mode and fp32 on the CPU.

    Args:
        run: its folder.
        step: of a checkpoint; None for the newest.
        weights: the decay of an average, as in ``ema_decays``, or ``raw``; None for the first average.

    Raises:
        FileNotFoundError: no such run or checkpoint. ValueError: no such weights, or a damaged checkpoint.
    """
    folder, config = Path(run) / "checkpoints", TrainingConfig.of_run(run)
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
    model = adapted(config)
    state = model.state_dict()
    stored: dict[str, Any] = {"model": state} if chosen == RAW else {"ema": {chosen: state}}
    read_checkpoint(path, stored, no_dist=True)
    with torch.no_grad():
        model.load_state_dict(state)
    return model.eval()


def save_lora(folder: str | Path, model: MADFormer) -> None:
    """Write a run's adapters as diffusers' ``load_lora_weights`` and ``load_lora_adapter`` read them.

    Raises:
        OSError: ``folder`` cannot be written.
    """
    from peft import get_peft_model_state_dict

    Path(folder).mkdir(parents=True, exist_ok=True)
    with staging(Path(folder)) as staged:
        MADFormerPipeline.save_lora_weights(
            staged,
            get_peft_model_state_dict(model, adapter_name="default"),
            transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )
        for path in staged.iterdir():
            os.replace(path, Path(folder) / path.name)


def save_pipeline(folder: str | Path, run: str | Path, model: MADFormer) -> None:
    """Write a run's ``model/`` with other weights; scheduler, autoencoder, tokenizer and class names are copied.

    Everything is written beside what the folder holds before any of it is replaced, whole.

    Raises:
        FileNotFoundError: the run has no ``model/`` yet. OSError: ``folder`` cannot be written; nothing in it changed.
    """
    source, folder = Path(run) / "model", Path(folder)
    if not (source / MODEL_INDEX).is_file():
        raise FileNotFoundError(f"{run} holds no model/ to take the rest of the pipeline from")
    with contextlib.ExitStack() as undo:
        for made in make_folders(folder):
            undo.callback(remove_empty, made)
        with staging(folder) as staged:
            model.save_pretrained(staged / "transformer")
            try:
                # less the run's weights, and what it is just writing
                less = shutil.ignore_patterns("transformer", ".*")
                shutil.copytree(source, staged, ignore=less, dirs_exist_ok=True)
            except shutil.Error as error:
                raise OSError(f"cannot write to {folder}: {error.args[0][0][2]}") from error
            _publish(staged, folder)
        undo.pop_all()


def _publish(staged: Path, folder: Path) -> None:
    # where this process is killed, rather a folder that is no pipeline than one with parts of two
    (folder / MODEL_INDEX).unlink(missing_ok=True)
    for part in PARTS:
        if (folder / part).is_dir():
            shutil.rmtree(folder / part)
    for path in sorted(staged.iterdir(), key=lambda path: path.name == MODEL_INDEX):
        os.replace(path, folder / path.name)
