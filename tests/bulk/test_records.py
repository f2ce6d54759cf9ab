"""What pictures say of how they were drawn, and what `madformer info` makes of it and of other files."""

from __future__ import annotations

import io
import json
import shlex
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import save_file

import madformer
from madformer.cli.info import command
from madformer.cli.main import main
from madformer.conditioning.tokenizer import ByteTokenizer
from madformer.config import TextConfig
from madformer.engine.schedulers import default_scheduler
from madformer.files.shards import ShardDataset
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from tests.helpers.testing import perturb, small_config, small_vae

PROMPTS = ["Käse 🧀 'mit' \"Loch\"", "--a cat; $(rm -rf ~)"]
OPTIONS = ["--guidance", "2.5", "--negative-prompt", "blur", "--guidance-interval", "0,900", "--class", "Food & Drink"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with text and classes."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    told = {"text": TextConfig(257, 8), "time_conditioning": "unet+adaln", "num_classes": 2}
    config = small_config(num_blocks=1, **told)
    parts = perturb(MADFormer(config)), small_vae(block_out_channels=(8,)), default_scheduler("epsilon")
    MADFormerPipeline(*parts, ByteTokenizer(), ["Flags", "Food & Drink"]).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def sample(model: Path, *options: object) -> None:
    common = ["sample", "--model", model, "--steps", 2, "--precision", "exact", "--device", "cpu", "--json"]
    assert main([str(option) for option in (*common, *options)]) == 0


@pytest.fixture(scope="module")
def drawn(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures and a grid of them."""
    out = tmp_path_factory.mktemp("private")
    sample(
        model,
        *prompts(PROMPTS),
        *OPTIONS,
        "--num-images",
        3,
        "--seed",
        2**32,
        "--out",
        out / "run",
        "--grid",
        out / "g.png",
    )
    return out


def prompts(texts: list[str]) -> list[str]:
    return [f"--prompt={text}" for text in texts]


def info(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["info", "--json", str(path)]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    capsys.readouterr()
    assert main(["info", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_a_picture_says_how_it_was_drawn(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.loads((drawn / "run" / "manifest.json").read_text())["settings"]
    for image in range(3):
        file = drawn / "run" / f"{2**32 + image}.png"
        expected = {
            "version": madformer.__version__, "seed": 2**32 + image, "prompt": PROMPTS[image % 2], "labels": 1,
            "class": "Food & Drink", "guidance_scale": 2.5, "steps": 2, "scheduler": "DPMSolverMultistepScheduler",
            "precision": "exact", "batch_size": 16, "model": settings["model"], "negative_prompt": "blur",
            "guidance_interval": [0.0, 900.0], "height": 2, "width": 2, "vae": settings["vae"],
        }  # fmt: skip
        assert info(capsys, file)["picture"] == expected
        with Image.open(file) as picture:
            assert json.loads(picture.text["madformer"]) == expected
            assert picture.size == (2, 2)
            assert picture.text["Software"] == f"madformer {madformer.__version__}"
        assert str(drawn).encode() not in file.read_bytes()
    grid = info(capsys, drawn / "g.png")["picture"]
    assert (grid["seed"], grid["num_images"], grid["prompt"]) == (2**32, 3, PROMPTS)
    assert (grid["rows"], grid["columns"], grid["labels"]) == (2, 2, [1])


def test_the_command_draws_it_again(
    model: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shell reads it, whatever is in the prompt."""
    monkeypatch.chdir(tmp_path)
    for file in (drawn / "run" / f"{2**32 + 1}.png", drawn / "g.png"):
        words = shlex.split(info(capsys, file)["command"])
        assert words[:4] == ["madformer", "sample", "--model", "MODEL"]
        assert main([*words[1:3], str(model), *words[4:], "--device", "cpu"]) == 0
        again, first = (np.asarray(Image.open(path)).astype(int) for path in (tmp_path / "picture.png", file))
        np.testing.assert_allclose(again, first, atol=1)
        assert info(capsys, tmp_path / "picture.png")["picture"]["prompt"] == info(capsys, file)["picture"]["prompt"]


@pytest.mark.parametrize(
    "record", [{}, {"seed": "x"}, {"seed": 1, "scheduler": "X", "prompt": "\x1b[2J"}, {"seed": None}]
)
def test_no_command_where_there_is_none(record: dict[str, Any]) -> None:
    assert command(record) is None


def test_shards_and_latents_say_it_too(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*prompts(PROMPTS), *OPTIONS, "--num-images", 2]
    sample(model, *options, "--format", "wds", "--out", tmp_path / "shards")
    shard = tmp_path / "shards" / "images-000000.tar"
    dataset = ShardDataset(shard)
    for image in range(2):
        record = info(capsys, shard / f"{image:08d}.png")["picture"]
        assert record == json.loads(dataset[image]["json"])
        assert record["prompt"] == PROMPTS[image]
    assert info(capsys, shard)["shard"] == {
        "samples": 2, "holds": ["json", "png"], "first": str(shard / "00000000.png"),
    }  # fmt: skip
    sample(model, *options, "--latents", "--out", tmp_path / "latents")
    file = tmp_path / "latents" / "00000001.safetensors"
    record = info(capsys, file)["picture"]
    assert (record["prompt"], record["seed"]) == (PROMPTS[1], 1)
    assert "height" not in record
    with safe_open(file, "pt") as stored:
        assert json.loads(stored.metadata()["madformer"]) == record
    assert info(capsys, tmp_path / "latents")["run"]["num_images"] == 2


def test_a_prompt_of_any_length(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer than what Pillow would unpack."""
    text = "".join(chr(0x4E00 + index % 20000) for index in range(600_000))
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    sample(model, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "run")
    assert info(capsys, tmp_path / "run" / "00000000.png")["picture"]["prompt"] == text


def test_the_same_pictures_are_the_same_bytes(model: Path, drawn: Path, tmp_path: Path) -> None:
    sample(model, *prompts(PROMPTS), *OPTIONS, "--num-images", 3, "--seed", 2**32, "--out", tmp_path / "elsewhere")
    for file in (drawn / "run").glob("*.png"):
        assert (tmp_path / "elsewhere" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", ["png", "wds", "latents"])
def test_a_folder_from_before_goes_on_as_it_began(model: Path, tmp_path: Path, kind: str) -> None:
    """Its manifest knows of no records; the rest of its files hold what they would have held."""
    options = {"png": [], "wds": ["--format", "wds"], "latents": ["--latents"]}[kind]
    run = [*prompts(PROMPTS), *options, "--out", tmp_path]
    sample(model, *run, "--num-images", 1)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["settings"].pop("recorded")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    sample(model, *run, "--num-images", 2)
    assert "recorded" not in json.loads((tmp_path / "manifest.json").read_text())["settings"]
    if kind == "latents":
        with safe_open(tmp_path / "00000001.safetensors", "pt") as stored:
            assert stored.metadata() is None
        return
    if kind == "wds":
        sample_of = ShardDataset(tmp_path / "images-000000.tar")[1]
        origin = json.loads(sample_of["json"])
        assert origin.keys() == {"seed", "steps", "scheduler", "precision", "model", "prompt"}
        assert (origin["seed"], origin["prompt"]) == (1, PROMPTS[1])
        data = sample_of["png"]
    else:
        data = (tmp_path / "00000001.png").read_bytes()
    plain = io.BytesIO()
    Image.fromarray(np.asarray(Image.open(io.BytesIO(data)))).save(plain, "PNG")
    assert data == plain.getvalue()


def test_a_folder_whose_images_would_change_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun when 2^32 drew seed 0's image."""
    run = [*prompts(PROMPTS), "--seed", 2**32 - 1, "--out", tmp_path]
    sample(model, *run)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["settings"]["recorded"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    arguments = ["sample", "--model", model, "--steps", 2, "--precision", "exact", "--device", "cpu", "--json", *run]
    assert main([*map(str, arguments), "--num-images", "2"]) == 1
    assert "was begun when seeds from 2^32 on drew others' images" in capsys.readouterr().err
    assert main([*map(str, arguments)]) == 0


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_bad(folder: Path, good: bytes) -> dict[str, bytes]:
    """Files of other tools, damaged files and files that are no pictures, by what is said of them."""
    picture = Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8))

    def saved(kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        return buffer.getvalue()

    def text(value: str, keyword: str = "madformer") -> PngInfo:
        info = PngInfo()
        info.add_itxt(keyword, value)
        return info

    save_file({"latents": torch.zeros(4)}, folder / "x.safetensors")
    other = (folder / "x.safetensors").read_bytes()
    middle = good.index(b"IDAT") + 10
    none = "madformer sample did not write it"
    return {
        f"other.png: {none}": saved("PNG", pnginfo=text("a cat", "parameters")),
        f"other.jpg: {none}": saved("JPEG"),
        f"other.webp: {none}": saved("WEBP"),
        f"other.gif: {none}": saved("GIF"),
        f"x.safetensors: {none}": other,
        "list.png: its record of how it was drawn is damaged": saved("PNG", pnginfo=text("[1]")),
        "json.png: its record of how it was drawn is damaged": saved("PNG", pnginfo=text('{"seed": 1')),
        "deep.png: its record of how it was drawn is damaged": saved("PNG", pnginfo=text("[" * 100_000)),
        "short.png: is a damaged picture": good[:middle],
        "begun.png: is a damaged picture": good[:20],
        "flipped.png: is a damaged picture": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        "text.png: is no picture": b"hello",
        "empty.png: is no picture": b"",
        "short.safetensors: is a damaged file of latents": other[:-1],
        "tiny.safetensors: is a damaged file of latents": b"123",
        "huge.safetensors: is a damaged file of latents": struct.pack("<Q", 2**62) + b"{}",
        "list.safetensors: is a damaged file of latents": struct.pack("<Q", 2) + b"[]",
        "bad.tar: not a readable tar shard": b"hello",
        "bomb.png: is a damaged picture": good[:8]
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 10**9, 10**9, 8, 2, 0, 0, 0)),
    }


def test_what_is_no_picture_of_ours(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (drawn / "run" / f"{2**32}.png").read_bytes()
    for told, data in make_bad(tmp_path, good).items():
        name, _, message = told.partition(": ")
        (tmp_path / name).write_bytes(data)
        line = refused(capsys, tmp_path / name)
        assert message in line, (name, line)
        assert name in line
    assert "No such file" in refused(capsys, tmp_path / "none.png")
    assert "holds no 00000009.png" in refused(capsys, make_tar(tmp_path, good) / "00000009.png")
    assert "holds no model" in refused(capsys, tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 1, "settings": [], "num_images": 3, "complete": true}')
    assert "is no manifest of a sampling run" in refused(capsys, tmp_path)


def make_tar(folder: Path, data: bytes) -> Path:
    from madformer.files.shards import write_shard

    write_shard([{"__key__": "00000000", "png": data}], folder / "images-000000.tar")
    return folder / "images-000000.tar"


def test_a_terminal_gets_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A record of somebody else's may hold what moves the cursor."""
    info = PngInfo()
    info.add_itxt("madformer", json.dumps({"seed": 1, "prompt": "\x1b[2J\nred"}))
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / "x.png", pnginfo=info)
    assert main(["info", str(tmp_path / "x.png")]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{'seed':<20} 1", f"{'prompt':<20} '\\x1b[2J\\nred'"]


def test_a_model_may_be_named_alone(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert info(capsys, model)["model"]["num_classes"] == 2
