"""Clip art as a data set: what is kept, what a picture becomes and is called; and the package itself, if it is here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from madformer.cli.main import main
from madformer.data.clipart import DEFAULT_SOURCE, ClipartSource, caption_of, key_of, write_clipart_shards
from madformer.data.images import open_dataset, open_source
from madformer.data.pixels import decode
from madformer.data.sources import RawSample
from madformer.evaluation import images, open_images, open_reference

SIZE = 32
needs_package = pytest.mark.skipif(not DEFAULT_SOURCE.is_dir(), reason="needs Debian's openclipart-png")


def picture(path: Path, colour: tuple[int, int, int], width: int = 40, height: int = 20) -> None:
    """Its left half opaque, the rest transparent, above a colour that must not be seen."""
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[:, : width // 2] = (*colour, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("png")
    picture(root / "animals" / "bugs" / "red_beetle_01.png", (255, 0, 0))
    picture(root / "animals" / "cat.png", (0, 0, 255), width=20, height=60)
    picture(root / "tools" / "hammer.png", (0, 128, 0))
    picture(root / "loose.png", (9, 9, 9))
    # the first one but for its shade, another name of the second, one in which nothing is to be seen, and no picture
    picture(root / "tools" / "beetle.png", (254, 1, 0))
    (root / "tools" / "cat.png").symlink_to("../animals/cat.png")
    picture(root / "tools" / "nothing.png", (250, 250, 250))
    (root / "tools" / "torn.png").write_bytes((root / "tools" / "hammer.png").read_bytes()[:60])
    return root


def test_shards_of_a_folder(source: Path, tmp_path: Path) -> None:
    made = write_clipart_shards(tmp_path / "a", size=SIZE, source=source)
    assert json.loads((tmp_path / "a" / "dataset.json").read_text()) == made
    assert (made["class_names"], made["class_counts"]) == (["animals", "tools"], [2, 1])
    assert (made["num_samples"], made["num_left_out"]) == (4, 4)
    assert made["left_out"] == {"duplicates": 2, "nearly_empty": 1, "unreadable": 1}
    data = open_dataset(tmp_path / "a", SIZE)
    assert data.class_names == made["class_names"]
    found = {data[index]["key"]: (data[index]["caption"], data[index]["label"]) for index in range(len(data))}
    assert found == {
        key_of("loose.png"): (caption_of("loose.png"), -1),
        key_of("animals/cat.png"): (caption_of("animals/cat.png"), 0),
        key_of("animals/bugs/red_beetle_01.png"): (caption_of("animals/bugs/red_beetle_01.png"), 0),
        key_of("tools/hammer.png"): (caption_of("tools/hammer.png"), 1),
    }
    write_clipart_shards(tmp_path / "b", size=SIZE, source=source)
    for name in ("clipart-000000.tar", "dataset.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert write_clipart_shards(tmp_path / "c", size=SIZE, source=source, limit=2)["num_samples"] == 2


def test_a_picture_is_whole_and_in_the_middle(source: Path) -> None:
    """What is to be seen of the second one, 10 x 60 pixels, is 5 x 30 of 32 x 32; the transparent rest is white."""
    clipart = ClipartSource(SIZE, source)
    (cat,) = (clipart.read(index) for index in range(len(clipart)) if "cat" in clipart.key(index))
    expected = np.full((SIZE, SIZE, 3), 255)
    expected[1:31, 13:18] = (0, 0, 255)
    np.testing.assert_array_equal(decode(cat.data), expected)


@pytest.mark.parametrize(
    ("path", "caption"),
    [
        ("animals/bugs/red_beetle_01.png", "red beetle, bugs"),
        ("food/fruit/lemon_slice_bw_ganson.png", "lemon slice black and white, fruit"),
        ("recreation/sports/baseball_anthony_liekens_01.png", "baseball, sports"),
        # cut off behind 24 characters
        ("food/desserts/flan_bw_jean-victor_bali_01.png", "flan black and white, desserts"),
        ("animals/birds/cigno_di_spalle_architet_01.png", "cigno di spalle, birds"),
        ("recreation/music/45_rpm_record_gerald_g._01.png", "45 rpm record, music"),
        ("recreation/games/cards/white/white_h_10.png", "white h 10, white"),
        ("signs_and_symbols/Mailbox2.PNG", "mailbox, signs and symbols"),
        ("loose.png", "loose"),
        ("tools/_-_01.png", "tools"),
        ("???.png", "???"),
    ],
)
def test_a_caption_is_of_the_path(path: str, caption: str) -> None:
    assert caption_of(path) == caption


@pytest.mark.slow
@needs_package
def test_the_package_itself(tmp_path: Path) -> None:
    made = write_clipart_shards(tmp_path, size=64, limit=20)
    assert len(made["class_names"]) == 22
    assert made["class_counts"][made["class_names"].index("animals")] == 20
    data = open_dataset(tmp_path, 64)
    assert [data[index]["label"] for index in range(20)] == [0] * 20
    assert len({data[index]["caption"] for index in range(20)}) > 15


def test_a_reference_by_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its samples are those of the shards, and so is its part that is held out."""
    monkeypatch.setitem(images._RENDERED, "clipart", lambda size: ClipartSource(size, source))
    write_clipart_shards(tmp_path, size=SIZE, source=source)
    clipart, shards = ClipartSource(SIZE, source), open_source(str(tmp_path))
    assert clipart.class_names == shards.class_names
    assert clipart.summary(10) == shards.summary(10)
    samples = [clipart.read(index) for index in range(len(clipart))]
    assert [RawSample(one.key, one.data, one.caption, one.label) for one in samples] == list(
        map(shards.read, range(len(shards)))
    )
    for holdout, side in ((0.0, "held out"), (0.5, "held out"), (0.5, "training")):
        by_name, by_folder = (
            open_images(name, holdout=holdout, side=side)  # type: ignore[arg-type]
            for name in (f"clipart:{SIZE}", tmp_path)
        )
        assert [part.key for part in by_name.parts()] == [part.key for part in by_folder.parts()]
    assert len(open_reference(f"clipart:{SIZE}", 2)) == 2  # type: ignore[arg-type]


def test_a_key_is_no_other_paths() -> None:
    paths = ["a/b.png", "a-b.png", "a_b.png", "a/b.c.png", "a/B.png", "a/b.jpg", f"{'long/' * 40}a.png"]
    keys = [key_of(path) for path in paths]
    assert len(set(keys)) == len(keys)
    assert not {"/", "."} & set("".join(keys))
    assert max(map(len, keys)) <= 70  # a tar's member has 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "{}/absent"], "install Debian's openclipart-png or pass --source FOLDER"),
        (["--source", "{}/empty"], "holds no .tar shards and no images"),
        (["--source", "{}/blank"], "no samples to write to"),
        (["--size", "0"], "size=0 must be at least 1"),
        (["--size", "100000"], "size=100000 must be at most 4096"),
        (["--limit", "0"], "limit=0 must be at least 1"),
    ],
)
def test_what_is_refused_is_one_line(
    options: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "blank" / "a.png", (255, 255, 255))
    told = [option.format(tmp_path) for option in (["--source", str(source), *options])]
    assert main(["data", "clipart", "--out", str(tmp_path / "out"), *told]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_size_that_is_none() -> None:
    with pytest.raises(ValueError, match="clipart:big: the size must be pixels along one side, as in clipart:64"):
        open_images("clipart:big")
