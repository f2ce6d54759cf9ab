"""Advice on latents whose statistics are known: its ranking, what it takes from a sweep, what it refuses."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from madformer.advice import Candidate, advise, expected_error, read_measured, steps_within
from madformer.cli.main import main
from madformer.config import emoji64, tiny
from madformer.data.latents import LatentDescription
from madformer.engine.options import SamplingOptions
from madformer.engine.schedulers import default_scheduler
from madformer.evaluation import Estimate, Protocol, Score
from madformer.evaluation.moments import Array
from madformer.files.shards import KEY, write_shard
from madformer.model import MADFormer
from madformer.sweeps import Sweep, SweepFolder
from madformer.sweeps.costs import evaluations_of, layers_once
from madformer.sweeps.folder import COSTS, flat_row

COUNT, SHAPE = 100, (4, 8, 8)


def smooth(count: int = COUNT, seed: int = 0) -> Array:
    """Latents ``(N, 4, 8, 8)`` of a steep spectrum, and with a mean of each image's: any block tells of the others."""
    random = np.random.default_rng(seed)
    radii = np.hypot(*np.meshgrid(np.fft.fftfreq(8, 1 / 8), np.fft.fftfreq(8, 1 / 8), indexing="ij"))
    waves = np.fft.fft2(random.standard_normal((count, *SHAPE))) * np.where(radii > 0, radii, 1) ** -1.5
    return (random.standard_normal((count, 4, 1, 1)) + np.fft.ifft2(waves).real).astype(np.float32)


def rough(count: int = COUNT) -> Array:
    return np.random.default_rng(1).standard_normal((count, *SHAPE)).astype(np.float32)


def write_latents(folder: Path, means: Array, source: str = "data/emoji32, without 0.1 held out") -> Path:
    folder.mkdir()
    description = LatentDescription(source, len(means), (), 32, SHAPE, "float32", False, "vae", "0" * 16, 1000)
    description.write(folder)

    def member(index: int) -> dict[str, Any]:
        buffer = io.BytesIO()
        np.save(buffer, np.stack([means[index], np.ones(SHAPE, np.float32)]))
        record = {"key": f"k{index}", "label": -1, "caption": ""}
        return {KEY: f"{index:08d}", "npy": buffer.getvalue(), "json": record}

    write_shard(map(member, range(len(means))), folder / description.shard_name(0))
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents") / "smooth", smooth())


# the hypothesis


def test_the_formula() -> None:
    """By hand: r = 0.4, a = 1, blocks of 8 x 8 latents have 2 octaves beyond the first, N = 6, D = 3, T = 10."""
    config = Candidate(4, 3).of(emoji64())
    assert config.block_latents == (8, 8)
    own = 0.6 * (3 / 10 + 1 / 3) + 0.4 / 4
    found = expected_error(config, 10, np.array([0.4, -0.2, 0.4]), np.array([1.0, -3.0, -3.0]))
    np.testing.assert_allclose(found, [own * 1.3, 1 / 10 + 1 / 3, (0.6 * (0.1 + 1 / 3) + 0.1) * 1.3])
    assert np.isinf(expected_error(config, 0, np.array([0.4]), np.array([1.0]))).all()


@pytest.mark.parametrize(
    "changes", [{}, {"context": "clean", "cross_block_attention": False}, {"context": "condition"}]
)
def test_a_budget_is_what_a_sweep_counts(changes: dict[str, Any]) -> None:
    """As many steps as cost no more than the budget by the sweeps' own count, and not one more."""
    for split in (1, 2):
        config = tiny().replace(diffusion_layers=split, **changes)
        with torch.device("meta"):
            model = MADFormer(config)
        cost = [
            evaluations_of(model, default_scheduler("epsilon"), SamplingOptions(steps)).layers for steps in range(1, 5)
        ]
        for budget in (*cost, *np.arange(1, cost[-1], 0.7)):
            assert steps_within(config, budget, "layers") == sum(one <= budget + 1e-9 for one in cost)
        assert steps_within(config, 7.9, "steps") == 7
        assert layers_once(config) == cost[0] - split


def test_blocks_are_for_what_can_be_predicted() -> None:
    """At few evaluations: of latents that are smooth, and no others."""
    of_smooth, of_rough = (advise(torch.from_numpy(data), 20) for data in (smooth(), rough()))
    assert of_smooth.proposal.num_blocks > 1
    assert of_rough.proposal.num_blocks == 1
    assert [one.num_blocks for one in of_rough.blocks] == [1, 4]
    assert of_smooth.blocks[0].r2 == (0.0,)
    assert min(of_smooth.blocks[1].r2[1:]) > 0.6 > 0.05 > max(of_rough.blocks[1].r2)
    assert of_smooth.slope.value == pytest.approx(3, abs=0.1)
    assert of_smooth.ranking[0].first > 0.95
    assert of_smooth.ranking[0].score.low <= of_smooth.ranking[0].score.value <= of_smooth.ranking[0].score.high


def test_more_evaluations_are_for_more_diffusion() -> None:
    """The paper's finding, which the hypothesis has to have."""
    data = torch.from_numpy(smooth())
    best = [advise(data, budget, num_blocks=[4]).proposal.diffusion_layers for budget in (12, 40, 400)]
    assert best == sorted(best)
    assert best[0] < best[-1]


def test_a_ranking_of_all_candidates() -> None:
    advice = advise(torch.from_numpy(smooth()), 30, num_blocks=[16, 1, 4], diffusion_layers=[5, 1])
    assert {one.candidate for one in advice.ranking} == {Candidate(m, d) for m in (1, 4, 16) for d in (1, 5)}
    scores = advice.rank([one.candidate for one in advice.ranking])
    assert scores == [one.score.value for one in advice.ranking] == sorted(scores, reverse=True)
    assert advice.rank([(4, 2)]) != advice.rank([(4, 5)])
    # no step of five layers behind an autoregressive pass through five
    poor = advise(torch.from_numpy(smooth()), 6, diffusion_layers=[1, 6])
    assert poor.rank([(4, 1)]) == [-np.inf]
    assert poor.rank([(1, 6)])[0] > -np.inf
    with pytest.raises(ValueError, match="9 blocks are not possible"):
        poor.rank([(9, 1)])
    assert advice.rank([(4, 1), (1, 1), (4, 1)])[::2] == advice.rank([(4, 1)]) * 2


def test_a_model_decides_layers_and_order(latents: Path) -> None:
    """Blocks are predicted from those that its order makes before them."""
    config = tiny().replace(num_layers=5, block_order="spiral", diffusion_layers=2)
    found = advise(latents, 30, model=config, num_blocks=[4])
    assert {one.candidate.diffusion_layers for one in found.ranking} == {1, 2, 3, 4, 5}
    data = np.random.default_rng(3).standard_normal((200, *SHAPE)).astype(np.float32)
    # the upper left block, the last one of the spiral, is the upper right one
    data[:, :, :4, :4] = data[:, :, :4, 4:]
    raster, spiral = (
        advise(torch.from_numpy(data), 30, model=tiny().replace(block_order=order), num_blocks=[4]).blocks[0].r2
        for order in ("raster", "spiral")
    )
    # of the spiral's last block, twice as many numbers that say nothing are among those that predict
    np.testing.assert_allclose(raster, [0, 1, 0, 0], atol=0.1)
    np.testing.assert_allclose(spiral, [0, 0, 0, 1], atol=0.3)


# what was measured


PROTOCOL = {
    "metric": "kid", "options": "", "extractor": "tiny", "extractor_hash": "1", "resizer": "r", "normalization": "n",
    "num_images": 8, "image_size": (32, 32), "image_format": "bytes", "images_hash": "2", "reference": "emoji:32",
    "reference_hash": "3", "num_reference": 8,
}  # fmt: skip


def quality(candidate: Candidate, seed: int = 0) -> float:
    """Of which (4, 3) is best, then (1, 3), then (4, 1), then (1, 1); less is better."""
    return {(4, 3): 0.1, (1, 3): 0.2, (4, 1): 0.3, (1, 1): 0.4}[
        candidate.num_blocks, candidate.diffusion_layers
    ] + 0.002 * seed


def measured_row(model: str, value: float, seed: int, **told: Any) -> dict[str, Any]:
    """As a sweep has it."""
    score = Score(Estimate(value, value - 0.01, value + 0.01, "m"), Protocol.of(PROTOCOL))
    costs = dict.fromkeys(COSTS, 1.0) | told.pop("costs")
    return {
        "cell": f"{model} {seed} {told}", "model": model, "training_seed": seed, "weights": model, "scheduler": "own",
        "guidance": 1.0, "guidance_tuned": False, "refresh_every": 1, "sampling_seed": 0, "costs": costs,
        "scores": {"kid": score.to_dict()}, **told,
    }  # fmt: skip


def table_rows() -> list[dict[str, Any]]:
    """Of :func:`~madformer.config.tiny` in one block and in four, flat as a table has them."""
    rows = []
    for one in (Candidate(blocks, split) for blocks in (1, 4) for split in (1, 3)):
        config = one.of(Candidate(1, 1).of(tiny()))
        for steps, seed in itertools.product((2, 50), (0, 1)):
            value = quality(one, seed) - (0.05 if steps == 50 else 0)
            costs = {"nfe_steps": steps, "nfe_layers": layers_once(config) + steps * one.diffusion_layers}
            row = measured_row(
                str(one), value, seed, steps=steps, diffusion_layers=one.diffusion_layers, costs=costs,
                values={"model.num_blocks": one.num_blocks},
            )  # fmt: skip
            rows.append(flat_row(row))
    return rows


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="needs madformer[evaluation]")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs madformer[evaluation]")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_what_a_table_has_measured(latents: Path, tmp_path: Path) -> None:
    """The best within the budget, over training seeds, beside the hypothesis; and how far the two agree."""
    table = write_table(tmp_path / "table.parquet", table_rows())
    options: dict[str, Any] = {"preset": "tiny", "num_blocks": [1, 4], "diffusion_layers": [1, 3], "sweep": table}
    found = advise(latents, 20, **options)
    assert found.proposal == Candidate(4, 3)
    assert found.because.startswith("measured: kid 0.101 is the best of 4 candidates")
    measured = {one.candidate: one.measured for one in found.ranking}
    for candidate, one in measured.items():
        assert one is not None
        assert (one.steps, one.estimate.value) == (2, pytest.approx(quality(candidate) + 0.001))
        # Student's for two seeds that lie 0.002 apart
        assert one.estimate.high - one.estimate.value == pytest.approx(12.706 * 0.001, rel=1e-3)
    order = [(4, 3), (1, 3), (4, 1), (1, 1)]
    places = np.argsort(np.argsort([-score for score in found.rank(order)]))
    assert found.agreement is not None
    assert found.agreement.value == pytest.approx(1 - 6 * np.square(places - np.arange(4)).sum() / 60)
    richer = advise(latents, 200, **options)
    assert all(one.measured and one.measured.steps == 50 for one in richer.ranking)
    # of one model alone two steps are within this one
    poor = advise(latents, 4, **options)
    assert poor.because.startswith(f"{table} has 1 of the candidates within the budget; by the hypothesis")
    assert poor.agreement is None


def test_what_a_folder_has_measured(latents: Path, tmp_path: Path) -> None:
    """Block counts and layers are those of its models; without another word their layers are split."""
    training = {
        "preset": "tiny", "fields": {"data": "data/emoji32", "vae": "vae", "model": {"num_layers": 4}},
        "grid": {"model": {"diffusion_layers": [1, 2, 4]}},
    }  # fmt: skip
    sweep = Sweep.of({"train": training, "sample": {"steps": 2}, "evaluate": {"reference": "emoji:32"}})
    folder = SweepFolder(tmp_path, sweep)
    with folder.opened():
        for cell, value in zip(sweep.cells, (0.3, 0.1, 0.2), strict=True):
            assert cell.model.config is not None
            told = measured_row(
                cell.model.label, value, 0, steps=2, diffusion_layers=cell.model.config.model.diffusion_layers,
                values=dict(cell.model.values), costs={"nfe_steps": 2, "nfe_layers": 9.0},
            )  # fmt: skip
            folder.write(cell, told)
    found = advise(latents, 30, sweep=tmp_path)
    assert found.num_layers == 4
    assert found.proposal == Candidate(4, 2)
    assert "their intervals lie apart" in found.because
    assert [one.candidate for one in found.ranking if one.measured] != []
    with pytest.raises(ValueError, match="another geometry: their latents are 4 x 8 x 8, these are 4 x 16 x 16"):
        advise(torch.zeros(200, 4, 16, 16), 30, model=emoji64(), sweep=tmp_path)


def mixed(name: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[-1][name] = value

    return change


def everywhere(**values: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row.update({name.replace("__", "."): value for name, value in values.items()})

    return change


def without(name: str) -> Callable[[list[dict[str, Any]]], None]:
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            del row[name]

    return change


def with_commits(rows: list[dict[str, Any]]) -> None:
    for index, row in enumerate(rows):
        row["commit"] = f"c{index % 2}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mixed("protocol.extractor_hash", "9"), "not to be compared: extractor_hash of kid is '1' and '9'"),
        (mixed("protocol.num_images", 9), "num_images of kid is 8 and 9"),
        (with_commits, "mixes figures that are not to be compared: commit is c0 and c1"),
        (mixed("protocol.reference", "emojis:32"), "is of another data set: its reference is emojis:32"),
        (mixed("protocol.reference", "data/flowers"), "is of another data set: its reference is data/flowers"),
        (mixed("protocol.image_size", [64, 64]), "is of pictures of 64 x 64 pixels, and these latents of 32 x 32"),
        (everywhere(num_layers=12), "is of models with 12 layers, and advice is asked for 3"),
        (without("nfe_layers"), "is no table of a sweep: 'nfe_layers'"),
        (mixed("nfe_steps", None), "is no table of a sweep: nfe_steps=None is no number"),
        (mixed("diffusion_layers", 0), "diffusion_layers=0 must be at least 1"),
        (without("kid"), "has no figure"),
        (list.clear, "holds no row"),
    ],
)
def test_tables_that_are_refused(change: Any, message: str, latents: Path, tmp_path: Path) -> None:
    rows = table_rows()
    change(rows)
    table = write_table(tmp_path / "table.parquet", rows)
    with pytest.raises(ValueError, match=r"table\.parquet") as caught:
        advise(latents, 20, preset="tiny", sweep=table)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_name_of_the_same_data(tmp_path: Path, latents: Path) -> None:
    rows, description = table_rows(), LatentDescription.read(latents)
    everywhere(protocol__reference="hf:me/pictures")(rows)
    table = write_table(tmp_path / "table.parquet", rows)
    assert read_measured(table, tiny(), description, otherwise=tiny(), same_data=True).figure == "kid"


def test_a_table_that_does_not_say_its_blocks(latents: Path, tmp_path: Path) -> None:
    """They are those of the model or preset that is named, as it is and not as it is laid out; never a guess.

    So are its layers.
    """
    rows = [row for row in table_rows() if row["train.model.num_blocks"] == 4]
    without("train.model.num_blocks")(rows)
    table = write_table(tmp_path / "table.parquet", rows)
    with pytest.raises(ValueError, match="does not say its models' num_layers: give --model or --preset"):
        advise(latents, 20, sweep=table)
    layers = {"train.model.num_layers": 6}
    told_layers = write_table(tmp_path / "layers.parquet", [row | layers for row in rows])
    with pytest.raises(ValueError, match="does not say its models' num_blocks: give --model or --preset"):
        advise(latents, 20, sweep=told_layers)
    # what was measured of others than those that are asked for is not proposed
    found = advise(latents, 20, preset="tiny", num_blocks=[4], diffusion_layers=[1], sweep=table)
    assert found.proposal == Candidate(4, 1)
    assert found.ranking[0].measured is not None


# the command


def test_the_command(latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "table.parquet", table_rows())
    options = ["advise", "--data", str(latents), "--budget", "20", "--preset", "tiny", "--sweep", str(table)]
    assert main([*options, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    # twice the same
    assert told == json.loads(json.dumps(advise(latents, 20, preset="tiny", sweep=table).to_dict()))
    assert told["proposal"] == {"num_blocks": 4, "diffusion_layers": 3}
    assert told["ranking"][0]["measured"]["steps"] == 2
    assert main(options) == 0
    printed = capsys.readouterr().out
    for text in ("100 images of", "a = ", "M=4 (2 x 2): earlier blocks explain 0.", "proposal: M=4, D=3", "because: "):
        assert text in printed


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is refused: latents, and a model of others."""
    root = tmp_path_factory.mktemp("bad")
    write_latents(root / "few", smooth(99))
    broken = smooth()
    broken[7, 0, 3, 3] = np.nan
    write_latents(root / "nan", broken)
    write_latents(root / "flat", np.ones_like(broken))
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text(emoji64().to_json())
    return root


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "--budget 0 must be at least 1 evaluation"),
        (["--budget", "nan"], "--budget nan must be at least 1 evaluation"),
        (["--budget", "1"], "budget=1 pays for no step: the cheapest candidate takes"),
        (["--data", "{}/few"], "few: statistics of latents take 100 images, and there are 99"),
        (["--data", "{}/nan"], "nan: latents of 1 of 100 images are not finite"),
        (["--data", "{}/flat"], "flat: latents have no power at some frequency: they are no data's"),
        (["--data", "{}"], "holds no latents: `madformer data latents` makes them of pictures"),
        (["--data", "{}/absent"], "absent holds no latents.json"),
        (["--model", "{}/model"], "smooth: latents are 4 x 8 x 8, the model takes 4 x 16 x 16"),
        (["--preset", "nano"], "unknown preset 'nano'; there are ffhq1024"),
        (["--model", "m", "--preset", "tiny"], "--model and --preset both name layers: give one"),
        (["--num-blocks", "3"], "3 blocks are not possible: their number is a square"),
        (["--diffusion-layers", "7"], "diffusion_layers=7 must be from 1 to num_layers=6"),
        (["--num-images", "50"], "statistics of latents take 100 images, and there are 50"),
        (["--sweep", "{}/absent"], "no sweep's folder or table at"),
        (["--sweep", "{}/few"], "holds no sweep: no sweep.json"),
        (["--metric", "kid"], "--metric is of --sweep"),
    ],
)
def test_what_is_refused_is_one_line(
    options: list[str], message: str, latents: Path, bad: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [option.format(bad) for option in ["--data", str(latents), "--budget", "30", *options]]
    assert main(["advise", *told]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_no_budget(latents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["advise", "--data", str(latents)])
    assert stop.value.code == 2
    assert "the following arguments are required: --budget" in capsys.readouterr().err
