"""A sweep's lines and comparisons from rows with known numbers, and the page that is made of them."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from madformer.cli.main import main
from madformer.evaluation import Estimate, Protocol, Score, variance_components
from madformer.evaluation.uncertainty import student
from madformer.sweeps import Sweep, SweepFolder, comparisons, lines, plot, write_report
from madformer.sweeps.config import Cell
from madformer.sweeps.page import svg_of

TOLD: dict[str, Any] = {
    "models": ["given"],
    "train": {"preset": "tiny", "seeds": [0, 1], "grid": {"batch_size": [4, 8]}},
    "sample": {"steps": [2, 4], "guidance": [1, 3], "seeds": [0, 1]},
    "evaluate": {"reference": "somewhere", "num_images": 50},
}


def protocol(**changes: Any) -> Protocol:
    told: dict[str, Any] = {
        "metric": "kid", "options": "subsets=100", "extractor": "tiny", "extractor_hash": "0", "resizer": "bicubic",
        "normalization": "none", "num_images": 50, "image_size": (16, 16), "image_format": "RGB, 8 bits",
        "images_hash": "1", "reference": "somewhere", "reference_hash": "2", "num_reference": 50,
    }  # fmt: skip
    return Protocol(**{**told, **changes})


def value_of(cell: Cell) -> float:
    """Known: of the model, of its training, of the draw, of the steps, of guidance."""
    model = {"given": 0.5, "batch_size=4": 1.0, "batch_size=8": 2.0}[cell.model.label]
    return model + 0.1 * (cell.model.seed or 0) + 0.01 * cell.seed + 1 / cell.steps + (cell.guidance or 0)


def row_of(cell: Cell, **changes: Any) -> dict[str, Any]:
    estimate = Estimate(value_of(cell), value_of(cell) - 0.2, value_of(cell) + 0.2, "jackknife over 20 groups")
    return {
        "cell": cell.id, "model": cell.model.label, "model_id": cell.model.id, "training_seed": cell.model.seed,
        "values": dict(cell.model.values), "scheduler": cell.scheduler, "steps": cell.steps, "guidance": cell.guidance,
        "guidance_tuned": False, "refresh_every": 1, "diffusion_layers": 2, "sampling_seed": cell.seed,
        "weights": cell.model.id, "warnings": ["few images"], "shown": ["red apple", "<b>pear</b>"],
        "scores": {"kid": Score(estimate, protocol(steps=cell.steps)).to_dict()},
        "costs": {
            "nfe_steps": cell.steps, "nfe_layers": 3.0 * cell.steps, "flops_per_image": 10**9,
            "seconds_per_image": 0.1 * cell.steps, "peak_memory_bytes": 10**8, "parameters": 10, "training_flops": None,
        },
    } | changes  # fmt: skip


def write(folder: Path, told: dict[str, Any] = TOLD, count: int | None = None) -> SweepFolder:
    sweep = SweepFolder(folder, Sweep.of(told))
    with sweep.opened():
        for cell in sweep.sweep.cells[:count]:
            sweep.write(cell, row_of(cell), [Image.new("RGB", (16, 16), (200, 30, 30))] * 2)
    for model in sweep.sweep.all_models:
        if model.config is not None:
            sweep.training(model).mkdir(parents=True)
            records = [{"step": step, "loss": 10 / step} for step in range(1, 901)]
            text = "".join(f"{json.dumps(record)}\n" for record in records)
            (sweep.training(model) / "metrics.jsonl").write_text(text + '{"step": 901, "lo')
    return sweep


def test_points_are_over_training_seeds_and_draws() -> None:
    cells = Sweep.of(TOLD).cells
    found = lines([row_of(cell) for cell in cells], "kid")
    assert [line.label for line in found] == [
        f"{model}, guidance {scale}" for model in ("given", "batch_size=4", "batch_size=8") for scale in (1, 3)
    ]
    assert [[point.steps for point in line.points] for line in found] == 6 * [[2, 4]]
    trained = found[3].points[0]
    by_hand = variance_components({0: [4.5, 4.51], 1: [4.6, 4.61]})
    assert trained.estimate == by_hand.estimate
    assert trained.spread == by_hand
    assert trained.cost("nfe_layers") == 6.0
    # of one training, draws alone: Student's interval of two
    given = found[0].points[1].estimate
    half = student(1) * np.std([1.75, 1.76], ddof=1) / math.sqrt(2)
    assert (given.low, given.value, given.high) == pytest.approx((1.755 - half, 1.755, 1.755 + half))
    assert "of one training" in given.method
    # of one row its own interval
    alone = lines([row_of(cells[0])], "kid")[0]
    assert alone.label == "given"
    assert alone.points[0].estimate.method == "jackknife over 20 groups"


def test_models_are_compared_over_trainings() -> None:
    found = comparisons([row_of(cell) for cell in Sweep.of(TOLD).cells], "kid")
    # that which is given has one training, and is compared with none
    assert {(one.first, one.second) for one in found} == {("batch_size=4", "batch_size=8")}
    assert [(one.settings, one.steps) for one in found] == [
        (f"guidance {scale}", steps) for scale in (1, 3) for steps in (2, 4)
    ]
    # means of two trainings that lie 0.1 apart: each has the variance 0.005 / 2, with 2 degrees of freedom by Welch
    half = student(2) * math.sqrt(2 * 0.005 / 2)
    for one in found:
        assert (one.difference.low, one.difference.value, one.difference.high) == pytest.approx((1 - half, 1, 1 + half))


class Page(HTMLParser):
    """What a page would fetch, and the text of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "poster", "srcset", "action"):
                self.loaded.append(value or "")


def test_the_page_needs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "sweep")
    assert main(["report", str(tmp_path / "sweep"), "--figures", str(tmp_path / "figures")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "sweep" / "report.html")
    text = (tmp_path / "sweep" / "report.html").read_text()
    page = Page(text)
    assert page.loaded
    assert all(one.startswith(("data:image/webp;base64,", "#")) for one in page.loaded)
    assert not re.search(r"@import|url\((?!['\"]?#)|<link|<iframe|fetch\(|import\(", text)
    # names of what SVG is, which are not fetched, are all of the web's addresses
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    names = [attributes.get("name") for tag, attributes in page.tags if tag == "meta"]
    assert "viewport" in names
    assert len([1 for tag, _ in page.tags if tag == "svg"]) == 4
    # no part of a figure has the name of another's
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    clips = [name for name in names if name is not None and re.fullmatch(r"[pm][0-9a-f]{10}", name)]
    assert clips
    assert len(clips) == len(set(clips))
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "nfe_layers.png", "nfe_steps.png", "seconds_per_image.png", "training.png"
    ]  # fmt: skip
    # what comes from captions is text
    assert "<b>pear" not in text
    assert "&lt;b&gt;pear" in text


def test_the_page_says_what_there_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "sweep", count=7)
    text = write_report(folder.path).read_text()
    assert "7 of 40 cells" in text
    rows = re.findall(r"<tr>(.*?)</tr>", text[text.index('id="cells"') : text.index("<h2>Protocol")], re.DOTALL)
    sorted_by = [re.findall(r'data-sort="([^"]*)"', row) for row in rows[1:]]
    assert len(sorted_by) == 7
    named = [dict(zip(columns(rows[0]), row, strict=True)) for row in sorted_by]
    for row, cell in zip(named, folder.sweep.cells, strict=False):
        assert row["model"] == cell.model.label
        assert float(row["guidance"]) == cell.guidance
        assert float(row["kid"]) == pytest.approx(value_of(cell))
        assert float(row["GFLOP"]) == 1.0
    assert "few images." in text
    assert "<dt>reference_hash</dt><dd>2</dd>" in text
    assert "<dt>steps</dt><dd>2, 4</dd>" in text


def columns(head: str) -> list[str]:
    return re.findall(r'<button type="button">(.*?)</button>', head)


def test_figures_are_matplotlibs_and_show_the_points(tmp_path: Path) -> None:
    folder = write(tmp_path / "sweep")
    figures = plot(folder.path)
    assert list(figures) == ["nfe_steps", "nfe_layers", "seconds_per_image", "training"]
    (axes,) = figures["nfe_layers"].axes
    drawn = [container.lines[0].get_xydata().tolist() for container in axes.containers]
    assert drawn[0] == [[6.0, pytest.approx(2.005)], [12.0, pytest.approx(1.755)]]
    assert "less is better" in axes.get_ylabel()
    (axes,) = figures["training"].axes
    assert len(axes.lines) == 4
    steps, losses = axes.lines[0].get_data()
    assert len(steps) == 300
    # three steps a point, and the line that was being written is left out
    assert (steps[0], losses[0]) == (2, pytest.approx((10 + 5 + 10 / 3) / 3))
    assert "currentColor" in svg_of(plot(folder.path, ink="#010203")["nfe_steps"], "a")
    figures["nfe_steps"].savefig(buffer := io.BytesIO(), format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="has no fd: there are kid"):
        plot(folder.path, "fd")


def test_no_report_of_nothing_or_of_two_protocols(tmp_path: Path) -> None:
    folder = write(tmp_path / "sweep", count=0)
    with pytest.raises(ValueError, match=r"no cell of .* is done yet"):
        write_report(folder.path)
    first, second, *_ = folder.sweep.cells
    folder.write(first, row_of(first))
    other = Score(Estimate(1.0, 0.0, 2.0, ""), dataclasses.replace(protocol(), reference_hash="3")).to_dict()
    folder.write(second, row_of(second, scores={"kid": other}))
    with pytest.raises(ValueError, match="reference_hash of kid is '2' and '3'"):
        write_report(folder.path)
    assert not (folder.path / "report.html").exists()
