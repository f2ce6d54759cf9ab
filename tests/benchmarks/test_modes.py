"""The engine's modes beside each other on a sweep's draws: rows that are the sweep's own, and a table of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from benchmarks.experiments import modes, page
from benchmarks.precision import EXACT, MODES
from madformer.evaluation.extractors import EXTRACTORS
from madformer.sweeps import Sweep, run_sweep
from tests.helpers.sweep_cases import make_world, register_tiny, sweep_values


@pytest.fixture(scope="module", autouse=True)
def _extractor() -> Iterator[None]:
    register_tiny()
    yield
    del EXTRACTORS["tiny"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a sweep ``runs``, and the sweep's file."""
    folder = tmp_path_factory.mktemp("world")
    values = sweep_values(make_world(folder))
    del values["train"]
    values["sample"] = {"steps": [2], "seeds": [0, 1], "batch_size": 4, "precision": "exact"}
    values["evaluate"]["metrics"] = ["kid"]
    run_sweep(Sweep.of(values), folder / "runs", device="cpu", cache=folder / "cache", progress=False)
    (folder / "small.toml").write_text(
        f"models = {json.dumps(values['models'])}\n[sample]\nsteps = 2\nseeds = [0, 1]\nbatch_size = 4\n"
        f'precision = "exact"\n[evaluate]\nreference = "{folder}/pictures"\nnum_images = 8\nextractor = "tiny"\n'
    )
    return folder


@pytest.fixture
def sweeps(swept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(modes, "SWEEPS", swept)
    return swept


def test_rows_of_modes(sweeps: Path) -> None:
    out = sweeps / "emoji-modes.json"
    assert modes.main(["small", f"{sweeps}/model", "--runs", str(sweeps / "runs"), "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["mode"], row["sampling_seed"]) for row in rows] == [(mode, seed) for seed in (0, 1) for mode in MODES]
    # the reference mode draws what the sweep drew, from its seeds
    table = page.read_table(sweeps / "runs" / "table.parquet")
    for row, cell in zip([row for row in rows if row["mode"] == EXACT], table, strict=True):
        assert row["kid"] == pytest.approx(cell["scores"]["kid"]["value"], abs=1e-6)
    for row in rows:
        assert ("picture_psnr_db" in row) == (row["mode"] != EXACT)
        assert row["mode"] == EXACT or 5 < row["picture_psnr_db"] < 80
    by_mode = {mode: statistics.fmean(row["kid"] for row in rows if row["mode"] == mode) for mode in MODES}
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics == {
        f"{mode}_2_steps": pytest.approx(by_mode[mode] - by_mode[EXACT]) for mode in MODES if mode != EXACT
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-sweep", "x"], "no sweep is called 'no-sweep'"),
        (["small", "x"], "no model is called 'x': there are "),
    ],
)
def test_what_cannot_be_compared(
    sweeps: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert modes.main([*arguments, "--runs", str(sweeps / "runs")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_table_of_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences are of the same training; the interval is Student's over trainings."""
    rows: list[dict[str, Any]] = []
    for training, (exact, light) in enumerate([(0.2, 0.21), (0.3, 0.33), (0.25, 0.25)]):
        shared = {"training_seed": training, "steps": 8, "sampling_seed": 0}
        errors = {"picture_psnr_db": 40 + training, "worst_picture_psnr_db": 30 + training, "ssim": 0.5}
        rows.append({"mode": EXACT, **shared, "kid": exact, "seconds_per_image": 2.0})
        rows.append(
            {"mode": "light", **shared, "kid": light, "seconds_per_image": 1.0, **errors, "feature_distance": 0.1}
        )
    record = {"label": "4 blocks", "sweep": "emoji-blocks.toml", "num_images": 256, "rows": rows}
    (tmp_path / "emoji-modes.json").write_text(json.dumps(record))
    monkeypatch.setattr(page, "TABLES", tmp_path)
    text = page.filled("<!-- modes emoji-modes -->\nstale\n<!-- end -->\n")
    half = 1000 * scipy.stats.t.ppf(0.975, 2) * statistics.stdev([0.01, 0.03, 0.0]) / 3**0.5
    assert "*4 blocks* of `emoji-blocks.toml`, 3 trainings, 1 draws of 256 images." in text
    assert "| exact | 8 | 250.0 |  |  |  |  |  | 1.00 |" in text
    assert f"| light | 8 | 263.3 | +13.3 ± {half:.1f} | 41.0 | 30.0 | 0.5000 | 0.1000 | 0.50 |" in text
    assert page.filled(text) == text
    assert "*Not run yet.*" in page.filled("<!-- modes other -->\n<!-- end -->\n")
