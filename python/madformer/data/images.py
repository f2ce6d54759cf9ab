"""Any source of labelled or captioned images as one map-style data set: shards, folders, Hugging Face.

A source only says how many samples it has and hands out undecoded ones; decoding, cropping and the treatment
of damaged images are the same for all of them, so the same picture gives the same pixels from everywhere.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from madformer.config import MADFormerConfig
from madformer.data.fields import NO_LABEL, DataSummary
from madformer.data.holdout import SplitSource
from madformer.data.hub import HuggingFaceSource, is_saved
from madformer.data.pixels import UnreadableImageError, decode, to_rgb
from madformer.data.sources import FolderSource, ShardSource, Source
from madformer.files.shards import is_hidden, list_shards
from madformer.files.text import first_line, printable
from madformer.vae import downscale

__all__ = ["NO_LABEL", "DataSummary", "ImageDataset", "UnreadableImageError", "decode_image", "open_dataset", "to_rgb"]

ImageSize = int | tuple[int, int]
"""Pixels along the sides of a square, or height and width."""
# Before this many samples were read one damaged file says nothing about the whole.
MIN_SEEN = 100
logger = logging.getLogger(__name__)


def open_dataset(
    source: str | Path,
    image_size: ImageSize,
    *,
    on_error: Literal["raise", "skip"] = "raise",
    max_bad_fraction: float = 0.05,
    holdout: float = 0.0,
) -> ImageDataset:
    """Open a data set of images by name.

    Args:
        source: one of

            - a folder or glob of ``.tar`` shards, or one shard; captions come from ``.txt`` or the
              ``caption`` of ``.json``, labels from ``.cls`` or the ``label`` of ``.json``;
            - a folder of images; when there are subfolders with images, they are the classes, sorted by name.
              A caption is the ``.txt`` beside the image, or else the name of the class;
            - ``hf:NAME[:SPLIT]``, a Hugging Face data set on the hub or in a folder; the split is ``train`` unless
              given. A folder that ``save_to_disk`` wrote needs no ``hf:``.

            Files and folders that are hidden (``.ipynb_checkpoints``, ``._x.jpg``, ``__MACOSX``) are left out.
        image_size: what images are resized and cropped (centre) to, in pixels: the side of a square, or height and
            width.
        on_error: ``raise`` for an unreadable image, or ``skip``: see :class:`ImageDataset`.
        max_bad_fraction: with ``skip``, the fraction of unreadable samples that is tolerated.
        holdout: the fraction that is left out, for a model to be evaluated on: see
            :func:`madformer.data.holdout.is_held_out`.

    Raises:
        FileNotFoundError: the source is missing or empty; one line.
        ImportError: ``hf:`` without the package ``datasets``.
        ValueError: an argument out of range, a damaged or compressed shard, a Hugging Face data set without images, or
            labels that are no class numbers: lists of several classes, say.
    """
    opened = open_source(str(source))
    if holdout:
        opened = SplitSource(opened, holdout, "training")
    return ImageDataset(opened, image_size, on_error=on_error, max_bad_fraction=max_bad_fraction)


class ImageDataset(Dataset[dict[str, Any]]):
    """Decoded samples of a source, for any number of DataLoader workers.

    ``dataset[i]`` is ``{"image": float32 (3, height, width) in [-1, 1], "caption": str, "label": int, "key": str}``;
    the label is -1 and the caption empty where the source has none. ``class_names`` lists the classes by label, empty
    if unknown.

    An unreadable image raises :class:`UnreadableImageError`, or with ``on_error="skip"`` is counted, logged
    once and replaced by the next readable sample in index order. Workers share the count, ``num_bad``.
    ``ValueError`` is raised once more than ``max_bad_fraction`` of the distinct samples seen are bad, where
    the first 100 (or the whole of a smaller data set) count as seen from the start.
    """

    def __init__(
        self,
        source: Source,
        image_size: ImageSize,
        *,
        on_error: Literal["raise", "skip"] = "raise",
        max_bad_fraction: float = 0.05,
    ) -> None:
        self.image_shape = shape_of(image_size)
        if min(self.image_shape) < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be within [0, 1], got {max_bad_fraction}")
        self.source = source
        self.class_names, self.root, self.shard_lengths = source.class_names, source.root, source.shard_lengths
        self.image_size = image_size
        self.on_error = on_error
        self.max_bad_fraction = max_bad_fraction
        # In shared memory, so that neither the next worker nor the next epoch forgets what was bad.
        self._seen = torch.zeros(len(source), dtype=torch.bool).share_memory_()
        self._bad = torch.zeros(len(source), dtype=torch.bool).share_memory_()

    @property
    def num_bad(self) -> int:
        """How many distinct samples turned out to be unreadable so far, in all workers."""
        return int(np.count_nonzero(self._bad.numpy()))

    def summary(self, limit: int = 10_000) -> DataSummary:
        """Classes and captions, without decoding a picture.

        Folders are known completely; of other sources up to ``limit`` samples are looked at, spread evenly.
        """
        return self.source.summary(limit)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"index {index} is out of range for {length} samples")
        index %= length
        if self.on_error == "raise":
            return self._load(index)
        for distance in range(length):
            sample = self.try_read((index + distance) % length)
            if sample is not None:
                return sample
        raise ValueError(f"none of the {length} samples is readable")

    def read(self, index: int, *, flipped: bool = False) -> dict[str, Any]:
        """The sample, or its mirror image."""
        sample = self[index]
        return {**sample, "image": sample["image"].flip(-1)} if flipped else sample

    def check(self, config: MADFormerConfig, vae: AutoencoderKL | None, *, flip: bool = False) -> None:
        """Raises ``ValueError`` where a model does not take what ``vae`` makes of the images."""
        if vae is None:
            raise ValueError("vae=None: images need one")
        shape = (side // downscale(vae) for side in self.image_shape)
        what = "images of {} x {} pixels".format(*self.image_shape)
        config.check_latents((vae.config.latent_channels, *shape), what)

    def try_read(self, index: int) -> dict[str, Any] | None:
        """The sample, or None where it is unreadable, which is counted and logged whatever ``on_error`` says.

        Raises:
            ValueError: too many are.
        """
        if self._bad[index]:
            return None
        try:
            sample = self._load(index)
        except UnreadableImageError as error:
            self._count_bad(index, error)
            return None
        self._seen[index] = True
        return sample

    def _load(self, index: int) -> dict[str, Any]:
        try:
            raw = self.source.read(index)
            image = decode_image(raw.data, self.image_shape)
        except (ValueError, OSError) as error:
            raise UnreadableImageError(f"{self.source.name(index)}: {first_line(error)}") from error
        return {"image": image, "caption": raw.caption, "label": raw.label, "key": raw.key}

    def _count_bad(self, index: int, error: UnreadableImageError) -> None:
        self._bad[index] = self._seen[index] = True
        logger.warning("skipping an unreadable image: %s", error)
        bad, seen = self.num_bad, int(np.count_nonzero(self._seen.numpy()))
        if bad > self.max_bad_fraction * max(seen, min(MIN_SEEN, len(self))):
            raise ValueError(
                f"{bad} of {seen} samples read are unreadable, over the limit "
                f"max_bad_fraction={self.max_bad_fraction:g}; the last: {error}"
            ) from error


def shape_of(image_size: ImageSize) -> tuple[int, int]:
    """Height and width."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width


def decode_image(data: bytes, shape: tuple[int, int]) -> Tensor:
    """Decode, resize until it covers ``shape`` (height, width), crop the centre.

    Returns:
        float32 ``(3, height, width)`` in [-1, 1]. An image of exactly that size is not resampled.

    Raises:
        UnreadableImageError: as :func:`madformer.data.pixels.decode`.
    """
    image = decode(data)
    height, width = shape
    crop_width = min(image.width, image.height * width / height)
    crop_height = min(image.height, image.width * height / width)
    left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
    # One resampling, of the crop alone; the filter still sees the pixels beyond the box.
    box = (left, top, left + crop_width, top + crop_height)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    pixels_HWC = torch.from_numpy(np.array(image))
    return pixels_HWC.permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1)


def open_source(source: str) -> Source:
    """What :func:`open_dataset` reads from, whose samples are not decoded; raises as it does."""
    if source.startswith("hf:"):
        return HuggingFaceSource(source.removeprefix("hf:"))
    path = Path(source)
    if path.is_dir():
        if is_saved(path):
            return HuggingFaceSource(source)
        visible = (entry for entry in os.scandir(path) if not is_hidden(entry.name))
        if not any(entry.name.endswith(".tar") and entry.is_file() for entry in visible):
            try:
                return _open_folder(path)
            except FileNotFoundError as error:
                nothing = error
    try:
        shards = list_shards(source)
    except FileNotFoundError as error:
        if path.is_dir():
            raise FileNotFoundError(f"{nothing}{_hint(path)}") from error
        raise FileNotFoundError(
            f"no data set at {printable(source)}: not a folder, a .tar shard, a glob of shards or hf:NAME[:SPLIT]"
        ) from error
    return ShardSource(shards)


def _open_folder(path: Path) -> FolderSource:
    source = FolderSource(path)
    for name in ("metadata.jsonl", "metadata.csv"):
        if (path / name).is_file():
            logger.warning("%s is not read; as hf:%s, the folder is read with it", path / name, path)
    return source


def _hint(folder: Path) -> str:
    """What else a folder without images might be."""
    if any(folder.glob("**/*.parquet")) or any(folder.glob("**/*.arrow")):
        return f"; for a data set of Hugging Face's give hf:{printable(folder)}"
    return "; a Hugging Face data set is given as hf:NAME[:SPLIT] or as the folder that save_to_disk wrote"
