"""Released ``baseline.conf`` files in this library's terms."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from diffusers import DDPMScheduler
from PIL import Image

from madformer.compat.released_config import read_released_config
from madformer.config import MADFormerConfig, TextConfig, ffhq1024, imagenet256
from madformer.data.images import open_dataset
from madformer.training.config import TrainingConfig
from madformer.training.costs import loss_weights
from madformer.training.losses import Batch, training_losses
from tests.helpers.compat_cases import BASELINE as FFHQ_CASE
from tests.helpers.compat_cases import HIDDEN_WEIGHT, OUTPUT_TOLERANCE, TEXT_WEIGHT, make_compat
from tests.helpers.compat_cases import TEXT_BASELINE as IMAGENET_CASE
from tests.helpers.testing import GoldenCase

# The released baselines, as their own shell syntax allows to write it.
BASELINE = """
# Model settings
DATASET="ffhq"
DATASET_PATH="./datasets/ffhq 1024"   # quoted, with a comment behind it
MODEL_CONFIG_PATH="Your/Path/To/Model/Config.json"
LR=3e-4
export WEIGHT_DECAY='5e-2'
EPOCHS=200
GLOBAL_BATCH_SIZE=64
PER_GPU_BATCH_SIZE=1
MIXED_PRECISION="bf16"
SQUARE_BLOCK=true
USE_ROPE=true
AR_LEN=16
CLEAR_CLEAN=false
RESULTS_DIR="results"
"""
IMAGENET = """
DATASET="imagenet"
DATASET_PATH="./datasets/imagenet"
MODEL_CONFIG_PATH="Your/Path/To/Model/Config.json"
EPOCHS=50
GLOBAL_BATCH_SIZE=256
PER_GPU_BATCH_SIZE=4
IMAGE_SIZE=256
BLOCK_SIZE=64
PRE_DOWNSAMPLE_BLOCK_SIZE=256
SPATIAL_LEN=256
AR_LEN=4
USE_ROPE=true
IMAGE_LOSS_LAMBDA=1.0
TEXT_LOSS_LAMBDA=0.0
RESULTS_DIR="results"
"""
QUIRKS = {"rope_pairing": "released", "clean_timestep": "noisy", "hidden_loss_skips": "same_block"}
MODELS: dict[str, MADFormerConfig] = {
    "ffhq": ffhq1024().replace(hidden_loss_input="condition+noisy", **QUIRKS),
    "imagenet": imagenet256().replace(**QUIRKS),
}


def write(folder: Path, text: str) -> Path:
    path = folder / "run.conf"
    path.write_text(text)
    return path


def test_baseline_is_the_papers_model_with_the_released_quirks(tmp_path: Path) -> None:
    config = read_released_config(write(tmp_path, BASELINE), world_size=8)
    assert config.model == MODELS["ffhq"]
    assert config.training == {
        "data": "./datasets/ffhq 1024", "image_size": 1024, "num_workers": 4, "steps": 200 * (70_000 // 64),
        "batch_size": 64, "accumulation_steps": 8, "learning_rate": 3e-4, "weight_decay": 0.05, "beta1": 0.9,
        "beta2": 0.95, "schedule": "wsd", "warmup": 0.01, "decay_start": 0.85, "decay_exponent": 6.0,
        "min_learning_rate": 0.0, "max_grad_norm": 1.0, "ema_decays": (0.9999,), "image_loss_weight": 1.0,
        "text_loss_weight": 0.0, "hidden_loss_weight": 0.1, "clean_loss_weight": 0.0, "precision": "bf16", "seed": 0,
        "log_every": 10, "save_every": 10_000,
    }  # fmt: skip
    assert config.ignored.keys() == {"USE_ROPE", "RESULTS_DIR"}
    assert TrainingConfig(model=config.model, **config.training).steps == 218_600


def test_imagenet_is_told_the_class_in_words(tmp_path: Path) -> None:
    config = read_released_config(write(tmp_path, IMAGENET), world_size=16)
    assert config.model == MODELS["imagenet"]
    ffhq = read_released_config(write(tmp_path, "DATASET=ffhq")).training
    assert {name: value for name, value in config.training.items() if ffhq.get(name) != value} == {
        "data": "hf:./datasets/imagenet", "image_size": 256, "steps": 50 * (1_281_167 // 256), "batch_size": 256,
        "accumulation_steps": 4, "tokenizer": "NousResearch/Llama-3.2-1B", "caption": "label", "caption_dropout": 0.0,
    }  # fmt: skip
    assert config.training.keys() - ffhq.keys() == {"tokenizer", "caption", "caption_dropout"}
    assert config.ignored.keys() == {"USE_ROPE", "RESULTS_DIR"}
    assert TrainingConfig(model=config.model, **config.training).steps == 250_200
    # what its script defaults to is what its file says
    assert read_released_config(write(tmp_path, "DATASET=imagenet"), world_size=16).training == config.training


@pytest.mark.parametrize("case", [FFHQ_CASE, IMAGENET_CASE], ids=lambda case: case.folder.name)
def test_the_trainer_minimises_the_released_loss(case: GoldenCase, tmp_path: Path) -> None:
    """Its own objective, with the weights that were read, on the golden model."""
    text = f"DATASET={case.folder.name}\nLAMBDA_HIDDEN_LOSS={HIDDEN_WEIGHT}\n"
    if case is IMAGENET_CASE:
        text += f"TEXT_LOSS_LAMBDA={TEXT_WEIGHT}\n"
    config = read_released_config(write(tmp_path, text))
    model, inputs, golden = make_compat(case).to_native(), case.inputs(), case.tensors()
    losses = training_losses(
        model,
        Batch(inputs["clean"], inputs["noise"], inputs["t"], text_BP=inputs.get("input_ids")),
        DDPMScheduler(),
        loss_weights(TrainingConfig(model=config.model, **config.training)),
    )
    assert losses.total.item() == pytest.approx(golden["loss"].item(), rel=OUTPUT_TOLERANCE)


def test_ablation_on_a_smaller_image(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps({"intermediate_size": 512, "unet_block_out_channels": [64, 128]}))
    text = """
    MODEL_CONFIG_PATH=model.json
    image_size=256
    BLOCK_SIZE=64 PRE_DOWNSAMPLE_BLOCK_SIZE=256
    AR_LEN=4
    SPATIAL_LEN=256
    DIFF_DEPTH=7
    CLEAR_COND=1
    DENOISING_MLP=True
    LR_SCHEDULER=cosine
    MAX_GRAD_NORM=0.0
    MIXED_PRECISION=none
    EPOCHS=3
    GLOBAL_BATCH_SIZE=8
    PER_GPU_BATCH_SIZE=2
    CLEAR_TOWER_LOSS_LAMBDA=0.5
    """
    config = read_released_config(write(tmp_path, text), num_images=83, world_size=2)
    model, training = config.model, config.training
    assert (model.num_blocks, model.block_size, model.diffusion_layers) == (4, 64, 7)
    assert (model.context, model.cross_block_attention) == ("clean", False)
    assert (model.intermediate_size, model.unet.block_out_channels) == (512, (64, 128))
    assert (training["steps"], training["batch_size"], training["accumulation_steps"]) == (30, 8, 2)
    assert (training["schedule"], training["min_learning_rate"]) == ("cosine", 0.01)
    assert (training["max_grad_norm"], training["precision"]) == (math.inf, "fp32")
    # The released loop leaves the hidden loss out where there is no condition.
    assert (training["hidden_loss_weight"], training["clean_loss_weight"]) == (0.0, 0.5)
    assert config.ignored == {}
    TrainingConfig(model=model, **training)


def test_model_config_argument_comes_first(tmp_path: Path) -> None:
    path = write(tmp_path, "MODEL_CONFIG_PATH=nowhere.json")
    assert read_released_config(path, model_config={"intermediate_size": 96}).model.intermediate_size == 96
    write(tmp_path, "DATASET=imagenet\nMODEL_CONFIG_PATH=nowhere.json")
    vocabulary = {"vocab_size": 300, "pad_token_id": 256, "max_position_embeddings": 5, "rope_theta": 500.0}
    assert read_released_config(path, model_config=vocabulary).model.text == TextConfig(300, 5, 256, 500.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("LEARNING_RATE=1\nBLOCKSIZE=2", r"unknown LEARNING_RATE \(.* is \w+\), BLOCKSIZE \(.* is BLOCK_SIZE\)$"),
        ("LR=fast", r"LR='fast' is no number$"),
        ("EPOCHS=2.5", r"EPOCHS='2.5' is no whole number$"),
        ("CLEAR_COND=yes", r"CLEAR_COND='yes' is no true or false$"),
        ('LR=1\nDATASET="ffhq', r"run.conf, line 2: No closing quotation$"),
        ("LR 1", r"line 1: 'LR' is no KEY=value$"),
        ("AR_LEN=4", r"SPATIAL_LEN=4096 must be 1024 with BLOCK_SIZE=256 and AR_LEN=4$"),
        ("AR_LEN=3", r"num_blocks=3 must be a square number"),
        ("PATCH_SIZE=2", r"PATCH_SIZE=2 must be 1"),
        ("MIXED_PRECISION=fp16", r"MIXED_PRECISION='fp16' must be one of bf16, none$"),
        ("LR_SCHEDULER=linear", r"LR_SCHEDULER='linear' must be wsd, cosine or constant$"),
        ("DATASET=cifar", r"DATASET='cifar' must be one of ffhq, imagenet$"),
        ("TEXT_LOSS_LAMBDA=1", r"unknown TEXT_LOSS_LAMBDA \(the nearest known name is CLEAR_TOWER_LOSS_LAMBDA\)$"),
        ("DATASET=imagenet\nDIFF_DEPTH=29", r"diffusion_layers=29 must be from 1 to num_layers=28$"),
        ("PER_GPU_BATCH_SIZE=48", r"GLOBAL_BATCH_SIZE=64 must be a multiple of PER_GPU_BATCH_SIZE=48 on 1 processes$"),
        ("EPOCHS=0", r"EPOCHS=0 of 70000 images are no step"),
        ("MODEL_CONFIG_PATH=mine.json", r"MODEL_CONFIG_PATH=mine.json names no file, from here or from .*"),
    ],
)
def test_what_cannot_be_read_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_released_config(write(tmp_path, text))
    assert str(error.value).startswith(str(tmp_path / "run.conf"))
    assert len(str(error.value).splitlines()) == 1


def test_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.conf"):
        read_released_config(tmp_path / "nowhere.conf")


@pytest.mark.parametrize(
    ("clone", "text"), [("MADFORMER_RELEASED", BASELINE), ("MADFORMER_RELEASED_IMAGENET", IMAGENET)]
)
def test_released_file(clone: str, text: str, tmp_path: Path) -> None:
    if clone not in os.environ:
        pytest.skip(f"{clone} does not name a clone")
    folder = Path(os.environ[clone]) / "src" / "configs"
    conf, model_config = folder / "train" / "baseline.conf", folder / "model" / "madformer.json"
    expected = read_released_config(write(tmp_path, text.replace("ffhq 1024", "ffhq-1024")))
    for config in (read_released_config(conf), read_released_config(conf, model_config=model_config)):
        assert config == expected


def test_data_that_save_to_disk_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the released README has it, from the clone and from elsewhere; the folder opens, labels and all."""
    datasets = pytest.importorskip("datasets")
    clone, elsewhere = tmp_path / "clone", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pictures = [Image.new("RGB", (32, 32), (index * 60, 0, 0)) for index in range(3)]
    for name, columns in (("ffhq", {"webp": pictures}), ("imagenet", {"jpg": pictures, "cls": [5, 7, 207]})):
        features = datasets.Features(
            {key: datasets.Value("int64") if key == "cls" else datasets.Image() for key in columns}
        )
        rows = datasets.Dataset.from_dict(columns, features=features)
        saved = datasets.DatasetDict(train=rows) if name == "ffhq" else rows
        saved.save_to_disk(str(clone / "datasets" / name))
        config = clone / "src" / "configs" / "train" / f"{name}.conf"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(f"DATASET={name}\nDATASET_PATH=./datasets/{name}\n")
        for folder in (clone, elsewhere):
            monkeypatch.chdir(folder)
            training = read_released_config(config).training
            dataset = open_dataset(training["data"], 32)
            assert len(dataset) == 3
            reds = [round((dataset[index]["image"][0].mean().item() + 1) * 127.5) for index in range(3)]
            assert reds == [0, 60, 120]
            assert [dataset[index]["label"] for index in range(3)] == ([5, 7, 207] if name == "imagenet" else [-1] * 3)
    monkeypatch.chdir(elsewhere)
    config.write_text("DATASET=imagenet\nDATASET_PATH=./nowhere\n")
    assert read_released_config(config).training["data"] == "hf:./nowhere"
