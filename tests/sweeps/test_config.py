"""What a file may say, and how a fault in it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from madformer.cli.main import main
from madformer.sweeps import Sweep

JUDGING = {"reference": "emoji:64"}
TRAIN = {"preset": "tiny", "seeds": [0, 7], "fields": {"steps": 5, "model": {"num_layers": 4}}}


def values(**changes: Any) -> dict[str, Any]:
    return {"models": ["a"], "evaluate": JUDGING} | changes


def test_cells_are_every_combination() -> None:
    grid = {"batch_size": [4, 8], "model": {"block_grid": [[1, 4], [2, 2]]}}
    told = values(
        train=TRAIN | {"grid": grid}, sample={"steps": [2, 4, 8], "guidance": [1, 3], "scheduler": "ddim", "seeds": 0}
    )
    sweep = Sweep.of(told)
    assert len(sweep.all_models) == 1 + 2 * 2 * 2
    assert len(sweep.cells) == 9 * 3 * 2
    assert len({cell.id for cell in sweep.cells}) == len(sweep.cells)
    given, first, *_ = sweep.all_models
    assert given.source == "a"
    assert given.config is None
    assert first.config is not None
    assert (first.config.steps, first.config.batch_size, first.config.seed) == (5, 4, 0)
    assert (first.config.model.num_layers, first.config.model.block_grid) == (4, (1, 4))
    assert first.label == "batch_size=4, block_grid=1x4"
    assert set(first.given) == {"steps", "model.num_layers", "batch_size", "model.block_grid"}
    assert Sweep.of(sweep.to_dict()).cells == sweep.cells
    # draws of the same model are tuned together
    tuned = Sweep.of(values(tune={}, sample={"seeds": [0, 1], "steps": [2, 4]})).cells
    assert len({cell.id for cell in tuned}) == 4
    assert len({cell.tuning_id for cell in tuned}) == 2


def test_cases_are_variants_that_no_grid_makes() -> None:
    cases = [
        {"label": "as it is"},
        {"label": "no hidden loss", "hidden_loss_weight": 0, "model": {"diffusion_layers": 1}},
    ]
    sweep = Sweep.of(values(models=[], train=TRAIN | {"cases": cases}))
    assert [(model.label, model.seed) for model in sweep.all_models] == [
        ("as it is", 0), ("as it is", 7), ("no hidden loss", 0), ("no hidden loss", 7),
    ]  # fmt: skip
    plain, *_, other = sweep.all_models
    assert plain.config is not None
    assert other.config is not None
    assert (plain.config.hidden_loss_weight, other.config.hidden_loss_weight) == (0.1, 0)
    assert (other.config.model.num_layers, other.config.model.diffusion_layers) == (4, 1)
    assert other.values == {"hidden_loss_weight": 0, "model.diffusion_layers": 1}
    assert set(other.given) == {"steps", "model.num_layers", "hidden_loss_weight", "model.diffusion_layers"}
    # a model is what it is trained as, however a file says so
    without = Sweep.of(values(models=[], train=TRAIN)).all_models
    grid = {"hidden_loss_weight": [0], "model": {"diffusion_layers": [1]}}
    by_grid = Sweep.of(values(models=[], train=TRAIN | {"grid": grid})).all_models
    assert [model.id for model in (*without, *by_grid)] == [model.id for model in sweep.all_models]
    # together with a grid: each case at each of its values, checked as one
    both = Sweep.of(values(models=[], train=TRAIN | {"cases": cases, "grid": {"batch_size": [4, 8]}}))
    assert [model.label for model in both.all_models[::2]] == [
        "as it is, batch_size=4", "as it is, batch_size=8",
        "no hidden loss, batch_size=4", "no hidden loss, batch_size=8",
    ]  # fmt: skip
    assert Sweep.of(both.to_dict()).cells == both.cells
    assert both.lasting() == sweep.lasting()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"train": TRAIN | {"cases": [{"steps": 3}]}}, "train.cases: a case has label=None, no name"),
        ({"train": TRAIN | {"cases": [{"label": "a"}, {"label": "a"}]}}, "train.cases: label holds 'a' twice"),
        ({"train": TRAIN | {"cases": [{"label": "a", "seed": 3}]}}, "train.cases.seed has no place"),
        ({"train": TRAIN | {"cases": [{"label": "a", "stepz": 3}]}}, "train.cases.stepz .the nearest known name"),
        ({"train": TRAIN | {"cases": ["a"]}}, "train.cases=.* must be objects with fields, in a list"),
        ({"train": TRAIN | {"cases": {"label": "a"}}}, "train.cases=.* must be objects with fields, in a list"),
        (
            {"train": TRAIN | {"cases": [{"label": "a", "steps": 4}, {"label": "b", "steps": 4}]}},
            "train.cases holds .* twice",
        ),
        (
            {"train": TRAIN | {"grid": {"steps": [3]}, "cases": [{"label": "a", "steps": 4}]}},
            "train.cases: a and train.grid both say what steps is",
        ),
        ({"sampel": {}}, r"field sampel \(the nearest known name is sample\)"),
        ({"sample": {"step": 3}}, r"field sample.step \(the nearest known name is sample.steps\)"),
        ({"evaluate": {"referenc": "x"}}, r"field evaluate.referenc \(the nearest known name is evaluate.reference\)"),
        ({"train": TRAIN | {"grid": {"model": {"difusion_layers": [1]}}}}, "train.grid.model.diffusion_layers"),
        ({"train": TRAIN | {"fields": {"stepz": 1}}}, r"train.fields.stepz \(the nearest known name is train.fields."),
        ({"train": TRAIN | {"grid": {"steps": 3}}}, "train.grid.steps=3 must be a list of values"),
        ({"train": TRAIN | {"grid": {"batch_size": []}}}, "train.grid.batch_size is an empty list"),
        ({"train": TRAIN | {"fields": {"seed": 1}}}, "train.fields.seed has no place: there are train.seeds"),
        ({"train": {"preset": "emoji"}}, "train.preset='emoji' must be one of"),
        ({"train": {}}, "field train.preset is missing"),
        ({"train": TRAIN | {"grid": {"model": {"diffusion_layers": [9]}}}}, "diffusion_layers=9 must be from 1 to"),
        ({"models": []}, "nothing to sample: give models, or train"),
        ({"models": ["a", "a"]}, "models holds 'a' twice"),
        ({"sample": {"steps": [4, 4]}}, "sample.steps holds 4 twice"),
        ({"sample": {"steps": [0]}}, "steps=0 must be"),
        ({"sample": {"guidance": 0.5}}, "sample.guidance=0.5 must be at least 1"),
        ({"sample": {"scheduler": "ddimm"}}, "no scheduler 'ddimm'"),
        ({"sample": {"steps": "many"}}, "sample.steps=.* must be whole numbers"),
        ({"sample": 3}, "sample=3 must be an object with fields"),
        ({"tune": {}, "sample": {"guidance": 2}}, "sample.guidance and tune are ways to choose guidance"),
        ({"tune": {"low": 3.0, "high": 2.0}}, "tune.low=3.0 and tune.high=2.0 must rise"),
        ({"tune": {"metric": "memorization"}}, "tune.metric='memorization' must be one of fd"),
        ({"evaluate": JUDGING | {"metrics": "kidd"}}, r"unknown metric kidd \(the nearest known name is kid\)"),
        ({"evaluate": JUDGING | {"num_images": 0}}, "evaluate.num_images=0 must be at least 1"),
        ({"sample": {"guidance_interval": [100, 500]}}, "sample.guidance_interval is for sample.guidance, or tune"),
        ({"evaluate": JUDGING | {"holdout": 1}}, "evaluate.holdout=1.* must be at least 0, and below 1"),
        ({"sample": {"seeds": [2**60]}}, "seed"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_told(told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sweep.of(values(**told))


def test_a_fault_of_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "sweep.toml", tmp_path / "out"
    for text, message in (
        ('models = ["a"]\n[evaluate]\nreference = "emoji:64"\n[sample]\nstps = 3', "sample.stps (the nearest"),
        ("models = [", "sweep.toml: "),
    ):
        file.write_text(text)
        assert main(["sweep", str(file), "--out", str(out)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"madformer sweep: error: {file}: ")
        assert message in line
    assert main(["sweep", str(tmp_path / "sweep.txt"), "--out", str(out)]) == 1
    assert "must end in .toml, .yaml" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no sweep" in capsys.readouterr().err
    assert not out.exists()


def test_a_dry_run_tells_what_there_is_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("models: a\nevaluate: {reference: 'emoji:64'}\ntrain: {preset: tiny, seeds: [0, 1]}\n")
    assert main(["sweep", str(file), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "tiny: to train, 2,000 steps, seed 1" in out
    assert "3 cells of 1,000 images, of which 0 are done" in out


def test_the_examples_are_sweeps() -> None:
    from madformer.cli import config_file

    examples = sorted((Path(__file__).parents[2] / "examples" / "sweeps").iterdir())
    assert examples
    for path in examples:
        assert Sweep.of(config_file.read(path)).cells
