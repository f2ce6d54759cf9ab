"""The data path's rates: of the geometry it says, by a clock worked out by hand, gated by equal batches."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import data_path
from madformer.config import tiny
from madformer.data.latents import LatentDataset
from madformer.training.data import BatchStream, Draws, Share
from madformer.training.losses import Batch

ARGUMENTS = ["--preset", "tiny", "--samples", "8", "--micro-batch", "2", "--workers", "1", "--epochs", "3"]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    return data_path.make_latents(tmp_path_factory.mktemp("data"), tiny(), 8)


def test_latents_have_the_models_geometry(latents: LatentDataset) -> None:
    latents.check(tiny())
    assert (len(latents), latents.flips) == (8, True)
    means = np.stack([latents[i]["mean"].numpy() for i in range(8)])
    assert len(np.unique(means.reshape(8, -1), axis=0)) == 8
    data_path.forget(latents)
    assert np.array_equal(latents[7]["mean"].numpy(), means[7])


def test_a_clock_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch takes 10 s, the others 2 s in the first epoch and 1 s in the next ones."""
    clock = SimpleNamespace(now=0.0, calls=0)

    def draw(stream: Any) -> None:
        clock.now += 10 if clock.calls == 0 else 2 if clock.calls < 4 else 1
        clock.calls += 1

    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    stream: Any = type("Stream", (), {"__next__": draw})()
    assert data_path.measure(stream, batches=4, epochs=3) == (10, [6, 4, 4])


def test_batches_that_disagree_are_no_rate(latents: LatentDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(seed: int) -> BatchStream:
        return BatchStream(latents, None, tiny(), Share(2, 2), Draws(seed))

    data_path.check(stream(1), stream(1))
    with pytest.raises(data_path.CannotCompare, match="no rates: clean_BMLC"):
        data_path.check(stream(1), stream(2))

    def nudged(batches: BatchStream) -> Batch:
        batch: Batch = plain(batches)
        batch.timestep_BM[1, 3] += batches is other
        return batch

    plain, other = BatchStream.__next__, stream(1)
    monkeypatch.setattr(BatchStream, "__next__", nudged)
    with pytest.raises(data_path.CannotCompare, match="no rates: timestep_BM"):
        data_path.check(stream(1), other)


@pytest.mark.parametrize("given", [False, True], ids=["random latents", "given latents"])
def test_record(given: bool, latents: LatentDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    options = ["--data", str(latents.folder)] if given else []
    assert data_path.main([*ARGUMENTS, *options, "--appetite", "4", "--folder", str(tmp_path), "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record["metrics"]
    assert record["metrics"]["data_path_vs_appetite"] == record["images_per_second"]["from_disk"] / 4
    assert (record["samples"], record["latent_shape"], record["dtype"]) == (8, [4, 8, 8], "float16")
    # mean and deviation of one of the two orientations
    assert record["megabytes_read_per_image"] == 2 * 4 * 8 * 8 * 2 / 1e6
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--epochs", "1"], "--epochs 1 must be at least 2"), (["--appetite", "0"], "--appetite 0 must be positive")],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        data_path.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere holds no latents.json"),
        (["--micro-batch", "5"], "8 samples are less than two batches of --micro-batch 5"),
        (["--preset", "huge"], "unknown preset 'huge'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, latents: LatentDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if "--data" in arguments else ["--data", str(latents.folder)]
    out = tmp_path / "record.json"
    assert data_path.main([*ARGUMENTS, *given, *arguments, "--folder", str(tmp_path), "--out", str(out)]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_geometry_of_given_latents(latents: LatentDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*ARGUMENTS, "--data", str(latents.folder), "--preset", "emoji64", "--folder", str(tmp_path)]
    assert data_path.main([*arguments, "--out", str(tmp_path / "record.json")]) == 1
    assert "latents are 4 x 8 x 8, the model takes 4 x 16 x 16" in capsys.readouterr().err
