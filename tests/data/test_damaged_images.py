"""No bytes of a picture escape the policy for unreadable images, and damaged metadata do a sound picture no harm."""

from __future__ import annotations

import base64
import io
import json
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from madformer.data.images import UnreadableImageError, decode_image, open_dataset
from madformer.data.metadata import without_metadata
from madformer.data.pixels import decode
from tests.helpers import fuzzing
from tests.helpers.fuzz_seeds import png_chunk, sound_files

# files on which earlier readers failed, found by `fuzzing`
CORPUS = json.loads((Path(__file__).parent / "damaged_images.json").read_text())


@pytest.mark.parametrize("case", CORPUS, ids=[f"{case['format']} {case['was']}" for case in CORPUS])
def test_what_failed_before(case: dict[str, Any]) -> None:
    data = base64.b64decode(case["file"])
    if "sound" in case:
        fuzzing.check_damaged_metadata(base64.b64decode(case["sound"]), data, case["orientation"])
    else:
        fuzzing.check_any_damage(data)


def test_a_few_hundred_mutated_files() -> None:
    outcomes = fuzzing.fuzz(range(10**6, 10**6 + 400))
    assert [case for case in outcomes if case[2].startswith("failed")] == []
    assert sum(outcome == "equal" for _, _, outcome in outcomes) == 200
    assert {"read", "refused"} <= {outcome.partition(":")[0] for _, _, outcome in outcomes}


def test_mutated_shards() -> None:
    outcomes = fuzzing.fuzz(range(10**6, 10**6 + 120), fuzzing.run_shard)
    assert [case for case in outcomes if case[2].startswith("failed")] == []
    assert {(kind, outcome.partition(":")[0]) for _, kind, outcome in outcomes} == {
        (kind, outcome) for kind in ("shards", "latents") for outcome in ("read", "refused")
    }


@pytest.mark.parametrize("kind", sorted(sound_files()))
def test_sound_files_are_read_and_lose_nothing_with_their_metadata(kind: str) -> None:
    for data in sound_files()[kind]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image = decode(data)
        stripped, orientation = without_metadata(data)
        assert (image.mode, orientation) == ("RGB", 1)
        assert np.array_equal(np.asarray(decode(stripped)), np.asarray(image))
        if kind in fuzzing.METADATA:
            with Image.open(io.BytesIO(stripped)) as opened:
                assert not {"exif", "icc_profile", "comment", "xmp", "prompt"} & set(opened.info)


def test_raised_by_a_decoder_whatever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped and counted, and reported in one line that names the file."""
    for number, data in enumerate(sound_files()["PNG"][:3]):
        (tmp_path / f"{number}.png").write_bytes(data)
    sound = decode_image(sound_files()["PNG"][0], (8, 8))
    for error in (KeyError("x"), RuntimeError("a\nb"), RecursionError("deep"), MemoryError(), AttributeError("no", 1)):

        def broken(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr("madformer.data.pixels.Image.open", broken)
            with pytest.raises(UnreadableImageError, match=rf"0\.png: {type(error).__name__}") as caught:
                open_dataset(tmp_path, 8)[0]
            assert "\n" not in str(caught.value)
        dataset = open_dataset(tmp_path, 8, on_error="skip")
        assert torch.equal(dataset[0]["image"], sound)


def test_interrupts_are_not_taken_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("madformer.data.pixels.Image.open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode(sound_files()["PNG"][0])


@pytest.mark.parametrize("name", ["zTXt", "iTXt", "iCCP"])
def test_text_that_unpacks_to_a_flood_is_not_unpacked(name: str) -> None:
    sound = sound_files()["PNG"][3]
    body = b"k\0\0" if name != "iTXt" else b"k\0\1\0\0\0"
    flood = png_chunk(name.encode(), body + zlib.compress(bytes(40 << 20), 1))
    data = sound[:33] + flood * 3 + sound[33:]
    tracemalloc.start()
    assert np.array_equal(np.asarray(decode(data)), np.asarray(decode(sound)))
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_a_directory_whose_entries_overlap_takes_no_memory() -> None:
    """5,000 tags that each claim the same 60,000 bytes: 300 MB for whoever reads them all."""
    entries = b"".join(struct.pack("<HHII", 1000 + tag, 7, 60_000, 8) for tag in range(5000))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 5000) + entries
    data = sound_files()["JPEG"][1]
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    tracemalloc.start()
    assert np.array_equal(np.asarray(decode(data[:2] + segment + data[2:])), np.asarray(decode(data)))
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1)])
def test_pictures_of_any_shape(shape: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", shape, (255, 0, 0)).save(buffer, "PNG")
    image = decode_image(buffer.getvalue(), (8, 16))
    assert (image[0] == 1).all()
    assert (image[1:] == -1).all()


@pytest.mark.parametrize("content", [b"", b"\0" * 3, b"\0\0\0\x12resc" + bytes(10), b"\0\0\0\x09rescx"])
def test_a_damaged_resolution_of_jpeg2000(content: bytes) -> None:
    sound = sound_files()["JPEG2000"][0]
    at = sound.index(b"jp2h") - 4
    (size,) = struct.unpack_from(">I", sound, at)
    box = struct.pack(">I4s", 8 + len(content), b"res ") + content
    header = struct.pack(">I", size + len(box)) + sound[at + 4 : at + size] + box
    damaged = sound[:at] + header + sound[at + size :]
    assert np.array_equal(np.asarray(decode(damaged)), np.asarray(decode(sound)))


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(UnreadableImageError, match=r"^cannot identify image file$"):
        decode(b"")
