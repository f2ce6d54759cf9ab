"""A sweep for tests: a small model, one to train, forty pictures; and, as a program, the command that runs it.

python -m tests.helpers.sweep_cases sweep FILE --out FOLDER ...
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from madformer.conditioning.tokenizer import ByteTokenizer
from madformer.config import TextConfig
from madformer.engine.schedulers import default_scheduler
from madformer.evaluation.extractors import EXTRACTORS
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from tests.helpers.evaluation_cases import pictures, tiny_extractor, write_folder
from tests.helpers.testing import perturb, small_config, small_vae


def register_tiny() -> None:
    EXTRACTORS["tiny"] = lambda weights, device: tiny_extractor()


if __name__ in ("__main__", "__mp_main__"):
    # in workers, too, which import the program that they are of
    register_tiny()

BLOCKS: dict[str, Any] = {"num_blocks": 2, "block_size": 32, "block_shape": (4, 8), "block_grid": (2, 1)}


def make_world(folder: Path) -> Path:
    """A folder with a given ``model``, ``pictures`` that have captions, and a ``vae``."""
    write_folder(folder / "pictures", pictures(40))
    for index in range(40):
        (folder / "pictures" / f"{index:05}.txt").write_text(f"number {index}")
    torch.manual_seed(0)
    # as the one that is trained: operations of both are counted at once
    model = perturb(MADFormer(small_config(**BLOCKS, text=TextConfig(257, 48, 256))))
    vae = small_vae()
    vae.save_pretrained(folder / "vae")
    assert isinstance(model, MADFormer)
    MADFormerPipeline(model, vae, default_scheduler("epsilon"), ByteTokenizer()).save_pretrained(folder / "model")
    return folder


def sweep_values(world: Path, **changes: Any) -> dict[str, Any]:
    """As a file has them: the given model and one that is trained from two seeds, four ways to sample them."""
    unet = {
        "block_out_channels": [8], "layers_per_block": [1], "attention": [False], "num_heads": 8, "norm_groups": 4,
        "time_embed_dim": 16,
    }  # fmt: skip
    training = {
        "data": str(world / "pictures"), "vae": str(world / "vae"), "image_size": 16, "steps": 3, "batch_size": 2,
        "precision": "fp32", "log_every": 1, "save_every": 2, "sample_every": 0, "tensorboard": False,
        "model": {**BLOCKS, "num_layers": 2, "unet": unet},
    }  # fmt: skip
    values = {
        "models": [str(world / "model")],
        "train": {
            "preset": "tiny", "seeds": [0, 1], "fields": training, "grid": {"model": {"diffusion_layers": [1]}}
        },
        "sample": {"steps": [1, 2], "guidance": [1, 2.0], "batch_size": 4, "precision": "exact"},
        "evaluate": {
            "reference": str(world / "pictures"), "num_images": 8, "extractor": "tiny", "metrics": ["fd", "prdc"]
        },
    }  # fmt: skip
    return values | changes


if __name__ == "__main__":
    from madformer.cli.main import main

    sys.exit(main())
