"""Data as strangers have them: hidden files, byte-order marks, odd names and labels, layouts of other tools."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import pickle
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from madformer.data import open_dataset
from madformer.data.images import ImageDataset, UnreadableImageError
from madformer.data.sources import RawSample
from madformer.files.shards import ShardDataset, list_shards, write_shards
from madformer.files.text import decode_text, read_text


def picture(grey: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), grey).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_files(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def read_all(dataset: ImageDataset) -> list[tuple[str, int, str]]:
    samples = (dataset[index] for index in range(len(dataset)))
    return [(sample["key"], sample["label"], sample["caption"]) for sample in samples]


class TestText:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
    def test_marks_are_read_and_not_passed_on(self, tmp_path: Path, encoding: str) -> None:
        (tmp_path / "x.txt").write_bytes("\u00e9ine \U0001f34e\n".encode(encoding))
        assert read_text(tmp_path / "x.txt") == "\u00e9ine \U0001f34e\n"

    def test_big_endian(self) -> None:
        assert decode_text("\ufeff\u00e9".encode("utf-16-be")) == "\u00e9"

    @pytest.mark.parametrize("data", [b"caf\xe9", b"\xff\xfe\x00", b"\xef\xbb\xbf\xff"])
    def test_other_bytes_are_refused_in_a_line_that_names_the_file(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "x.txt").write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.txt: not UTF-\S+ text: byte 0x.. at \d") as caught:
            read_text(tmp_path / "x.txt")
        assert len(str(caught.value).splitlines()) == 1

    def test_endless_text_is_not_read(self) -> None:
        with pytest.raises(ValueError, match="more than 16 MiB"):
            read_text("/dev/zero")

    def test_captions_and_labels_with_a_mark(self, tmp_path: Path) -> None:
        mark = b"\xef\xbb\xbf"
        write_files(tmp_path / "folder", {"a.png": picture(), "a.txt": mark + b"a cat\r\n"})
        assert read_all(open_dataset(tmp_path / "folder", 4)) == [("a.png", -1, "a cat")]
        members = {"a.png": picture(), "a.txt": mark + b"a cat", "a.cls": mark + b"3"}
        record = mark + json.dumps({"caption": "\ufeffa dog", "label": 4}).encode()
        write_tar(tmp_path / "x.tar", members | {"b.png": picture(), "b.json": record})
        assert read_all(open_dataset(tmp_path / "x.tar", 4)) == [("a", 3, "a cat"), ("b", 4, "a dog")]

    def test_halves_of_surrogate_pairs_do_not_reach_the_tokenizer(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "x.tar", {"a.png": picture(), "a.json": b'{"caption": "a \\ud83c cat"}'})
        assert open_dataset(tmp_path / "x.tar", 4)[0]["caption"] == "a ? cat"


class TestFolders:
    def test_hidden_files_and_folders_are_neither_samples_nor_classes(self, tmp_path: Path) -> None:
        files = dict.fromkeys(
            ("cat/1.png", "cat/._1.png", "cat/.ipynb_checkpoints/1-checkpoint.png", "cat/deep/2.png", "dog/3.PNG",
             ".ipynb_checkpoints/4.png", "__MACOSX/cat/._1.png", "__MACOSX/cat/5.png", ".hidden.png", ".Trash/6.png"),
            picture(),
        )  # fmt: skip
        dataset = open_dataset(write_files(tmp_path, files | {".DS_Store": b"", "cat/.DS_Store": b""}), 4)
        assert dataset.class_names == ["cat", "dog"]
        assert read_all(dataset) == [("cat/1.png", 0, "cat"), ("cat/deep/2.png", 0, "cat"), ("dog/3.PNG", 1, "dog")]

    def test_the_order_is_that_of_the_parts_of_the_paths(self, tmp_path: Path) -> None:
        names = ["a/b/1.png", "a/b-1.png", "a/b.png", "a/a.png", "A/1.png", "a b/1.png", "z.png"]
        dataset = open_dataset(write_files(tmp_path, dict.fromkeys(names, picture())), 4)
        in_classes = sorted((name for name in names if "/" in name), key=lambda name: name.split("/"))
        assert [key for key, _, _ in read_all(dataset)] == ["z.png", *in_classes]

    def test_names_that_are_no_utf8(self, tmp_path: Path) -> None:
        folder = os.fsencode(tmp_path / "data")
        os.makedirs(folder + b"/caf\xe9")
        for name in (b"/caf\xe9/\xff.png", b"/caf\xe9/x.png"):
            with open(folder + name, "wb") as file:
                file.write(picture() if b"x" in name else b"damaged")
        with open(folder + b"/caf\xe9/x.txt", "wb") as file:
            file.write(b"a cat")
        dataset = open_dataset(tmp_path / "data", 4, on_error="skip")
        assert dataset.class_names == ["caf\\xe9"]
        assert dataset[0]["key"] == "caf\\xe9/x.png"
        with pytest.raises(UnreadableImageError, match=r"caf\\xe9/\\xff\.png: cannot identify"):
            open_dataset(tmp_path / "data", 4)[1]
        for text in (dataset[0]["key"], dataset.source.name(1), *dataset.class_names):
            text.encode()

    def test_folders_of_splits_are_not_taken_for_classes(self, tmp_path: Path) -> None:
        write_files(tmp_path, {"train/a/1.png": picture(), "val/a/1.png": picture()})
        with pytest.raises(ValueError, match="holds the folders train, val, which would be taken for classes"):
            open_dataset(tmp_path, 4)
        assert open_dataset(tmp_path / "train", 4).class_names == ["a"]

    def test_what_is_no_data_set_says_how_one_is_given(self, tmp_path: Path) -> None:
        (tmp_path / "notes.md").write_text("")
        with pytest.raises(FileNotFoundError, match="hf:NAME"):
            open_dataset(tmp_path, 4)
        (tmp_path / "x.parquet").write_bytes(b"")
        with pytest.raises(FileNotFoundError, match=f"give hf:{tmp_path}") as caught:
            open_dataset(tmp_path, 4)
        assert "\n" not in str(caught.value)

    def test_metadata_that_is_not_read_is_mentioned(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            open_dataset(write_files(tmp_path, {"1.png": picture(), "metadata.jsonl": b"{}"}), 4)
        assert "metadata.jsonl is not read" in caplog.text


class TestShards:
    def test_names_that_are_no_utf8(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "x.tar", {"caf\udce9/a.png": picture(), "caf\udce9/a.\udcff": b""})
        sample = open_dataset(tmp_path / "x.tar", 4)[0]
        assert sample["key"] == "caf\\xe9/a"

    def test_hidden_members_are_left_out(self, tmp_path: Path) -> None:
        names = ("a/1.png", "a/._1.png", "__MACOSX/a/1.png", ".ipynb_checkpoints/2.png", "./b/3.png", ".DS_Store")
        write_tar(tmp_path / "x.tar", dict.fromkeys(names, picture()))
        assert [key for key, _, _ in read_all(open_dataset(tmp_path / "x.tar", 4))] == ["a/1", "./b/3"]

    def test_dots_in_the_extension(self, tmp_path: Path) -> None:
        members = {"000.input.png": picture(255), "000.meta.json": b'{"caption": "a cat", "label": 2}'}
        members |= {"001.mask.png": picture(0), "001.png": picture(255), "001.caption.txt": b"a dog"}
        dataset = open_dataset(write_tar(tmp_path / "x.tar", members), 4)
        assert read_all(dataset) == [("000", 2, "a cat"), ("001", -1, "a dog")]
        assert [float(dataset[index]["image"].mean()) for index in range(2)] == [1, 1]

    def test_two_images_of_one_name_are_refused(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "x.tar", {"000.input.png": picture(), "000.output.png": picture()})
        with pytest.raises(UnreadableImageError, match=r"2 images with this key.*\(input\.png, output\.png\)"):
            open_dataset(tmp_path / "x.tar", 4)[0]

    def test_names_that_all_differ_after_the_first_dot(self, tmp_path: Path) -> None:
        """As many extensions as samples; a table of both would have 9 million places."""
        dataset = ShardDataset(write_tar(tmp_path / "x.tar", {f"{i}.v{i}.png": b"%d" % i for i in range(3000)}))
        assert len(dataset.extensions) == len(dataset) == 3000
        assert dataset[2999] == {"__key__": "2999", "v2999.png": b"2999"}
        assert len(pickle.dumps(dataset)) < 1 << 20

    @pytest.mark.parametrize(
        ("kind", "name"), [("gz", "x.tar.gz"), ("gz", "x.tgz"), ("gz", "x.tar"), ("xz", "x.tar.xz")]
    )
    def test_compressed_shards_are_named_as_such(self, tmp_path: Path, kind: str, name: str) -> None:
        with tarfile.open(tmp_path / name, f"w:{kind}"):  # type: ignore[call-overload]
            pass
        for source in (tmp_path, tmp_path / name):
            with pytest.raises(ValueError, match=rf"{name} is compressed \(\w+\).*unpack it") as caught:
                open_dataset(source, 4)
            assert "\n" not in str(caught.value)

    def test_a_compressed_shard_beside_its_unpacked_twin_is_left_alone(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", {"1.png": picture()})
        (tmp_path / "x.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        assert len(open_dataset(tmp_path, 4)) == 1

    def test_shards_in_subfolders(self, tmp_path: Path) -> None:
        for name in ("a/1.tar", "b/c/0.tar", ".hidden/2.tar"):
            write_tar(tmp_path / name, {f"{name[0]}.png": picture()})
        assert [key for key, _, _ in read_all(open_dataset(tmp_path, 4))] == ["a", "b"]

    def test_globs_in_any_part_and_brackets_that_are_none(self, tmp_path: Path) -> None:
        for name in ("[2024] photos/a.tar", "[2024] photos/b.tar", "2/c.tar", "4/d [1].tar", "deep/er/e.tar"):
            write_tar(tmp_path / name, {"1.png": picture()})
        for pattern, expected in (
            ("[2024] photos", "ab"),
            ("[2024] photos/*.tar", "ab"),
            ("[2024] photos/[b].tar", "b"),
            ("[24]/*.tar", "cd"),
            ("*/c.tar", "c"),
            ("4/d [1].tar", "d"),
            ("**/e.tar", "e"),
            ("?/*.tar", "cd"),
        ):
            assert "".join(path.name[0] for path in list_shards(tmp_path / pattern)) == expected, pattern

    def test_a_damaged_header_is_not_the_end(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "x.tar", {f"{i}.png": picture() for i in range(3)})
        data = bytearray(path.read_bytes())
        data[2 * 1024 + 150] ^= 1  # in the checksum of the third
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.tar: not a readable tar shard \(a damaged header at byte 2048\)"):
            ShardDataset(path)

    def test_a_member_of_any_size_is_refused_before_it_is_read(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "x.tar", {"1.png": picture(), "1.txt": bytes((16 << 20) + 1)})
        with pytest.raises(UnreadableImageError, match="txt has 16777217 bytes, more than 16777216"):
            open_dataset(tmp_path / "x.tar", 4)[0]

    @pytest.mark.parametrize(
        "index", [b"[" * 10_000, b'{"bytes": 1}', b'{"bytes": %d, "samples": [["a", {"png": [0, %d]}]]}']
    )
    def test_an_index_is_not_believed(self, tmp_path: Path, index: bytes) -> None:
        path = write_tar(tmp_path / "x.tar", {"a.png": picture(), "b.png": picture()})
        if b"%d" in index:
            index %= (path.stat().st_size, 1 << 50)
        (tmp_path / "x.index.json").write_bytes(index)
        assert len(ShardDataset(path)) == 2


class TestLabels:
    @pytest.mark.parametrize(
        ("value", "label"),
        [(3, 3), ("3", 3), (3.0, 3), (True, 1), (None, -1), (-1, -1), (float("nan"), -1)],
    )
    def test_a_number_of_a_class(self, tmp_path: Path, value: Any, label: int) -> None:
        write_tar(tmp_path / "x.tar", {"a.png": picture(), "a.json": json.dumps({"label": value}).encode()})
        assert open_dataset(tmp_path / "x.tar", 4)[0]["label"] == label

    @pytest.mark.parametrize("value", [2.5, -2, 1e400, 2**31, "two", 10**300, "9" * 5000])
    def test_what_is_none_is_an_unreadable_sample(self, tmp_path: Path, value: Any) -> None:
        record = {"a.png": picture(), "a.json": json.dumps({"label": value}).encode()}
        with pytest.raises(UnreadableImageError, match=r"x\.tar:a: ") as caught:
            open_dataset(write_tar(tmp_path / "x.tar", record), 4)[0]
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("value", [[1, 2], [0, 1, 0], {"name": "cat"}])
    def test_lists_in_shards_are_refused_at_once(self, tmp_path: Path, value: Any) -> None:
        write_tar(tmp_path / "x.tar", {"a.png": picture(), "a.json": json.dumps({"label": value}).encode()})
        with pytest.raises(ValueError, match=r"x\.tar:a: its label is .* one class for each image"):
            open_dataset(tmp_path / "x.tar", 4)

    def test_a_list_after_numbers_is_an_unreadable_sample(self, tmp_path: Path) -> None:
        members = {"0.png": picture(), "0.json": b'{"label": 1}', "1.png": picture(), "1.json": b'{"label": [1, 2]}'}
        write_tar(tmp_path / "x.tar", members)
        dataset = open_dataset(tmp_path / "x.tar", 4, on_error="skip", max_bad_fraction=1)
        assert (dataset[1]["key"], dataset.num_bad) == ("0", 1)

    def test_names_and_ranges_where_the_classes_are_described(self, tmp_path: Path) -> None:
        members = {"a.png": picture(), "a.cls": b"dog", "b.png": picture(), "b.cls": b"2"}
        write_tar(tmp_path / "x.tar", members)
        (tmp_path / "dataset.json").write_text('{"class_names": ["cat", "dog"]}')
        dataset = open_dataset(tmp_path, 4)
        assert dataset[0]["label"] == 1
        with pytest.raises(UnreadableImageError, match=r"x\.tar:b: the label 2 is not within 0 \.\. 1"):
            dataset[1]

    @pytest.mark.parametrize("text", ["[]", '{"class_names": 3}', '{"class_names": [1]}', "{", "[" * 10_000])
    def test_a_description_that_describes_nothing(self, tmp_path: Path, text: str) -> None:
        write_tar(tmp_path / "x.tar", {"a.png": picture()})
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match=r"dataset\.json|Expecting") as caught:
            open_dataset(tmp_path, 4)
        assert "\n" not in str(caught.value)

    def test_captions_that_are_no_text(self, tmp_path: Path) -> None:
        members = {
            "a.png": picture(),
            "a.json": b'{"caption": {"en": "a cat"}}',
            "b.png": picture(),
            "b.json": b'{"text": 7}',
        }
        dataset = open_dataset(write_tar(tmp_path / "x.tar", members), 4)
        with pytest.raises(UnreadableImageError, match=r"x\.tar:a: the caption \{'en': 'a cat'\} is no text"):
            dataset[0]
        assert dataset[1]["caption"] == "7"

    def test_json_nested_deeply(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "x.tar", {"a.png": picture(), "a.json": b"[" * 100_000})
        with pytest.raises(UnreadableImageError, match="nested too deeply"):
            open_dataset(tmp_path / "x.tar", 4)[0]


class TestHuggingFace:
    @pytest.fixture
    def datasets(self) -> Any:
        return pytest.importorskip("datasets", reason="needs madformer[hf]")

    def rows(self, datasets: Any, **columns: Any) -> Any:
        count = len(next(iter(columns.values())))
        kinds = {"image": datasets.Image()}
        images = {"image": [{"bytes": picture(), "path": None}] * count}
        rows = datasets.Dataset.from_dict(images, features=datasets.Features(kinds))
        for name, values in columns.items():
            rows = rows.add_column(name, values)
        return rows

    def test_a_saved_folder_needs_no_prefix(self, tmp_path: Path, datasets: Any) -> None:
        rows = self.rows(datasets, label=[0, 1], text=["a", "b"])
        rows.save_to_disk(str(tmp_path / "one"))
        datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(str(tmp_path / "both"))
        datasets.DatasetDict(only=rows).save_to_disk(str(tmp_path / "only"))
        for source in (tmp_path / "one", tmp_path / "both", tmp_path / "only", f"hf:{tmp_path}/both:train"):
            assert read_all(open_dataset(source, 4)) == [("00000000", 0, "a"), ("00000001", 1, "b")]
        assert len(open_dataset(f"hf:{tmp_path}/both:test", 4)) == 1
        with pytest.raises(FileNotFoundError, match=r"no data set at hf:.*both:dev: it has the splits train, test"):
            open_dataset(f"hf:{tmp_path}/both:dev", 4)

    @pytest.mark.parametrize(
        ("part", "content", "message"),
        [
            ("state.json", None, r"is not whole, as save_to_disk writes it \(.*No such file.*state.json"),
            ("state.json", b"", r"is not whole.*state.json: Expecting value"),
            ("state.json", b"[]", "is not whole.*state.json: .. is no JSON object"),
            ("state.json", b"{}", "is not whole.*state.json lists no _data_files"),
            ("dataset_info.json", None, "is not whole"),
            ("dataset_info.json", b"x", "is not whole"),
            ("data-00000-of-00001.arrow", None, "is not whole"),
            ("data-00000-of-00001.arrow", b"", "is not whole"),
            ("data-00000-of-00001.arrow", b"ARROW1", "is not whole"),
        ],
    )
    def test_a_saved_folder_that_is_not_whole(
        self, tmp_path: Path, datasets: Any, part: str, content: bytes | None, message: str
    ) -> None:
        self.rows(datasets, label=[0, 1]).save_to_disk(str(tmp_path))
        (tmp_path / part).unlink() if content is None else (tmp_path / part).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            open_dataset(tmp_path, 4)
        assert "\n" not in str(caught.value)

    def test_a_saved_folder_without_rows(self, tmp_path: Path, datasets: Any) -> None:
        rows = self.rows(datasets, label=[0, 1])
        rows.select([]).save_to_disk(str(tmp_path / "one"))
        datasets.DatasetDict(train=rows, test=rows.select([])).save_to_disk(str(tmp_path / "both"))
        for source in (tmp_path / "one", f"hf:{tmp_path}/both:test"):
            with pytest.raises(FileNotFoundError, match="is empty"):
                open_dataset(source, 4)
        assert len(open_dataset(tmp_path / "both", 4)) == 2
        for split in ("train", "test"):
            shutil.rmtree(tmp_path / "both" / split)
        with pytest.raises(ValueError, match="both/train is not whole"):
            open_dataset(tmp_path / "both", 4)

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            ([[0, 1], [1]], "lists"),
            ([[0.0, 1.0], [1.0, 0.0]], "lists"),
            ([0.5, 1.0], "0.5"),
            ([{"a": 1}] * 2, "it holds"),
        ],
    )
    def test_labels_that_are_no_class_are_refused_at_once(
        self, tmp_path: Path, datasets: Any, values: list[Any], reason: str
    ) -> None:
        self.rows(datasets, labels=values).save_to_disk(str(tmp_path))
        with pytest.raises(
            ValueError, match=rf"its column 'labels' is not one class for each image \(.*{reason}"
        ) as caught:
            open_dataset(tmp_path, 4)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("values", "labels", "names"),
        [
            ([2, 0, None], [2, 0, -1], []),
            ([True, False, True], [1, 0, 1], []),
            ([2.0, 0.0, None], [2, 0, -1], []),
            (["2", "0", None], [2, 0, -1], []),
            (["dog", "cat", None], [1, 0, -1], ["cat", "dog"]),
            (["dog ", "cat", ""], [1, 0, -1], ["cat", "dog"]),
        ],
    )
    def test_labels_of_other_types(
        self, tmp_path: Path, datasets: Any, values: list[Any], labels: list[int], names: list[str]
    ) -> None:
        self.rows(datasets, label=values).save_to_disk(str(tmp_path))
        dataset = open_dataset(tmp_path, 4)
        assert [label for _, label, _ in read_all(dataset)] == labels
        assert dataset.class_names == names

    def test_of_several_kinds_of_class_the_one_that_is_called_label(self, tmp_path: Path, datasets: Any) -> None:
        rows = self.rows(datasets, mood=[0, 0], label=[1, 0])
        rows = rows.cast_column("mood", datasets.ClassLabel(names=["calm"]))
        rows.cast_column("label", datasets.ClassLabel(names=["cat", "dog"])).save_to_disk(str(tmp_path))
        dataset = open_dataset(tmp_path, 4)
        assert dataset.class_names == ["cat", "dog"]
        assert [label for _, label, _ in read_all(dataset)] == [1, 0]

    def test_images_that_are_not_declared_as_such(self, tmp_path: Path, datasets: Any) -> None:
        for name, values in (("plain", [picture(255)]), ("struct", [{"bytes": picture(255), "path": "x.png"}])):
            datasets.Dataset.from_dict({"id": [1], "img": values}).save_to_disk(str(tmp_path / name))
            assert float(open_dataset(tmp_path / name, 4)[0]["image"].mean()) == 1
        datasets.Dataset.from_dict({"id": [1]}).save_to_disk(str(tmp_path / "none"))
        with pytest.raises(ValueError, match="has no image column, only id"):
            open_dataset(tmp_path / "none", 4)


class TestKinds:
    def test_what_pillow_reads_is_read_and_what_is_left_out_is_counted(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        kinds = {
            "jfif": "JPEG",
            "jpe": "JPEG",
            "jp2": "JPEG2000",
            "tga": "TGA",
            "ico": "ICO",
            "pgm": "PPM",
            "AVIF": "AVIF",
        }
        for extension, name in kinds.items():
            Image.new("L" if extension == "pgm" else "RGB", (16, 16), "white").save(tmp_path / f"x.{extension}", name)
        for left_out in ("a.heic", "b.HEIC", "c.svg", "notes.md"):
            (tmp_path / left_out).write_bytes(b"x")
        with caplog.at_level("WARNING"):
            dataset = open_dataset(tmp_path, 4)
        assert [record.getMessage() for record in caplog.records] == [
            f"{tmp_path}: 2 .heic, 1 .svg are left out; convert them to have them read"
        ]
        assert [float(item["image"].mean()) for item in dataset] == pytest.approx([1] * len(kinds), abs=0.02)
        for extension in kinds:
            (tmp_path / f"x.{extension}").unlink()
        with pytest.raises(FileNotFoundError, match=r"no images \(only 2 \.heic, 1 \.svg, which are not read"):
            open_dataset(tmp_path, 4)

    def test_names_of_classes_stay_in_a_line(self, tmp_path: Path) -> None:
        dataset = open_dataset(write_files(tmp_path, {"a\nb/1.png": b"", "c\x1b[31m\u2028/2.png": b""}), 4)
        assert dataset.class_names == ["a\\nb", "c\\x1b[31m\\u2028"]
        assert dataset.source.name(0).splitlines() == [f"{tmp_path}/a\\nb/1.png"]


class TestSummary:
    def test_of_class_folders(self, tmp_path: Path) -> None:
        summary = open_dataset(write_files(tmp_path, {"a/1.png": b"", "b/2.png": b"", "b/2.txt": b"x"}), 4).summary()
        assert (summary.num_samples, summary.num_labelled, summary.num_captioned) == (2, 2, 1)
        assert (summary.num_classes, summary.class_names, summary.names_as_captions) == (2, ("a", "b"), True)
        assert summary.complete

    def test_of_a_flat_folder(self, tmp_path: Path) -> None:
        summary = open_dataset(write_files(tmp_path, {"1.png": b"", "2.png": b""}), 4).summary()
        assert (summary.num_labelled, summary.num_captioned, summary.num_classes) == (0, 0, 0)
        assert not summary.names_as_captions

    def test_of_shards(self, tmp_path: Path) -> None:
        samples = [{"__key__": f"{i}", "png": b"", "cls": i % 7, **({"txt": "x"} if i % 2 else {})} for i in range(70)]
        write_shards(samples, tmp_path, "x", 30)
        summary = open_dataset(tmp_path, 4).summary()
        assert (summary.num_examined, summary.num_labelled, summary.num_captioned, summary.num_classes) == (
            70,
            70,
            35,
            7,
        )
        some = open_dataset(tmp_path, 4).summary(limit=10)
        assert (some.num_samples, some.num_examined, some.complete) == (70, 10, False)

    def test_of_shards_with_a_damaged_label(self, tmp_path: Path) -> None:
        write_shards([{"__key__": "a", "png": b"", "cls": 1}, {"__key__": "b", "png": b"", "cls": "x"}], tmp_path, "x")
        summary = open_dataset(tmp_path, 4).summary()
        assert (summary.num_labelled, summary.num_classes) == (1, 2)
        assert "is no number of a class" in summary.problem

    def test_of_rows(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets", reason="needs madformer[hf]")
        rows = TestHuggingFace().rows(datasets, label=[4, 1], text=["a", ""])
        rows.save_to_disk(str(tmp_path))
        summary = open_dataset(tmp_path, 4).summary()
        assert (summary.num_labelled, summary.num_captioned, summary.num_classes) == (2, 1, 5)
        self_only = TestHuggingFace().rows(datasets, other=[1, 2])
        self_only.save_to_disk(str(tmp_path / "bare"))
        assert open_dataset(tmp_path / "bare", 4).summary().num_labelled == 0


class Endless:
    """Ten million samples, all but a few of which are one picture."""

    root, shard_lengths = None, None

    def __init__(self, bad: set[int]) -> None:
        self.class_names: list[str] = []
        self.bad, self.reads, self.data = bad, 0, picture(255)

    def __len__(self) -> int:
        return 10_000_000

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> RawSample:
        self.reads += 1
        return RawSample(str(index), b"" if index in self.bad else self.data)


def test_an_item_of_ten_million_costs_what_its_picture_does() -> None:
    """Nothing is built that is as long as the data set; the next readable one is found, around the end as well."""
    import tracemalloc

    source = Endless({5, 6, 9_999_999})
    dataset = ImageDataset(source, 4, on_error="skip")  # type: ignore[arg-type]
    tracemalloc.start()
    keys = [dataset[index]["key"] for index in (0, 5, 9_999_998, 9_999_999, -1)]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert keys == ["0", "7", "9999998", "0", "0"]
    assert (source.reads, dataset.num_bad) == (8, 3)
    assert torch.equal(dataset[3]["image"], torch.ones(3, 4, 4))
