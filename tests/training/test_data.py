"""The stream of batches: what is drawn depends on the seed and the position, and on nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from madformer.config import TextConfig, tiny
from madformer.data import open_dataset
from madformer.data.encoding import write_latents
from madformer.data.images import ImageDataset
from madformer.data.latents import LatentDataset, LatentDescription
from madformer.files.shards import write_shards
from madformer.model.blocks import from_blocks
from madformer.training.data import (
    WINDOW,
    BatchStream,
    CachedLatents,
    Conditioning,
    Draws,
    EpochOrder,
    Share,
    cache_latents,
    draw_split,
)
from madformer.training.losses import Batch
from madformer.vae import encode, load_vae
from tests.helpers.testing import DEVICE, small_vae

CONFIG = tiny()
SIZE, NUM_IMAGES, GLOBAL_BATCH = 16, 14, 12
Data = LatentDataset | CachedLatents | ImageDataset
TENSORS = ("clean_BMLC", "noise_BMLC", "timestep_BM", "labels_B")


def write_images(folder: Path) -> None:
    """Labelled by class, captioned by number."""
    random = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        path = folder / ("ab"[index % 2]) / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"number {index}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_images(root / "images")
    small_vae().save_pretrained(root / "vae")
    images, vae = open_dataset(root / "images", SIZE), load_vae(root / "vae")
    for name, flips in (("latents", True), ("plain", False)):
        description = LatentDescription.of(
            images, vae, source="images", vae_name="vae", flips=flips, dtype="float32", shard_size=4
        )
        write_latents(images, vae, root / name, description, batch_size=1, progress=False)
    return root


@pytest.fixture(scope="module")
def vae(folder: Path) -> AutoencoderKL:
    return load_vae(folder / "vae")


@pytest.fixture(scope="module")
def sources(folder: Path, vae: AutoencoderKL) -> dict[str, Data]:
    images = open_dataset(folder / "images", SIZE)
    return {
        "latents": LatentDataset(folder / "latents"),
        "memory": cache_latents(vae, images, batch_size=1),
        "images": images,
    }


def stream(data: Data | TensorDataset, vae: AutoencoderKL | None, **options: Any) -> BatchStream:
    options = {"config": CONFIG, "global_batch": GLOBAL_BATCH, "micro_batch": GLOBAL_BATCH, "seed": 3, **options}
    share, draws = (
        cls(**{own.name: options.pop(own.name) for own in dataclasses.fields(cls) if own.name in options})
        for cls in (Share, Draws)
    )
    return BatchStream(data, vae, share=share, draws=draws, **options)


def take(batches: BatchStream, count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def union(batches: list[Batch]) -> dict[str, Any]:
    tensors: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in TENSORS}
    return tensors | {"captions": [caption for batch in batches for caption in batch.captions]}


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left["captions"] == right["captions"]
    for name in TENSORS:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


# Who shares a step, and where it resumed


@pytest.mark.parametrize("source", ["latents", "memory", "images"])
@pytest.mark.parametrize(
    ("world_size", "micro_batch", "num_workers"), [(1, 4, 0), (2, 6, 0), (2, 3, 0), (3, 2, 0), (1, 3, 2), (2, 2, 1)]
)
def test_however_a_step_is_shared(
    sources: dict[str, Data], vae: AutoencoderKL, source: str, world_size: int, micro_batch: int, num_workers: int
) -> None:
    """Bit for bit: two steps, over the end of an epoch, from several ranks, micro-batches and workers."""
    data, flip = sources[source], source != "memory"
    whole = union(take(stream(data, vae, flip=flip), 2))
    accumulated = GLOBAL_BATCH // (world_size * micro_batch)
    ranks = [
        take(
            stream(
                data, vae, flip=flip, micro_batch=micro_batch, rank=rank, world_size=world_size, num_workers=num_workers
            ),
            2 * accumulated,
        )
        for rank in range(world_size)
    ]
    # micro-batch a of rank r stands at a * world_size + r
    assert_same(union([ranks[r][a] for a in range(2 * accumulated) for r in range(world_size)]), whole)


@pytest.mark.parametrize("order", ["uniform", "shards"])
def test_resume_at_any_step(sources: dict[str, Data], order: str) -> None:
    """Nothing is needed but the number of the step; also of another number of ranks."""
    data = sources["latents"]
    whole = take(stream(data, None, order=order), 7)
    for step in range(7):
        (resumed,) = take(stream(data, None, order=order, first_step=step), 1)
        assert_same(union([resumed]), union([whole[step]]))
    halves = [
        take(stream(data, None, order=order, first_step=5, micro_batch=6, rank=r, world_size=2), 1) for r in (0, 1)
    ]
    assert_same(union([*halves[0], *halves[1]]), union([whole[5]]))


def test_another_seed_is_another_run(sources: dict[str, Data]) -> None:
    first, other, far = (union(take(stream(sources["latents"], None, seed=seed), 1)) for seed in (3, 4, 3 + 2**40))
    for run in (other, far):  # torch's own generator would take the last for the first
        assert first["captions"] != run["captions"]
        assert not torch.equal(first["noise_BMLC"], run["noise_BMLC"])
        assert not torch.equal(first["timestep_BM"], run["timestep_BM"])


# The order


def order_of(order: EpochOrder, count: int) -> list[int]:
    return [order[position] for position in range(count)]


@pytest.mark.parametrize("shard_lengths", [None, [2, 0, 4, 1]], ids=["uniform", "shards"])
def test_every_epoch_visits_everything_once_in_another_order(shard_lengths: list[int] | None) -> None:
    positions = order_of(EpochOrder(7, 3, shard_lengths), 28)
    epochs = [positions[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # in whatever order it is asked
    again = EpochOrder(7, 3, shard_lengths)
    assert [again[position] for position in reversed(range(28))] == positions[::-1]


def test_every_permutation_is_as_likely() -> None:
    seen = [tuple(order_of(EpochOrder(3, seed), 3)) for seed in range(1200)]
    counts = [seen.count(permutation) for permutation in itertools.permutations(range(3))]
    # 200 each, with a standard deviation of 13
    assert min(counts) > 150
    assert max(counts) < 250


def test_shards_stay_together() -> None:
    """A window holds whole shards, which are not those that lie side by side; and their samples are mixed."""
    size, num_shards = 10, 3 * WINDOW
    samples = np.array(order_of(EpochOrder(size * num_shards, 0, [size] * num_shards), size * num_shards))
    shards = (samples // size).reshape(3, WINDOW * size)
    windows = [set(window.tolist()) for window in shards]
    assert [len(window) for window in windows] == [WINDOW] * 3
    assert len(set.union(*windows)) == num_shards
    assert any(max(window) - min(window) >= WINDOW for window in windows)
    assert all((np.diff(window) == 0).mean() < 0.3 for window in shards)


def test_images_in_shards_have_an_order_of_shards(folder: Path, vae: AutoencoderKL, tmp_path: Path) -> None:
    files = sorted((folder / "images").rglob("*.png"))
    write_shards(
        ({"__key__": file.stem, "png": file.read_bytes(), "txt": file.stem} for file in files), tmp_path, "x", 4
    )
    (batch,) = take(stream(open_dataset(tmp_path, SIZE), vae, order="shards", global_batch=14, micro_batch=14), 1)
    assert sorted(batch.captions) == sorted(file.stem for file in files)


# What is drawn


def test_a_batch_is_what_it_says(sources: dict[str, Data], vae: AutoencoderKL) -> None:
    """All parts against the data: labels and captions of the sample, and a draw from its own posterior."""
    data = sources["latents"]
    by_caption = {data[i]["caption"]: data[i] for i in range(NUM_IMAGES)}
    batch = union(take(stream(data, vae), 40))
    count = 40 * GLOBAL_BATCH
    assert batch["clean_BMLC"].shape == batch["noise_BMLC"].shape == (count, 4, 16, 4)
    assert (batch["timestep_BM"].shape, batch["timestep_BM"].dtype) == ((count, 4), torch.int64)
    assert batch["labels_B"].tolist() == [by_caption[caption]["label"] for caption in batch["captions"]]
    means, deviations = (
        torch.stack([by_caption[c][name] for c in batch["captions"]]) for name in ("mean", "deviation")
    )
    posterior = (from_blocks(batch["clean_BMLC"], CONFIG) - means) / deviations
    for drawn in (posterior, batch["noise_BMLC"]):
        assert_standard_normal(drawn)
    # of one position, and of two: nothing in common
    assert abs(correlation(posterior, from_blocks(batch["noise_BMLC"], CONFIG))) < 0.02
    assert abs(correlation(batch["noise_BMLC"][1:], batch["noise_BMLC"][:-1])) < 0.02


@pytest.mark.parametrize("source", ["latents", "images"])
def test_blocks_come_in_the_models_order(sources: dict[str, Data], vae: AutoencoderKL, source: str) -> None:
    """Of a spiral for all; in random order each sample has its own, and says so. Nothing else is drawn differently."""
    raster = union(take(stream(sources[source], vae), 2))
    spiral = union(take(stream(sources[source], vae, config=CONFIG.replace(block_order="spiral")), 2))
    assert torch.equal(spiral["clean_BMLC"], raster["clean_BMLC"][:, [2, 3, 1, 0]])
    batches = take(stream(sources[source], vae, config=CONFIG.replace(block_order="random")), 2)
    orders = torch.cat([batch.order_BM for batch in batches])  # type: ignore[arg-type, misc]
    assert (orders.sort(dim=1).values == torch.arange(4)).all()
    assert len(orders.unique(dim=0)) > GLOBAL_BATCH // 2
    for index, order in enumerate(orders):
        assert torch.equal(union(batches)["clean_BMLC"][index], raster["clean_BMLC"][index][order])
    for name in ("noise_BMLC", "timestep_BM", "labels_B"):
        assert torch.equal(spiral[name], raster[name])
        assert torch.equal(union(batches)[name], raster[name])


def assert_standard_normal(drawn: Tensor) -> None:
    """Four moments, each within five of its standard errors."""
    values, error = drawn.double().flatten(), drawn.numel() ** -0.5
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(values.pow(power).mean().item() - moment) < 5 * error * variance**0.5


def correlation(left: Tensor, right: Tensor) -> float:
    return torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1].item()


def test_timesteps_are_uniform_and_each_blocks_own(sources: dict[str, Data]) -> None:
    batches = take(stream(sources["memory"], None, num_timesteps=10, global_batch=2000, micro_batch=2000), 1)
    counts = torch.bincount(batches[0].timestep_BM.flatten(), minlength=10)
    assert len(counts) == 10
    # chi-squared of 9 degrees: beyond 33 once in ten thousand times
    assert ((counts - 800).square() / 800).sum() < 33
    assert abs(correlation(*batches[0].timestep_BM.double()[:, :2].unbind(1))) < 0.1


def test_flips_are_of_the_image(folder: Path, sources: dict[str, Data], vae: AutoencoderKL) -> None:
    """By chance every second sample; latents on the disk are drawn as images encoded in passing are."""
    read, passing = (union(take(stream(sources[name], vae, flip=True), 8)) for name in ("latents", "images"))
    torch.testing.assert_close(read["clean_BMLC"], passing["clean_BMLC"], rtol=1e-5, atol=1e-5)
    plain = union(take(stream(sources["latents"], vae), 8))
    images = sources["images"]
    pixels = {images[i]["caption"]: images[i]["image"][None] for i in range(NUM_IMAGES)}
    num_flipped = 0
    for caption, one, other in zip(
        read["captions"], from_blocks(plain["clean_BMLC"], CONFIG), from_blocks(read["clean_BMLC"], CONFIG), strict=True
    ):
        mean, deviation = encode(vae, pixels[caption])
        mirrored_mean, mirrored_deviation = encode(vae, pixels[caption].flip(-1))
        mirrored = mirrored_mean[0] + mirrored_deviation[0] * (one - mean[0]) / deviation[0]
        flipped = not torch.equal(one, other)
        torch.testing.assert_close(other, mirrored if flipped else one, rtol=1e-4, atol=1e-4)
        num_flipped += flipped
    assert 30 < num_flipped < 66  # of 96: the standard deviation is 5
    # and nothing else changes
    assert torch.equal(plain["noise_BMLC"], read["noise_BMLC"])


def test_the_vae_is_not_called_for_latents(
    sources: dict[str, Data], vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the VAE was called")

    monkeypatch.setattr("madformer.training.data.encode", refuse)
    monkeypatch.setattr(vae, "encode", refuse)
    for name in ("latents", "memory"):
        assert take(stream(sources[name], vae), 2)[1].clean_BMLC.isfinite().all()
    with pytest.raises(AssertionError, match="the VAE was called"):
        next(stream(sources["images"], vae))


def test_tensors_of_moments_are_enough() -> None:
    """``cache_latents`` adds labels and captions."""
    means, deviations = torch.full((8, 4, 8, 8), 2.0), torch.full((8, 4, 8, 8), 0.5)
    (batch,) = take(stream(TensorDataset(means, deviations), None, global_batch=64, micro_batch=64), 1)
    assert batch.clean_BMLC.mean().item() == pytest.approx(2, abs=0.02)
    assert batch.clean_BMLC.std().item() == pytest.approx(0.5, abs=0.02)
    assert batch.labels_B.tolist() == [-1] * 64
    assert batch.captions == [""] * 64


@pytest.mark.gpu
def test_batches_are_pinned(sources: dict[str, Data]) -> None:
    for workers in (0, 1):
        (batch,) = take(stream(sources["latents"], None, num_workers=workers), 1)
        assert all(getattr(batch, name).is_pinned() for name in TENSORS)


@pytest.mark.gpu
def test_images_are_encoded_on_the_vaes_device(folder: Path, sources: dict[str, Data], vae: AutoencoderKL) -> None:
    on_gpu = union(take(stream(sources["images"], load_vae(folder / "vae", DEVICE), flip=True), 2))
    on_cpu = union(take(stream(sources["images"], vae, flip=True), 2))
    assert on_gpu["clean_BMLC"].device.type == DEVICE.type
    # cuDNN's convolutions multiply in TF32
    torch.testing.assert_close(on_gpu["clean_BMLC"].cpu(), on_cpu["clean_BMLC"], rtol=1e-2, atol=1e-2)


# What goes wrong


def broken(folder: Path, tmp_path: Path, *bad: int) -> ImageDataset:
    """The images, some of them unreadable."""
    write_images(tmp_path)
    for path in tmp_path.rglob("*.png"):
        if int(path.stem) in bad:
            path.write_bytes(b"no image")
    return open_dataset(tmp_path, SIZE, on_error="skip", max_bad_fraction=0.1)


def test_a_bad_image_in_the_middle(
    folder: Path, sources: dict[str, Data], vae: AutoencoderKL, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next readable one takes its place; nothing else moves, whoever meets it."""
    whole = union(take(stream(sources["images"], vae), 2))
    with caplog.at_level(logging.WARNING):
        data = broken(folder, tmp_path, 6)
        skipping = union(take(stream(data, vae), 2))
    assert (data.num_bad, len(caplog.records)) == (1, 1)
    # sorted by class, the even numbers come first
    assert skipping["captions"] == ["number 8" if c == "number 6" else c for c in whole["captions"]]
    others = torch.tensor([caption != "number 6" for caption in whole["captions"]])
    assert not others.all()
    assert torch.equal(skipping["clean_BMLC"][others], whole["clean_BMLC"][others])
    assert torch.equal(skipping["noise_BMLC"], whole["noise_BMLC"])
    shared = [take(stream(data, vae, micro_batch=6, rank=r, world_size=2, num_workers=1), 2) for r in (0, 1)]
    assert_same(union([shared[r][step] for step in (0, 1) for r in (0, 1)]), skipping)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_images(folder: Path, vae: AutoencoderKL, tmp_path: Path, num_workers: int) -> None:
    batches = stream(broken(folder, tmp_path, 6, 9), vae, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"^2 of \d+ samples read are unreadable.*max_bad_fraction=0.1; the last: .*$"):
        take(batches, 2)


def test_a_damaged_shard_is_named(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "latents").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes().replace(b"\x93NUMPY", b"\x93NUMPI"))
    with pytest.raises(ValueError, match=r"^.*latents-00000\d\.tar:000000\d\d is damaged"):
        next(stream(LatentDataset(tmp_path), None, num_workers=1))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("latents", {"micro_batch": 5}, "global_batch=12 must be a multiple of micro_batch=5 x world_size=1"),
        ("latents", {"micro_batch": 6, "world_size": 3}, "global_batch=12 must be a multiple of micro_batch=6 x world"),
        ("latents", {"micro_batch": 0}, "micro_batch=0 must be at least 1"),
        ("latents", {"seed": -1}, "seed=-1 must be from 0"),
        ("latents", {"rank": 1}, "rank=1 must be from 0 to world_size - 1 = 0"),
        ("latents", {"order": "sorted"}, "order='sorted' must be 'uniform' or 'shards'"),
        ("memory", {"order": "shards"}, "order='shards' needs data in .tar shards"),
        ("images", {"order": "shards"}, "order='shards' needs data in .tar shards"),
        ("memory", {"flip": True}, "flip=True needs mirror images"),
        ("plain", {"flip": True}, r"flip=True needs mirror images, and .*plain was written with --no-flip"),
        ("images", {"vae": None}, "vae=None: images need one"),
    ],
)
def test_nonsense_is_refused(
    folder: Path, sources: dict[str, Data], vae: AutoencoderKL, source: str, options: dict[str, Any], message: str
) -> None:
    data = LatentDataset(folder / "plain") if source == "plain" else sources[source]
    with pytest.raises(ValueError, match=message):
        stream(data, **({"vae": vae} | options))


@pytest.mark.parametrize(
    ("source", "what"), [("latents", "latents"), ("memory", "data in memory"), ("images", "images of 16 x 16 pixels")]
)
def test_geometry_must_fit(sources: dict[str, Data], vae: AutoencoderKL, source: str, what: str) -> None:
    config = dataclasses.replace(CONFIG, num_blocks=16)
    with pytest.raises(ValueError, match=rf"{what}: latents are 4 x 8 x 8, the model takes 4 x 16 x 16"):
        BatchStream(sources[source], vae, config, Share(1, 1), Draws(0))


def test_workers_leave_interrupts_to_the_run(sources: dict[str, Data]) -> None:
    """Ctrl-C reaches them, too; the run that saves a checkpoint still gets its batches."""
    batches = stream(sources["latents"], None, num_workers=1)
    whole = take(stream(sources["latents"], None), 6)
    first = next(batches)
    for child in children():
        os.kill(child, signal.SIGINT)
    assert_same(union([first, *take(batches, 5)]), union(whole))


def children() -> Iterator[int]:
    yield from map(int, Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


# What the model is told


class Spelling:
    """A tokenizer whose ids can be read."""

    vocab_size, pad_token_id = 128, 0

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        return torch.tensor([[*map(ord, text[:length].ljust(length, "\0"))] for text in texts])


TOLD = CONFIG.replace(text=TextConfig(128, 9), num_classes=2, time_conditioning="unet+adaln")


def told(folder: Path, steps: int, data: Data | None = None, **options: Any) -> list[Batch]:
    data, vae = data or open_dataset(folder / "images", SIZE), load_vae(folder / "vae")
    draws = Draws(0, conditioning=Conditioning(Spelling(), **options))
    stream = BatchStream(data, vae, TOLD, Share(GLOBAL_BATCH, GLOBAL_BATCH), draws)
    return [next(stream) for _ in range(steps)]


@pytest.mark.parametrize("caption", ["caption", "label"])
def test_texts_and_labels_are_the_samples_own(folder: Path, caption: Any) -> None:
    for batch in told(folder, 2, caption=caption):
        assert batch.text_BP is not None
        for text, label, caption_ in zip(batch.text_BP, batch.labels_B, batch.captions, strict=True):
            read = "".join(map(chr, text.tolist())).rstrip("\0")
            assert read == caption_
            assert read == (str(int(label)) if caption == "label" else f"number {read.removeprefix('number ')}")
            if caption == "caption":
                assert int(read.removeprefix("number ")) % 2 == label  # written so


def test_captions_and_labels_are_left_out_as_often_as_asked(folder: Path, sources: dict[str, Data]) -> None:
    """Apart from each other; and nothing else of the batch is drawn otherwise."""
    data = sources["latents"]
    batches, plain = told(folder, 30, data, caption_dropout=0.5, label_dropout=0.25), told(folder, 30, data)
    empty = torch.tensor([caption == "" for batch in batches for caption in batch.captions])
    unlabelled = torch.cat([batch.labels_B for batch in batches]) < 0
    assert 0.42 < empty.float().mean() < 0.58
    assert 0.18 < unlabelled.float().mean() < 0.32
    assert 0.08 < (empty & unlabelled).float().mean() < 0.18
    for batch, other in zip(batches, plain, strict=True):
        for name in ("clean_BMLC", "noise_BMLC", "timestep_BM"):
            assert torch.equal(getattr(batch, name), getattr(other, name))


def test_labels_that_the_model_does_not_have(folder: Path) -> None:
    data, vae = open_dataset(folder / "images", SIZE), load_vae(folder / "vae")
    config = CONFIG.replace(num_classes=1, time_conditioning="adaln")
    stream = BatchStream(data, vae, config, Share(14, 14), Draws(0))
    with pytest.raises(ValueError, match=r"sample b/\d+\.png has the label 1, and the model's are 0 to 0"):
        next(stream)


def test_splits_are_drawn_by_seed_and_step() -> None:
    config = CONFIG.replace(elastic_diffusion_layers=(1, 2, 3))
    drawn = [draw_split(config, 0, step) for step in range(300)]
    assert drawn == [draw_split(config, 0, step) for step in range(300)]
    assert drawn != [draw_split(config, 1, step) for step in range(300)]
    assert all(70 < drawn.count(split) < 130 for split in (1, 2, 3))
    assert draw_split(CONFIG, 0, 0) is None
