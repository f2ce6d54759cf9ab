"""``madformer bench``: what it counts against closed forms, how it splits a run, how it ends, and the command."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from madformer.cli.main import main
from madformer.config import MADFormerConfig, tiny
from madformer.engine import memory
from madformer.engine.options import SamplingOptions
from madformer.engine.progress import Progress
from madformer.engine.sampler import Sampler, bytes_per_image
from madformer.engine.schedulers import default_scheduler
from madformer.measuring import report, sampling
from madformer.measuring.bare import BareModel, Work
from madformer.measuring.timing import Spread, Stopwatch
from madformer.pipeline import MADFormerPipeline
from tests.helpers.engine_cases import CASES, draw_noise, draw_prompt, make_model
from tests.helpers.testing import relative_error, small_vae

CPU = torch.device("cpu")
ROOF = sampling.Roof(matmul_flops=1e9, copy_bytes=1e6)


def make_sampler(config: MADFormerConfig) -> Sampler:
    model = make_model(config).eval()
    return Sampler(model, default_scheduler(config.prediction_type))


# The bare model and its work


@pytest.mark.parametrize(
    "name",
    ["both", "clean only", "condition only", "noisy blocks only", "block-local", "shared towers", "one block", "text"],
)
@torch.inference_mode()
def test_bare_passes_are_the_engines(name: str) -> None:
    """Before the first step of every block: the same condition and the same prediction from the same inputs."""
    config = CASES[name]
    plan = make_sampler(config).plan(2, SamplingOptions(2)).warmup()
    bare = BareModel(plan.model, plan.cache)
    checked = []

    def compare(progress: Progress) -> None:
        block = progress.block
        if progress.step or block in checked:
            return
        checked.append(block)
        bare.latents_B1LC = plan.slots.canvas_RMLC[:, block - 1 : block] if block else bare.latents_B1LC
        bare.down_BT = plan.slots.clean_embedding(None)
        if (condition := bare.ar(block)) is not None:
            assert relative_error(condition, plan.cache.condition_RLC) < 1e-5
        bare.latents_B1LC = plan.slots.latents_RLC[:, None]
        (expected,) = plan.passes.predict(None, plan.slots.latents_RLC, bare.down_BT, bare.up_BT, torch.empty(2, 0))
        assert relative_error(bare.denoise(block)[:, 0], expected) < 1e-5

    plan.run(draw_noise(config), draw_prompt(config), callback=compare)
    assert checked == list(range(config.num_blocks))


@pytest.mark.parametrize("name", ["both", "condition only", "block-local", "one block"])
def test_work_is_the_closed_form(name: str) -> None:
    """Products with weights and attention of the Transformer by hand, the U-Net as counted on the running model."""
    config = CASES[name]
    model, work = make_model(config).set_backend("reference"), Work.of(make_model(config))
    tokens, hidden, blocks = config.block_size, config.hidden_size, range(config.num_blocks)
    projections = 2 * tokens * (4 * hidden**2 + 3 * hidden * config.intermediate_size)

    def attention(block: int, cross_block: bool) -> int:
        return 4 * tokens * (block * cross_block + 1) * tokens * hidden

    cross = config.cross_block_attention
    step = sum(config.diffusion_layers * (projections + attention(block, cross)) for block in blocks)
    assert work.step_flops - work.unet_flops == step

    down, up, _ = (torch.zeros(1, width) for width in config.told_widths)
    latents = torch.zeros(1, 1, config.latents_per_block, config.latent_channels)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tokens_BSC, skips = model.embed(latents, down)
        embedding = counter.get_total_flops()
        model.decode(tokens_BSC, up, skips)
    assert work.unet_flops == config.num_blocks * counter.get_total_flops()

    ar = 0
    for block in blocks:
        if config.has_condition:
            ar += config.ar_layers * (projections + attention(block, True))
        if block and config.context != "noise":
            ar += embedding
        if block and config.has_clean_stream:
            full = model.clean_layers - 1
            seen = [attention(block - 1, cross or index < config.ar_layers) for index in range(full)]
            ar += full * projections + sum(seen) + 2 * tokens * 2 * hidden**2
    assert work.ar_flops == ar


def test_bytes_are_those_of_the_weights_that_a_step_reads() -> None:
    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            used.update((id(x), x) for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor))
            return func(*args, **(kwargs or {}))

    used: dict[int, Tensor] = {}
    plan = (
        Sampler(make_model(tiny()), default_scheduler("epsilon"), pack_weights=False)
        .plan(1, SamplingOptions(1))
        .warmup()
    )
    bare = BareModel(plan.model, plan.cache)
    with Recorder(), torch.no_grad():
        bare.denoise(1)
    read = sum(parameter.nbytes for parameter in plan.model.parameters() if id(parameter) in used)
    work = Work.of(plan.model)
    assert work.step_bytes == read
    assert work.weight_bytes(3) == 3 * tiny().num_blocks * read


# Rows


def test_stopwatch_adds_up_its_calls_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work(duration: float) -> float:
        clock[0] += duration
        return duration

    watch = Stopwatch(CPU)
    timed = watch.around(lambda: work(2.0))
    assert timed() == 2.0
    work(5.0)
    timed()
    assert watch.read() == 4.0
    assert watch.read() == 0.0


def test_rows_are_medians_whose_parts_add_up() -> None:
    plan = make_sampler(tiny()).plan(2, SamplingOptions(3))
    rounds = [
        {"total": 10.0, "ar": 1.0, "denoise": 6.0, "vae": 2.0, "unet": 4.0},
        {"total": 12.0, "ar": 1.5, "denoise": 7.0, "vae": 2.5, "unet": 4.0},
        {"total": 90.0, "ar": 1.5, "denoise": 7.0, "vae": 2.0, "unet": 5.0},
    ]
    work = Work(num_blocks=4, ar_flops=10**6, step_flops=10**6, unet_flops=1, step_bytes=500)
    pairs = [(1.0, 0.9), (1.2, 1.0), (90.0, 10.0)]
    row = sampling.row_of(plan, rounds, pairs, ROOF, work)
    assert row.split == {"ar": 1.5, "transformer": 3.0, "unet": 4.0, "vae": 2.0, "host": 1.0}
    assert row.seconds.median == 12.0
    assert row.images_per_second == 2 / 12
    assert row.overhead == pytest.approx(0.2), "the middle one of the pairs' own ratios"
    assert row.bare_seconds.median == 1.0
    assert row.operations_floor == pytest.approx(2 * 4e6 / 1e9)
    assert row.bytes_floor == pytest.approx(4 * 3 * 500 / 1e6)
    assert row.fraction_of_roof == pytest.approx(row.operations_floor / 10)


@pytest.mark.parametrize("name", ["both", "text and classes", "ACDiT"])
def test_a_row_is_measured_on_the_run_itself(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sampling, "PAIRS_SECONDS", float("inf"))
    plan = make_sampler(CASES[name]).plan(2, SamplingOptions(2)).warmup()
    prepared = plan.prepared
    row = sampling.measure(plan, ROOF, Work.of(plan.model), repeats=2)
    assert plan.prepared is prepared
    assert len(row.seconds.samples) == 2
    assert len(row.bare_seconds.samples) == 2 * plan.config.num_blocks
    assert row.split["vae"] == 0
    assert all(row.split[part] > 0 for part in ("ar", "unet", "host"))
    parts = row.split["ar"] + row.split["transformer"] + row.split["unet"] + row.split["host"]
    # medians of two are means, so the parts are exactly the whole
    assert parts == pytest.approx(row.seconds.median)


def test_a_batch_that_does_not_fit_ends_its_step_count_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make_sampler(tiny())
    room = 3 * bytes_per_image(sampler.source, 2)
    monkeypatch.setattr(memory, "available", lambda device: room)
    result = sampling.sweep(sampler, [8, 4, 1], [1, 2], ROOF, repeats=1)
    assert [(row.steps, row.batch) for row in result.rows] == [(1, 1), (2, 1)]
    refusal = "batch=4 does not fit in the memory of cpu: the largest batch that fits is 3"
    assert result.stopped == [f"1 steps: {refusal}", f"2 steps: {refusal}"]


def test_no_row_begins_after_the_budget() -> None:
    seen: list[sampling.Row] = []
    result = sampling.sweep(make_sampler(tiny()), [1], [1, 2], ROOF, budget=-1, on_row=seen.append)
    assert (result.rows, seen) == ([], [])
    assert result.not_measured == ["batch 1, 1 steps", "batch 1, 2 steps"]


def test_a_schedule_that_is_not_tabulated_is_refused() -> None:
    sampler = Sampler(make_model(tiny()), UniPCMultistepScheduler())
    with pytest.raises(ValueError, match="UniPCMultistepScheduler has no step loop to time"):
        sampling.sweep(sampler, [1], [2], ROOF)


def make_row(batch: int, steps: int, seconds: float) -> sampling.Row:
    split = dict(zip(sampling.PARTS, (0.1, 0.3, 0.4, 0.15, 0.05), strict=True))
    split = {part: share * seconds for part, share in split.items()}
    spread = Spread.of([seconds])
    return sampling.Row(batch, steps, spread, split, spread, batch / 100, 0.1, 0.01)


def test_metrics_and_table() -> None:
    rows = [make_row(1, 10, 1.0), make_row(4, 10, 2.0), make_row(8, 10, 5.0), make_row(1, 25, 2.5)]
    metrics = report.metrics(rows, ROOF)
    assert metrics["seconds_batch_1_steps_10"] == 1.0
    assert (metrics["images_per_second_steps_10"], metrics["best_batch_steps_10"]) == (2.0, 4)
    assert metrics["overhead_batch_8_steps_10"] == 0.08
    assert metrics["fraction_of_roof_steps_25"] == pytest.approx(0.1 / (2.5 * 0.85))
    cells = report.line(rows[1]).split()
    assert " ".join(cells) == "10 4 2 2 10.0% 30.0% 40.0% 15.0% 5.0% 0.1 0.01 5.9% +4.0%"
    assert len(report.heading().splitlines()[1].replace("of roof", "of_roof").split()) == len(cells)
    ending = report.ending(sampling.Sweep(rows, ["too large"], ["batch 16"]))
    assert ending[0] == "10 steps: 1 s at batch 1; most images a second 2 at batch 4"
    assert ending[2:] == ["stopped, too large", "out of time, not measured: batch 16"]


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline with an autoencoder."""
    path = tmp_path_factory.mktemp("model")
    vae = small_vae(block_out_channels=(8,))
    MADFormerPipeline(make_model(tiny()), vae, default_scheduler("epsilon")).save_pretrained(path)
    return path


def test_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling.Roof, "measure", lambda device, dtype: ROOF)
    out, plot = tmp_path / "new" / "record.json", tmp_path / "plot.png"
    arguments = ["bench", "--model", folder, "--batch-sizes", "2,1", "--steps", "1", "--repeats", 1]
    arguments += ["--precision", "exact", "--out", out, "--plot", plot]
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    record = json.loads(out.read_text())
    assert json.loads(last) == record["metrics"]
    assert [(row["steps"], row["batch"]) for row in record["rows"]] == [(1, 1), (1, 2)]
    for row in record["rows"]:
        assert row["images_per_second"] == row["batch"] / row["seconds"]["median"]
        assert row["split"]["vae"] > 0
    assert sum(text.split()[:2] == ["1", "2"] for text in table) == 1
    assert record.keys() >= {"commit", "device", "threads", "versions", "config", "precision", "roof", "work_per_image"}
    assert record["precision"] == "exact"
    assert len(np.unique(np.asarray(Image.open(plot).convert("L")))) > 20


def test_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--preset", "tiny", "--batch-sizes", "1", "--steps", "1", "--repeats", "1", "--json"]
    capsys.readouterr()
    assert main(arguments) == 0
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert record["model"] == "preset tiny, random weights"
    assert not record["autoencoder"]
    # a laptop's core to a large GPU
    assert 1e9 < record["roof"]["matmul_flops"] < 1e16
    assert 1e8 < record["roof"]["copy_bytes"] < 1e14
    assert record["rows"][0]["split"]["vae"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --model FOLDER or --preset NAME"),
        (["--preset", "tiny", "--model", "m"], "give either --model FOLDER or --preset NAME"),
        (["--preset", "huge"], "unknown preset 'huge'; there are ffhq1024"),
        (["--preset", "tiny", "--steps", "5000"], "num_inference_steps=5000 must be between 1 and"),
        (["--preset", "tiny", "--batch-sizes", "1,0"], "--batch-sizes 1,0 must be whole numbers from 1 on"),
        (["--preset", "tiny", "--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--preset", "tiny", "--budget", "nan"], "--budget nan must be at least 0"),
        (["--preset", "tiny", "--device", "cuda:99"], "--device cuda:99"),
        (["--preset", "tiny", "--out", "."], "is a folder; --plot and --out name files"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("madformer bench: error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "1,,2", "two", "1.5"])
def test_bad_lists(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--preset", "tiny", "--batch-sizes", text])
    assert "must be whole numbers with commas between them" in capsys.readouterr().err


def test_no_matplotlib_is_said_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert main(["bench", "--preset", "tiny", "--plot", str(tmp_path / "plots" / "p.png")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "madformer bench: error: --plot needs matplotlib: pip install matplotlib\n"
    assert not list(tmp_path.iterdir())
