"""How many images a second training gets from latents on the disk, against how many the model can take.

    python -m benchmarks.data_path [--preset ffhq1024] [--workers 2] [--appetite 16] [--data LATENTS]

Images with random pixels are encoded by a small autoencoder that does not downsample, so that latents of the model's
geometry, with flips, are written by the writer that users have; ``--data`` takes a folder of ``madformer data latents``
in their place. Then :class:`~madformer.training.data.BatchStream` draws posterior, flips, timesteps and noise, and
brings them to this process. In the first epoch every read goes to the disk, where the system lets go of what it has
cached; the others find the files in memory.

The appetite is what one H200 can train on of the preset, 16 images/s at FFHQ-1024: 790 TFLOP/s over 49 TFLOP an image.

No rate is reported where workers give other batches than this process draws by itself.

The last line on stdout is the metrics as JSON. Exit status 1: bad options, or batches that disagree.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from benchmarks.record import CannotCompare, finish, results_folder
from madformer.config import MADFormerConfig, preset
from madformer.data import open_dataset
from madformer.data.encoding import write_latents
from madformer.data.latents import LatentDataset, LatentDescription
from madformer.machine import environment
from madformer.training.data import BatchStream, Draws, Share


def make_latents(folder: Path, config: MADFormerConfig, count: int) -> LatentDataset:
    """``count`` samples of a model's geometry in ``folder / "latents"``."""
    random, (_, *shape) = np.random.default_rng(0), config.latent_shape
    (folder / "images").mkdir()
    for index in range(count):
        pixels = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index:06d}.png")
    images = open_dataset(folder / "images", (shape[0], shape[1]))
    torch.manual_seed(0)
    # without attention, which would see a token for every pixel
    vae = AutoencoderKL(
        block_out_channels=(4,),
        norm_num_groups=4,
        latent_channels=config.latent_channels,
        mid_block_add_attention=False,
    )
    description = LatentDescription.of(images, vae, source="random pixels", vae_name="random weights")
    write_latents(images, vae, folder / "latents", description)
    return LatentDataset(folder / "latents")


def forget(data: LatentDataset) -> None:
    """Ask the system to drop the shards from its cache."""
    for path in data.shards.paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check(with_workers: BatchStream, without: BatchStream) -> None:
    """Raises :class:`CannotCompare` where the first batches differ in any bit."""
    ours, theirs = next(with_workers), next(without)
    for name in ("clean_BMLC", "noise_BMLC", "timestep_BM", "labels_B"):
        if not torch.equal(getattr(ours, name), getattr(theirs, name)):
            raise CannotCompare(f"no rates: {name} of the workers' first batch is not what this process draws")


def measure(stream: BatchStream, batches: int, epochs: int) -> tuple[float, list[float]]:
    """Seconds to the first batch, and of each epoch; the first epoch's are without those of its first batch."""
    started = time.perf_counter()
    next(stream)
    marks = [time.perf_counter()]
    for epoch in range(epochs):
        for _ in range(batches - (epoch == 0)):
            next(stream)
        marks.append(time.perf_counter())
    return marks[0] - started, [later - earlier for earlier, later in itertools.pairwise(marks)]


def rates(data: LatentDataset, config: MADFormerConfig, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a record.

    Raises:
        CannotCompare, ValueError: see the message.
    """
    batch = options.micro_batch
    if len(data) < 2 * batch:
        raise CannotCompare(f"{len(data)} samples are less than two batches of --micro-batch {batch}")

    def stream(workers: int) -> BatchStream:
        draws = Draws(seed=0, flip=data.flips)
        return BatchStream(data, None, config, Share(batch, batch), draws, num_workers=workers)

    with_workers = stream(options.workers)
    check(with_workers, stream(0))
    with_workers.close()
    forget(data)
    batches = len(data) // batch
    timed = stream(options.workers)
    first, seconds = measure(timed, batches, options.epochs)
    timed.close()
    cold, warm = (batches - 1) * batch / seconds[0], batches * batch / median(seconds[1:])
    bytes_read = 2 * int(np.prod(data.description.latent_shape)) * np.dtype(data.description.dtype).itemsize
    return {
        "latent_shape": data.description.latent_shape,
        "dtype": data.description.dtype,
        "flips": data.flips,
        "samples": len(data),
        "workers": options.workers,
        "micro_batch": batch,
        "appetite": options.appetite,
        "seconds_to_first_batch": first,
        "images_per_second": {"from_disk": cold, "from_memory": warm},
        "megabytes_read_per_image": bytes_read / 1e6,
        "metrics": {"data_path_vs_appetite": cold / options.appetite},
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Write latents if there are none, measure; returns the record.

    Raises:
        CannotCompare, ValueError, OSError: see the message.
    """
    config = preset(options.preset)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        data = LatentDataset(options.data) if options.data else make_latents(Path(folder), config, options.samples)
        figures = rates(data, config, options)
    found = figures["images_per_second"]
    print(
        f"{options.preset}, {options.workers} workers: {found['from_disk']:.0f} images/s from the disk, "
        f"{found['from_memory']:.0f} from memory; the model takes {options.appetite:g}, which is "
        f"{options.appetite * figures['megabytes_read_per_image']:.3g} MB/s"
    )
    head = environment("data_path", torch.device("cpu"), ("numpy",))
    return {**head, "cores": len(os.sched_getaffinity(0)), "preset": options.preset, **figures}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--preset", default="ffhq1024", help="gives the geometry (ffhq1024)")
    add("--data", type=Path, help="a folder of `madformer data latents`, in place of random ones")
    add("--samples", type=int, default=256, help="random images to encode (256)")
    add("--workers", type=int, default=2, help="processes that read and draw (2)")
    add("--micro-batch", type=int, default=8, help="images of a batch (8)")
    add("--epochs", type=int, default=4, help="the first from the disk, the others from memory (4)")
    add("--appetite", type=float, default=16.0, help="images/s that the model can take (16)")
    add("--folder", type=Path, help="where to write random latents: on the disk in question")
    add("--out", type=Path, metavar="RECORD.json", help="in place of benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    for name, low in (("samples", 1), ("workers", 0), ("micro_batch", 1), ("epochs", 2)):
        if getattr(options, name) < low:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {low}")
    if options.appetite <= 0:
        parser.error(f"--appetite {options.appetite:g} must be positive")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    out = options.out or results_folder(torch.device("cpu")) / "data_path.json"
    return finish("data_path", lambda: run(options), out, errors=(CannotCompare, ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
