"""Sources of undecoded samples on the disk: WebDataset shards and folders of images."""

from __future__ import annotations

import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from madformer.data import fields
from madformer.files.shards import ShardDataset, is_hidden
from madformer.files.text import MAX_BYTES, PackedStrings, decode_json, decode_text, printable, read_text

__all__ = ["FolderSource", "RawSample", "ShardSource", "Source"]

logger = logging.getLogger(__name__)
MAX_FILE_BYTES = 1 << 30
"""Of a picture's file that is read."""
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}


@dataclass(frozen=True)
class RawSample:
    """An undecoded sample. ``label`` is -1 and ``caption`` empty where the source has none."""

    key: str
    data: bytes
    caption: str = ""
    label: int = fields.NO_LABEL


class Source(Protocol):
    """What :class:`~madformer.data.images.ImageDataset` needs of a source: picklable, cheap to index."""

    class_names: list[str]

    @property
    def root(self) -> Path | None:
        """The folder of a user's own files that its pictures lie in, if they do: nothing may be written there."""

    @property
    def shard_lengths(self) -> list[int] | None:
        """Samples that lie together, shard by shard in order; None where any is as near as any other."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """What :meth:`read` gives for a key, without reading."""

    def name(self, index: int) -> str:
        """What messages call the sample; must not fail on a damaged one."""

    def read(self, index: int) -> RawSample:
        """Raises ``ValueError`` or ``OSError`` if the sample is damaged."""

    def summary(self, limit: int) -> fields.DataSummary:
        """Looks into no more than ``limit`` files."""


class ShardSource:
    """Samples of WebDataset tar shards; class names from a ``dataset.json`` beside the first, if any."""

    def __init__(self, paths: list[Path]) -> None:
        self.shards, self.root = ShardDataset(paths), None
        self.shard_lengths = self.shards.shard_lengths
        if not len(self.shards):
            raise FileNotFoundError(f"no samples in {printable(paths[0])} ({len(paths)} shards)")
        self.class_names = _described_names(paths[0].parent / "dataset.json")
        self._check_label()

    def __len__(self) -> int:
        return len(self.shards)

    def key(self, index: int) -> str:
        return self.shards.key(index)

    def name(self, index: int) -> str:
        return f"{printable(self.shards.path(index))}:{self.shards.key(index)}"

    def read(self, index: int) -> RawSample:
        members = self.shards.members(index)
        found = _by_kind(members, fields.IMAGE_EXTENSIONS)
        if not found:
            raise ValueError(f"no image among its members ({_listed(members)})")
        if len(found) > 1:
            raise ValueError(f"{len(found)} images with this key, the part before the first dot ({_listed(found)})")
        data = self.shards.member(index, found[0], MAX_FILE_BYTES)
        assert data is not None
        label, caption = self.annotations(index)
        return RawSample(self.shards.key(index), data, caption, label)

    def annotations(self, index: int) -> tuple[int, str]:
        """Label and caption."""
        label, caption = self._fields(index)
        return fields.label_of(label, self.class_names), fields.caption_of(caption)

    def summary(self, limit: int) -> fields.DataSummary:
        return fields.summarize(len(self), self.annotations, self.class_names, limit)

    def _fields(self, index: int) -> tuple[Any, Any]:
        """Label and caption as they stand there."""
        members = self.shards.members(index)
        texts: dict[str, str] = {}
        record: Any = {}
        for kind in ("txt", "cls", "json"):
            for name in _by_kind(members, (kind,))[:1]:
                data = self.shards.member(index, name, MAX_BYTES)
                assert data is not None
                if kind == "json":
                    record = decode_json(data, name)
                else:
                    texts[kind] = decode_text(data, name)
        if not isinstance(record, dict):
            record = {}
        label, caption = (fields.first(record, names) for names in (fields.LABEL_FIELDS, fields.CAPTION_FIELDS))
        return texts.get("cls", label), texts.get("txt", caption)

    def _check_label(self) -> None:
        """Say at once, not in the middle of training, that the labels are of a kind that cannot be used."""
        try:
            label, _ = self._fields(0)
        except (ValueError, OSError):
            return
        if isinstance(label, (list, dict)):
            kind = "several classes" if isinstance(label, list) else "an object"
            raise ValueError(f"{self.name(0)}: its label is {kind}, where one class for each image is read")


def _by_kind(members: list[str], kinds: tuple[str, ...]) -> list[str]:
    """The members with one of these extensions: the first of exactly that name, or else all that end in one.

    WebDataset ends a key at the first dot, so ``7.input.png`` is the ``input.png`` of ``7``.
    """
    lower = {name.lower(): name for name in reversed(members)}
    exact = next((lower[kind] for kind in kinds if kind in lower), None)
    return [exact] if exact is not None else [name for name in members if name.lower().rpartition(".")[2] in kinds]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _described_names(path: Path) -> list[str]:
    if not path.is_file():
        return []
    description = decode_json(path.read_bytes(), str(path))
    names = description.get("class_names", []) if isinstance(description, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{printable(path)}: class_names must be a list of names")
    return names


def read_picture(file: Path) -> bytes:
    """The bytes of a file; raises ``OSError``, or ``ValueError`` for one that is too large."""
    with file.open("rb") as opened:
        return check_size(opened.read(MAX_FILE_BYTES + 1))


def check_size(data: bytes) -> bytes:
    """The same, if it is not too large; raises ``ValueError``."""
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"a file of more than {MAX_FILE_BYTES >> 30} GiB")
    return data


class FolderSource:
    """Image files; first-level subfolders that hold images are classes, sorted by name. Hidden ones are left out."""

    shard_lengths = None

    def __init__(self, root: Path) -> None:
        self.root = root
        self.class_names: list[str] = []
        self._files = PackedStrings()
        labels, captioned = array("i"), bytearray()
        left_out: Counter[str] = Counter()
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name))
        for name in ("", *folders):
            label = len(self.class_names) if name else fields.NO_LABEL
            before = len(labels)
            for path, has_text in _image_files(root, name, left_out):
                self._files.append(path)
                labels.append(label)
                captioned.append(has_text)
            if name and len(labels) > before:
                self.class_names.append(printable(name))
        others = ", ".join(f"{count} .{kind}" for kind, count in left_out.most_common())
        if not labels:
            kinds = f"only {others}, which are not read" if others else ", ".join(fields.IMAGE_EXTENSIONS)
            raise FileNotFoundError(f"{printable(root)} holds no .tar shards and no images ({kinds})")
        if others:
            logger.warning("%s: %s are left out; convert them to have them read", printable(root), others)
        self._labels, self._captioned = np.array(labels, np.int32), np.array(captioned, np.bool_)
        if len(self.class_names) > 1 and {name.lower() for name in self.class_names} <= _SPLITS:
            raise ValueError(
                f"{printable(root)} holds the folders {', '.join(self.class_names)}, which would be taken for classes: "
                f"name one of them"
            )

    def __len__(self) -> int:
        return len(self._labels)

    def key(self, index: int) -> str:
        return printable(self._files[index])

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def path(self, index: int) -> Path:
        """Of a picture's file."""
        return self.root / self._files[index]

    def read(self, index: int) -> RawSample:
        path, label = self._files[index], int(self._labels[index])
        file = self.root / path
        if self._captioned[index]:
            caption = fields.caption_of(read_text(file.with_suffix(".txt")))
        else:
            caption = self.class_names[label] if label != fields.NO_LABEL else ""
        return RawSample(printable(path), read_picture(file), caption, label)

    def summary(self, limit: int) -> fields.DataSummary:
        """Complete, whatever the limit: the names say it all."""
        return fields.DataSummary(
            num_samples=len(self),
            num_examined=len(self),
            num_labelled=int((self._labels != fields.NO_LABEL).sum()),
            num_captioned=int(self._captioned.sum()),
            num_classes=len(self.class_names),
            class_names=tuple(self.class_names),
            names_as_captions=bool(self.class_names),
        )


def _image_files(root: Path, folder: str, left_out: Counter[str]) -> Iterator[tuple[str, bool]]:
    """Paths of images under ``root / folder``, in the order of their parts, and whether a ``.txt`` lies beside each.

    Of ``root`` itself, those that lie in it. Pictures of kinds that are not read are counted in ``left_out``.
    """
    pending: list[tuple[str, bool | None]] = [(folder, None)]
    while pending:
        path, has_text = pending.pop()
        if has_text is None:
            pending += reversed(list(_entries(root, path, folder != "", left_out)))
        else:
            yield path, has_text


def _entries(root: Path, folder: str, descend: bool, left_out: Counter[str]) -> Iterator[tuple[str, bool | None]]:
    """Image files with whether they have a text, and folders with None."""
    with os.scandir(root / folder) as scan:
        entries = sorted((entry for entry in scan if not is_hidden(entry.name)), key=lambda entry: entry.name)
    names = {entry.name for entry in entries if entry.name.endswith(".txt")}
    for entry in entries:
        path = f"{folder}/{entry.name}" if folder else entry.name
        stem, dot, extension = entry.name.rpartition(".")
        if dot and stem and extension.lower() in fields.IMAGE_EXTENSIONS and entry.is_file():
            yield path, f"{stem}.txt" in names
        elif dot and stem and extension.lower() in fields.UNREAD_EXTENSIONS:
            left_out[extension.lower()] += 1
        elif descend and entry.is_dir(follow_symlinks=False):
            yield path, None
