"""A folder that a long run fills: what is there, what is missing, and files that appear whole or not at all.

A *batch* is the unit of work: it is done when all its images are there, else it is drawn again as a whole, so that
every image is drawn beside the same neighbours however often the run was stopped. Batches are dealt to processes by
their number; the files say which are done, so any number of processes can go on from any other number.

With shards, images wait as files in ``unpacked/`` until their shard's are all there. Whoever completes it packs it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from madformer.bulk.settings import Settings
from madformer.data.shards import KEY, write_shard
from madformer.model.persistence import atomic_path, check_writable, locked
from madformer.seeds import check_seed

MANIFEST = "manifest.json"
UNPACKED = "unpacked"
VERSION = 1
_IMAGE = re.compile(r"(\d{8,})\.(?:png|safetensors)")
_SHARD = re.compile(r"(?:images|latents)-(\d{6,})\.tar")
# how `atomic_path` names what it has not finished
_TEMPORARY = re.compile(rf"\.({_IMAGE.pattern}|{_SHARD.pattern}|{re.escape(MANIFEST)})\.[^.]+")


class OutputFolder:
    """The images ``0 .. num_images - 1`` of a run, in files named by their seeds.

    Making one touches no file: :meth:`opened` does.

    Args:
        path: the folder. num_images: how many the run is to have, counted from its start.
    """

    def __init__(self, path: str | Path, settings: Settings, num_images: int) -> None:
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1")
        check_seed(settings.seed, num_images)
        self.path, self.settings, self.num_images = Path(path), settings, num_images
        self.sharded = settings.format == "wds"
        self.images = self.path / UNPACKED if self.sharded else self.path
        self.extension = "safetensors" if settings.latents else "png"

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
        check_writable(self.path)
        with locked(self.path / f".lock-{rank}", wait=False):
            with locked(self.path / ".lock"):
                if overwrite:
                    self._clear()
                self._settle_manifest()
                self._tidy(rank, world_size)
            yield self

    def span(self, batch: int) -> range:
        """The images of a batch."""
        first = batch * self.settings.batch_size
        return range(first, min(first + self.settings.batch_size, self.num_images))

    def batches(self, rank: int = 0, world_size: int = 1) -> range:
        """The batches that a process is dealt."""
        return range(rank, -(-self.num_images // self.settings.batch_size), world_size)

    def missing(self, batches: Iterable[int]) -> list[int]:
        """Those of ``batches`` that have to be drawn."""
        present = self.present()
        return [batch for batch in batches if not present.issuperset(self.span(batch))]

    def present(self) -> set[int]:
        """The images that are there."""
        found = self._unpacked()
        for shard in self._shards():
            found.update(self._shard_span(shard))
        return found

    def file(self, image: int) -> Path:
        """Where an image is or will be, until it is packed."""
        return self.images / f"{self.settings.seed + image:08d}.{self.extension}"

    def write(self, image: int, data: bytes) -> None:
        # a batch that is drawn again may have images in a shard that was complete
        if not (self.sharded and self._shard(image // self._shard_size).exists()):
            with atomic_path(self.file(image)) as path:
                path.write_bytes(data)

    def pack(self) -> None:
        """Pack the shards whose images are all there, if there are any."""
        if self._complete_shards():
            with locked(self.path / ".lock"):
                # again: another process may have seen the same and been faster
                self._pack(self._complete_shards())

    def finish(self) -> bool:
        """Note in the manifest that all images are there, if they are; whether this call was the one to do it."""
        with locked(self.path / ".lock"):
            if self._read_manifest()["complete"] or len(self.present()) < self.num_images:
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
        settings, file = self.settings, self.file(image)
        origin = {
            "seed": settings.seed + image,
            "steps": settings.steps,
            "scheduler": settings.scheduler["class"],
            "precision": settings.precision,
            "model": settings.model,
            **settings.prompts.entry(image),
        }
        return {KEY: file.stem, self.extension: file.read_bytes(), "json": origin}

    def _shard(self, shard: int) -> Path:
        return self.path / f"{'latents' if self.settings.latents else 'images'}-{shard:06d}.tar"

    def _shards(self) -> list[int]:
        return [int(match[1]) for match in _matches(_SHARD, self.path)] if self.sharded else []

    def _shard_span(self, shard: int) -> range:
        first = shard * self._shard_size
        return range(first, min(first + self._shard_size, self.num_images))

    def _unpacked(self) -> set[int]:
        """The images that are files of their own."""
        found = {int(match[1]) - self.settings.seed for match in _matches(_IMAGE, self.images)}
        return found.intersection(range(self.num_images))

    def _unlink(self, images: Iterable[int]) -> None:
        for image in images:
            self.file(image).unlink(missing_ok=True)

    def _settle_manifest(self) -> None:
        """Write the manifest of a new run, check that of an old one, and make room for more images."""
        found = self._first_file()
        if not (self.path / MANIFEST).exists():
            if found:
                raise ValueError(f"{self.path} holds {found} but no {MANIFEST}: take another folder, or overwrite")
            self._write_manifest(complete=False)
            return
        manifest = self._read_manifest()
        if difference := self.settings.difference(manifest["settings"]):
            # a run that ended before its first image binds nobody
            if found:
                raise ValueError(f"{self.path} is of a run with {difference}: take another folder, or overwrite")
            self._write_manifest(complete=False)
            return
        before = manifest["num_images"]
        if self.num_images < before:
            raise ValueError(f"num_images={self.num_images} is less than the {before} that {self.path} is made for")
        if self.num_images > before and self.sharded:
            self._unpack_last(before)
        complete = manifest["complete"] and len(self.present()) == self.num_images
        if (before, manifest["complete"]) != (self.num_images, complete):
            self._write_manifest(complete)

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

    def _tidy(self, rank: int, world_size: int) -> None:
        """Remove files that a killed process had begun, and images that are in their shard; pack what is complete.

        Called under the lock, where nobody packs. Images that other processes may be writing are left to them.
        """
        own = {self.file(image).name for batch in self.batches(rank, world_size) for image in self.span(batch)}
        for folder in {self.path, self.images}:
            for match in _matches(_TEMPORARY, folder):
                if match[1] in own or not _IMAGE.fullmatch(match[1]):
                    (folder / match[0]).unlink(missing_ok=True)
        for shard in self._shards():
            self._unlink(self._unpacked().intersection(self._shard_span(shard)))
        self._pack(self._complete_shards())

    def _clear(self) -> None:
        for pattern in (_IMAGE, _SHARD, _TEMPORARY):
            for match in _matches(pattern, self.path):
                (self.path / match[0]).unlink()
        shutil.rmtree(self.path / UNPACKED, ignore_errors=True)
        (self.path / MANIFEST).unlink(missing_ok=True)

    def _read_manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        try:
            manifest = json.loads(path.read_text())
            if manifest["version"] != VERSION:
                raise ValueError(f"version {manifest['version']}, where {VERSION} is known")
            return {name: manifest[name] for name in ("settings", "num_images", "complete")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no manifest of a sampling run: {error}") from error

    def _write_manifest(self, complete: bool) -> None:
        values = {
            "version": VERSION,
            "num_images": self.num_images,
            "complete": complete,
            "settings": self.settings.to_dict(),
        }
        with atomic_path(self.path / MANIFEST) as path:
            path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")


def _matches(pattern: re.Pattern[str], folder: Path) -> Iterator[re.Match[str]]:
    """Of the names in a folder, which need not exist."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    yield from filter(None, map(pattern.fullmatch, sorted(names)))
