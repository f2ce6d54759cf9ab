"""Features of a set of images: made once, kept by content, and read from the disk.

The images go by in parts. What the network makes of a part is a file named by the part's content, in a folder of the
network's: a set that was looked at before, or a run that was stopped, or two sets with images in common, take no second
look. The whole is a file, mapped into memory.

Shape legend: N images, D features.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import safetensors
import torch
from PIL import Image
from safetensors.numpy import save
from torch import Tensor
from tqdm import tqdm

from madformer.evaluation.extractors import Extractor
from madformer.evaluation.images import DrawnImages, ImageSet, Part, sources_fingerprint
from madformer.evaluation.moments import Array
from madformer.files.atomic import atomic_path, remove_leftovers, write_json
from madformer.machine import cache_folder
from madformer.objects import read_object

__all__ = ["FeatureSet", "default_cache", "extract"]

DECODERS = 4
"""Threads that resize, most of whose time Pillow lets others run."""
AHEAD = 16
"""Images that are waiting for a look while others are read or drawn: a batch."""

FEATURES, DESCRIPTION = "features.npy", "features.json"

_CODE = ("data/pixels.py", "data/metadata.py", "evaluation/extractors.py")  # that a feature depends on


@dataclass(frozen=True)
class FeatureSet:
    """What an extractor makes of a set of images.

    Attributes:
        features_ND: float32, mapped from a file without a name.
        name: of the set. hash: 16 hexadecimal digits of its content, in its order. image_size: height and width.
        drawn: how a model drew the images; empty where nobody knows.
        num_computed: how many had to be looked at. seconds: that it took, drawing included.
        extractor_hash: of what made them.
        captions, labels: what the images are of, see :class:`~madformer.evaluation.images.Part`.
    """

    features_ND: Array
    name: str
    hash: str
    image_size: tuple[int, int]
    drawn: dict[str, Any]
    num_computed: int
    seconds: float
    extractor_hash: str
    captions: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.features_ND)

    def write(self, folder: str | Path) -> None:
        """Into a folder, for :meth:`read`. Raises ``OSError`` where it cannot be written."""
        told = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "features_ND"}
        with atomic_path(Path(folder) / FEATURES) as temporary, temporary.open("wb") as file:
            np.save(file, self.features_ND)
        write_json(Path(folder) / DESCRIPTION, told)

    @classmethod
    def read(cls, folder: str | Path) -> FeatureSet:
        """What :meth:`write` wrote, mapped from its file. Raises ``OSError`` or ``ValueError`` where it is damaged."""
        told = read_object(Path(folder) / DESCRIPTION)
        told |= {name: tuple(told[name]) for name in ("image_size", "captions", "labels")}
        return cls(np.load(Path(folder) / FEATURES, mmap_mode="r"), **told)

    @property
    def images_per_second(self) -> float | None:
        """Those that were looked at; None where none had to be."""
        return self.num_computed / self.seconds if self.num_computed and self.seconds else None


def default_cache() -> Path:
    """Where features are kept unless told otherwise: ``madformer/features`` in the user's cache."""
    return cache_folder("features")


def extract(
    images: ImageSet,
    extractor: Extractor,
    *,
    cache: str | Path | None = None,
    progress: bool = False,
    alone: bool | None = None,
) -> FeatureSet:
    """Features of all images of a set.

    On a CPU as many threads as PyTorch computes with look at a picture each, while the next ones are read.
    What comes out does not depend on it.

    Args:
        cache: the folder where features are kept; several processes may share it. None: they are made anew.
        progress: show a bar.
        alone: read and draw nothing while pictures are looked at, so that the time which that takes is its own. None:
            where a model on a CPU draws, whose threads would wait for each other beside those that look.

    Raises:
        ValueError: images of several sizes, or one that cannot be read; one line that names it.
        FloatingPointError: features that are not finite. OSError: the cache cannot be written.
    """
    if alone is None:
        alone = isinstance(images, DrawnImages) and images.pipeline.transformer.device.type == "cpu"
    with _folder(cache, extractor) as folder:
        remove_leftovers(folder, "*.safetensors")
        features_ND = _mapped(folder, (len(images), extractor.width))
        digest, size, first, computed, started = hashlib.sha256(), None, 0, 0, time.perf_counter()
        captions, labels = list[str](), list[int]()
        with (
            _Lookers(extractor, alone=alone) as lookers,
            tqdm(total=len(images), desc=f"features of {images.name}", unit="image", disable=not progress) as bar,
        ):
            for part in images.parts():
                path = folder / f"{part.key}.safetensors"
                found = _read(path, part.count, extractor.width)
                if found is None:
                    found = _compute(part, lookers, images.name, bar)
                    computed += part.count
                    with atomic_path(path) as temporary:
                        temporary.write_bytes(save({"features": found[0], "size": np.array(found[1])}))
                if size is not None and size != found[1]:
                    raise ValueError(_mixed(images.name, size, found[1]))
                size = found[1]
                features_ND[first : first + part.count] = found[0]
                first += part.count
                captions.extend(part.captions)
                labels.extend(part.labels)
                digest.update(part.key.encode())
                bar.update(first - bar.n)
        if size is None:
            raise ValueError(f"{images.name} holds no images")
    seconds = time.perf_counter() - started
    digits = digest.hexdigest()[:16]
    return FeatureSet(
        features_ND, images.name, digits, size, dict(images.drawn), computed, seconds, extractor.hash,
        tuple(captions), tuple(labels),
    )  # fmt: skip


def _compute(part: Part, lookers: _Lookers, name: str, bar: Any) -> tuple[Array, tuple[int, int]]:
    """Features, and height and width of the images."""
    size: tuple[int, int] | None = None

    def alike(images: Iterator[Image.Image]) -> Iterator[Image.Image]:
        nonlocal size
        for image in images:
            if size is not None and size != (image.height, image.width):
                raise ValueError(_mixed(name, size, (image.height, image.width)))
            size = (image.height, image.width)
            yield image

    features_BD = np.concatenate(list(lookers.look(alike(part.images()), bar)))
    assert size is not None
    return features_BD, size


class _Lookers:
    """Threads that make features of pictures: on a CPU as many as PyTorch has, each with one of its own.

    Pictures that wait are few, and an error of one is raised as soon as others are to be taken in.
    """

    def __init__(self, extractor: Extractor, *, alone: bool) -> None:
        self.extractor, self.alone = extractor, alone
        self.on_cpu, self.threads = extractor.device.type == "cpu", torch.get_num_threads()
        # what waits for a GPU is one group, while it looks at another
        self.ahead = AHEAD if self.on_cpu else 2 * extractor.group

    def __enter__(self) -> _Lookers:
        one = functools.partial(torch.set_num_threads, 1)
        self.decoders = ThreadPoolExecutor(DECODERS, "prepare", initializer=one)
        self.pool = ThreadPoolExecutor(self.threads if self.on_cpu else 1, "look", initializer=one)
        return self

    def __exit__(self, *error: object) -> None:
        for pool in (self.decoders, self.pool):
            pool.shutdown(cancel_futures=True)
        # each of the threads set its own number, and that of threads which are begun later
        torch.set_num_threads(self.threads)

    def look(self, images: Iterator[Image.Image], bar: Any) -> Iterator[Array]:
        """Features ``(B, D)`` of groups, in order, which are as many images as the extractor sees at once."""
        waiting: deque[Future[Array]] = deque()
        # a group of the extractor's may be a single picture, and drawing alone is asked for in batches
        size = AHEAD // 2 if self.alone and self.on_cpu else self.extractor.group
        while some := list(itertools.islice(images, size)):
            prepared = [self.decoders.submit(self.extractor.prepare, image) for image in some]
            del some
            for first in range(0, len(prepared), self.extractor.group):
                waiting.append(self.pool.submit(self._features, prepared[first : first + self.extractor.group]))
            while waiting and (self.alone or len(waiting) * self.extractor.group >= self.ahead):
                yield self._counted(waiting.popleft(), bar)
        while waiting:
            yield self._counted(waiting.popleft(), bar)

    def _features(self, prepared: list[Future[Tensor]]) -> Array:
        return self.extractor.features(torch.stack([one.result() for one in prepared]))

    def _counted(self, found: Future[Array], bar: Any) -> Array:
        features_BD = found.result()
        bar.update(len(features_BD))
        return features_BD


def _mixed(name: str, first: tuple[int, int], second: tuple[int, int]) -> str:
    sizes = " and ".join(f"{height} x {width}" for height, width in (first, second))
    return f"{name} holds images of {sizes} pixels: a figure is of images of one size, so resize them first"


@contextmanager
def _folder(cache: str | Path | None, extractor: Extractor) -> Iterator[Path]:
    """Where the parts of an extractor are; one that ends with the context where nothing is to be kept."""
    if cache is None:
        with tempfile.TemporaryDirectory(prefix="madformer-features-") as name:
            yield Path(name)
        return
    # whatever else changes a feature by more than nothing
    how = [extractor.hash, str(extractor.device.type), PIL.__version__, torch.__version__, sources_fingerprint(*_CODE)]
    folder = Path(cache) / f"{extractor.name}-{hashlib.sha256(repr(how).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def _mapped(folder: Path, shape: tuple[int, int]) -> Array:
    with tempfile.TemporaryFile(dir=folder) as file:
        # the mapping keeps the file, which has no name any more
        return np.memmap(file, np.float32, "w+", shape=shape)


def _read(path: Path, count: int, width: int) -> tuple[Array, tuple[int, int]] | None:
    """A part that is there and whole; None otherwise."""
    with (
        suppress(OSError, ValueError, KeyError, safetensors.SafetensorError),
        safetensors.safe_open(path, "np") as file,
    ):
        features, size = file.get_tensor("features"), file.get_tensor("size")
        if features.shape == (count, width) and size.shape == (2,):
            return features, (int(size[0]), int(size[1]))
    return None
