"""A folder that a long run fills: what is there, what is missing, and files that appear whole or not at all.

A *batch* is the unit of work: it is done when all its images are there, else it is drawn again as a whole, so that
every image is drawn beside the same neighbours however often the run was stopped. Batches are dealt to processes by
their number; the files say which are done, so any number of processes can go on from any other number.

With shards, images wait as files in ``unpacked/`` until their shard's are all there. Whoever completes it packs it.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from madformer.arguments import whole_number
from madformer.bulk.settings import Settings
from madformer.files.atomic import atomic_path, locked, remove_leftover, write_json
from madformer.files.number_set import NumberSet
from madformer.files.resumable import LOCK, dealt, first_difference, goes_on, span, taken
from madformer.files.shards import KEY, write_shard
from madformer.seeds import check_seed

logger = logging.getLogger("madformer.bulk")

MANIFEST = "manifest.json"
UNPACKED = "unpacked"
VERSION = 1
# what the shards' JSON held before pictures had records
_FIRST_RECORD = ("seed", "steps", "scheduler", "precision", "model", "prompt", "labels")
_IMAGE = re.compile(r"(\d{8,})\.(?:png|safetensors)")
_SHARD = re.compile(r"(?:images|latents)-(\d{6,})\.tar")
_ENDS = {".png": b"\0\0\0\0IEND\xaeB`\x82", ".tar": bytes(2 * tarfile.BLOCKSIZE)}
# how `atomic_path` names what it has not finished
_TEMPORARY = re.compile(rf"\.({_IMAGE.pattern}|{_SHARD.pattern}|{re.escape(MANIFEST)})\.[^.]+")


class OutputFolder:
    """The images ``0 .. num_images - 1`` of a run, in files named by their seeds.

    Making one touches no file: :meth:`opened` does.

    Args:
        path: the folder. num_images: how many the run is to have, counted from its start.
    """

    def __init__(self, path: str | Path, settings: Settings, num_images: int) -> None:
        whole_number("num_images", num_images, 1)
        check_seed(settings.seed, num_images)
        self.path, self.settings, self.num_images = Path(path), settings, num_images
        self.sharded = settings.format == "wds"
        self.images = self.path / UNPACKED if self.sharded else self.path
        self.extension = "safetensors" if settings.latents else "png"
        self._found = NumberSet()

    @contextmanager
    def opened(self, rank: int = 0, world_size: int = 1, *, overwrite: bool = False) -> Iterator[OutputFolder]:
        """Take the folder for this process: check or write the manifest, and clear away what a killed run left.

        Args:
            rank, world_size: which of how many processes this is.
            overwrite: remove what an earlier run made, whatever its settings.

        Raises:
            ValueError: the folder is of another run, of a longer one, or of something else; one line. Nothing in it
                is changed.
            OSError: it cannot be written, or a process of this rank is at work in it.
        """
        with taken(self.path, rank, lambda: self._settle(overwrite)):
            yield self

    def _settle(self, overwrite: bool) -> None:
        if overwrite:
            self._clear()
        complete = self._settle_manifest()
        self._tidy()
        self._found = self.present()
        if complete and not self.had_all:
            self._write_manifest(complete=False)

    def span(self, batch: int) -> range:
        """The images of a batch."""
        return span(batch, self.settings.batch_size, self.num_images)

    def batches(self, rank: int = 0, world_size: int = 1) -> range:
        """The batches that a process is dealt."""
        return dealt(-(-self.num_images // self.settings.batch_size), rank, world_size)

    def count(self, batches: range) -> int:
        """The images of all these batches."""
        size = self.settings.batch_size
        number = max(0, -(-(batches.stop - batches.start) // batches.step))  # `len` ends at 2^63 - 1
        last = -(-self.num_images // size) - 1
        return number * size - (size - len(self.span(last)) if last in batches else 0)

    def count_done(self, batches: range) -> int:
        """The images of those batches that were complete when the folder was opened."""
        seen = itertools.takewhile(lambda batch: self.span(batch).start < self._found.end, batches)
        return sum(len(self.span(batch)) for batch in seen if self._found.issuperset(self.span(batch)))

    def missing(self, batches: range) -> Iterator[int]:
        """Those of ``batches`` that had to be drawn when the folder was opened, found as they are asked for."""
        return (batch for batch in batches if not self._found.issuperset(self.span(batch)))

    @property
    def had_all(self) -> bool:
        """Whether nothing was missing when the folder was opened."""
        return len(self._found) == self.num_images

    def present(self) -> NumberSet:
        """The images that are there now."""
        # files first: another process may pack them in between
        found = self._unpacked()
        for shard in self._shards():
            found.update(self._shard_span(shard))
        return found

    def file(self, image: int) -> Path:
        """Where an image is or will be, until it is packed."""
        return self.images / f"{self.settings.seed + image:08d}.{self.extension}"

    def record(self, image: int) -> dict[str, Any] | None:
        """What the image's file says of itself; None where the folder was begun before they did."""
        return self.settings.record(range(image, image + 1)) if self.settings.recorded else None

    def write(self, image: int, data: bytes) -> None:
        # a batch that is drawn again may have images in a shard that was complete
        if not (self.sharded and self._shard(image // self._shard_size).exists()):
            with atomic_path(self.file(image)) as path:
                path.write_bytes(data)

    def pack(self) -> None:
        """Pack the shards whose images are all there, if there are any."""
        if self._complete_shards():
            with locked(self.path / LOCK):
                # again: another process may have seen the same and been faster
                self._pack(self._complete_shards())

    def finish(self) -> bool:
        """Note in the manifest that all images are there, if they are; whether this call was the one to do it."""
        with locked(self.path / LOCK):
            if read_manifest(self.path / MANIFEST)["complete"]:
                return False
            if len(self.present()) < self.num_images:
                return False
            self._write_manifest(complete=True)
            if self.sharded:
                with suppress(OSError):  # somebody else's files keep it
                    self.images.rmdir()
            return True

    @property
    def _shard_size(self) -> int:
        assert self.settings.shard_size is not None
        return self.settings.shard_size

    def _complete_shards(self) -> set[int]:
        """Those whose images are all there as files."""
        if not self.sharded:
            return set()
        unpacked = self._unpacked()
        shards = {image // self._shard_size for image in unpacked}
        return {shard for shard in shards if unpacked.issuperset(self._shard_span(shard))}

    def _pack(self, shards: Iterable[int]) -> None:
        """Called under the lock."""
        for shard in sorted(shards):
            span = self._shard_span(shard)
            write_shard((self._sample(image) for image in span), self._shard(shard))
            self._unlink(span)

    def _sample(self, image: int) -> dict[str, Any]:
        file, origin = self.file(image), self.record(image)
        if origin is None:
            record = self.settings.record(range(image, image + 1))
            origin = {name: record[name] for name in _FIRST_RECORD if name in record}
        return {KEY: file.stem, self.extension: file.read_bytes(), "json": origin}

    def _shard(self, shard: int) -> Path:
        return self.path / f"{'latents' if self.settings.latents else 'images'}-{shard:06d}.tar"

    def _shards(self) -> list[int]:
        return [int(match[1]) for match in _matches(_SHARD, self.path)] if self.sharded else []

    def _shard_span(self, shard: int) -> range:
        return span(shard, self._shard_size, self.num_images)

    def _unpacked(self) -> NumberSet:
        """The images that are files of their own."""
        found, seed, end = NumberSet(), self.settings.seed, f".{self.extension}"
        for name in _names(self.images):
            stem, dot, extension = name.partition(".")
            # of the two, `isdecimal` takes other scripts' digits, and `file` writes no leading zeros beyond the eighth
            if (
                dot + extension == end
                and stem.isascii()
                and stem.isdecimal()
                and len(stem) == max(8, len(stem.lstrip("0")))
            ):
                image = int(stem) - seed
                if 0 <= image < self.num_images:
                    found.add(image)
        return found

    def _unlink(self, images: Iterable[int]) -> None:
        for image in images:
            self.file(image).unlink(missing_ok=True)

    def _settle_manifest(self) -> bool:
        """Write the manifest of a new run, check that of an old one, and make room for more images.

        Returns:
            Whether it says that all images are there.
        """
        found, manifest = self._first_file(), {}
        if (self.path / MANIFEST).exists():
            manifest = read_manifest(self.path / MANIFEST)
            if found and "recorded" not in manifest["settings"]:
                self._go_on_as_before()

        def difference() -> str | None:
            return first_difference(manifest["settings"], self.settings.to_dict())

        if not goes_on(self.path, MANIFEST, found, difference, "take another folder, or overwrite"):
            self._write_manifest(complete=False)
            return False
        before = manifest["num_images"]
        if self.num_images < before:
            raise ValueError(f"num_images={self.num_images} is less than the {before} that {self.path} is made for")
        self._drop_damaged()
        if self.num_images > before:
            if self.sharded:
                self._unpack_last(before)
            self._write_manifest(complete=False)
            return False
        return bool(manifest["complete"])

    def _drop_damaged(self) -> None:
        """Remove what was damaged since it appeared, to be drawn again."""
        for file in itertools.chain(map(self.file, self._unpacked()), map(self._shard, self._shards())):
            if not _is_whole(file):
                logger.warning("%s is damaged, and drawn again", file)
                file.unlink(missing_ok=True)

    def _go_on_as_before(self) -> None:
        """In a folder of madformer 0.1.0 from before pictures had records: the rest is to be as it would have been."""
        self.settings = replace(self.settings, recorded={})
        if self.settings.seed + self.num_images > 1 << 32:
            raise ValueError(f"{self.path} was begun when seeds from 2^32 on drew others' images: take another folder")
        if self.settings.sampling.guidance < 1:
            raise ValueError(f"{self.path} was begun when guidance below 1 was some: take another folder")

    def _first_file(self) -> str | None:
        """The name of an image or shard, of whatever settings."""
        places = ((_IMAGE, self.path), (_IMAGE, self.path / UNPACKED), (_SHARD, self.path))
        return next((match[0] for pattern, folder in places for match in _matches(pattern, folder)), None)

    def _unpack_last(self, num_images: int) -> None:
        """Open the last shard of a run of ``num_images`` again, where more belong into it.

        It goes before the manifest is written: a shard that exists is always complete.
        """
        shard = self._shard(num_images // self._shard_size)
        if num_images % self._shard_size == 0 or not shard.exists():
            return
        with tarfile.open(shard) as tar:
            for member in tar:
                if _IMAGE.fullmatch(member.name):
                    file = tar.extractfile(member)
                    assert file is not None
                    with atomic_path(self.images / member.name) as path, path.open("wb") as target:
                        shutil.copyfileobj(file, target)
        shard.unlink()

    def _tidy(self) -> None:
        """Remove files that a killed process had begun, and images that are in their shard; pack what is complete.

        Called under the lock, where nobody packs. What other processes are writing is left to them.
        """
        for folder in {self.path, self.images}:
            for match in _matches(_TEMPORARY, folder):
                remove_leftover(folder / match[0])
        if self.sharded:
            shards = set(self._shards())
            self._unlink(image for image in self._unpacked() if image // self._shard_size in shards)
            self._pack(self._complete_shards())

    def _clear(self) -> None:
        for pattern in (_IMAGE, _SHARD, _TEMPORARY):
            for match in _matches(pattern, self.path):
                (self.path / match[0]).unlink()
        shutil.rmtree(self.path / UNPACKED, ignore_errors=True)
        (self.path / MANIFEST).unlink(missing_ok=True)

    def _write_manifest(self, complete: bool) -> None:
        values = {
            "version": VERSION,
            "num_images": self.num_images,
            "complete": complete,
            "settings": self.settings.to_dict(),
        }
        write_json(self.path / MANIFEST, values)


def read_manifest(path: Path) -> dict[str, Any]:
    """Of a run: ``settings``, ``num_images`` and whether it is ``complete``.

    Raises:
        OSError: there is none. ValueError: it is damaged, or of something else; one line.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] != VERSION:
            raise ValueError(f"version {manifest['version']}, where {VERSION} is known")
        if not isinstance(manifest["settings"], dict) or not isinstance(manifest["num_images"], int):
            raise TypeError("settings must be an object, num_images a whole number")
        return {name: manifest[name] for name in ("settings", "num_images", "complete")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no manifest of a sampling run: {error}") from error


def _is_whole(path: Path) -> bool:
    """Whether a picture, its latents or a shard ends as files of its kind do; no more of it is looked at.

    A crashed system, or a copy that was broken off, leaves files that end before their contents do.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "np"):  # which compares the file's length with what its header says
                return True
        with path.open("rb") as file:
            if path.suffix == ".tar" and os.fstat(file.fileno()).st_size % tarfile.RECORDSIZE:
                return False
            file.seek(-len(_ENDS[path.suffix]), os.SEEK_END)
            return file.read() == _ENDS[path.suffix]
    except (OSError, SafetensorError):
        return False


def _matches(pattern: re.Pattern[str], folder: Path) -> Iterator[re.Match[str]]:
    """Of the names in a folder, which need not exist."""
    return filter(None, map(pattern.fullmatch, _names(folder)))


def _names(folder: Path) -> Iterator[str]:
    """In a folder of millions one after the other, in no order."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                yield entry.name
    except FileNotFoundError:
        return
