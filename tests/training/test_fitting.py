"""Somebody's own data: what they say of the model, and what is told before the first step."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from madformer.cli.main import main
from madformer.config import TextConfig, tiny
from madformer.data.fields import DataSummary
from madformer.data.latents import LatentDataset
from madformer.pipeline import MADFormerPipeline
from madformer.training.config import PRESETS, TrainingConfig
from madformer.training.fitting import check_fit, fit, open_data
from madformer.training.trainer import Trainer

NAMES = ("ape", "bee", "cat")
TEXT = TextConfig(257, 48, 256)


def data(labelled: int = 100, captioned: int = 0, classes: int = 3, **changes: Any) -> DataSummary:
    names = {"class_names": NAMES if classes == 3 and labelled else ()}
    return DataSummary(100, 100, labelled, captioned, classes if labelled else 0, **(names | changes))


@pytest.mark.parametrize(
    ("preset", "summary", "given", "classes", "text"),
    [
        ("tiny", data(), {}, 3, None),
        ("tiny", data(captioned=100), {}, 3, TEXT),
        ("tiny", data(labelled=0, captioned=7), {}, 0, TEXT),
        ("tiny", data(labelled=0), {}, 0, None),
        ("tiny", data(labelled=99), {}, 0, None),
        ("tiny", data(), {"model.num_classes": 0}, 0, None),
        ("tiny", data(), {"model.time_conditioning": "unet"}, 0, None),
        ("tiny", data(names_as_captions=True), {"caption": "caption"}, 3, TEXT),
        ("tiny", data(), {"caption": "label"}, 0, TEXT),
        ("emoji64", data(), {}, 3, None),
        ("emoji64", data(), {"caption": "label"}, 3, TEXT),
        ("emoji64", data(names_as_captions=True), {"caption": "caption"}, 3, TEXT),
        ("emoji64", data(labelled=0, captioned=100), {}, 0, TEXT),
        ("emoji64", data(captioned=100, classes=9), {}, 9, TEXT),
        ("emoji64", data(captioned=100, classes=9), {"model.text": None}, 9, None),
        ("tiny", data(captioned=100), {"model.text": None}, 3, None),
        ("ffhq1024", data(labelled=0), {}, 0, None),
        ("imagenet256", data(classes=1000), {}, 0, PRESETS["imagenet256"]().model.text),
    ],
)  # fmt: skip
def test_the_model_is_of_the_classes_and_captions_of_the_data(
    preset: str, summary: DataSummary, given: dict[str, Any], classes: int, text: TextConfig | None
) -> None:
    config = PRESETS[preset]()
    model = config.model.replace(**{k[6:]: v for k, v in given.items() if k.startswith("model.")})
    own = {name: value for name, value in given.items() if "." not in name}
    fitted = fit(dataclasses.replace(config, model=model, **own), summary, given)
    assert (fitted.model.num_classes, fitted.model.text) == (classes, text)
    assert fitted.model.modulated or not classes
    assert check_fit(fitted, summary) is not None


def test_what_fits_stays_as_it_is() -> None:
    """The emoji's preset on the emoji, and the paper's on its data."""
    emoji = DataSummary(3600, 3600, 3600, 3600, 9, tuple("abcdefghi"))
    assert fit(PRESETS["emoji64"](), emoji, ()) == PRESETS["emoji64"]()
    assert fit(PRESETS["ffhq1024"](), data(labelled=0), ()) == PRESETS["ffhq1024"]()
    assert fit(PRESETS["imagenet256"](), data(classes=1000), ()) == PRESETS["imagenet256"]()


def told(changes: dict[str, Any], **model: Any) -> TrainingConfig:
    adaln = {"time_conditioning": "unet+adaln"}
    return TrainingConfig(model=tiny().replace(**(adaln | model)), data="photos", batch_size=4, **changes)


@pytest.mark.parametrize(
    ("config", "summary", "message"),
    [
        (told({}, num_classes=2), data(), r"3 classes \(ape, bee, cat\), .* num_classes=2: --model.num-classes 3"),
        (told({}, num_classes=5), data(), r"num_classes=5: --model.num-classes 3"),
        (told({}, num_classes=5), data(classes=6), r"6 classes, and the model num_classes=5: --model.num-classes 6"),
        (told({}, num_classes=3), data(labelled=0), "0 of 100 pictures of photos have a class: --model"),
        (told({}, num_classes=3), data(labelled=98), "98 of 100 pictures of photos have a class: --model"),
        (told({}, text=TEXT), data(labelled=0), "no picture of photos has one: take a model without"),
        (told({}, text=TEXT), data(), "reads captions, and no picture of photos has one: --caption label"),
        (told({"caption": "label"}, text=TEXT), data(labelled=50), "50 of 100 .* have one: --caption caption"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_mends_it(
    config: TrainingConfig, summary: DataSummary, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_fit(config, summary)


@pytest.mark.parametrize(
    ("config", "summary", "notices"),
    [
        (told({}, num_classes=3), data(), []),
        (told({}), data(), ["photos has 3 classes, which the model is not told: --model.num-classes 3"]),
        (told({}, num_classes=9), data(classes=5), ["num_classes=9 of the model, of which photos has 5"]),
        (told({}), data(labelled=0, captioned=5), ["photos has captions, which the model does not read"]),
        (
            told({}, text=TEXT), data(0, 90),
            ["10 of 100 pictures of photos have no caption: they are trained on without"],
        ),
        (told({"caption": "label"}, text=TEXT), data(), []),
        (
            told({}, text=TEXT, num_classes=3), data(names_as_captions=True),
            ["100 of 100 pictures of photos have no caption: their class's name is read"],
        ),
    ],
)  # fmt: skip
def test_what_a_user_should_know_is_said(config: TrainingConfig, summary: DataSummary, notices: list[str]) -> None:
    assert check_fit(config, summary) == notices


def test_fewer_pictures_than_a_step_takes() -> None:
    few = dataclasses.replace(data(labelled=0), num_samples=3, num_examined=3)
    (notice,) = check_fit(told({}), few)
    assert notice.startswith("3 pictures of photos are fewer than batch_size=4")
    assert notice.endswith("--batch-size 3)")


@pytest.fixture(scope="module")
def photos(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index, image in enumerate(sorted(Path(config.data).iterdir())):
        (folder / NAMES[index % 3]).mkdir(exist_ok=True)
        shutil.copy(image, folder / NAMES[index % 3])
    return folder


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("as_latents", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["images", "latents"])
def test_one_command_for_a_folder_of_folders(
    config: TrainingConfig, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str], as_latents: bool,
) -> None:  # fmt: skip
    """Pictures of 16 pixels for a model of 16; what it learned is asked for by name."""
    source = str(photos)
    if as_latents:
        source = str(tmp_path / "latents")
        encode = ["data", "latents", "--data", str(photos), "--vae", config.vae, "--image-size", "16", "--out", source]
        assert main([*encode, "--num-workers", "0"]) == 0
        assert LatentDataset(source).summary().num_captioned == 0
    run = tmp_path / "run"
    options = ["--image-size", "16", "--vae", config.vae, "--steps", "1", "--batch-size", "4", "--sample-every", "0"]
    options += ["--no-tensorboard", "--num-threads", "1"]
    with caplog.at_level(logging.WARNING):
        assert main(["train", "tiny", "--data", source, "--out", str(run), *options]) == 0
    assert f"{source}: 10 pictures, 3 classes (ape, bee, cat)" in caplog.messages
    stored = json.loads((run / "config.json").read_text())["model"]
    assert (stored["num_classes"], stored["text"]) == (3, None)
    pipeline = MADFormerPipeline.from_pretrained(run / "model")
    assert pipeline.config.class_names == list(NAMES)
    grid = ["--steps", "1", "--grid", str(tmp_path / "g.png")]
    assert main(["sample", "--model", str(run / "model"), "--class", "bee", *grid]) == 0
    assert (tmp_path / "g.png").is_file()
    if as_latents:
        return
    # its labels would stand for others, or the same in another order
    index = json.loads((run / "model" / "model_index.json").read_text())
    index["class_names"] = {"0": "ape", "1": "cat", "2": "bee"}
    (run / "model" / "model_index.json").write_text(json.dumps(index))
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(run), "--steps", "2"]) == 1
    assert "of a run whose class 1 is 'cat', and the data's is 'bee'" in capsys.readouterr().err
    assert main(["train", "tiny", "--data", source, "--out", str(photos / "ape" / "run"), *options]) == 1
    assert "lies within the data, whose pictures its samples would be" in capsys.readouterr().err
    assert not (photos / "ape" / "run").exists()


def test_contradictions_are_refused_before_anything_is_written(
    config: TrainingConfig, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "tiny", "--data", str(photos), "--out", str(tmp_path / "run"), "--vae", config.vae]
    assert main([*train, "--model.num-classes", "2"]) == 1
    assert "has 3 classes (ape, bee, cat), and the model num_classes=2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("untraced")
def test_pictures_that_are_smaller(config: TrainingConfig, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = tiny().replace(num_blocks=16)
    with caplog.at_level(logging.WARNING):
        Trainer(dataclasses.replace(config, model=model, image_size=32), tmp_path / "run")
    assert (
        "10 of 10 pictures looked at are smaller than the model's 32 x 32 pixels, and enlarged (one: 16 x 16)"
        in caplog.messages
    )


def test_a_run_of_no_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="data='' names no pictures"):
        open_data(TrainingConfig(model=tiny()))
