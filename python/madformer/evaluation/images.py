"""Sets of images to be looked at: folders, shards, ``.npz`` batches, rendered ones, and what a model draws on the way.

Every set comes in parts of a few dozen images with a key that its content decides, so that what was found out about a
part need not be found out again, whatever set it lies in and wherever a run was stopped.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import madformer.engine
import madformer.kernels
from madformer.bulk.folder import MANIFEST, read_manifest
from madformer.data.clipart import ClipartSource
from madformer.data.emoji import EmojiSource
from madformer.data.holdout import Side, SplitSource
from madformer.data.images import open_source
from madformer.data.pixels import UnreadableImageError, decode
from madformer.data.sources import RawSample, Source
from madformer.files.text import first_line, printable
from madformer.machine import device_name
from madformer.seeds import check_seed
from madformer.vae import check_finite, finite, to_uint8
from madformer.vae import decode as decode_latents

if TYPE_CHECKING:
    from madformer.bulk.settings import Settings
    from madformer.pipeline import MADFormerPipeline

__all__ = ["ArrayImages", "DrawnImages", "ImageSet", "Part", "StoredImages", "is_statistics", "open_images"]

PART = 64
"""Images of a part: of 1024 x 1024 pixels, as PNG, about 100 MB."""
_RENDERED: dict[str, Callable[[int], Source]] = {"emoji": EmojiSource, "clipart": ClipartSource}
"""Data sets that need no files of their own, by name."""
_ARRAY = "arr_0"


@dataclass(frozen=True)
class Part:
    """Some neighbouring images of a set.

    Attributes:
        key: 64 hexadecimal digits, which other images do not have. count: how many there are.
        images: reads, or draws, them: pictures of mode RGB.
        captions, labels: what they are of; empty, or -1, where an image has none. Without any where none has one.
    """

    key: str
    count: int
    images: Callable[[], Iterator[Image.Image]]
    captions: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()


class ImageSet(Protocol):
    """Images that are read one part after the other.

    Attributes:
        name: what messages call the set. drawn: how a model drew them, in JSON's types; empty where nobody knows.
    """

    @property
    def name(self) -> str: ...

    @property
    def drawn(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def parts(self) -> Iterator[Part]:
        """All of it, in order.

        Raises:
            ValueError, OSError: an image that cannot be read; names it.
        """


@dataclass(frozen=True)
class StoredImages:
    """The pictures of a data set as they are, neither resized nor cropped.

    Attributes:
        source: of undecoded samples. name: what messages call it. count: how many of them; None for all.
        spread: take them evenly from all over the source, which may be in an order, and not its first ones.
        drawn: see :class:`ImageSet`.

    Raises:
        ValueError: there are fewer than ``count``.
    """

    source: Source
    name: str
    count: int | None = None
    spread: bool = False
    drawn: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_count(self.name, self.count, len(self.source))

    def __len__(self) -> int:
        return len(self.source) if self.count is None else self.count

    def parts(self) -> Iterator[Part]:
        for first in range(0, len(self), PART):
            span = range(first, min(first + PART, len(self)))
            samples = list(map(self._sample, span))
            files = [sample.data for sample in samples]
            digest = hashlib.sha256()
            for file in files:
                digest.update(len(file).to_bytes(8) + file)
            captions, labels = zip(*((sample.caption, sample.label) for sample in samples), strict=True)
            read = functools.partial(map, self._decode, span, files)
            yield Part(digest.hexdigest(), len(span), read, captions, labels)

    def caption(self, index: int) -> str:
        """Of an image; empty where it has none."""
        return self._sample(index).caption

    def label(self, index: int) -> int:
        """Of an image; -1 where it has none."""
        return self._sample(index).label

    def _sample(self, index: int) -> RawSample:
        try:
            return self.source.read(self._place(index))
        except (ValueError, OSError) as error:
            raise UnreadableImageError(f"{self.source.name(self._place(index))}: {first_line(error)}") from error

    def _place(self, index: int) -> int:
        """In the source."""
        return index * len(self.source) // len(self) if self.spread else index

    def _decode(self, index: int, data: bytes) -> Image.Image:
        try:
            return decode(data)
        except ValueError as error:
            raise UnreadableImageError(f"{self.source.name(self._place(index))}: {first_line(error)}") from error


class ArrayImages:
    """The array ``arr_0`` of an ``.npz`` file, bytes ``(N, H, W, 3)``, as ADM's batches are; never all of it in memory.

    Args:
        count: how many of them; None for all. spread: see :class:`StoredImages`.

    Raises:
        OSError: there is no such file. ValueError: it is damaged, holds no such array, or fewer than ``count``.
    """

    def __init__(self, path: Path, count: int | None = None, *, spread: bool = False) -> None:
        self.path, self.name, self.drawn, self.spread = path, printable(path), dict[str, Any](), spread
        with self._opened() as (_, shape):
            self._shape = shape
        _check_count(self.name, count, shape[0])
        self._count = shape[0] if count is None else count

    def __len__(self) -> int:
        return self._count

    def parts(self) -> Iterator[Part]:
        read = self._images()
        while some := list(itertools.islice(read, PART)):
            data, count = b"".join(some), len(some)
            images = np.frombuffer(data, np.uint8).reshape(count, *self._shape[1:])
            key = hashlib.sha256(repr(images.shape).encode() + data).hexdigest()
            yield Part(key, count, functools.partial(map, Image.fromarray, images))

    def _images(self) -> Iterator[bytes]:
        each, place = int(np.prod(self._shape[1:])), 0
        with self._opened() as (file, _):
            for index in range(len(self)):
                wanted = index * self._shape[0] // len(self) if self.spread else index
                while place < wanted:
                    self._read(file, each)
                    place += 1
                yield self._read(file, each)
                place += 1

    def _opened(self) -> _Opened:
        return _Opened(self.path)

    def _read(self, file: Any, size: int) -> bytes:
        try:
            data = file.read(size)
        except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
            raise ValueError(f"{self.name} is damaged: {first_line(error)}") from error
        if len(data) != size:
            raise ValueError(f"{self.name} is damaged: it ends within {_ARRAY}")
        return bytes(data)


class _Opened:
    """The member of a ``.npz`` file that holds the pictures, behind its header, and the array's shape."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> tuple[Any, tuple[int, ...]]:
        path, name = self._path, printable(self._path)
        try:
            self._archive = zipfile.ZipFile(path)
            if f"{_ARRAY}.npy" not in self._archive.namelist():
                held = ", ".join(member.removesuffix(".npy") for member in self._archive.namelist()[:5])
                raise ValueError(f"it holds {held or 'nothing'}, where {_ARRAY} is looked for")
            file = self._archive.open(f"{_ARRAY}.npy")
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_column, dtype = read(file)
        except FileNotFoundError:
            raise
        except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
            raise ValueError(f"{name} is no batch of images: {first_line(error)}") from error
        if dtype != np.uint8:
            raise ValueError(f"{name}: {_ARRAY} must hold bytes (uint8) from 0 to 255, got {dtype}")
        if len(shape) != 4 or shape[3] != 3 or not all(shape) or by_column:
            raise ValueError(f"{name}: {_ARRAY} must have the shape (images, height, width, 3), got {shape}")
        return file, shape

    def __exit__(self, *error: object) -> None:
        self._archive.close()


class DrawnImages:
    """What a pipeline draws, batch after batch, image ``i`` from ``settings.seed + i``; nothing is written.

    Pictures are rounded to bytes, as they are in files, so that a folder of the same ones gives the same figures.

    Args:
        settings: how. num_images: how many.

    Raises:
        ValueError: the pipeline has no autoencoder, or the seeds end before the images do.
    """

    def __init__(self, pipeline: MADFormerPipeline, settings: Settings, num_images: int, name: str = "model") -> None:
        if pipeline.vae is None:
            raise ValueError("the model has no autoencoder: its latents are no pictures to look at")
        check_seed(settings.seed, num_images)
        self.pipeline, self.settings, self.num_images, self.name = pipeline, settings, num_images, name
        left_out = ("format", "shard_size", "latents")
        self.drawn = {key: value for key, value in settings.to_dict().items() if key not in left_out}

    def __len__(self) -> int:
        return self.num_images

    def parts(self) -> Iterator[Part]:
        batch = self.settings.batch_size
        # whole batches, so that every image is drawn beside the same neighbours
        size = batch * max(1, PART // batch)
        where = [sources_fingerprint(), torch.__version__, device_name(self.pipeline.transformer.device)]
        how = json.dumps([self.drawn, self.pipeline.transformer.backend, *where], sort_keys=True)
        for first in range(0, self.num_images, size):
            span = range(first, min(first + size, self.num_images))
            # an image depends on how many there are in its batch
            key = hashlib.sha256(f"{how} {span.start} {span.stop}".encode()).hexdigest()
            captions, labels = self.asked(span)
            yield Part(key, len(span), functools.partial(self._draw, span), captions, labels)

    def asked(self, span: range) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Captions and classes that these images are drawn for; empty for a model without."""
        entries = [self.settings.prompts.entry(index) for index in span]
        captions, labels = (tuple(one[name] for one in entries if name in one) for name in ("prompt", "labels"))
        return captions, labels

    def batches(self, span: range | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents ``(B, C, H, W)`` and pictures ``(B, 3, H, W)`` in [0, 1] of these images, or all, as they are drawn.

        Raises:
            FloatingPointError: a pixel is not finite.
        """
        span = range(self.num_images) if span is None else span
        for first in range(span.start, span.stop, self.settings.batch_size):
            batch = range(first, min(first + self.settings.batch_size, span.stop))
            latents = self.pipeline(**self.settings.options(batch), output_type="latent").images
            pixels = decode_latents(self.pipeline.vae, latents)
            check_finite(finite(pixels), self.pipeline.vae)
            yield latents, pixels

    def _draw(self, span: range) -> Iterator[Image.Image]:
        for _, pixels in self.batches(span):
            yield from map(Image.fromarray, to_uint8(pixels).cpu().numpy())


@dataclass(frozen=True)
class OnePart:
    """A part of a set, as a set of its own."""

    name: str
    part: Part
    drawn: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.part.count

    def parts(self) -> Iterator[Part]:
        yield self.part


def open_images(
    source: str | Path,
    count: int | None = None,
    *,
    spread: bool = False,
    holdout: float = 0.0,
    side: Side = "held out",
) -> ImageSet:
    """A set of images by name.

    Args:
        source: what :func:`madformer.data.open_dataset` takes, ``emoji:SIZE`` or ``clipart:SIZE`` for the pictures of
            ``madformer data emoji`` and ``madformer data clipart``, or an ``.npz`` file with an array ``arr_0``. Of a
            folder that ``madformer sample`` wrote, how its images were drawn is known.
        count: how many of them; None for all.
        spread: take them evenly from all over the source, which may be in an order, and not its first ones.
        holdout: take the part that a run with this ``--holdout`` did not train on, or with ``side="training"`` the
            other one; 0 for all.

    Raises:
        FileNotFoundError: the source is missing or empty. ImportError: a package for it is.
        ValueError: it is damaged, or has fewer than ``count``; one line.
    """
    name = str(source)

    def split(whole: Source) -> Source:
        return SplitSource(whole, holdout, side) if holdout else whole

    kind, _, size = name.partition(":")
    if ":" in name and kind in _RENDERED and not Path(name).exists():
        if not (size.isascii() and size.isdecimal()):
            raise ValueError(f"{printable(name)}: the size must be pixels along one side, as in {kind}:64")
        return StoredImages(split(_RENDERED[kind](int(size))), name, count, spread)
    if name.endswith(".npz"):
        if holdout:
            raise ValueError(f"holdout={holdout} goes by the names of images, and those in {printable(name)} have none")
        return ArrayImages(Path(name), count, spread=spread)
    return StoredImages(split(open_source(name)), name, count, spread, _how_drawn(Path(name)))


def is_statistics(source: str | Path) -> bool:
    """Whether it is a file of statistics, in which there are no images."""
    path = Path(source)
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"mu.npy", "sigma.npy"} <= (names := set(archive.namelist())) and f"{_ARRAY}.npy" not in names


@functools.cache
def sources_fingerprint(*names: str) -> str:
    """16 hexadecimal digits of the package's own code, so that what other code made is not taken for what this would.

    Args:
        names: of files in ``madformer``; all that there are, without any.
    """
    folders = [Path(folder) for package in _PACKAGES for folder in package.__path__]
    paths = [folders[0] / name for name in names] or sorted(path for folder in folders for path in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


_PACKAGES = (madformer, madformer.kernels, madformer.engine)


def _how_drawn(folder: Path) -> dict[str, Any]:
    """What the folder's manifest says of its images."""
    try:
        manifest = read_manifest(folder / MANIFEST)
    except (OSError, ValueError):
        return {}
    if not manifest["complete"]:
        raise ValueError(f"{printable(folder)} is not complete: the command that fills it goes on with it")
    settings = manifest["settings"]
    return {key: value for key, value in settings.items() if key not in ("format", "shard_size", "latents")}


def _check_count(name: str, count: int | None, there: int) -> None:
    if count is not None and not 1 <= count <= there:
        raise ValueError(f"{printable(name)} has {there} images, and {count} are asked for")
