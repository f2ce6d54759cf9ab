"""A part of a data set that no model is trained on, the same one wherever the pictures lie."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Literal

from madformer.arguments import number
from madformer.data.fields import DataSummary
from madformer.data.sources import RawSample, Source

__all__ = ["SplitSource", "is_held_out"]

Side = Literal["training", "held out"]


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a sample belongs to the part that is held out, by the SHA-256 of its name.

    What is held out at a fraction is at every greater one, too, and stays so when a data set grows. Of the name counts
    what is behind the last slash and before the first dot, so that a folder and the shards that are made of it agree.

    Args:
        key: of the sample: the path in its folder, the key in its shard, or a number in a data set of the hub.
    """
    name = key.rpartition("/")[2].partition(".")[0]
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) < fraction * 2**64


class SplitSource:
    """One side of a source.

    Args:
        fraction: that is held out, from 0 to 1. side: ``"training"`` or ``"held out"``.

    Raises:
        ValueError: a fraction that is none, or a side without a sample.
    """

    def __init__(self, source: Source, fraction: float, side: Side) -> None:
        if not 0 < number("holdout", fraction, 0) < 1:
            raise ValueError(f"holdout={fraction} must be between 0 and 1")
        self.source = source
        wanted = side == "held out"
        found = [is_held_out(source.key(index), fraction) == wanted for index in range(len(source))]
        self._places = [index for index, mine in enumerate(found) if mine]
        if not self._places:
            raise ValueError(f"holdout={fraction} leaves nothing {side} of {len(source)} images")
        self.class_names = source.class_names

    @property
    def root(self) -> Path | None:
        return self.source.root

    @property
    def shard_lengths(self) -> list[int] | None:
        lengths = self.source.shard_lengths
        if lengths is None:
            return None
        counts, shard, end = [0] * len(lengths), 0, lengths[0]
        for place in self._places:
            while place >= end:
                shard += 1
                end += lengths[shard]
            counts[shard] += 1
        return counts

    def __len__(self) -> int:
        return len(self._places)

    def key(self, index: int) -> str:
        return self.source.key(self._places[index])

    def name(self, index: int) -> str:
        return self.source.name(self._places[index])

    def read(self, index: int) -> RawSample:
        return self.source.read(self._places[index])

    def summary(self, limit: int) -> DataSummary:
        """Of the whole source, in proportion: a class that a part has no sample of is a class all the same."""
        whole = self.source.summary(limit)
        share = len(self) / len(self.source)
        counts: dict[str, Any] = {
            name: round(getattr(whole, name) * share) or int(getattr(whole, name) > 0)
            for name in ("num_examined", "num_labelled", "num_captioned")
        }
        return dataclasses.replace(whole, num_samples=len(self), **counts)
