"""What is there and what is missing, of any number of images: nothing is listed before it is drawn."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from pathlib import Path

import pytest

from madformer.bulk import OutputFolder
from madformer.files.number_set import NumberSet
from tests.helpers.bulk_cases import NOTHING, settings


def test_an_image_set_is_a_set() -> None:
    """Against Python's own, over numbers that are near, far, and around the edges of the integers that hold them."""
    random.seed(0)
    edges = [
        base + offset for base in (0, 1024, 2048, 10 * 1024, 10**12) for offset in range(-3, 4) if base + offset >= 0
    ]
    for _ in range(50):
        ours, theirs = NumberSet(), set()
        for _ in range(30):
            if random.random() < 0.5:
                image = random.choice([*edges, random.randrange(5000)])
                ours.add(image)
                theirs.add(image)
            else:
                first = random.randrange(5000)
                span = range(first, first + random.choice([0, 1, 5, 1023, 1024, 1025, 3000]))
                ours.update(span)
                theirs.update(span)
        assert list(ours) == sorted(theirs)
        assert (len(ours), ours.end) == (len(theirs), max(theirs, default=-1) + 1)
        for _ in range(100):
            first = random.choice([*edges, random.randrange(9000)])
            span = range(first, first + random.choice([0, 1, 2, 16, 1024, 1500]))
            assert ours.issuperset(span) == theirs.issuperset(span)
            assert (first in ours) == (first in theirs)


@pytest.mark.parametrize("shard_size", [None, 1000])
def test_a_run_without_end_begins_at_once(tmp_path: Path, shard_size: int | None) -> None:
    """A million million images, a few of them there: a few kilobytes are held, and the next ones come at once."""
    number = 10**12
    own = settings(shard_size=shard_size, format="wds" if shard_size else "png")
    tracemalloc.start()
    with OutputFolder(tmp_path, own, number).opened() as folder:
        assert list(itertools.islice(folder.missing(folder.batches()), 3)) == [0, 1, 2]
        assert folder.count(folder.batches()) == number
        for image in (*range(16), *range(32, 48), 50):
            folder.write(image, NOTHING)
        folder.pack()
        assert not folder.finish()
    with OutputFolder(tmp_path, own, number).opened(1, 3) as folder:
        assert list(itertools.islice(folder.missing(folder.batches(1, 3)), 2)) == [1, 4]
        assert list(itertools.islice(folder.missing(folder.batches(2, 3)), 2)) == [5, 8]
        assert [folder.count_done(folder.batches(rank, 3)) for rank in range(3)] == [16, 0, 16]
        assert not folder.had_all
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert json.loads((tmp_path / "manifest.json").read_text())["num_images"] == number


def test_counts_are_sums() -> None:
    for number, size, world_size in itertools.product((1, 5, 16, 17, 48, 50), (1, 3, 16), (1, 2, 7)):
        folder = OutputFolder("nowhere", settings(batch_size=size), number)
        for rank in range(world_size):
            batches = folder.batches(rank, world_size)
            assert folder.count(batches) == sum(len(folder.span(batch)) for batch in batches)


def test_the_most_images_that_there_are_seeds_for(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, settings(batch_size=1), 2**63).opened() as folder:
        assert next(folder.missing(folder.batches())) == 0
        assert folder.count(folder.batches()) == 2**63
    with pytest.raises(ValueError, match="and with it the last of"):
        OutputFolder(tmp_path, settings(batch_size=1), 2**63 + 1)


def test_names_that_are_no_images(tmp_path: Path) -> None:
    """Of another seed, with zeros too many, in other digits or of the other kind: nothing of the run."""
    with OutputFolder(tmp_path, settings(seed=100), 50).opened() as folder:
        for image in range(3):
            folder.write(image, NOTHING)
        for name in ("000000103", "0000104", "00000099", "00000150", "٠٠٠٠٠١٠٥", "00000106.1"):
            (tmp_path / f"{name}.safetensors").write_bytes(b"")
        (tmp_path / "00000107.png").write_bytes(b"")
        assert list(folder.present()) == [0, 1, 2]


@pytest.mark.slow
def test_a_large_folder_is_read_in_little_memory(tmp_path: Path) -> None:
    """A bit a file, where a set of their numbers takes 60 bytes."""
    number = 50_000
    with OutputFolder(tmp_path, settings(), number).opened() as folder:
        for image in range(number - 1):
            folder.file(image).write_bytes(NOTHING)
    with OutputFolder(tmp_path, settings(), number).opened():
        pass  # what is imported is
    tracemalloc.start()
    with OutputFolder(tmp_path, settings(), number).opened() as folder:
        assert list(folder.missing(folder.batches())) == [number // 16 - 1]
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()
