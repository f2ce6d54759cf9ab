"""What the data sets that anyone can make offline have in common: captioned pictures in classes, for shards or at once.

Their pictures are square, of mode RGB and on white, and made of files that a distribution packages; the same files give
the same bytes.
"""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from madformer.arguments import whole_number
from madformer.data.fields import NO_LABEL, DataSummary
from madformer.data.sources import RawSample
from madformer.files.shards import KEY, write_shards

__all__ = ["RenderedSample", "RenderedSource", "check_side", "png_of", "write_rendered"]

LARGEST = 4096
"""Pixels along a side of a picture: more than any that is rendered has."""


@dataclass(frozen=True)
class RenderedSample(RawSample):
    """A sample whose ``data`` are a PNG.

    Attributes:
        told: what its record says besides key, caption and class.
    """

    told: Mapping[str, Any] = field(default_factory=dict)


class RenderedSource:
    """Rendered samples as a :class:`~madformer.data.sources.Source`, for evaluation without files.

    Args:
        kind: what they are called in messages. samples: in order. class_names: by label.
    """

    root, shard_lengths = None, None

    def __init__(self, kind: str, samples: Sequence[RenderedSample], class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)
        self._kind, self._samples = kind, samples

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        return self._samples[index].key

    def name(self, index: int) -> str:
        return f"{self._kind} {self.key(index)}"

    def read(self, index: int) -> RawSample:
        return self._samples[index]

    def summary(self, limit: int) -> DataSummary:
        """Complete, whatever the limit."""
        count = len(self)
        labelled = sum(sample.label != NO_LABEL for sample in self._samples)
        return DataSummary(count, count, labelled, count, len(self.class_names), tuple(self.class_names))


def write_rendered(
    samples: Iterable[RenderedSample],
    folder: str | Path,
    name: str,
    class_names: Sequence[str],
    *,
    size: int,
    max_per_shard: int = 10_000,
    limit: int | None = None,
) -> dict[str, Any]:
    """Write ``folder/NAME-NNNNNN.tar``; a sample has the members ``png``, ``txt`` (caption), ``cls`` and ``json``.

    Args:
        samples: are made as they are asked for. size: side of their pictures in pixels. limit: stop after that many.

    Returns:
        The beginning of what ``dataset.json`` is to say.

    Raises:
        ValueError: ``limit`` is below 1, or as :func:`~madformer.files.shards.write_shards`.
    """
    if limit is not None:
        whole_number("limit", limit, 1)
    counts: Counter[int] = Counter()

    def member(sample: RenderedSample) -> dict[str, Any]:
        counts[sample.label] += 1
        label_name = class_names[sample.label] if sample.label != NO_LABEL else ""
        record = {"caption": sample.caption, "label": sample.label, "label_name": label_name, **sample.told}
        return {KEY: sample.key, "png": sample.data, "txt": sample.caption, "cls": sample.label, "json": record}

    paths = write_shards(map(member, itertools.islice(samples, limit)), folder, name, max_per_shard)
    return {
        "name": name,
        "num_samples": counts.total(),
        "image_size": size,
        "class_names": list(class_names),
        "class_counts": [counts[label] for label in range(len(class_names))],
        "shards": [path.name for path in paths],
    }


def check_side(size: int) -> int:
    """Raises ``ValueError`` for what is no side of a picture in pixels."""
    return whole_number("size", size, 1, LARGEST)


def png_of(image: Image.Image) -> bytes:
    """A picture's file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
