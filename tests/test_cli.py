"""The command line as a user meets it: what it writes, what it says, and how it fails."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from madformer.cli.main import main
from madformer.cli.request import Precision
from madformer.conditioning.tokenizer import ByteTokenizer
from madformer.config import TextConfig, tiny
from madformer.engine.precision import PRECISIONS, apply
from madformer.engine.schedulers import default_scheduler
from madformer.kernels import launch
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from tests.helpers.engine_cases import FLAT
from tests.helpers.testing import GOLDEN, golden_cases, perturb, relative_error, small_vae

FOUR_LATENT_CHANNELS = GOLDEN / "ffhq"


def save_released(path: Path, branch: str) -> Path:
    """A released training checkpoint, made of the golden weights."""
    arguments = argparse.Namespace(block_size=16, ar_len=4, spatial_len=64, diff_depth=2, square_block=True)
    weights = golden_cases(branch)[0].weights()
    torch.save({"model": weights, "ema": weights, "opt": {}, "lrs": {}, "args": arguments}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_released(tmp_path_factory.mktemp("released") / "ckpts.pt", "ffhq")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    small_vae(block_out_channels=(8,)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = FOUR_LATENT_CHANNELS / "model_config.json"
    arguments = ["--checkpoint", checkpoint, "--model-config", config, "--vae", vae, "--out", folder]
    assert main(["convert", *map(str, arguments)]) == 0
    return folder


def save_random(folder: Path, *extras: object, **changes: object) -> Path:
    """A pipeline with random weights, one block to draw."""
    torch.manual_seed(0)
    transformer = perturb(MADFormer(FLAT.replace(num_blocks=1, **changes)))
    vae = small_vae(block_out_channels=(8,))
    MADFormerPipeline(transformer, vae, default_scheduler("epsilon"), *extras).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("text"), ByteTokenizer(), text=TextConfig(257, 8))


@pytest.fixture(scope="module")
def class_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, names = tmp_path_factory.mktemp("class"), ["Flags", "Food & Drink"]
    return save_random(folder, None, names, num_classes=2, time_conditioning="unet+adaln")


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run, expect status 1, and give the one line on stderr."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("madformer ")]
    assert len(lines) == 1, captured.err
    return lines[0]


def test_convert_then_sample(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sample", "--model", model, "--num-images", 3, "--steps", 2, "--seed", 5, "--batch-size", 2]
    arguments += ["--out", tmp_path / "images", "--grid", tmp_path / "grid.png", "--precision", "exact", "--json"]
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["num_images"], record["num_inference_steps"], record["precision"]) == (3, 2, "exact")
    assert record["scheduler"] == "DPMSolverMultistepScheduler"
    assert record["seconds_per_image"] == pytest.approx(record["seconds"] / 3, abs=0.01)
    files = sorted(p.name for p in (tmp_path / "images").iterdir() if not p.name.startswith("."))
    assert files == [*(f"{seed:08d}.png" for seed in (5, 6, 7)), "manifest.json"]
    pictures = [np.asarray(Image.open(tmp_path / "images" / f"{seed:08d}.png")) for seed in (5, 6, 7)]
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (32, 32, 3)
    assert np.array_equal(grid[:16, 16:], pictures[1])
    assert np.array_equal(grid[16:, :16], pictures[2])
    pipeline = MADFormerPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    alone = np.asarray(pipeline(num_inference_steps=2, seed=6).images[0])
    np.testing.assert_allclose(alone.astype(int), pictures[1].astype(int), atol=1)


def test_latents_need_no_autoencoder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["convert", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "model")]) == 0
    arguments = ["sample", "--model", tmp_path / "model", "--steps", 2, "--out", tmp_path / "out"]
    assert main([*map(str, arguments), "--latents", "--scheduler", "ddim"]) == 0
    assert load_file(tmp_path / "out" / "00000000.safetensors")["latents"].shape == (4, 16, 16)
    message = fails(capsys, *arguments)
    assert "give --vae FOLDER, or --latents" in message


@pytest.mark.parametrize("precision", ["exact", "default", "fp8"])
def test_precision(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str) -> None:
    """Each mode draws what the pipeline draws with the network so prepared and the autoencoder in its dtype."""
    options = ["--num-images", 2, "--steps", 2, "--out", tmp_path, "--json", "--device", "cpu"]
    capsys.readouterr()
    assert main([str(argument) for argument in ("sample", "--model", model, *options, "--precision", precision)]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == precision
    dtype = PRECISIONS[precision].dtype
    pipeline = MADFormerPipeline.from_pretrained(model, dtype=torch.float32, vae_dtype=dtype)
    assert pipeline.vae.dtype == dtype
    pipeline.transformer = apply(pipeline.transformer, precision)
    pipeline.set_progress_bar_config(disable=True)
    for seed, picture in enumerate(pipeline(num_images_per_prompt=2, num_inference_steps=2, seed=0).images):
        assert Image.open(tmp_path / f"{seed:08d}.png").tobytes() == picture.tobytes()


def test_prompts(text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Taken in turn; a row of the grid is a prompt's; from a file they are the same."""
    (tmp_path / "prompts.txt").write_text("Käse\n\n  a cat \n", encoding="utf-8")
    common = ["sample", "--model", text_model, "--steps", 2, "--num-images", 5, "--batch-size", 2, "--json"]
    common += ["--guidance", 3, "--negative-prompt", "blur", "--precision", "exact", "--device", "cpu"]
    capsys.readouterr()
    grids, records = [], []
    for name, options in (
        ("arguments", ["--prompt", "Käse", "--prompt", "a cat", "--out", tmp_path / "images"]),
        ("file", ["--prompts", tmp_path / "prompts.txt"]),
    ):
        grid = tmp_path / f"{name}.png"
        assert main([str(argument) for argument in (*common, *options, "--grid", grid)]) == 0
        records.append(json.loads(capsys.readouterr().out))
        grids.append(np.asarray(Image.open(grid)).astype(int))
    assert records[0]["prompts"] == records[1]["prompts"] == ["Käse", "a cat"]
    assert (records[0]["negative_prompt"], records[0]["guidance_scale"]) == ("blur", 3.0)
    assert (records[0]["labels"], records[0]["guidance_interval"]) == ([], None)
    assert np.array_equal(*grids)
    pipeline = MADFormerPipeline.from_pretrained(text_model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    side = grids[0].shape[0] // 2
    assert grids[0].shape == (2 * side, 3 * side, 3)
    for image in range(5):
        options = {"prompt": ["Käse", "a cat"][image % 2], "negative_prompt": "blur", "guidance_scale": 3.0}
        expected = np.asarray(pipeline(num_inference_steps=2, **options, seed=image).images[0]).astype(int)
        row, column = image % 2, image // 2
        shown = grids[0][row * side : (row + 1) * side, column * side : (column + 1) * side]
        np.testing.assert_allclose(shown, expected, atol=1)
        file = np.asarray(Image.open(tmp_path / "images" / f"{image:08d}.png"))
        assert np.array_equal(file, shown)


def test_classes(class_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", 2, "--num-images", 2, "--out", tmp_path, "--latents", "--guidance", 2, "--json"]
    options += ["--class", "Food & Drink", "--class", 0, "--precision", "exact", "--device", "cpu"]
    capsys.readouterr()
    assert main([str(argument) for argument in ("sample", "--model", class_model, *options)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["labels"], record["prompts"], record["guidance_scale"]) == ([1, 0], [], 2.0)
    pipeline = MADFormerPipeline.from_pretrained(class_model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(num_inference_steps=2, labels=[1, 0], guidance_scale=2.0, seed=0, output_type="latent").images
    for image in range(2):
        assert torch.equal(load_file(tmp_path / f"{image:08d}.safetensors")["latents"], drawn[image])


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        ("text_model", [], "a prompt is missing: the model was made for text"),
        ("text_model", ["--prompt", "a", "--prompts", "p.txt"], "ways to say what to draw: give one"),
        ("text_model", ["--prompts", "none.txt"], "none.txt"),
        ("text_model", ["--prompts", os.devnull], f"--prompts {os.devnull} holds no prompt"),
        ("text_model", ["--prompt", "a", "--negative-prompt", "b"], "--negative-prompt is for --guidance"),
        ("text_model", ["--prompt", "a", "--guidance-interval", "0,500"], "--guidance-interval is for --guidance"),
        ("text_model", ["--prompt", "a", "--guidance", "nan"], "--guidance nan must be finite"),
        ("text_model", ["--prompt", "a", "--guidance", 2, "--guidance-interval", "9,5"], "the lower timestep, then"),
        ("text_model", ["--prompt", "a", "--class", 1], "a class has no place: the model was made without classes"),
        pytest.param(
            *("text_model", ["--prompt", "a", "--tokenizer", "no/such"], "no tokenizer at no/such"),
            marks=pytest.mark.slow,  # a hub that does not answer is asked again and again
        ),
        ("class_model", ["--guidance", 2], "a class is missing: the model was made for classes"),
        ("class_model", ["--class", "Cars"], "no class 'Cars': there are 2, Flags, Food & Drink"),
        ("class_model", ["--class", 0, "--class", 2], "no class '2'"),
        ("model", ["--prompt", "a cat"], "a prompt has no place: the model was made without text"),
        ("model", ["--guidance", 2], "guidance needs a model with text or classes"),
    ],
)
def test_bad_prompts(
    which: str, options: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = ["--out", tmp_path / "out", "--steps", 2]
    assert message in fails(capsys, "sample", "--model", request.getfixturevalue(which), *out, *options)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("text", ["", "5", "1,2,3", "a,b", "0,inf", "nan,1"])
def test_bad_intervals(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--model", "m", "--guidance-interval", text])
    assert "must be two numbers with a comma between them" in capsys.readouterr().err


def test_precisions_are_the_engines() -> None:
    assert get_args(Precision) == ("auto", *PRECISIONS)


def test_images_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = perturb(MADFormer(FLAT))
    MADFormerPipeline(model, small_vae(), default_scheduler("epsilon")).save_pretrained(tmp_path / "model")  # type: ignore[arg-type]
    sample = ["sample", "--model", tmp_path / "model", "--steps", 2, "--precision", "exact", "--width", 24]
    assert main([*map(str, sample), "--out", str(tmp_path / "wide")]) == 0
    assert "precision exact, seed 0 on cpu" in capsys.readouterr().err
    pipeline = MADFormerPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    expected = np.asarray(pipeline(num_inference_steps=2, width=24, seed=0).images[0]).astype(int)
    assert expected.shape == (16, 24, 3)
    drawn = np.asarray(Image.open(tmp_path / "wide" / "00000000.png")).astype(int)
    np.testing.assert_allclose(drawn, expected, atol=1)
    message = fails(capsys, *sample, "--refresh-every", 2, "--out", tmp_path / "wide")
    assert "refresh_every=1, not 2" in message
    message = fails(capsys, *sample[:-1], 32, "--out", tmp_path / "wide")
    assert "latent_shape.2=12, not 16" in message
    assert "height=20 must be a multiple" in fails(capsys, *sample, "--height", 20, "--out", tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_an_elastic_model_is_sampled_at_the_split_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    elastic = perturb(MADFormer(FLAT.replace(elastic_diffusion_layers=(1, 2))))
    assert isinstance(elastic, MADFormer)
    elastic.save_pretrained(tmp_path / "model")
    sample = ["sample", "--model", tmp_path / "model", "--steps", 2, "--latents", "--precision", "exact"]
    for split in (1, 2):
        arguments = [*sample, "--diffusion-layers", split, "--out", tmp_path / str(split)]
        assert main([*map(str, arguments)]) == 0
        (file,) = (tmp_path / str(split)).glob("*.safetensors")
        (drawn,) = load_file(file).values()
        pipeline = MADFormerPipeline(elastic.set_split(split), None, default_scheduler("epsilon"))
        expected = pipeline(num_inference_steps=2, seed=0, output_type="latent").images
        assert relative_error(drawn.flatten(), expected.flatten()) < 1e-4
    message = fails(capsys, *sample, "--diffusion-layers", 3, "--out", tmp_path / "3")
    assert "diffusion_layers=3: this model was trained for 1, 2" in message


def test_info_of_a_run_names_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "environment.json"):
        (tmp_path / name).write_text("{}")
    assert main(["info", str(tmp_path)]) == 1
    assert f"is the folder of a run; its model is {tmp_path / 'model'}" in capsys.readouterr().err


def test_info(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["info", "--json", "--model", str(model)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["versions"]["torch"] == torch.__version__
    backends = {backend["backend"]: backend for backend in record["backends"]}
    assert backends["reference"]["available"]
    assert "denoise_step" in backends["cpp"]["ops"]
    assert record["model"]["rope_pairing"] == "released"
    assert record["model"]["parameters"] == sum(t.numel() for t in golden_cases("ffhq")[0].weights().values())
    assert main(["info"]) == 0
    assert "reference" in capsys.readouterr().out


def test_bad_models(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sample = ["sample", "--grid", tmp_path / "grid.png", "--model"]
    assert "no folder no/such/model" in fails(capsys, *sample, "no/such/model")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in fails(capsys, *sample, tmp_path / "empty")
    assert "is a file" in fails(capsys, *sample, model / "model_index.json")
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 0, "--grid", "g.png"], "--steps 0 must be at least 1"),
        (["--steps", 5000, "--grid", "g.png"], "num_inference_steps=5000 must be between 1 and num_train_timesteps"),
        (["--num-images", -1, "--grid", "g.png"], "--num-images -1 must be at least 1"),
        ([], "give --out FOLDER, --grid FILE, or both"),
        (["--device", "cuda:99", "--grid", "g.png"], "--device cuda:99"),
        (["--grid", "."], "names a file"),
    ],
)
def test_bad_sampling_arguments(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: list[object], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, "sample", "--model", model, *arguments)
    assert not list(tmp_path.iterdir())


def test_backend_that_cannot_run_here(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, no fallback, nothing written."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    options = ["--device", "cpu", "--backend", "triton", "--out", tmp_path / "images"]
    message = fails(capsys, "sample", "--model", model, *options)
    assert message.startswith("madformer sample: error: backend='triton' cannot run")
    assert not list(tmp_path.glob("images/*"))


def test_unwritable_output(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write to" in fails(capsys, "sample", "--model", model, "--out", tmp_path / "file" / "images")
    assert "cannot write to" in fails(capsys, "sample", "--model", model, "--grid", tmp_path / "file" / "grid.png")


def test_bad_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown preset 'emoji65'; there are" in fails(capsys, "train", "emoji65", "--out", tmp_path)
    message = fails(capsys, "train", "emoji64", "--out", tmp_path, "--model.num-blocks", 7)
    assert "num_blocks=7 must be a square number" in message
    message = fails(capsys, "train", "emoji64", "--out", tmp_path, "--model.block-grid", "2,3")
    assert "block_grid=(2, 3) must be rows and columns of num_blocks=4" in message
    for option, what in (("--model.block-grid", "whole numbers"), ("--ema-decays", "numbers")):
        with pytest.raises(SystemExit):
            main(["train", "emoji64", option, "2:3"])
        assert f"argument {option}: '2:3' must be {what} with commas between them" in capsys.readouterr().err
    assert "steps=0" in fails(capsys, "train", "emoji64", "--out", tmp_path, "--steps", 0)
    assert "ema_decays=(1.0,)" in fails(capsys, "train", "emoji64", "--out", tmp_path, "--ema-decays", 1)
    assert "give a preset (ffhq1024, imagenet256, emoji64, tiny), or --released-config" in fails(capsys, "train")
    assert "give --out FOLDER" in fails(capsys, "train", "emoji64")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_a_run_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = {"num_layers": 2, "hidden_size": 128, "num_heads": 2, "time_conditioning": "adaln", "unet": None}
    file = tmp_path / "smaller.json"
    file.write_text(json.dumps({"model": smaller}))
    out = str(tmp_path / "run")
    assert main(["train", "tiny", "--config", str(file), "--out", out, "--dry-run", "--batch-size", "64"]) == 0
    printed = capsys.readouterr().out
    parameters = sum(parameter.numel() for parameter in MADFormer(tiny().replace(**smaller)).parameters())
    assert f"parameters           {parameters / 1e6:.1f} M" in printed
    assert "a step of 64 images" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("untraced")
def test_a_released_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "baseline.conf"
    file.write_text("ID=mine\nGLOBAL_BATCH_SIZE=8\nAR_LEN=4\nSPATIAL_LEN=1024\nIMAGE_SIZE=512\nDIFF_DEPTH=1\n")
    smaller = ["--model.num-layers", "2", "--model.hidden-size", "128", "--model.num-heads", "2"]
    arguments = ["train", "--released-config", file, *smaller, "--dry-run"]
    assert main([*map(str, arguments)]) == 0
    printed = capsys.readouterr()
    assert "ID is ignored" in printed.err
    assert "a step of 8 images" in printed.out
    file.write_text("AR_LAN=4\n")
    assert "unknown AR_LAN (the nearest known name is AR_LEN)" in fails(capsys, *arguments)


def test_bad_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "data", "emoji", "--out", tmp_path / "data", "--font", tmp_path / "none.ttf")
    assert "fonts-noto-color-emoji" in message
    assert "--font PATH" in message


def test_bad_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    message = fails(capsys, "convert", "--checkpoint", tmp_path / "bad.pt", "--out", tmp_path / "out")
    assert "bad.pt" in message
    assert not list((tmp_path / "out").iterdir())


def test_what_cannot_be_converted(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_text, config = save_released(tmp_path / "text.pt", "imagenet"), GOLDEN / "imagenet" / "model_config.json"
    for arguments, message in (
        ([with_text], "a model with text needs model_config"),
        ([with_text, "--model-config", config, "--tokenizer", "bytes"], "the tokenizer has 257 tokens, and the model"),
        ([with_text, "--model-config", config, "--tokenizer", tmp_path], f"no tokenizer at {tmp_path}"),
        ([with_text, "--model-config", FOUR_LATENT_CHANNELS / "model_config.json"], "does not fit the configuration"),
        ([checkpoint, "--tokenizer", "bytes"], "is of a model without text"),
    ):
        assert message in fails(capsys, "convert", "--checkpoint", *arguments, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_help_is_fast_and_complete() -> None:
    """It imports neither torch nor diffusers, and every command teaches an example."""
    code = """
import contextlib, io, json, sys
from madformer.cli.main import COMMANDS, main
shown = {}
for words in ("", *COMMANDS):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        main([*words.split(), "--help"])
    shown[words] = said.getvalue()
print(json.dumps([shown, sorted({"torch", "diffusers"} & set(sys.modules))]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown, imported = json.loads(result.stdout)
    assert imported == []
    program = [sys.executable, "-m", "madformer.cli.main", "sample", "--help"]
    shown["as a program"] = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    for command in ("sample", "as a program", "train", "convert"):
        assert "madformer" in shown[command].split("example")[1], command
