"""The comparison of precision modes: statistics, the record, and the tiers that the record in the tree bears out."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import precision as benchmark
from benchmarks.record import RESULTS
from madformer.bulk import Prompts
from madformer.config import tiny
from madformer.engine.options import SamplingOptions
from madformer.engine.precision import PRECISIONS
from madformer.engine.schedulers import default_scheduler
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from tests.helpers.testing import perturb, small_vae

OPTIONS = ["--num-images", "3", "--batch-size", "2", "--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, and beside it the bare model."""
    vae = small_vae()
    model = perturb(MADFormer(tiny()))
    assert isinstance(model, MADFormer)
    folder = tmp_path_factory.mktemp("model")
    MADFormerPipeline(model, vae, default_scheduler("epsilon")).save_pretrained(folder)
    return folder


def drawn(latents: torch.Tensor, pictures: torch.Tensor) -> benchmark.Drawn:
    return benchmark.Drawn(latents, pictures, (1.0,))


def test_figures_of_a_known_difference() -> None:
    latents, pictures = torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 16, 16)
    latents[0, 0, 0, 0], latents[1, 0, 0, 0] = -3, 5
    exact, off, light = drawn(latents, pictures), latents.clone(), pictures.clone()
    off[0] += 0.2
    light[0] += 0.1
    figures = benchmark.compare(drawn(off, light), exact)
    similar = {name: figures.pop(name) for name in ("ssim", "worst_ssim")}
    assert 0 < similar["worst_ssim"] < similar["ssim"] < 1
    assert figures == pytest.approx(
        {
            "picture_psnr_db": 20 + 10 * math.log10(2),
            "worst_picture_psnr_db": 20,
            "latent_psnr_db": 20 * math.log10(8 / 0.2) + 10 * math.log10(2),
            "largest_latent_difference": 0.2,
            "mean_latent_difference": 0.1,
        },
        rel=1e-5,
    )
    off[1, 2, 3, 4] = float("nan")
    with pytest.raises(benchmark.CannotCompare, match="not finite"):
        benchmark.compare(drawn(off, light), exact)


@pytest.mark.slow
def test_record(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_fp8(mode: str, device: torch.device) -> str | None:
        return "no such GPU" if mode == "fp8" else None

    monkeypatch.setattr(benchmark, "refusal", without_fp8)
    out, pictures = tmp_path / "record.json", tmp_path / "pictures.png"
    files = ["--model", str(folder), "--out", str(out), "--pictures", str(pictures)]
    assert benchmark.main([*OPTIONS, *files]) == 0
    lines, record = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
    assert json.loads(lines[-1]) == record["metrics"]
    assert lines[-2] == "fp8      not run: no such GPU"
    assert record["not_run"] == {"fp8": "no such GPU"}
    drawn_in = ["exact", "default", "every_2", "every_3"]
    assert record["metrics"].keys() == {
        *(f"{mode}_{name}" for mode in drawn_in[1:] for name in record["errors"][mode]),
        *(f"{mode}_seconds_per_image" for mode in drawn_in),
    }
    # Two images in the one batch that is whole: the last one is not timed.
    assert [len(spread["samples"]) for spread in record["seconds"].values()] == [1] * 4
    assert record["metrics"]["exact_seconds_per_image"] == record["seconds"]["exact"]["median"] / 2
    assert record["metrics"]["default_picture_psnr_db"] > 20
    assert Image.open(pictures).size == (3 * 16, 4 * 16)


def test_every_mode_draws_what_the_pipeline_draws(folder: Path) -> None:
    """In batches as at once, and fp8 is another model than default."""
    device = torch.device("cpu")
    pipelines = {mode: benchmark.load(str(folder), name, device) for mode, (name, _) in benchmark.MODES.items()}
    images = benchmark.draw(pipelines, Prompts(), 3, SamplingOptions(2), 2, seed=5)
    alone = pipelines["exact"](num_inference_steps=2, seed=7, output_type="latent").images
    torch.testing.assert_close(images["exact"].latents[2:], alone, rtol=1e-4, atol=1e-4)
    errors = {mode: benchmark.compare(images[mode], images["exact"]) for mode in ("default", "fp8")}
    assert max(error["latent_psnr_db"] for error in errors.values()) < math.inf
    # which is nearer to exact is chance: bf16 in the U-Net outweighs FP8 in a tower this small
    assert not torch.equal(images["fp8"].latents, images["default"].latents)
    for mode, (name, _) in benchmark.MODES.items():
        assert pipelines[mode].vae.dtype == PRECISIONS[name].dtype
    # two steps: with the layers in every second one, the last runs without them
    reusing = pipelines["exact"](num_inference_steps=2, seed=7, refresh_every=2, output_type="latent").images
    torch.testing.assert_close(images["every_2"].latents[2:], reusing, rtol=1e-4, atol=1e-4)
    assert torch.equal(images["every_2"].latents, images["every_3"].latents)
    assert not torch.allclose(reusing, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "precision: no folder nowhere, and no such repository"),
        (["--model", "{folder}/transformer"], "transformer holds no autoencoder"),
        (["--model", "{folder}", "--batch-size", "4"], r"--batch-size 4 must be in 1\.\.3"),
        (["--model", "{folder}", "--steps", "0"], "precision: .*0"),
    ],
    ids=["no model", "no autoencoder", "batch size", "steps"],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "record.json"
    given = [argument.format(folder=folder) for argument in arguments]
    assert benchmark.main([*OPTIONS, "--out", str(out), *given]) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert re.search(message, stderr)
    assert len(stderr.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize("mode", ["default", "fp8"])
def test_tiers_are_those_of_the_records(mode: str) -> None:
    """What PRECISIONS says of the demo model holds in every record, and is at most 3 dB too modest for the worst."""
    records = [json.loads(path.read_text()) for path in RESULTS.glob("*/precision.json")]
    assert {record["model"] for record in records} == {"assets/emoji64"}
    measured = [record["errors"][mode] for record in records if mode in record["errors"]]
    stated = [int(number) for number in re.findall(r"(\d+) dB", PRECISIONS[mode].tier)]
    for number, name in zip(stated, ("picture_psnr_db", "worst_picture_psnr_db"), strict=True):
        assert number <= min(figures[name] for figures in measured) < number + 3
