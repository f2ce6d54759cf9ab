"""A small sweep from beginning to end: its rows, what is refused, and that stopping it anywhere changes nothing."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

from madformer.cli.main import main
from madformer.engine.schedulers import default_scheduler
from madformer.evaluation import Statistics, evaluate, extract, open_images
from madformer.evaluation.extractors import EXTRACTORS
from madformer.files import atomic
from madformer.files.atomic import locked
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from madformer.sweeps import Sweep, SweepFolder, lines, plot, read_table, run_sweep, work
from madformer.sweeps.folder import UNEQUAL, scores_of
from madformer.sweeps.running import jobs_of
from tests.helpers import environment
from tests.helpers.evaluation_cases import pictures, tiny_extractor, write_folder
from tests.helpers.sweep_cases import BLOCKS, make_world, register_tiny, sweep_values
from tests.helpers.testing import small_config, small_vae

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def _extractor() -> Iterator[None]:
    register_tiny()
    yield
    del EXTRACTORS["tiny"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def swept(world: Path) -> Path:
    """A sweep with a given model and one that is trained."""
    run(Sweep.of(small(world)), world / "swept", world)
    return world / "swept"


def small(world: Path, **changes: Any) -> dict[str, Any]:
    values = sweep_values(world)
    values["train"]["seeds"] = [0]
    return values | changes


def given(world: Path, **changes: Any) -> dict[str, Any]:
    """Of nothing to train."""
    values = small(world, **changes)
    del values["train"]
    return values


def run(sweep: Sweep, out: Path, world: Path, **options: Any) -> Rows:
    return run_sweep(sweep, out, device="cpu", cache=world / "cache", progress=False, **options).to_pylist()


def equal_part(rows: Rows) -> Rows:
    return [{name: value for name, value in row.items() if name not in UNEQUAL} for row in rows]


def test_rows(swept: Path, world: Path) -> None:
    rows = pyarrow.parquet.read_table(swept / "table.parquet").to_pylist()
    assert [(row["model"].rpartition("/")[2], row["steps"], row["guidance"]) for row in rows] == [
        (model, steps, scale) for model in ("model", "diffusion_layers=1") for steps in (1, 2) for scale in (1.0, 2.0)
    ]
    assert [row["nfe_steps"] for row in rows] == 2 * [1, 2, 2, 4]
    assert [row["training_seed"] for row in rows] == 4 * [None] + 4 * [0]
    assert [row["train.model.diffusion_layers"] for row in rows] == 4 * [None] + 4 * [1]
    for row in rows:
        assert row["precision_low"] <= row["precision"] <= row["precision_high"]
        assert row["fd"] > 0
        assert 0 < row["seconds_per_image"] < 60
        assert row["peak_memory_bytes"] > 1e7
        assert row["protocol.num_images"] == 8
        assert row["protocol.steps"] == row["steps"]
        assert row["protocol.guidance"] == row["guidance"]
    assert [row["training_flops"] is None for row in rows] == 4 * [True] + 4 * [False]
    # a figure is that of the pictures that the pipeline draws for the captions of the reference
    pipeline = MADFormerPipeline.from_pretrained(world / "model")
    pipeline.set_progress_bar_config(disable=True)
    drawn: list[Any] = []
    for first in range(0, 8, 4):
        texts = [f"number {5 * index}" for index in range(first, first + 4)]
        drawn += pipeline(texts, num_inference_steps=2, guidance_scale=2.0, seed=first, output_type="pil").images
    folder = world / "drawn"
    folder.mkdir()
    for index, image in enumerate(drawn):
        image.save(folder / f"{index:03}.png")
    found = evaluate(open_images(folder), open_images(world / "pictures"), tiny_extractor(), metrics=["fd"], cache=None)
    assert rows[3]["fd"] == pytest.approx(found.scores["fd"].value, rel=1e-5)


def test_a_table_is_read_as_the_rows_that_made_it(swept: Path, tmp_path: Path) -> None:
    kept = [row for _, row in SweepFolder.of(swept).rows()]
    file = swept / "table.parquet"
    found = read_table(file, file)
    for row, original in zip(found, kept, strict=True):
        assert scores_of(row) == scores_of(original)
        assert row == {name: value for name, value in original.items() if name != "shown"} | {"scores": row["scores"]}
    assert [line.label for line in lines(found, "fd")] == [line.label for line in lines(kept, "fd")]
    assert set(plot(file, "fd")) == {"nfe_steps", "nfe_layers", "seconds_per_image"}
    # another protocol's is not mixed in, and what is no table is told apart from one
    table = pyarrow.parquet.read_table(file)
    others = table.to_pylist()
    for row in others:
        row |= {"cell": f"x{row['cell']}", "protocol.reference_hash": "other"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(others), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"reference_hash of .* is .* and 'other'"):
        read_table(file, tmp_path / "other.parquet")
    pyarrow.parquet.write_table(table.drop_columns(["cell"]), tmp_path / "no.parquet")
    (tmp_path / "text.parquet").write_text("text")
    for name in ("no", "text"):
        with pytest.raises(ValueError, match=f"{name}.parquet is no table of a sweep"):
            read_table(tmp_path / f"{name}.parquet")


def test_data_are_encoded_once_and_models_are_kept(swept: Path) -> None:
    assert len(list((swept / "latents").iterdir())) == 1
    (training,) = (swept / "models").iterdir()
    assert json.loads((training / "config.json").read_text())["data"].startswith(str(swept / "latents"))
    assert (training / "finished" / "model_index.json").is_file()


def test_another_sweep_is_refused_and_a_longer_one_goes_on(
    swept: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(swept, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    judging, training = small(world)["evaluate"], small(world)["train"]
    for changes, message in (
        ({"evaluate": judging | {"num_images": 9}}, "evaluate.num_images=8, not 9"),
        ({"sample": {"batch_size": 2}}, "sample.batch_size=4, not 2"),
        ({"train": training | {"fields": training["fields"] | {"steps": 4}}}, "train.fields.steps=3, not 4"),
        ({"tune": {}, "sample": {"precision": "exact", "batch_size": 4}}, "tune.low='absent', not 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(Sweep.of(small(world, **changes)), out, world)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # more of an axis adds cells, and none that is there is drawn again
    measured: list[str] = []
    measure = work.Worker.measure
    monkeypatch.setattr(work.Worker, "measure", lambda self, name: (measured.append(name), measure(self, name))[1])
    longer = given(world)
    # the same model under another name
    case = {"label": "one layer", "model": {"diffusion_layers": 1}}
    longer["train"] = {name: value for name, value in training.items() if name != "grid"} | {"cases": [case]}
    longer["sample"] = longer["sample"] | {"steps": [1, 3, 2], "guidance": [1]}
    rows = run(Sweep.of(longer), out, world)
    assert [row["steps"] for row in rows] == 2 * [1, 3, 2]
    assert measured == [row["cell"] for row in rows if row["steps"] == 3]
    assert [row["model"] for row in rows[3:]] == 3 * ["one layer"]


def test_runs_that_begin_with_a_model_are_encoded_once_too(world: Path) -> None:
    """Under the size that their model says, and apart from what is held out."""
    values = small(world)
    fields = values["train"]["fields"]
    own = {name: value for name, value in fields.items() if name != "model"}
    values["train"] = {
        "preset": "tiny",
        "fields": own,
        "grid": {"init_from": [str(world / "model")], "holdout": [0.0, 0.5]},
    }
    told, held = (model.config for model in Sweep.of(values | {"models": []}).all_models)
    assert told is not None
    assert held is not None
    assert work.encoding_of(told) != work.encoding_of(held)
    plain = next(model.config for model in Sweep.of(small(world)).all_models if model.config is not None)
    # its pictures have the same size
    assert work.encoding_of(told) == work.encoding_of(plain)


def test_the_reference_is_looked_at_by_all_and_once(swept: Path, world: Path, tmp_path: Path) -> None:
    out = SweepFolder(tmp_path / "out", Sweep.of(given(world)))
    jobs = jobs_of(out, 2)
    looks = [job for job in jobs if job.kind == "look"]
    assert [job.name for job in looks] == ["0 of 2", "1 of 2"]
    assert set(next(job for job in jobs if job.kind == "reference").after) == {
        ("check", ""),
        *(job.key for job in looks),
    }
    assert {tuple(job.after) for job in jobs if job.kind == "cell"} == {(("reference", ""),)}
    workers = [work.Worker(out, "cpu", tmp_path / "cache", progress=False) for _ in range(3)]
    for number, job in enumerate(looks):
        workers[number](*job.key)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1  # forty pictures are one part
    workers[0]("reference", "")
    found = workers[2].reference_features
    assert not isinstance(found, Statistics)
    assert found.num_computed == 0
    expected = extract(open_images(world / "pictures"), tiny_extractor())
    np.testing.assert_array_equal(found.features_ND, expected.features_ND)
    assert (found.hash, found.image_size, found.name) == (expected.hash, expected.image_size, expected.name)


def refused(world: Path, folder: Path, case: str) -> dict[str, Any]:
    """A sweep that some model cannot be sampled by."""
    values = given(world)
    values["sample"] |= {"guidance": [1]}
    if case == "trained":
        # of data that have no captions
        write_folder(folder / "bare", pictures(8))
        values = small(world, models=[])
        values["train"]["fields"] |= {"data": str(folder / "bare")}
    elif case in ("given", "prompts", "autoencoder", "autoencoder's channels"):
        torch.manual_seed(0)
        vae = None if case.startswith("autoencoder") else small_vae()
        plain = MADFormerPipeline(MADFormer(small_config(**BLOCKS)), vae, default_scheduler("epsilon"))
        plain.save_pretrained(folder / "plain")
        small_vae(latent_channels=2).save_pretrained(folder / "vae")
        values["models"].append(str(folder / "plain"))
        values["sample"] |= {
            "given": {"guidance": [1, 3]},
            "prompts": {"prompts": ["a"]},
            "autoencoder": {},
            "autoencoder's channels": {"vae": str(folder / "vae")},
        }[case]
    elif case == "tuned":
        write_folder(folder / "bare", pictures(8))
        values = small(world, models=[], tune={"metric": "fd"})
        values["train"]["fields"] |= {"data": str(folder / "bare")}
        values["sample"] |= {"guidance": 1}
    else:
        values["sample"] |= {
            "steps": {"steps": [4, 1001]},
            "split": {"diffusion_layers": [1, 2]},
            "scheduler": {"scheduler": ["own", "flow-euler"]},
        }[case]
    return values


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("given", "plain: sample.guidance=3: guidance needs a model with text or classes"),
        ("trained", "diffusion_layers=1: sample.guidance=2: guidance needs a model with text or classes"),
        ("tuned", "diffusion_layers=1: tune: guidance needs a model with text or classes"),
        ("prompts", "plain: sample.prompts have no place: it was made without text"),
        ("autoencoder", "plain: sample.vae is missing: it has no autoencoder"),
        ("autoencoder's channels", "has 2 latent channels, and it draws 4"),
        ("steps", "model: sample.steps=1001 with sample.scheduler='own': num_inference_steps=1001 must be between"),
        ("split", "model: sample.diffusion_layers=2: diffusion_layers=2: this model was trained for 1"),
        ("scheduler", "sample.scheduler='flow-euler': FlowMatchEulerDiscreteScheduler has prediction_type='flow'"),
    ],
)
def test_what_a_model_refuses_is_told_before_anything_is_done(
    case: str, message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "sweep.json", tmp_path / "out"
    file.write_text(json.dumps(refused(world, tmp_path, case)))
    words = ["sweep", str(file), "--out", str(out), "--device", "cpu", "--json"]
    for more in ([], ["--dry-run"]):
        assert main([*words, *more]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("madformer sweep: error: model ")
        assert message in line
    assert not out.exists()


def test_two_sweeps_do_not_share_a_folder(swept: Path, world: Path) -> None:
    with locked(swept / ".lock-0"), pytest.raises(OSError, match="another process is filling"):
        run(Sweep.of(small(world)), swept, world)


def test_a_model_that_has_changed_is_refused(swept: Path, world: Path, tmp_path: Path) -> None:
    model = shutil.copytree(world / "model", tmp_path / "model")
    values = given(world, models=[str(model)])
    values["sample"] |= {"guidance": [1]}
    run(Sweep.of(values | {"sample": values["sample"] | {"steps": [1]}}), tmp_path / "out", world)
    shutil.rmtree(model)
    (trained,) = (swept / "models").iterdir()
    shutil.copytree(trained / "model", model)
    with pytest.raises(ValueError, match="has become another model since some of its cells were done"):
        run(Sweep.of(values), tmp_path / "out", world)


@pytest.mark.parametrize("trained", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stopping_it_changes_nothing(
    trained: bool, swept: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between writing the model, rows and pictures of cells, and between evaluations."""
    out, stops = tmp_path / "out", random.Random(0)
    replace, left = atomic.os.replace, 0

    def stopping(source: Any, target: Any) -> None:
        nonlocal left
        if str(target).startswith(str(out)):
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        replace(source, target)

    sweep = Sweep.of((small if trained else given)(world))
    monkeypatch.setattr(atomic.os, "replace", stopping)
    for _ in range(3):
        left = stops.randint(1, 6 if trained else 2)
        with pytest.raises(KeyboardInterrupt):
            run(sweep, out, world)
    left = 1000
    found = equal_part(run(sweep, out, world))
    expected = equal_part(pyarrow.parquet.read_table(swept / "table.parquet").to_pylist())
    assert found == [{name: row[name] for name in found[0]} for row in expected[: len(found)]]
    assert not [path for path in out.rglob(".*") if not path.name.startswith((".lock", ".metadata"))]


def test_a_full_disk_is_one_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out, values = tmp_path / "sweep.json", tmp_path / "out", given(world)
    values["sample"] |= {"steps": [1]}
    file.write_text(json.dumps(values))
    words = ["sweep", str(file), "--out", str(out), "--device", "cpu", "--json", "--cache", str(world / "cache")]
    write_bytes = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if ".webp." in self.name and len(list(out.glob("cells/*.json"))) == 1:
            write_bytes(self, data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"madformer sweep: error: cannot write {out}/cells/")
    assert line.endswith("No space left on device")
    assert len([path for path in (out / "cells").iterdir() if path.suffix == ".json"]) == 1
    assert not list((out / "cells").glob(".*"))
    assert main(words) == 0
    assert pyarrow.parquet.read_table(out / "table.parquet").num_rows == 2


def test_guidance_is_tuned_on_pictures_of_its_own(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = given(world, tune={"metric": "fd", "low": 1.0, "high": 5.0, "evaluations": 4})
    values["sample"] = {"steps": 1, "seeds": [0, 1], "batch_size": 4, "precision": "exact"}
    drawn: list[tuple[float, int]] = []
    draw = work.Worker.draw

    def noted(self: Any, cell: Any, guidance: float, seed: int, *rest: Any) -> Any:
        drawn.append((guidance, seed))
        return draw(self, cell, guidance, seed, *rest)

    monkeypatch.setattr(work.Worker, "draw", noted)
    rows = run(Sweep.of(values), tmp_path / "out", world)
    tuning, cells = drawn[:4], drawn[4:]
    assert {seed for _, seed in tuning} == {work.TUNING_SEED}
    assert len({guidance for guidance, _ in tuning}) == 4
    # once for both draws, which have pictures of seeds of their own
    (file,) = (tmp_path / "out" / "tuning").iterdir()
    found = json.loads(file.read_text())
    best = min(found["looked_at"], key=found["looked_at"].__getitem__)
    assert cells == [(float(best), 0), (float(best), 8)]
    assert [row["guidance"] for row in rows] == 2 * [float(best)]
    assert all(row["guidance_tuned"] for row in rows)
    assert rows[0]["fd"] != rows[1]["fd"]


def test_what_there_is_nothing_to_draw_for_is_told(world: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "bare", pictures(8))
    bare = given(world, evaluate=small(world)["evaluate"] | {"reference": str(tmp_path / "bare")})
    with pytest.raises(ValueError, match=r"has no captions to draw for: give sample\.prompts"):
        run(Sweep.of(bare), tmp_path / "out", world)
    assert not SweepFolder(tmp_path / "out", Sweep.of(bare)).rows()


# processes of their own


def command(values: dict[str, Any], folder: Path, world: Path, *options: str) -> list[str]:
    file = folder / "sweep.json"
    file.write_text(json.dumps(values))
    words = ["sweep", str(file), "--out", str(folder / "out"), "--device", "cpu", "--cache", str(world / "cache")]
    return [sys.executable, "-m", "tests.helpers.sweep_cases", *words, *options]


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_same_table(swept: Path, world: Path, tmp_path: Path) -> None:
    words, moments = command(small(world), tmp_path, world), random.Random(time.time())
    run_of = {"env": environment(OMP_NUM_THREADS="1"), "stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    begun = time.monotonic()
    whole = command(small(world), tmp_path, world)
    whole[whole.index("--out") + 1] = str(tmp_path / "whole")
    subprocess.run(whole, check=True, timeout=300, **run_of)  # type: ignore[call-overload]
    taken = time.monotonic() - begun
    for _ in range(3):
        process = subprocess.Popen(words, **run_of)  # type: ignore[call-overload]
        time.sleep(taken * moments.uniform(0.2, 0.8))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(words, check=True, timeout=300, **run_of)  # type: ignore[call-overload]
    found, expected = (
        equal_part(pyarrow.parquet.read_table(folder / "table.parquet").to_pylist())
        for folder in (tmp_path / "out", swept)
    )
    assert found == expected


@pytest.mark.slow
def test_two_workers_give_the_table_of_one(swept: Path, world: Path, tmp_path: Path) -> None:
    words = command(small(world), tmp_path, world, "--workers", "2")
    subprocess.run(words, check=True, timeout=400, env=environment(OMP_NUM_THREADS="1"))
    found, expected = (
        equal_part(pyarrow.parquet.read_table(folder / "table.parquet").to_pylist())
        for folder in (tmp_path / "out", swept)
    )
    assert found == expected


def test_without_ray_it_says_so(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'madformer[ray]'")):
        run(Sweep.of(given(world)), tmp_path / "out", world, ray=True)
    assert not list((tmp_path / "out" / "cells").glob("*"))


@pytest.mark.slow
def test_actors_of_ray_give_the_table_of_one(swept: Path, world: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    workers = {"env_vars": {"PYTHONPATH": environment()["PYTHONPATH"]}, "worker_process_setup_hook": register_tiny}
    with ray.init(log_to_driver=False, num_cpus=2, runtime_env=workers):
        found = run(Sweep.of(small(world)), tmp_path / "out", world, ray=True, workers=2)
        with pytest.raises(ValueError, match="the Ray cluster has no GPU"):
            run_sweep(Sweep.of(given(world)), tmp_path / "other", device="cuda", cache=world / "cache", ray=True)
    assert equal_part(found) == equal_part(pyarrow.parquet.read_table(swept / "table.parquet").to_pylist())
