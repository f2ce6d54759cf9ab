"""What the number of samples costs: an item, an unreadable one, the memory of the names, and opening.

    python -m benchmarks.many_samples [--counts 10000,1000000,10000000] [--files 20000]

A source of one small picture stands for a data set of ``--counts`` samples, so what is timed is what
:class:`~madformer.data.images.ImageDataset` adds to decoding. Opening is timed on ``--files`` real ones. Times are of
the CPU, the best of several, so that other work on the machine is not in them.

The last line on stdout is the metrics as JSON: what an item of the largest count costs more than one of the smallest,
as a ratio. Exit status 1: bad options.
"""

from __future__ import annotations

import argparse
import io
import logging
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.record import CannotCompare, finish, results_folder
from madformer.data.fields import DataSummary
from madformer.data.images import ImageDataset, open_dataset
from madformer.data.sources import RawSample
from madformer.files.shards import write_index, write_shards
from madformer.files.text import PackedStrings
from madformer.machine import environment

NAME = "class-{:04d}/picture-{:08d}.png"


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


class OnePicture:
    """As many samples as are asked for; every thousandth is damaged."""

    def __init__(self, count: int) -> None:
        self.class_names: list[str] = []
        self.root, self.shard_lengths = None, None
        self.count, self.data = count, picture()

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return NAME.format(index % 1000, index)

    def read(self, index: int) -> RawSample:
        return RawSample(str(index), b"" if index % 1000 == 999 else self.data)

    def summary(self, limit: int) -> DataSummary:
        return DataSummary(self.count, 0, 0, 0, 0)


def cpu_seconds(work: Callable[[], Any], times: int) -> float:
    """The least that one of several calls took."""
    taken = []
    for _ in range(times):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)


def of_count(count: int) -> dict[str, float]:
    """Microseconds and bytes at one size."""
    data = ImageDataset(OnePicture(count), 8, on_error="skip", max_bad_fraction=1)
    places = [count * part // 1000 // 1000 * 1000 for part in range(1, 1000)]
    sound = cpu_seconds(lambda: [data[place] for place in places], 5) / len(places)
    damaged = range(999, count, 1000)[:7]
    yet = iter(damaged)  # the second time, a sample is known to be unreadable
    unreadable = cpu_seconds(lambda: data[next(yet)], len(damaged))
    names = PackedStrings(NAME.format(index % 1000, index) for index in range(count))
    pickled = pickle.dumps(names)
    return {
        "item_us": sound * 1e6,
        "unreadable_item_us": unreadable * 1e6,
        "bytes_per_name": len(pickled) / count,
        "name_us": cpu_seconds(lambda: [names[place] for place in places], 5) / len(places) * 1e6,
    }


def opening(files: int) -> dict[str, float]:
    """Microseconds for a sample: class folders, and shards without and with an index."""
    with tempfile.TemporaryDirectory() as made:
        folder, data = Path(made), picture()
        for index in range(files):
            path = folder / "folder" / NAME.format(index % 100, index)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        samples = ({"__key__": f"{index:08d}", "png": data, "txt": "x", "cls": 1} for index in range(files))
        paths = write_shards(samples, folder / "shards", "x")
        found = {"folder": cpu_seconds(lambda: open_dataset(folder / "folder", 8), 3)}
        found["shards"] = cpu_seconds(lambda: open_dataset(folder / "shards", 8), 2)
        for path in paths:
            write_index(path)
        found["indexed_shards"] = cpu_seconds(lambda: open_dataset(folder / "shards", 8), 3)
    return {f"{name}_us_per_sample": seconds / files * 1e6 for name, seconds in found.items()}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns the record."""
    logging.disable(logging.WARNING)
    counts = {str(count): of_count(count) for count in options.counts}
    opened = opening(options.files)
    for count, figures in counts.items():
        print(f"{int(count):12,} samples: " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items()))
    print(f"opening {options.files:,}: " + ", ".join(f"{name} {value:.1f}" for name, value in opened.items()))
    items = [figures["item_us"] for figures in counts.values()]
    return {
        **environment("many_samples", torch.device("cpu"), ("numpy", "pillow")),
        "counts": counts,
        "files": options.files,
        "opening": opened,
        "metrics": {"item_of_most_vs_fewest": items[-1] / items[0]},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--counts", default="10000,1000000,10000000", help="samples (10000,1000000,10000000)")
    parser.add_argument("--files", type=int, default=20_000, help="to open (20000)")
    parser.add_argument("--out", type=Path, metavar="RECORD.json", help="in place of benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    try:
        options.counts = sorted(int(count) for count in options.counts.split(","))
    except ValueError:
        parser.error(f"--counts {options.counts}: numbers, separated by commas")
    if options.counts[0] < 2000 or options.files < 1:
        parser.error("--counts from 2000 on, --files from 1 on")
    out = options.out or results_folder(torch.device("cpu")) / "many_samples.json"
    return finish("many_samples", lambda: run(options), out, errors=(CannotCompare, ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
