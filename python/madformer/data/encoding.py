"""Encodes a data set of images once into the shards of :mod:`madformer.data.latents`, by any number of processes.

Shape legend: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from madformer.arguments import whole_number
from madformer.data.images import ImageDataset
from madformer.data.latents import DESCRIPTION, FLIPPED, PLAIN, LatentDescription
from madformer.data.workers import fetch_batches
from madformer.files.atomic import remove_leftovers
from madformer.files.resumable import dealt, goes_on, taken
from madformer.files.shards import KEY, index_path, write_index, write_shard
from madformer.vae import encode

__all__ = ["EncodingReport", "write_latents"]


_Records = list[tuple[int, dict[str, Any]]]
_Read = tuple[_Records, Tensor, int]


@dataclass
class EncodingReport:
    """What one process did.

    Attributes:
        num_encoded: images. num_bad: unreadable ones that it met.
        complete: whether every shard is there now, whoever wrote it.
        rounding: root mean square of what the dtype took from the means. deviation: the same of the posterior's own
            standard deviation, beside which the rounding should be small. NaN where nothing was encoded.
    """

    num_encoded: int
    num_bad: int
    complete: bool
    rounding: float
    deviation: float


def write_latents(
    images: ImageDataset,
    vae: AutoencoderKL,
    folder: str | Path,
    description: LatentDescription,
    *,
    batch_size: int = 16,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> EncodingReport:
    """Encode the shards that a folder lacks of those that a process is dealt (every ``world_size``-th).

    A shard appears when it is whole, so a run that was killed is gone on with by the same call, and ends with the same
    bytes on the same machine. Unreadable images are counted, logged and left out; too many stop the run as ``images``'
    ``max_bad_fraction`` says, each process for itself.

    Args:
        vae: encodes on its device, in its dtype.
        description: :meth:`LatentDescription.of` these images and this VAE.
        batch_size: images that are encoded at once. num_workers: processes that decode images.
        progress: show a bar over the images that this process encodes.

    Raises:
        ValueError: an argument out of range; a folder of other latents or of something else; too many bad images.
        FloatingPointError: latents that the description's dtype cannot hold; names the sample.
        OSError: the folder cannot be written, or a process of this rank is at work in it.
    """
    whole_number("batch_size", batch_size, 1)
    whole_number("num_workers", num_workers, 0)
    folder, bad_before = Path(folder), images.num_bad
    with _opened(folder, description, rank, world_size) as missing:
        encoder = _Encoder(images, vae, description, batch_size, num_workers)
        encoder.write(missing, folder, progress)
    rounding, deviation = (encoder.squares / encoder.count).sqrt().tolist()
    return EncodingReport(
        num_encoded=encoder.num_encoded,
        num_bad=images.num_bad - bad_before,
        complete=all((folder / description.shard_name(shard)).is_file() for shard in range(description.num_shards)),
        rounding=rounding,
        deviation=deviation,
    )


@contextmanager
def _opened(folder: Path, description: LatentDescription, rank: int, world_size: int) -> Iterator[list[int]]:
    """Take a folder for this process; gives the shards that it is dealt and that are not there.

    What a killed process had begun is cleared away or finished, but for shards that others may be writing.
    """
    shards = {
        shard: folder / description.shard_name(shard) for shard in dealt(description.num_shards, rank, world_size)
    }

    def settle() -> None:
        def difference() -> str | None:
            return description.difference(LatentDescription.read(folder))

        found = min((path.name for path in folder.glob("*.tar")), default=None)
        if not goes_on(folder, DESCRIPTION, found, difference, "take another folder"):
            description.write(folder)
        files = (file.name for path in shards.values() for file in (path, index_path(path)))
        remove_leftovers(folder, DESCRIPTION, *files)

    with taken(folder, rank, settle):
        for path in shards.values():
            if path.exists() and not index_path(path).exists():
                write_index(path)
        yield [shard for shard, path in shards.items() if not path.exists()]


@dataclass
class _Encoder:
    """Streams images through the VAE into shards: a batch at a time is held, however large the shard.

    Attributes:
        num_encoded: images. squares: sums of the squares of the means' rounding errors and of the deviations, over
            ``count`` latents.
    """

    images: ImageDataset
    vae: AutoencoderKL
    description: LatentDescription
    batch_size: int
    num_workers: int
    num_encoded: int = 0
    count: int = 0
    squares: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def write(self, shards: Sequence[int], folder: Path, progress: bool) -> None:
        numbers = [batch for shard in shards for batch in self._batches(shard)]
        total, on_gpu = sum(map(len, numbers)), self.vae.device.type == "cuda"
        reads = fetch_batches(_Reader(self.images), numbers, num_workers=self.num_workers, pin_memory=on_gpu)
        with tqdm(total=total, desc="encoding", unit="image", disable=not (progress and total)) as bar:
            for shard in shards:
                path = folder / self.description.shard_name(shard)
                write_shard(self._samples(itertools.islice(reads, len(self._batches(shard))), bar), path)
                write_index(path)

    def _batches(self, shard: int) -> list[range]:
        """No batch straddles shards: a shard's bytes do not depend on which others were there."""
        span = self.description.span(shard)
        return [span[i : i + self.batch_size] for i in range(0, len(span), self.batch_size)]

    def _samples(self, reads: Iterator[_Read], bar: tqdm) -> Iterator[dict[str, Any]]:
        for records, pixels_BCHW, num_read in reads:
            if records:
                moments = {PLAIN: self._encode(pixels_BCHW, records)}
                if self.description.flips:
                    moments[FLIPPED] = self._encode(pixels_BCHW.flip(-1), records)
                for row, (number, record) in enumerate(records):
                    yield {KEY: f"{number:08d}", "json": record, **{k: _npy(v[row]) for k, v in moments.items()}}
            self.num_encoded += len(records)
            bar.update(num_read)

    def _encode(self, pixels_BCHW: Tensor, records: _Records) -> Tensor:
        """Mean and deviation ``(B, 2, C, H, W)``, rounded, on the CPU."""
        exact = torch.stack(encode(self.vae, pixels_BCHW, check=False), dim=1).cpu()
        moments = exact.to(getattr(torch, self.description.dtype))
        finite = moments.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            key = records[finite.index(False)][1]["key"]
            raise FloatingPointError(f"{key}: its latents are not finite in {self.description.dtype}")
        mean, deviation = exact.double().unbind(1)
        self.squares += torch.stack([(moments[:, 0] - mean).square().sum(), deviation.square().sum()])
        self.count += mean.numel()
        return moments


@dataclass(frozen=True)
class _Reader:
    """What a worker reads: number and record of the readable samples, their pixels, and how many were asked for."""

    images: ImageDataset

    def __call__(self, numbers: Sequence[int]) -> _Read:
        read = [(number, sample) for number in numbers if (sample := self.images.try_read(number)) is not None]
        records = [(number, {name: sample[name] for name in ("key", "label", "caption")}) for number, sample in read]
        pixels = torch.stack([sample["image"] for _, sample in read]) if read else torch.empty(0)
        return records, pixels, len(numbers)


def _npy(moments: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, moments.numpy())
    return buffer.getvalue()
