"""Latents on the disk: what the VAE says, to the dtype's rounding; the same bytes however the writer was stopped."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader

from madformer.cli.main import main
from madformer.config import tiny
from madformer.data import open_dataset
from madformer.data.encoding import EncodingReport, write_latents
from madformer.data.latents import LatentDataset, LatentDescription, holds_latents
from madformer.files.shards import ShardDataset, index_path
from madformer.vae import encode, load_vae
from tests.helpers.killing import Kill, statuses
from tests.helpers.testing import small_vae

NUM_IMAGES, BAD = 23, 9
SIZE = 16
# batches that straddle nothing, a last batch and a last shard that are not full, a bad image in the middle
OPTIONS = ["--batch-size", 2, "--shard-size", 5, "--num-workers", 0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes; one image has a caption, one is no image."""
    root = tmp_path_factory.mktemp("source")
    random = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        folder = root / ("bird" if index < 12 else "cat")
        folder.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"{index:02d}.png")
    (root / "bird" / "03.txt").write_text("a wren")
    (root / "bird" / f"{BAD:02d}.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    small_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(source: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    assert main(command(source, vae_folder, out)) == 0
    return out


def command(source: Path, vae: Path, out: Path, *options: object) -> list[str]:
    arguments = ["data", "latents", "--data", source, "--vae", vae, "--image-size", SIZE, "--out", out]
    return [str(argument) for argument in (*arguments, "--device", "cpu", *OPTIONS, *options)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the locks, which are empty."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".lock")}


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


def error_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 1
    return capsys.readouterr().err.splitlines()[-1]


# What is written


def numbers() -> list[int]:
    return [index for index in range(NUM_IMAGES) if index != BAD]


@pytest.mark.parametrize(("dtype", "resolution"), [("float16", 2.0**-11), ("float32", 0.0)])
def test_what_the_vae_says_to_the_dtypes_rounding(
    source: Path, vae_folder: Path, unbroken: Path, tmp_path: Path, dtype: str, resolution: float
) -> None:
    """Of the images, and of the mirrored images: those are not the mirrored latents."""
    folder = unbroken
    if dtype == "float32":
        folder = tmp_path
        assert main(command(source, vae_folder, folder, "--dtype", dtype)) == 0
    latents, images, vae = LatentDataset(folder), open_dataset(source, SIZE), load_vae(vae_folder)
    assert (len(latents), latents.num_bad) == (NUM_IMAGES - 1, 1)
    smallest = torch.finfo(torch.float16).smallest_normal
    for index, number in enumerate(numbers()):
        image = images[number]["image"][None]
        for flipped in (False, True):
            expected = encode(vae, image.flip(-1) if flipped else image)
            read = latents.read(index, flipped=flipped)
            for name, exact in zip(("mean", "deviation"), expected, strict=True):
                assert read[name].dtype == torch.float32
                # oneDNN rounds by the batch; half of a unit in the last place, below 2**-14 of the last subnormal one
                limit = resolution * exact[0].abs().clamp(min=smallest if resolution else 0) + 2e-6
                assert ((read[name] - exact[0]).abs() <= limit).all(), (number, name, flipped)
        mirrored = latents.read(index)["mean"].flip(-1)
        assert (latents.read(index, flipped=True)["mean"] - mirrored).abs().max() > 0.01


def test_labels_captions_keys_and_description(unbroken: Path, source: Path) -> None:
    latents = LatentDataset(unbroken)
    assert latents.class_names == ["bird", "cat"]
    assert [latents[i]["label"] for i in range(len(latents))] == [int(number >= 12) for number in numbers()]
    assert (latents[3]["caption"], latents[4]["caption"], latents[3]["key"]) == ("a wren", "bird", "bird/03.png")
    assert latents.shard_lengths == [5, 4, 5, 5, 3]
    description = latents.description
    assert (description.source, description.num_images) == (str(source), NUM_IMAGES)
    assert (description.latent_shape, description.dtype, description.flips) == ((4, 8, 8), "float16", True)
    assert holds_latents(unbroken)
    assert not holds_latents(source)


def test_members_are_standard(unbroken: Path) -> None:
    """What any WebDataset reader sees."""
    sample = ShardDataset(unbroken)[3]
    assert sample.keys() == {"__key__", "json", "npy", "flip.npy"}
    assert sample["__key__"] == "00000003"
    assert json.loads(sample["json"]) == {"key": "bird/03.png", "label": 0, "caption": "a wren"}
    moments = np.load(io.BytesIO(sample["npy"]))
    assert (moments.shape, moments.dtype) == ((2, 4, 8, 8), np.float16)
    assert np.array_equal(moments[0].astype(np.float32), LatentDataset(unbroken)[3]["mean"].numpy())


def test_without_flips(source: Path, vae_folder: Path, unbroken: Path, tmp_path: Path) -> None:
    assert main(command(source, vae_folder, tmp_path, "--no-flip")) == 0
    latents, both = LatentDataset(tmp_path), LatentDataset(unbroken)
    assert ShardDataset(tmp_path).extensions == ["json", "npy"]
    assert torch.equal(latents[7]["mean"], both[7]["mean"])
    with pytest.raises(ValueError, match="holds no flips: it was written with --no-flip"):
        latents.read(0, flipped=True)


def test_workers_read_the_same(unbroken: Path) -> None:
    latents = LatentDataset(unbroken)
    latents[0]
    assert torch.equal(pickle.loads(pickle.dumps(latents))[5]["mean"], latents[5]["mean"])
    loaded = [sample for batch in DataLoader(latents, batch_size=4, num_workers=2) for sample in batch["mean"]]
    assert all(torch.equal(sample, latents[i]["mean"]) for i, sample in enumerate(loaded))
    assert len(loaded) == len(latents)


def test_an_index_says_what_the_headers_say(unbroken: Path, tmp_path: Path) -> None:
    """One of a shard of another size, or a damaged one, is not believed: the headers are read."""
    indexed = ShardDataset(unbroken)
    for path in indexed.paths:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    walked = ShardDataset(tmp_path)
    assert [walked[i] for i in range(len(walked))] == [indexed[i] for i in range(len(indexed))]
    first, *_, last = walked.paths
    assert first.stat().st_size != last.stat().st_size
    index_path(first).write_bytes(index_path(unbroken / last.name).read_bytes())
    index_path(last).write_text("[1]")
    again = ShardDataset(tmp_path)
    assert [again[i] for i in range(len(again))] == [indexed[i] for i in range(len(indexed))]


def test_rounding_is_measured(source: Path, vae_folder: Path, tmp_path: Path) -> None:
    """Against the moments themselves; in fp32 there is none."""
    images, vae = open_dataset(source, SIZE), load_vae(vae_folder)
    exact = [encode(vae, images[number]["image"][None]) for number in numbers()]
    exact += [encode(vae, images[number]["image"][None].flip(-1)) for number in numbers()]
    means, deviations = (torch.cat(parts).double() for parts in zip(*exact, strict=True))
    reports = {}
    for dtype in ("float16", "float32"):
        reports[dtype] = write(source, vae, tmp_path / dtype, dtype=dtype)
        assert (reports[dtype].num_encoded, reports[dtype].num_bad, reports[dtype].complete) == (22, 1, True)
    rounding = (means.half().double() - means).square().mean().sqrt().item()
    assert reports["float16"].rounding == pytest.approx(rounding, rel=1e-2)
    assert reports["float16"].deviation == pytest.approx(deviations.square().mean().sqrt().item(), rel=1e-4)
    assert reports["float32"].rounding == 0


def write(source: Path, vae: AutoencoderKL, folder: Path, **options: Any) -> EncodingReport:
    images = open_dataset(source, SIZE)
    description = LatentDescription.of(images, vae, source="source", vae_name="vae", **options)
    return write_latents(images, vae, folder, description, batch_size=4, progress=False)


# How it is written


@pytest.mark.slow
def test_kill_at_any_moment(source: Path, vae_folder: Path, unbroken: Path, tmp_path: Path) -> None:
    """SIGKILL again and again, each run going on from the last one's end: no duplicate, no gap, the same bytes."""
    kills = [
        Kill(1, False, ["os.replace"]),  # the description
        Kill(4, True, ["madformer.data.encoding.encode"]),  # within the first shard
        Kill(1, True, ["os.replace"]),  # behind the first shard, before its index
        Kill(4, False, ["os.replace"]),
    ]
    arguments = command(source, vae_folder, tmp_path)
    assert statuses([(arguments, kill) for kill in (*kills, None)]) == [-signal.SIGKILL] * len(kills) + [0]
    assert contents(tmp_path) == contents(unbroken)


def test_two_processes_write_what_one_writes(
    source: Path, vae_folder: Path, unbroken: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each its own shards; the last one reports. What a killed one had begun is cleared away by whom it is dealt to."""
    as_process(monkeypatch, 1, 2)
    assert main(command(source, vae_folder, tmp_path)) == 0
    assert sorted(ShardDataset(tmp_path).paths) == [tmp_path / f"latents-{k:06d}.tar" for k in (1, 3)]
    assert "images in" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"holds 2 of 5 shards: the same `madformer data latents` adds"):
        LatentDataset(tmp_path)
    mine, others = tmp_path / ".latents-000002.tar.abcdef_1", tmp_path / ".latents-000003.tar.abcdef_2"
    mine.touch()
    others.touch()
    as_process(monkeypatch, 0, 2)
    assert main(command(source, vae_folder, tmp_path)) == 0
    assert f"22 images in {tmp_path}: latents 4 x 8 x 8, float16, with flips (1 unreadable)" in capsys.readouterr().out
    assert others.exists()
    assert not mine.exists()
    others.unlink()
    assert contents(tmp_path) == contents(unbroken)


def test_what_is_there_is_not_encoded_again(
    source: Path, vae_folder: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, data in contents(unbroken).items():
        if name != "latents-000001.tar":
            (tmp_path / name).write_bytes(data)
    encoded: list[int] = []

    def counting(vae: AutoencoderKL, images: torch.Tensor, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
        encoded.append(len(images))
        return encode(vae, images, **options)

    monkeypatch.setattr("madformer.data.encoding.encode", counting)
    assert main(command(source, vae_folder, tmp_path)) == 0
    # images 5 to 9 in batches of two, each with its mirror images; 9 is bad
    assert encoded == [2, 2, 2, 2]
    assert contents(tmp_path) == contents(unbroken)


def test_decoding_in_workers_changes_nothing(source: Path, vae_folder: Path, unbroken: Path, tmp_path: Path) -> None:
    assert main(command(source, vae_folder, tmp_path, "--num-workers", 2)) == 0
    assert contents(tmp_path) == contents(unbroken)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_images_stop_the_run(
    source: Path, vae_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str], num_workers: int,
) -> None:  # fmt: skip
    broken, out = tmp_path / "broken", tmp_path / "out"
    broken.mkdir()
    for index, path in enumerate(sorted(source.rglob("*.png"))):
        (broken / path.name).write_bytes(b"no image" if index in (6, BAD) else path.read_bytes())
    with caplog.at_level(logging.WARNING):
        line = error_line(capsys, command(broken, vae_folder, out, "--num-workers", num_workers))
    assert "2 of 10 samples read are unreadable, over the limit max_bad_fraction=0.05" in line
    assert "09.png" in line
    assert "Traceback" not in line
    if num_workers == 0:
        assert [record.args[0].args[0].split(":")[0] for record in caplog.records] == [  # type: ignore
            str(broken / f"{index:02d}.png") for index in (6, BAD)
        ]
    # whole shards stay, nothing half-written
    assert sorted(contents(out)) == ["latents-000000.index.json", "latents-000000.tar", "latents.json"]


def test_a_shard_without_a_readable_image(vae_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for index in range(6):
        path = tmp_path / "source" / f"{index}.png"
        Image.new("RGB", (SIZE, SIZE), (index * 40, 0, 0)).save(path)
        if index in (2, 3):
            path.write_bytes(b"")
    images, vae = open_dataset(tmp_path / "source", SIZE, max_bad_fraction=0.5), load_vae(vae_folder)
    description = LatentDescription.of(images, vae, source="s", vae_name="v", shard_size=2)
    for _ in range(2):  # again, to go on with it
        write_latents(images, vae, tmp_path / "out", description, progress=False)
    latents = LatentDataset(tmp_path / "out")
    assert latents.shard_lengths == [2, 0, 2]
    assert [latents[i]["key"] for i in range(4)] == ["0.png", "1.png", "4.png", "5.png"]


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-flip"], "is of a run with flips=True, not False: take another folder"),
        (["--dtype", "float32"], "dtype='float16', not 'float32'"),
        (["--shard-size", 4], "shard_size=5, not 4"),
        (["--image-size", 32], "image_size=16, not 32"),
        (["--image-size", 15], "image_size=15 must be a multiple of 2, a latent's pixels"),
        (["--batch-size", 0], "batch_size=0 must be at least 1"),
        (["--shard-size", 0], "shard_size=0 must be at least 1"),
        (["--data", "nowhere"], "no data set at nowhere"),
        (["--vae", "."], "holds no readable AutoencoderKL"),
    ],
)
def test_another_run_into_the_same_folder(
    source: Path, vae_folder: Path, unbroken: Path, capsys: pytest.CaptureFixture[str],
    options: list[object], message: str,
) -> None:  # fmt: skip
    before = contents(unbroken)
    assert message in error_line(capsys, command(source, vae_folder, unbroken, *options))
    assert contents(unbroken) == before


def test_another_source_or_vae(
    source: Path, vae_folder: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "source=" in error_line(capsys, command(source / "cat", vae_folder, unbroken))
    small_vae(seed=1).save_pretrained(tmp_path / "other")
    assert "vae_fingerprint=" in error_line(capsys, command(source, tmp_path / "other", unbroken))
    # under another name it is the same
    small_vae().save_pretrained(tmp_path / "same")
    assert main(command(source, tmp_path / "same", unbroken)) == 0


def test_a_folder_of_something_else(
    source: Path, vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images-000000.tar").touch()
    line = error_line(capsys, command(source, vae_folder, tmp_path))
    assert line.endswith("holds images-000000.tar but no latents.json: take another folder")
    assert sorted(contents(tmp_path)) == ["images-000000.tar"]


def test_a_second_process_of_the_same_rank(
    source: Path, vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    with (tmp_path / ".lock-0").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert f"another process is filling {tmp_path}" in error_line(capsys, command(source, vae_folder, tmp_path))


def test_latents_that_the_dtype_cannot_hold(source: Path, tmp_path: Path) -> None:
    vae = small_vae()
    vae.register_to_config(scaling_factor=1e7)
    with pytest.raises(FloatingPointError, match=r"bird/00\.png: its latents are not finite in float16"):
        write(source, vae, tmp_path)
    assert sorted(contents(tmp_path)) == ["latents.json"]


def test_geometry_and_vae_must_fit(unbroken: Path, vae_folder: Path) -> None:
    latents = LatentDataset(unbroken)
    latents.check(tiny(), load_vae(vae_folder))
    with pytest.raises(ValueError, match=r"latents are 4 x 8 x 8, the model takes 4 x 16 x 16 \(latent_channels; num_"):
        latents.check(tiny().replace(num_blocks=16))
    with pytest.raises(ValueError, match=rf"was encoded by {vae_folder} \(\w+\), not by this VAE \(\w+\)"):
        latents.check(tiny(), small_vae(seed=1))


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("{", "describes no latents"),
        ('{"version": 2}', "version 2, where 1 is known"),
        ("[]", "describes no latents"),
        ('{"version": 1, "class_names": [], "latent_shape": 5, "image_size": 8}', "describes no latents"),
        ('{"version": 1, "class_names": [], "latent_shape": [4, 2, 2], "image_size": [8]}', "describes no latents"),
    ],
)
def test_damaged_descriptions(tmp_path: Path, description: str, message: str) -> None:
    (tmp_path / "latents.json").write_text(description)
    with pytest.raises(ValueError, match=message):
        LatentDataset(tmp_path)


def test_a_folder_without_a_description(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no latents\.json"):
        LatentDataset(tmp_path)


def test_a_damaged_member_is_named(unbroken: Path, tmp_path: Path) -> None:
    for name, data in contents(unbroken).items():
        (tmp_path / name).write_bytes(data.replace(b"\x93NUMPY", b"\x93NUMPI", 1))
    with pytest.raises(ValueError, match=r"latents-000000\.tar:00000000 is damaged: "):
        LatentDataset(tmp_path)[0]
    with (tmp_path / "latents-000001.tar").open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(ValueError, match=r"latents-000001\.tar: not a readable tar shard"):
        LatentDataset(tmp_path)


@pytest.mark.slow
def test_torchrun(source: Path, vae_folder: Path, unbroken: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "madformer.cli.main"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(
        [*launcher, *command(source, vae_folder, tmp_path)],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert contents(tmp_path) == contents(unbroken)
