"""Sets of images from anywhere, their features, and what cannot be read."""

from __future__ import annotations

import weakref
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from madformer.evaluation import extract, open_images
from madformer.evaluation.extractors import Extractor
from madformer.evaluation.images import Part
from madformer.files.shards import KEY, write_shards
from tests.helpers.evaluation_cases import Tiny, pictures, tiny_extractor, write_batch, write_folder

PART = 8


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("madformer.evaluation.images.PART", PART)


class Counting(Tiny):
    """Counts the images that it sees; raises at one."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.seen, self.stop_at = 0, stop_at

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        self.seen += len(pixels_BCHW)
        if self.stop_at is not None and self.seen > self.stop_at:
            raise KeyboardInterrupt
        return super().forward(pixels_BCHW)


def counting(stop_at: int | None = None) -> tuple[Extractor, Counting]:
    plain, network = tiny_extractor(), Counting(stop_at)
    fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    return Extractor(**{**fields, "network": network}), network


def test_every_packaging_gives_the_same_features(tmp_path: Path) -> None:
    images = pictures(PART + 9)
    folder, batch = write_folder(tmp_path / "folder", images), write_batch(tmp_path / "batch.npz", images)
    samples = [{KEY: f"{i:05}", "png": (folder / f"{i:05}.png").read_bytes()} for i in range(len(images))]
    write_shards(samples, tmp_path / "shards", "images", 30)
    extractor = tiny_extractor()
    prepared = torch.stack([extractor.prepare(Image.fromarray(image)) for image in images])
    with torch.inference_mode():
        expected = extractor.network(prepared).numpy()
    hashes = {}
    for source in (folder, tmp_path / "shards", batch):
        found = extract(open_images(source), extractor)
        assert found.features_ND.dtype == np.float32
        np.testing.assert_allclose(found.features_ND, expected, rtol=0, atol=1e-6)
        assert (len(found), found.image_size, found.num_computed) == (len(images), (16, 16), len(images))
        hashes[source] = found.hash
    assert hashes[folder] == hashes[tmp_path / "shards"]
    for source in (folder, batch):
        np.testing.assert_array_equal(extract(open_images(source, 7), extractor).features_ND, found.features_ND[:7])
        # 17 images: 0, 4, 8 and 12 of them
        spread = extract(open_images(source, 4, spread=True), extractor)
        np.testing.assert_array_equal(spread.features_ND, found.features_ND[[0, 4, 8, 12]])


def test_features_are_made_once(tmp_path: Path) -> None:
    """Of a set that grew the new part alone; of a picture that changed its part, and of a damaged file its own."""
    images, cache = pictures(2 * PART + 5), tmp_path / "cache"
    folder = write_folder(tmp_path / "folder", images[: 2 * PART])
    extractor, network = counting()
    first = extract(open_images(folder), extractor, cache=cache)
    assert network.seen == first.num_computed == 2 * PART
    assert first.images_per_second
    again = extract(open_images(folder), extractor, cache=cache)
    assert network.seen == 2 * PART
    assert (again.num_computed, again.images_per_second, again.hash) == (0, None, first.hash)
    np.testing.assert_array_equal(again.features_ND, first.features_ND)

    write_folder(folder, images)
    assert extract(open_images(folder), extractor, cache=cache).num_computed == 5
    Image.fromarray(images[1]).save(folder / "00000.png")
    changed = extract(open_images(folder), extractor, cache=cache)
    assert changed.num_computed == PART
    assert changed.hash != first.hash
    np.testing.assert_array_equal(changed.features_ND[0], changed.features_ND[1])

    for part in cache.rglob("*.safetensors"):
        part.write_bytes(part.read_bytes()[:-1])
    mended = extract(open_images(folder), extractor, cache=cache)
    assert mended.num_computed == len(images)
    np.testing.assert_array_equal(mended.features_ND, changed.features_ND)


def test_another_extractor_has_features_of_its_own(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", pictures(3))
    extract(open_images(folder), tiny_extractor(), cache=tmp_path / "cache")
    assert extract(open_images(folder), tiny_extractor("other"), cache=tmp_path / "cache").num_computed == 3


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    folder, cache = write_folder(tmp_path / "folder", pictures(3 * PART)), tmp_path / "cache"
    extractor, network = counting(stop_at=2 * PART + 3)
    with pytest.raises(KeyboardInterrupt):
        extract(open_images(folder), extractor, cache=cache)
    network.stop_at, network.seen = None, 0
    found = extract(open_images(folder), extractor, cache=cache)
    assert network.seen == found.num_computed == PART
    np.testing.assert_array_equal(found.features_ND, extract(open_images(folder), extractor).features_ND)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".safetensors"]


def test_images_do_not_pile_up_in_memory() -> None:
    """However many there are, no more of them live than are being looked at."""
    alive: set[int] = set()
    most = 0

    def made(count: int) -> Iterator[Image.Image]:
        nonlocal most
        for number in range(count):
            image = Image.new("RGB", (20, 20))
            alive.add(number)
            weakref.finalize(image, alive.discard, number)
            most = max(most, len(alive))
            yield image

    class Many:
        name, drawn = "many", dict[str, Any]()

        def __len__(self) -> int:
            return 400

        def parts(self) -> Iterator[Part]:
            for number in range(2):
                yield Part(f"{number:064x}", 200, lambda: made(200))

    assert len(extract(Many(), tiny_extractor())) == 400
    assert most <= 3 * 8  # and not the 200 of a part


def test_threads_change_no_feature() -> None:
    """However many look, and whether pictures are made meanwhile; and PyTorch has as many threads as before."""
    images, found = pictures(PART + 5), []

    class Made:
        name, drawn, looked_at = "made", dict[str, Any](), 0

        def __len__(self) -> int:
            return len(images)

        def parts(self) -> Iterator[Part]:
            for first in (0, PART):
                some = images[first : first + PART]
                yield Part(f"{first:064x}", len(some), lambda some=some: map(Image.fromarray, some))

    before = torch.get_num_threads()
    for threads, alone in ((1, True), (1, False), (3, True), (3, False)):
        torch.set_num_threads(threads)
        try:
            found.append(extract(Made(), tiny_extractor(), alone=alone).features_ND)
            assert torch.get_num_threads() == threads
            # and those that a thread begins with which is begun later
            with ThreadPoolExecutor(1) as other:
                assert other.submit(torch.get_num_threads).result() == threads
        finally:
            torch.set_num_threads(before)
        np.testing.assert_array_equal(found[0], found[-1])


def not_a_number(folder: Path) -> Path:
    return write_batch(folder / "nan.npz", np.full((3, 8, 8, 3), np.nan, np.float32))


def of_other_names(folder: Path) -> Path:
    np.savez(folder / "names.npz", images=pictures(3), labels=np.arange(3))
    return folder / "names.npz"


def cut_off(folder: Path) -> Path:
    path = folder / "cut.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"shape": (300, 16, 16, 3), "fortran_order": False, "descr": "|u1"})
        file.write(bytes(100 * 16 * 16 * 3))
    return path


def no_archive(folder: Path) -> Path:
    (folder / "text.npz").write_text("text")
    return folder / "text.npz"


def mixed(folder: Path) -> Path:
    write_folder(folder / "mixed", pictures(12))
    Image.new("RGB", (16, 20)).save(folder / "mixed" / "00011.png")
    return folder / "mixed"


def unreadable(folder: Path) -> Path:
    write_folder(folder / "unreadable", pictures(5))
    (folder / "unreadable" / "00003.png").write_bytes(b"not a picture")
    return folder / "unreadable"


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def flat(folder: Path) -> Path:
    return write_batch(folder / "grey.npz", pictures(4)[..., 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (not_a_number, "nan.npz: arr_0 must hold bytes (uint8) from 0 to 255, got float32"),
        (of_other_names, "names.npz is no batch of images: it holds images, labels, where arr_0 is looked for"),
        (cut_off, "cut.npz is damaged: it ends within arr_0"),
        (no_archive, "text.npz is no batch of images: File is not a zip file"),
        (flat, "grey.npz: arr_0 must have the shape (images, height, width, 3), got (4, 16, 16)"),
        (mixed, "mixed holds images of 16 x 16 and 20 x 16 pixels: a figure is of images of one size"),
        (unreadable, "00003.png: cannot identify image file"),
        (empty, "holds no .tar shards and no images"),
        (lambda folder: folder / "absent", "no data set at"),
        (lambda folder: folder / "absent.npz", "No such file"),
        (lambda folder: "emoji:big", "emoji:big: the size must be pixels along one side, as in emoji:64"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else None,
)
def test_what_cannot_be_read_is_one_line(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        extract(open_images(make(tmp_path)), tiny_extractor(), cache=tmp_path / "cache")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_more_than_there_are(tmp_path: Path) -> None:
    folder, batch = write_folder(tmp_path / "folder", pictures(3)), write_batch(tmp_path / "b.npz", pictures(3))
    for source in (folder, batch):
        with pytest.raises(ValueError, match="has 3 images, and 4 are asked for"):
            open_images(source, 4)


def test_features_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    extractor, network = counting()
    network.body[0].weight.fill_(torch.nan)
    folder = write_folder(tmp_path / "folder", pictures(3))
    with pytest.raises(FloatingPointError, match="tiny makes features that are not finite"):
        extract(open_images(folder), extractor, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
