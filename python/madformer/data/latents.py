"""A data set of images encoded once through a VAE, into WebDataset shards that training reads with no VAE in the loop.

Beside ``latents-000000.tar``, ``latents-000001.tar``, ... stands ``latents.json``: what the latents are and of what.
A sample has up to three members, named by its number in the source:

- ``00000042.json``: its ``key``, ``label`` (-1 unknown) and ``caption``;
- ``00000042.npy``: ``(2, C, H, W)``, posterior mean and standard deviation, scaled as :func:`madformer.vae.encode`
  gives them;
- ``00000042.flip.npy``: the same of the image mirrored left to right, which is not the mirrored latents.

Shard ``k`` is made of the source's samples ``k * shard_size .. (k + 1) * shard_size - 1`` and of nothing else: so any
number of processes can share the work, and a shard that is there is done. :mod:`madformer.data.encoding` writes them.

Shape legend: C channels, H rows, W columns.
"""

from __future__ import annotations

import dataclasses
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.utils.data import Dataset

from madformer.arguments import whole_number
from madformer.config import MADFormerConfig
from madformer.data.fields import DataSummary, caption_of, label_of, summarize
from madformer.data.images import ImageDataset, ImageSize, shape_of
from madformer.files.atomic import write_json
from madformer.files.resumable import first_difference, span
from madformer.files.shards import ShardDataset
from madformer.files.text import MAX_BYTES, decode_json, first_line, printable
from madformer.files.weights import fingerprint
from madformer.objects import check_types, from_object, parse_object
from madformer.vae import downscale

__all__ = ["LatentDataset", "LatentDescription", "holds_latents"]

DESCRIPTION = "latents.json"
VERSION = 1
Precision = Literal["float16", "float32"]
PLAIN, FLIPPED = "npy", "flip.npy"


@dataclass(frozen=True)
class LatentDescription:
    """What ``latents.json`` says, known before the first image is encoded.

    Attributes:
        source: as the user named it. num_images: of the source, unreadable ones included.
        class_names: by label; empty if unknown.
        image_size: of what was encoded, as :class:`~madformer.data.images.ImageDataset` takes it.
        latent_shape: channels, rows, columns.
        dtype: that the moments are rounded to.
        flips: whether mirrored images were encoded, too.
        vae: its name. vae_fingerprint: what :func:`madformer.files.weights.fingerprint` says of it as stored.
        shard_size: images of a shard, unreadable ones included.
    """

    source: str
    num_images: int
    class_names: tuple[str, ...]
    image_size: ImageSize
    latent_shape: tuple[int, int, int]
    dtype: Precision
    flips: bool
    vae: str
    vae_fingerprint: str
    shard_size: int

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("num_images", "shard_size"):
            whole_number(name, getattr(self, name), 1)
        if min(shape_of(self.image_size)) < 1:
            raise ValueError(f"image_size={self.image_size} must be at least 1")

    @classmethod
    def of(
        cls,
        images: ImageDataset,
        vae: AutoencoderKL,
        *,
        source: str,
        vae_name: str,
        dtype: Precision = "float16",
        flips: bool = True,
        shard_size: int = 1000,
    ) -> LatentDescription:
        """Of what a VAE, as stored, makes of a data set.

        Raises:
            ValueError: the VAE makes no whole latents of images of that size, or another argument is out of range.
        """
        pixels = downscale(vae)
        if any(side % pixels for side in images.image_shape):
            raise ValueError(f"image_size={images.image_size} must be a multiple of {pixels}, a latent's pixels")
        return cls(
            source=source,
            num_images=len(images),
            class_names=tuple(images.class_names),
            image_size=images.image_size,
            latent_shape=(vae.config.latent_channels, *(side // pixels for side in images.image_shape)),
            dtype=dtype,
            flips=flips,
            vae=vae_name,
            vae_fingerprint=fingerprint(vae, vae.config),
            shard_size=shard_size,
        )

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_images / self.shard_size)

    def shard_name(self, shard: int) -> str:
        return f"latents-{shard:06d}.tar"

    def span(self, shard: int) -> range:
        """The source's samples that a shard is made of."""
        return span(shard, self.shard_size, self.num_images)

    def difference(self, stored: LatentDescription) -> str | None:
        """The first field in which ``stored`` is of other latents, as ``name=its value, not ours``; or None."""
        # the same weights may have two names; classes follow from the source, and may be a thousand
        theirs, ours = (
            {name: value for name, value in dataclasses.asdict(own).items() if name not in ("vae", "class_names")}
            for own in (stored, self)
        )
        return first_difference(theirs, ours)

    def write(self, folder: Path) -> None:
        write_json(folder / DESCRIPTION, {"version": VERSION, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> LatentDescription:
        """Inverse of :meth:`write`.

        Raises:
            FileNotFoundError, ValueError: there is none, or it is something else; one line.
        """
        path = folder / DESCRIPTION
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {DESCRIPTION}; `madformer data latents` writes one")
        try:
            values = parse_object(path.read_bytes())
            if (version := values.pop("version", None)) != VERSION:
                raise ValueError(f"version {version}, where {VERSION} is known")
            return from_object(cls, values)
        except ValueError as error:
            raise ValueError(f"{path} describes no latents: {error}") from error


def holds_latents(source: str | Path) -> bool:
    """Whether a data source is a folder for :class:`LatentDataset`, not one of images."""
    return (Path(source) / DESCRIPTION).is_file()


class LatentDataset(Dataset[dict[str, Any]]):
    """Posterior moments that :func:`write_latents` wrote, for any number of DataLoader workers.

    ``dataset[i]`` is ``{"mean": fp32 (C, H, W), "deviation": the same, "label": int, "caption": str, "key": str}``.
    Opening it reads the shards' tar headers. It pickles, as :class:`ShardDataset` does, and shares that one's limits.

    Attributes:
        class_names: by label; empty if unknown. flips: whether mirrored images were encoded, too.
        num_bad: images of the source that were unreadable, and are left out.
        shard_lengths: samples of each shard, in order.

    Raises:
        FileNotFoundError: there is no description, or not every shard of it.
        ValueError: a description or a shard that is damaged, or not one readable sample.
    """

    root = None

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.description = LatentDescription.read(self.folder)
        paths = [self.folder / self.description.shard_name(k) for k in range(self.description.num_shards)]
        there = sum(path.is_file() for path in paths)
        if there < len(paths):
            raise FileNotFoundError(
                f"{folder} holds {there} of {len(paths)} shards: the same `madformer data latents` adds the others"
            )
        self.shards = ShardDataset(paths)
        if not len(self.shards):
            raise ValueError(f"{folder} holds no sample: none of its {self.description.num_images} images was readable")
        self.class_names, self.flips = list(self.description.class_names), self.description.flips
        self.num_bad = self.description.num_images - len(self)
        self.shard_lengths = self.shards.shard_lengths

    def summary(self, limit: int = 10_000) -> DataSummary:
        """Classes and captions, of up to ``limit`` samples, spread evenly; the name of a class is no caption."""
        names, named = self.class_names, []

        def annotations(index: int) -> tuple[int, str]:
            record = self._record(index)
            label, caption = record["label"], record["caption"]
            is_name = 0 <= label < len(names) and caption == names[label]
            named.append(is_name)
            return label, "" if is_name else caption

        summary = summarize(len(self), annotations, names, limit)
        return dataclasses.replace(summary, names_as_captions=any(named))

    def _record(self, index: int) -> dict[str, Any]:
        record = decode_json(self._member(index, "json", MAX_BYTES))
        if not isinstance(record, dict) or not {"key", "label", "caption"} <= record.keys():
            raise ValueError("its record lacks key, label or caption")
        label, caption = label_of(record["label"]), caption_of(record["caption"])
        return {"key": str(record["key"]), "label": label, "caption": caption}

    def _member(self, index: int, name: str, limit: int) -> bytes:
        data = self.shards.member(index, name, limit)
        if data is None:
            raise ValueError("a member is missing")
        return data

    def check(self, config: MADFormerConfig, vae: AutoencoderKL | None = None, *, flip: bool = False) -> None:
        """Raises ``ValueError`` where a model does not take these latents, or ``vae``, as stored, did not make them.

        Args:
            flip: mirror images are wanted, too.
        """
        config.check_latents(self.description.latent_shape, str(self.folder))
        if flip and not self.flips:
            raise ValueError(f"flip=True needs mirror images, and {self.folder} was written with --no-flip")
        if vae is not None and (found := fingerprint(vae, vae.config)) != self.description.vae_fingerprint:
            raise ValueError(
                f"{self.folder} was encoded by {self.description.vae} ({self.description.vae_fingerprint}), "
                f"not by this VAE ({found})"
            )

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index)

    def read(self, index: int, *, flipped: bool = False) -> dict[str, Any]:
        """A sample, or the one of the mirrored image: only what is asked for is read from the disk.

        Raises:
            ValueError: a member is damaged, or ``flipped`` where there are no flips.
        """
        if flipped and not self.flips:
            raise ValueError(f"{self.folder} holds no flips: it was written with --no-flip")
        try:
            # torch's conversion from fp16 is ten times as fast as NumPy's
            mean, deviation = torch.from_numpy(self._moments(index, FLIPPED if flipped else PLAIN)).float()
            return {"mean": mean, "deviation": deviation, **self._record(index)}
        except ValueError as error:
            place = f"{printable(self.shards.path(index))}:{self.shards.key(index)}"
            raise ValueError(f"{place} is damaged: {error}") from error

    def _moments(self, index: int, name: str) -> np.ndarray[Any, Any]:
        """``(2, C, H, W)`` of a member, if it is what the description says; whatever else it says, no more is read."""
        shape, dtype = (2, *self.description.latent_shape), np.dtype(self.description.dtype)
        size = math.prod(shape) * dtype.itemsize
        data = self._member(index, name, size + 4096)
        file = io.BytesIO(data)
        try:
            np.lib.format.read_magic(file)
            found = np.lib.format.read_array_header_1_0(file)
        except Exception as error:
            raise ValueError(first_line(error)) from error
        if found != (shape, False, dtype):
            raise ValueError(f"its shape is {found[0]} of {found[2]}, not {shape} of {dtype}")
        body = data[file.tell() :]
        if len(body) != size:
            raise ValueError(f"it holds {len(body)} bytes for the shape {shape}")
        # a copy, that torch may write to
        return np.frombuffer(body, dtype).reshape(shape).copy()
