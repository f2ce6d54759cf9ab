"""Any source of labelled or captioned images as one map-style data set: shards, folders, Hugging Face.

A source only says how many samples it has and hands out undecoded ones; decoding, cropping and the treatment
of damaged images are the same for all of them, so the same picture gives the same pixels from everywhere.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from madformer.data.pixels import UnreadableImageError, decode, to_rgb
from madformer.data.shards import KEY, ShardDataset, list_shards

__all__ = ["ImageDataset", "UnreadableImageError", "decode_image", "open_dataset", "to_rgb"]

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "avif")
CAPTION_FIELDS = ("caption", "text", "prompt")
LABEL_FIELDS = ("label", "labels", "class", "cls")
NO_LABEL = -1
ImageSize = int | tuple[int, int]
"""Pixels along the sides of a square, or height and width."""
# Before this many samples were read one damaged file says nothing about the whole.
MIN_SEEN = 100
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RawSample:
    """An undecoded sample. ``label`` is -1 and ``caption`` empty where the source has none."""

    key: str
    data: bytes
    caption: str = ""
    label: int = NO_LABEL


class Source(Protocol):
    """What :class:`ImageDataset` needs of a source: picklable, cheap to index."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What messages call the sample; must not fail on a damaged one."""

    def read(self, index: int) -> RawSample:
        """Raises ``ValueError`` or ``OSError`` if the sample is damaged."""


def open_dataset(
    source: str | Path,
    image_size: ImageSize,
    *,
    on_error: Literal["raise", "skip"] = "raise",
    max_bad_fraction: float = 0.05,
) -> ImageDataset:
    """Open a data set of images by name.

    Args:
        source: one of

            - a folder or glob of ``.tar`` shards, or one shard; captions come from ``.txt`` or the
              ``caption`` of ``.json``, labels from ``.cls`` or the ``label`` of ``.json``;
            - a folder of images; when there are subfolders with images, they are the classes, sorted by name.
              A caption is the ``.txt`` beside the image, or else the name of the class;
            - ``hf:NAME[:SPLIT]``, a Hugging Face data set on the hub or a local one (``save_to_disk``
              included); the split is ``train`` unless given.
        image_size: what images are resized and cropped (centre) to, in pixels: the side of a square, or height and
            width.
        on_error: ``raise`` for an unreadable image, or ``skip``: see :class:`ImageDataset`.
        max_bad_fraction: with ``skip``, the fraction of unreadable samples that is tolerated.

    Raises:
        FileNotFoundError: the source is missing or empty; one line.
        ImportError: ``hf:`` without the package ``datasets``.
        ValueError: an argument out of range, a damaged shard, or a Hugging Face data set without images.
    """
    opened = _open_source(str(source))
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
        self.image_size = image_size
        self.on_error = on_error
        self.max_bad_fraction = max_bad_fraction
        # In shared memory, so that neither the next worker nor the next epoch forgets what was bad.
        self._seen = torch.zeros(len(source), dtype=torch.bool).share_memory_()
        self._bad = torch.zeros(len(source), dtype=torch.bool).share_memory_()

    @property
    def class_names(self) -> list[str]:
        return self.source.class_names

    @property
    def num_bad(self) -> int:
        """How many distinct samples turned out to be unreadable so far, in all workers."""
        return int(self._bad.sum())

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"index {index} is out of range for {length} samples")
        index %= length
        if self.on_error == "raise":
            return self._load(index)
        for candidate in (*range(index, length), *range(index)):
            sample = self.try_read(candidate)
            if sample is not None:
                return sample
        raise ValueError(f"none of the {length} samples is readable")

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
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise UnreadableImageError(f"{self.source.name(index)}: {reason}") from error
        return {"image": image, "caption": raw.caption, "label": raw.label, "key": raw.key}

    def _count_bad(self, index: int, error: UnreadableImageError) -> None:
        self._bad[index] = self._seen[index] = True
        logger.warning("skipping an unreadable image: %s", error)
        bad, seen = self.num_bad, int(self._seen.sum())
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


def _open_source(source: str) -> Source:
    if source.startswith("hf:"):
        return HuggingFaceSource(source.removeprefix("hf:"))
    path = Path(source)
    if path.is_dir() and not any(path.glob("*.tar")):
        return FolderSource(path)
    try:
        shards = list_shards(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no data set at {source}: not a folder, a .tar shard, a glob of shards or hf:NAME[:SPLIT]"
        ) from error
    return ShardSource(shards)


class ShardSource:
    """Samples of WebDataset tar shards; class names from a ``dataset.json`` beside the first, if any."""

    def __init__(self, paths: list[Path]) -> None:
        self.shards = ShardDataset(paths)
        if not len(self.shards):
            raise FileNotFoundError(f"no samples in {paths[0]} ({len(paths)} shards)")
        description = paths[0].parent / "dataset.json"
        self.class_names: list[str] = []
        if description.is_file():
            self.class_names = json.loads(description.read_text(encoding="utf-8")).get("class_names", [])

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, index: int) -> str:
        return f"{self.shards.path(index)}:{self.shards.key(index)}"

    def read(self, index: int) -> RawSample:
        members = {name.lower(): value for name, value in self.shards[index].items()}
        data = _first(members, IMAGE_EXTENSIONS)
        if data is None:
            raise ValueError(f"no image among its members ({', '.join(self.shards.extensions)})")
        record = json.loads(members.get("json", b"{}"))
        if not isinstance(record, dict):
            record = {}
        caption = members["txt"].decode() if "txt" in members else _first(record, CAPTION_FIELDS)
        label = members["cls"] if "cls" in members else _first(record, LABEL_FIELDS)
        return RawSample(members[KEY], data, _as_caption(caption), _as_label(label))


class FolderSource:
    """Image files; first-level subfolders that hold images are classes, sorted by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        found = {folder.name: images for folder in folders if (images := _image_files(folder, "**/*"))}
        self.class_names = list(found)
        self.files = [(file, NO_LABEL) for file in _image_files(root, "*")]
        for label, files in enumerate(found.values()):
            self.files += [(file, label) for file in files]
        if not self.files:
            kinds = ", ".join(IMAGE_EXTENSIONS)
            raise FileNotFoundError(f"{root} holds no .tar shards and no images ({kinds})")

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index][0])

    def read(self, index: int) -> RawSample:
        file, label = self.files[index]
        beside = file.with_suffix(".txt")
        if beside.is_file():
            caption = beside.read_text(encoding="utf-8").strip()
        else:
            caption = self.class_names[label] if label != NO_LABEL else ""
        return RawSample(file.relative_to(self.root).as_posix(), file.read_bytes(), caption, label)


def _image_files(folder: Path, pattern: str) -> list[Path]:
    suffixes = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    return sorted(p for p in folder.glob(pattern) if p.suffix.lower() in suffixes and p.is_file())


class HuggingFaceSource:
    """Rows of a ``datasets.Dataset``: its first image column, class label and caption-like text column."""

    def __init__(self, name: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError("hf: sources need the package datasets: pip install 'madformer[hf]'") from error
        self.title = f"hf:{name}"
        rows = _load_rows(name)
        kinds = rows.features
        images = [column for column, kind in kinds.items() if isinstance(kind, datasets.Image)]
        if not images:
            raise ValueError(f"{self.title} has no image column, only {', '.join(kinds)}")
        labels = [column for column, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
        self.class_names = list(kinds[labels[0]].names) if labels else []
        self.image_column = images[0]
        self.label_column = labels[0] if labels else next((c for c in LABEL_FIELDS if c in kinds), None)
        self.caption_column = next((c for c in CAPTION_FIELDS if c in kinds), None)
        # Undecoded: damage is then met in one place, and every source resizes alike.
        self.rows = rows.cast_column(self.image_column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def read(self, index: int) -> RawSample:
        row = self.rows[index]
        image = row[self.image_column]
        if image is None:
            raise ValueError("the row has no image")
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        caption = row[self.caption_column] if self.caption_column else None
        label = row[self.label_column] if self.label_column else None
        return RawSample(f"{index:08d}", data, _as_caption(caption), _as_label(label))


def _load_rows(name: str) -> Any:
    """The ``datasets.Dataset`` of ``NAME[:SPLIT]``."""
    import datasets

    path, colon, split = name.partition(":")
    try:
        if (Path(path) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(path)[split or "train"]
        elif (Path(path) / "dataset_info.json").is_file():
            if colon:
                raise ValueError(f"hf:{path} is saved as one split; leave out ':{split}'")
            rows = datasets.load_from_disk(path)
        else:
            rows = datasets.load_dataset(path, split=split or "train")
    except (OSError, KeyError) as error:
        # An unknown name, split or absent network; the messages have several lines.
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise FileNotFoundError(f"no data set at hf:{name}: {reason}") from error
    if not len(rows):
        raise FileNotFoundError(f"hf:{name} is empty")
    return rows


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _as_caption(value: Any) -> str:
    """Some data sets have several captions for an image; the first is taken."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return "" if value is None else str(value).strip()


def _as_label(value: Any) -> int:
    return NO_LABEL if value is None else int(value)
