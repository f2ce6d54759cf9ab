"""What the page of experiments says of tables whose figures are known, and what its figures lie between."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import scipy.stats
from PIL import Image

from benchmarks.experiments import advised, limits, page
from benchmarks.record import CannotCompare
from madformer.evaluation import Estimate
from madformer.sweeps.folder import COSTS, flat_row

KID = {
    ("as the paper", 0): (0.010, 0.012), ("as the paper", 1): (0.020, 0.022),
    ("no hidden loss", 0): (0.110, 0.112), ("no hidden loss", 1): (0.120, 0.122),
    ("flow matching", 0): (0.015, 0.017), ("flow matching", 1): (0.025, 0.027),
}  # fmt: skip
PROTOCOL: dict[str, Any] = dict.fromkeys(("preset", "weights", "seed", "guidance_interval", "prompts"))
PROTOCOL |= {
    "metric": "kid", "options": "", "extractor": "x", "extractor_hash": "x", "resizer": "x", "normalization": "x",
    "num_images": 256, "image_size": [32, 32], "image_format": "x", "images_hash": "x", "reference": "emoji",
    "reference_hash": "x", "num_reference": 700, "scheduler": "x", "steps": 8, "guidance": 1.0, "refresh_every": 1,
    "precision": "exact",
}  # fmt: skip


def row(model: str, training: int, draw: int, kid: float) -> dict[str, Any]:
    score = {"metric": "kid", **vars(Estimate(kid, kid - 0.001, kid + 0.001, "groups")), "protocol": PROTOCOL}
    own = {"cell": f"{model} {training} {draw}", "model": model, "training_seed": training, "sampling_seed": draw}
    how = {"scheduler": "own", "steps": 8, "guidance": 1.0, "guidance_tuned": False, "refresh_every": 1}
    rest = {"diffusion_layers": 2, "values": {}, "costs": dict.fromkeys(COSTS, 1), "scores": {"kid": score}}
    return own | how | rest


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [row(*key, draw, kid) for key, values in KID.items() for draw, kid in enumerate(values)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(map(flat_row, rows))), tmp_path / "emoji-hidden.parquet")
    monkeypatch.setattr(page, "TABLES", tmp_path)
    return tmp_path


def numbers(text: str, beginning: str) -> list[float]:
    """Of the rest of the first line that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(beginning))
    return [float(number) for number in re.findall(r"[-+]?[\d.]+", line.removeprefix(beginning))]


def place(what: str) -> str:
    return f"before\n<!-- {what} -->\nstale\n<!-- end -->\nafter\n"


def test_a_place_is_filled_with_means_differences_and_what_was_not_run(tables: Path) -> None:
    text = page.filled(place("cells emoji-hidden against as the paper"))
    assert text.startswith("before\n<!-- cells emoji-hidden against as the paper -->\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "stale" not in text
    assert "2 trainings of each, 2 draws of 256 images against 700 that were held out" in text
    # of two trainings whose means are 0.01 apart, by Student's quantile for one degree of freedom
    half = scipy.stats.t.ppf(0.975, 1) * 0.01 / 2
    assert numbers(text, "| as the paper | ") == pytest.approx([16, 1000 * half], abs=0.06)
    # two differences at once, by the variance of three models of two trainings each
    half = scipy.stats.t.ppf(1 - 0.025 / 2, 3) * math.sqrt(0.01**2 / 2)
    # what an interval leaves 0 out of is bold
    assert numbers(text, "| no hidden loss | **") == pytest.approx([100, 1000 * half], abs=0.06)
    assert numbers(text, "| flow matching | +") == pytest.approx([5, 1000 * half], abs=0.06)
    # no cell of the file itself is in this table
    assert "Not run: 72 of 72 cells: as the paper (12), no hidden loss (12), condition with noise added (12)," in text
    assert page.filled(text) == text
    assert "*Not run yet.*" in page.filled(place("cells emoji-blocks against 4 blocks"))


def test_noise_is_parted_and_gives_what_can_be_resolved(tables: Path) -> None:
    text = page.filled(place("noise emoji-hidden"))
    between, within = 0.01**2 / 2, 0.002**2 / 2
    training, draws = math.sqrt(between - within / 2), math.sqrt(within)
    least = [1000 * scipy.stats.t.ppf(0.975, 2 * n - 2) * math.sqrt(between * 2 / n) for n in (2, 3, 5)]
    expected = [8, 16, 1000 * training, 1000 * draws, *least]
    assert numbers(text, "| as the paper | ") == pytest.approx(expected, abs=0.06)


def test_a_baseline_that_is_not_there_is_named(tables: Path) -> None:
    with pytest.raises(ValueError, match="no model is called 'paper': there are as the paper, no hidden loss"):
        page.filled(place("cells emoji-hidden against paper"))


def test_the_page_is_what_the_tables_make_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert page.main(["--check"]) == 0, capsys.readouterr().err


def test_limits(tmp_path: Path) -> None:
    """The set itself is at no distance from itself; coding it, and one image for all, cost something."""
    (tmp_path / "pictures").mkdir()
    values = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 3), dtype=np.uint8)
    for index, pixels in enumerate(values):
        Image.fromarray(pixels).resize((16, 16), Image.Resampling.NEAREST).save(tmp_path / "pictures" / f"{index}.png")
    judging = f'[evaluate]\nreference = "{tmp_path}/pictures"\nnum_images = 16\nmetrics = ["fd"]\n'
    file = tmp_path / "sweep.toml"
    file.write_text(f'[train]\npreset = "emoji64"\n{judging}')
    record = limits.measure(file)
    assert any("no full rank" in warning for warning in record["warnings"])
    figures = record["metrics"]
    itself, decoded, mean = (figures[name]["fd"] for name in ("training images", "encoded and decoded", "their mean"))
    assert itself == pytest.approx(0, abs=1e-6)
    assert decoded > 1
    assert mean > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no sweep", "Expected '='"),
        ('models = ["assets/emoji64"]\n[evaluate]\nreference = "emoji:64"\n', "trains no model"),
    ],
)
def test_what_has_no_limits(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    with pytest.raises(CannotCompare, match=message):
        limits.measure(file)


def test_advice_is_held_against_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """By the tables that are there: their models' blocks and layers are the sweeps' files'."""
    by_steps, config = advised.measured(["emoji-split", "emoji-blocks"])
    assert config.num_layers == 4
    assert set(by_steps[8]) == {(1, 2), (4, 1), (4, 2), (4, 3), (4, 4), (16, 2)}
    rows = page.read_table(page.TABLES / "emoji-blocks.parquet")
    own = [row["scores"]["kid"]["value"] for row in rows if row["model"] == "1 block" and row["steps"] == 8]
    assert by_steps[8][1, 2] == pytest.approx(float(np.mean(own)))
    assert advised.main(["emoji-split", "--steps", "5", "--data", "nowhere"]) == 1
    assert capsys.readouterr().err == "advised: 0 candidates were measured at 5 steps, and it takes 3\n"
