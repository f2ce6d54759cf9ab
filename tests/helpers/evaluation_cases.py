"""Sets of images and an extractor that is small."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from madformer.evaluation.extractors import Extractor, resize
from madformer.evaluation.moments import Array

WIDTH = 12


class Tiny(nn.Module):
    """Two convolutions and a mean, of random weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(3, 16, 5, 2), nn.SiLU(), nn.Conv2d(16, WIDTH, 3, 2))
            self.head = nn.Linear(WIDTH, 7)
        self.requires_grad_(False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.body(pixels_BCHW).mean((2, 3))


def tiny_extractor(name: str = "tiny") -> Extractor:
    network = Tiny()

    def prepare(image: Image.Image) -> Tensor:
        return resize(image, 20, mean=(0.5,) * 3, std=(0.5,) * 3)

    head = (network.head.weight, network.head.bias)
    return Extractor(name, network, prepare, 20, "bicubic", "from -1 to 1", WIDTH, "0" * 16, head)


def pictures(count: int, seed: int = 0, size: int = 16) -> Array:
    """Bytes ``(N, H, W, 3)``: blobs of colour."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, 4, 4, 3))
    return np.asarray(
        coarse.repeat(size // 4, 1).repeat(size // 4, 2) * 0.9 + random.integers(0, 25, (count, size, size, 3)),
        np.uint8,
    )


def write_folder(folder: Path, images: Array) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:05}.png")
    return folder


def write_batch(path: Path, images: Array) -> Path:
    """As ADM's reference batches are."""
    np.savez(path, arr_0=images)
    assert zipfile.is_zipfile(path)
    return path
