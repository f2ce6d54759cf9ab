"""What a sweep of the experiments is between: figures of pictures that no model drew.

    python -m benchmarks.experiments.limits benchmarks/experiments/emoji-noise.toml [--out RECORD.json]

Of training images, as many as a cell has, held against the held-out ones as a model's pictures are: as they are, which
is the best that there is; encoded and decoded, which is the best that a model of these latents can draw; and their mean
image, of which all have the same.

The last line on stdout is the figures as JSON, ``{picture: {metric: figure}}``. Exit status 1: the file is no sweep, or
trains nothing.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.record import CannotCompare, environment, finish
from madformer.evaluation import evaluate, extract, load_extractor, open_images, open_reference
from madformer.evaluation.images import Part
from madformer.sweeps import Sweep
from madformer.vae import decode, encode, load_vae, to_uint8


@dataclass(frozen=True)
class Pictures:
    """Pictures ``(B, H, W, 3)`` of bytes, as a set."""

    name: str
    pictures: np.ndarray[Any, Any]

    @property
    def drawn(self) -> dict[str, Any]:
        return {}

    def __len__(self) -> int:
        return len(self.pictures)

    def parts(self) -> Iterator[Part]:
        yield Part(self.name.encode().hex().ljust(64, "0")[:64], len(self), lambda: map(Image.fromarray, self.pictures))


def measure(file: Path) -> dict[str, Any]:
    try:
        sweep = Sweep.of(tomllib.loads(file.read_text()))
    except ValueError as error:  # tomllib's too
        raise CannotCompare(str(error)) from None
    trained = next((model.config for model in sweep.all_models if model.config), None)
    if trained is None:
        raise CannotCompare(f"{file} trains no model")
    judging, extractor = sweep.evaluate, load_extractor(sweep.evaluate.extractor, sweep.evaluate.weights)
    reference = open_reference(judging.reference, judging.num_reference, holdout=judging.holdout)
    target = extract(reference, extractor)
    of_training: dict[str, Any] = {"holdout": judging.holdout, "side": "training"} if judging.holdout else {}
    images = open_images(judging.reference, judging.num_images, spread=True, **of_training)
    pictures = np.stack([np.asarray(image) for part in images.parts() for image in part.images()])
    vae = load_vae(trained.vae, torch.device("cpu"))
    figures, warnings = {}, dict[str, None]()
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "training images": lambda pixels: pixels,
        "encoded and decoded": lambda pixels: decode(vae, encode(vae, 2 * pixels - 1)[0]),
        "their mean": lambda pixels: pixels.mean(0, keepdim=True).expand_as(pixels),
    }
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    for name, change in changes.items():
        shown = Pictures(name, to_uint8(change(pixels).contiguous()).numpy())
        found = evaluate(shown, target, extractor, metrics=list(judging.metrics))
        figures[name] = {metric: score.estimate.value for metric, score in found.scores.items()}
        warnings |= dict.fromkeys(found.warnings)
    about = environment("limits", torch.device("cpu"), ("torch", "numpy"))
    return about | {"sweep": file.name, "num_images": len(pictures), "warnings": list(warnings), "metrics": figures}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="a sweep")
    parser.add_argument("--out", type=Path, help="where to write the record")
    options = parser.parse_args()
    return finish("limits", lambda: measure(options.file), options.out)


if __name__ == "__main__":
    sys.exit(main())
