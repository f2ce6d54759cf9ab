"""Files for ``--config``: what ``--print-config`` writes is the same run, and what is wrong with a file is one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from madformer.cli.config_file import plain, read, toml
from madformer.cli.main import main
from madformer.cli.train import Train
from madformer.objects import changed
from madformer.training.config import PRESETS, TrainingConfig
from tests.helpers.training_run import losses

# a model without a U-Net and without text, where the preset has the one and may have the other
START = """
preset: tiny
steps: 20
learning_rate: 1e-3
ema_decays: [0.9, 0.5]
model: {unet: null, text: null, num_layers: 2, diffusion_layers: 1, time_conditioning: adaln, block_grid: [2, 2]}
"""


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([*map(str, words), "--print-config"]) == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("no_checkpoints", "untraced")
def test_the_printed_configuration_is_the_same_run(
    config: TrainingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty losses bit for bit, of a file alone; it says what the data decided, and has fields that are None."""
    for index, image in enumerate(sorted(Path(config.data).iterdir())):
        (tmp_path / "photos" / f"class-{index % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(image, tmp_path / "photos" / f"class-{index % 2}")
    (tmp_path / "start.yaml").write_text(START)
    words = ["train", "--config", tmp_path / "start.yaml", "--data", tmp_path / "photos", "--vae", config.vae]
    words += ["--image-size", 16, "--batch-size", 2, "--num-workers", 0, "--log-every", 1, "--sample-every", 0]
    words += [
        "--no-tensorboard",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--no-model.qk-norm",
        "--max-grad-norm",
        "inf",
    ]
    text = printed(capsys, *words, "--out", tmp_path / "again")
    assert {'unet = "none"', 'text = "none"', "num_classes = 2", "max_grad_norm = inf"} <= set(text.splitlines())
    (tmp_path / "run.toml").write_text(text)
    assert main([*map(str, words), "--out", str(tmp_path / "first")]) == 0
    assert main(["train", "--config", str(tmp_path / "run.toml")]) == 0
    first, again = losses(tmp_path / "first"), losses(tmp_path / "again")
    assert len(first) == 20
    assert first == again
    stored = [TrainingConfig.of_run(tmp_path / name) for name in ("first", "again")]
    assert stored[0] == stored[1]
    assert (stored[0].model.unet, stored[0].model.text, stored[0].model.qk_norm) == (None, None, False)
    # and config.json of a run is such a file, too
    assert printed(capsys, "train", "--config", tmp_path / "again" / "config.json", "--out", tmp_path / "again") == text


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_toml(name: str, tmp_path: Path) -> None:
    """Read over a configuration that differs in all that may be None."""
    config = PRESETS[name]()
    (tmp_path / "run.toml").write_text(toml(plain(config)))
    for base in (TrainingConfig(), *(preset() for preset in PRESETS.values())):
        assert changed(base, read(tmp_path / "run.toml")) == config


def test_strings_survive_toml(tmp_path: Path) -> None:
    config = dataclasses.replace(TrainingConfig(), data='a "b" \\c\n\t\x01\x7f # Käse \U0001f34e', wandb="none")
    (tmp_path / "run.toml").write_text(toml(plain(config)), encoding="utf-8")
    assert changed(TrainingConfig(), read(tmp_path / "run.toml")) == config


def test_options_change_what_a_file_says(tmp_path: Path) -> None:
    """Field by field, those of a part too; a preset beside the file is what it changes."""
    (tmp_path / "small.toml").write_text("steps = 7\nbatch_size = 2\n[model.unet]\nnorm_groups = 4\n")
    words = ["emoji64", "--config", str(tmp_path / "small.toml"), "--steps", "9", "--model.unet.time-embed-dim", "64"]
    config, given = Train.parse(words, "madformer train").config_and_given()
    preset = PRESETS["emoji64"]()
    unet = dataclasses.replace(preset.model.unet, norm_groups=4, time_embed_dim=64)
    assert config == dataclasses.replace(preset, steps=9, batch_size=2, model=preset.model.replace(unet=unet))
    assert given is not None
    assert set(given) == {"steps", "batch_size", "model.unet"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "stepps = 3", "unknown configuration field stepps (the nearest known name is steps)"),
        ("a.toml", "[model]\nnum_heds = 3", "field model.num_heds (the nearest known name is model.num_heads)"),
        ("a.toml", "[model.unet]\nlevels = 3", "unknown configuration field model.unet.levels (the nearest"),
        ("a.toml", "steps = 3.5", "steps=3.5 must be a whole number"),
        ("a.toml", "out = 3", "out=3 must be a path or null"),
        ("a.toml", "steps = 0", "steps=0 must be at least 1"),
        ("a.toml", "steps = ", "a.toml: Invalid value (at end of document)"),
        ("a.toml", "steps = 1\nsteps = 2", "a.toml: Cannot overwrite a value"),
        ("a.yaml", "steps: 1\nsteps: 2", "a.yaml: the key 'steps' appears twice"),
        ("a.yaml", "- steps", "a.yaml: it holds no names with values"),
        ("a.yaml", "steps: [", "a.yaml: while parsing"),
        ("a.yaml", "3: 4", "unknown configuration field 3 (the nearest"),
        ("a.json", "{", "a.json: Expecting property name"),
        ("a.ini", "", "a.ini must end in .toml, .yaml, .yml, .json"),
        ("a.toml", "config = 'b.toml'", "unknown configuration field config (the nearest"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    assert main(["train", "tiny", "--config", str(tmp_path / name), "--out", str(tmp_path / "run")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("madformer train: error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(tmp_path / "none.toml")]) == 1
    assert "none.toml" in capsys.readouterr().err


def test_other_commands_read_files_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "sample",
        "--model",
        "m",
        "--grid",
        "g.png",
        "--class",
        "a b",
        "--class",
        "3",
        "--guidance-interval",
        "0,50",
    ]
    text = printed(capsys, *words, "--lora-strength", "-0.5")
    (tmp_path / "sample.toml").write_text(text)
    assert printed(capsys, "sample", "--config", tmp_path / "sample.toml") == text
    assert 'classes = ["a b", "3"]' in text
    assert "guidance_interval = [0.0, 50.0]" in text
    assert 'ray = "none"' in text
    changed_text = printed(capsys, "sample", "--config", tmp_path / "sample.toml", "--steps", 5, "--no-json", "--ray")
    assert {*changed_text.splitlines()} - {*text.splitlines()} == {"steps = 5", "ray = 0"}
    (tmp_path / "latents.json").write_text(json.dumps({"data": "d", "vae": "v", "image_size": [64, 48], "out": "o"}))
    assert "image_size = [64, 48]" in printed(capsys, "data", "latents", "--config", tmp_path / "latents.json")
    # what is missing in the file is asked for
    (tmp_path / "latents.json").write_text('{"data": "d"}')
    with pytest.raises(SystemExit) as stop:
        main(["data", "latents", "--config", str(tmp_path / "latents.json")])
    assert stop.value.code == 2
    assert "the following arguments are required: --vae, --image-size, --out" in capsys.readouterr().err
