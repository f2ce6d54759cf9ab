"""What is held out: the same images of every packaging, in training, in latents and in evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from madformer.data import open_dataset
from madformer.data.holdout import SplitSource, is_held_out
from madformer.data.images import open_source
from madformer.evaluation import open_images
from madformer.files.shards import KEY, write_shards
from madformer.training.config import tiny
from madformer.training.fitting import open_data
from tests.helpers.evaluation_cases import pictures, write_folder


def test_the_share_is_held_out_and_stays_so() -> None:
    names = [f"{index:08d}" for index in range(5000)]
    tenth, third = ({name for name in names if is_held_out(name, share)} for share in (0.1, 1 / 3))
    assert len(tenth) == pytest.approx(500, abs=4 * np.sqrt(450))
    assert len(third) == pytest.approx(5000 / 3, abs=4 * np.sqrt(1111))
    assert tenth < third
    assert [is_held_out(name, 0.1) for name in ("a/b/00000042.png", "00000042", "00000042.0.jpg")] == [
        is_held_out("00000042", 0.1)
    ] * 3
    # fixed for good: the SHA-256 of abc begins with ba7816bf, which is 0.728396 of 2^32
    assert is_held_out("abc", 0.7284)
    assert not is_held_out("abc", 0.7283)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("held")
    folder = write_folder(root / "folder", pictures(60))
    samples = [{KEY: path.stem, "png": path.read_bytes(), "txt": path.stem} for path in sorted(folder.iterdir())]
    write_shards(samples, root / "shards", "images", 17)
    return folder, root / "shards"


def test_both_sides_are_the_whole_of_every_packaging(places: tuple[Path, Path]) -> None:
    found = []
    for place in places:
        sides = [SplitSource(open_source(str(place)), 0.25, side) for side in ("training", "held out")]  # type: ignore[arg-type]
        keys = [[side.key(index).partition(".")[0] for index in range(len(side))] for side in sides]
        assert sorted(keys[0] + keys[1]) == [f"{index:05}" for index in range(60)]
        assert all(side.read(index).key == side.key(index) for side in sides for index in range(len(side)))
        assert all(side.name(0).count(keys[number][0]) for number, side in enumerate(sides))
        found.append(keys)
    assert found[0] == found[1]
    shards = SplitSource(open_source(str(places[1])), 0.25, "training")
    assert shards.shard_lengths is not None
    assert sum(shards.shard_lengths) == len(shards) == shards.summary(100).num_samples
    first = [key for key in found[0][0] if int(key) < 17]
    assert shards.shard_lengths[0] == len(first)


def test_training_and_evaluation_share_no_image(places: tuple[Path, Path]) -> None:
    config = tiny()
    trained = open_data(type(config)(**{**vars(config), "data": str(places[1]), "holdout": 0.25}))
    seen = {trained.read(index)["key"] for index in range(len(trained))}
    held = open_images(places[0], holdout=0.25)
    rest = open_images(places[0], holdout=0.25, side="training")
    assert len(held) + len(rest) == 60
    assert len(seen) == len(rest)
    assert not {held.source.key(index).partition(".")[0] for index in range(len(held))} & seen  # type: ignore[attr-defined]


def test_what_cannot_be_held_out(places: tuple[Path, Path], tmp_path: Path) -> None:
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="holdout="):
            open_dataset(places[0], 16, holdout=share)
    few = write_folder(tmp_path / "few", pictures(1))
    with pytest.raises(ValueError, match=r"holdout=1e-09 leaves nothing held out of 1 images"):
        open_images(few, holdout=1e-9)
    np.savez(tmp_path / "batch.npz", arr_0=pictures(3))
    with pytest.raises(ValueError, match=r"goes by the names of images, and those in .*batch.npz have none"):
        open_images(tmp_path / "batch.npz", holdout=0.1)
