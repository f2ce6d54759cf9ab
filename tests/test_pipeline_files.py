"""A pipeline's folder: diffusers' own loading and ours, parts passed in, stale parts, forms of weights, the hub."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from madformer import pipeline_files
from madformer.conditioning.tokenizer import ByteTokenizer
from madformer.config import TextConfig, tiny
from madformer.engine.schedulers import default_scheduler
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from tests.helpers.testing import perturb, relative_error
from tests.helpers.vae_cases import CLASSES, make_vae

CONFIG = tiny().replace(
    text=TextConfig(vocab_size=257, length=6, pad_token_id=256), time_conditioning="unet+adaln", num_classes=2
)
NAMES = ["cats", "dogs"]


def make_pipeline(**changes: Any) -> MADFormerPipeline:
    torch.manual_seed(0)
    model = perturb(MADFormer(CONFIG))
    parts = {
        "transformer": model,
        "vae": make_vae("AutoencoderKL"),
        "scheduler": default_scheduler("epsilon"),
        "tokenizer": ByteTokenizer(),
        "class_names": NAMES,
    }
    made = MADFormerPipeline(**parts | changes)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipeline: Any, **options: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(labels="dogs", num_inference_steps=2, seed=1, **{"output_type": "pt", **options}).images
    assert isinstance(drawn, torch.Tensor)
    return drawn


@pytest.fixture(scope="module")
def pipeline() -> MADFormerPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline: MADFormerPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "pipeline"
    pipeline.save_pretrained(path)
    return path


def test_diffusers_loads_it(pipeline: MADFormerPipeline, folder: Path) -> None:
    """By its own class, with madformer imported, and by the code in the folder."""
    expected = draw(pipeline)
    own = {"custom_pipeline": "pipeline", "trust_remote_code": True}
    for options in ({}, own):
        loaded = DiffusionPipeline.from_pretrained(folder, **options)
        assert type(loaded) is MADFormerPipeline
        assert loaded.transformer.dtype == torch.float32
        assert loaded.config.class_names == NAMES
        assert torch.allclose(draw(loaded), expected, atol=1e-5)


@pytest.mark.slow
def test_diffusers_loads_it_where_madformer_was_not_imported(folder: Path) -> None:
    code = (
        "from diffusers import DiffusionPipeline\n"
        f"p = DiffusionPipeline.from_pretrained({str(folder)!r}, custom_pipeline='pipeline', trust_remote_code=True)\n"
        "print(type(p).__name__, type(p.tokenizer).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["MADFormerPipeline", "ByteTokenizer"]


def test_fp32_unless_asked_otherwise(pipeline: MADFormerPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.float32
    loaded = MADFormerPipeline.from_pretrained(tmp_path)
    assert loaded.transformer.dtype == loaded.vae.dtype == torch.float32
    assert 0 < relative_error(loaded.transformer.boi, pipeline.transformer.boi) < 0.005
    for options in ({"dtype": torch.bfloat16}, {"torch_dtype": torch.bfloat16}):
        half = MADFormerPipeline.from_pretrained(tmp_path, **options)
        assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    mixed = MADFormerPipeline.from_pretrained(tmp_path, dtype={"transformer": torch.bfloat16})
    assert (mixed.transformer.dtype, mixed.vae.dtype) == (torch.bfloat16, torch.float32)
    assert MADFormerPipeline.from_pretrained(tmp_path, vae_dtype=torch.bfloat16).vae.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ({"variant": "fp16"}, {"variant": "fp16"}),
        ({"safe_serialization": False}, {"use_safetensors": False}),
        ({"max_shard_size": "200KB"}, {}),
        ({"max_shard_size": "200KB", "variant": "ema"}, {"variant": "ema", "use_safetensors": True}),
        ({}, {"local_files_only": True, "device_map": "cpu"}),
    ],
)
def test_forms_of_weights(
    pipeline: MADFormerPipeline, saved: dict[str, Any], loaded: dict[str, Any], tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path, **saved)
    again = MADFormerPipeline.from_pretrained(tmp_path, **loaded)
    assert torch.allclose(draw(again), draw(pipeline), atol=1e-5)
    if "variant" in loaded:
        with pytest.raises((ValueError, OSError)) as raised:
            MADFormerPipeline.from_pretrained(tmp_path, variant="other")
        assert len(str(raised.value).splitlines()) == 1


def test_parts_that_are_passed_in(pipeline: MADFormerPipeline, folder: Path) -> None:
    scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    loaded = MADFormerPipeline.from_pretrained(folder, scheduler=scheduler, vae=None, tokenizer=None)
    assert loaded.scheduler is scheduler
    assert loaded.vae is None
    assert loaded.tokenizer is None
    assert loaded.config.vae == (None, None)
    transformer, tiny_vae = pipeline.transformer, make_vae("AutoencoderTiny")
    loaded = MADFormerPipeline.from_pretrained(folder, transformer=transformer, vae=tiny_vae, tokenizer="bytes")
    assert loaded.transformer is transformer
    assert loaded.vae is tiny_vae
    assert MADFormerPipeline.from_pretrained(folder.parent, subfolder=folder.name).config.class_names == NAMES


def test_parts_that_an_earlier_save_left(pipeline: MADFormerPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "notes").mkdir()
    bare = make_pipeline(vae=None, tokenizer=None)
    bare.save_pretrained(tmp_path)
    assert not (tmp_path / "vae").exists()
    assert not (tmp_path / "tokenizer").exists()
    assert (tmp_path / "notes").is_dir()
    for loaded in (MADFormerPipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(tmp_path)):
        assert loaded.vae is None
        assert loaded.tokenizer is None
    # a folder that was not the pipeline's stays, and is not loaded
    make_vae("AutoencoderKL").save_pretrained(tmp_path / "vae")
    bare.save_pretrained(tmp_path)
    assert (tmp_path / "vae").is_dir()
    assert MADFormerPipeline.from_pretrained(tmp_path).vae is None


@pytest.mark.parametrize("names", [CLASSES[:2], pytest.param(CLASSES, marks=pytest.mark.slow)], ids=["two", "all"])
def test_every_autoencoder_is_found_by_its_class(
    pipeline: MADFormerPipeline, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """One after the other into the same folder, each over the last one's weights."""
    for name in names:
        saved = make_pipeline(transformer=pipeline.transformer, vae=make_vae(name))
        saved.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == ["diffusers", name]
        expected = draw(saved)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        assert type(loaded) is MADFormerPipeline
        assert type(loaded.vae).__name__ == name
        assert torch.allclose(draw(loaded), expected, atol=1e-4)


def test_what_the_hub_is_sent(pipeline: MADFormerPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, dict[str, str], str]] = []

    class Repository:
        repo_id = "somebody/drawings"

    def upload_folder(*, repo_id: str, folder_path: Path, commit_message: str, **_: Any) -> str:
        files = {str(p.relative_to(folder_path)): p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()}
        sent.append((repo_id, {name: data.decode("utf-8", "replace") for name, data in files.items()}, commit_message))
        return "address"

    monkeypatch.setattr(pipeline_files, "create_repo", lambda *_, **__: Repository)
    monkeypatch.setattr(diffusers.utils.hub_utils, "upload_folder", upload_folder)
    assert pipeline.push_to_hub("drawings", variant="fp16", license="mit", commit_message="First") == "address"
    pipeline.save_pretrained(tmp_path / "drawings", push_to_hub=True)
    for repo_id, files, _ in sent:
        assert repo_id == "somebody/drawings"
        assert {"model_index.json", "pipeline.py", "README.md", "scheduler/scheduler_config.json"} <= files.keys()
        assert "library_name: diffusers" in files["README.md"]
        assert 'MADFormerPipeline.from_pretrained("somebody/drawings")' in files["README.md"]
        assert not isinstance(json.loads(files["model_index.json"])["class_names"], list)
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in sent[0][1]
    assert "license: mit" in sent[0][1]["README.md"]
    assert sent[0][2] == "First"
    assert (tmp_path / "drawings" / "README.md").is_file()


def test_schedulers_that_are_refused(pipeline: MADFormerPipeline, tmp_path: Path) -> None:
    message = (
        "FlowMatchEulerDiscreteScheduler has prediction_type=.flow. and the model .epsilon.: their noise is another"
    )
    with pytest.raises(ValueError, match=message):
        make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match=message):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    with pytest.raises(ValueError, match="prediction_type='sample' and the model 'epsilon'"):
        pipeline.scheduler = EulerDiscreteScheduler(prediction_type="sample")
    pipeline.save_pretrained(tmp_path)
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match="is of FlowMatchEulerDiscreteScheduler, and model_index"):
        MADFormerPipeline.from_pretrained(tmp_path)


def test_copies_and_pickles_after_a_call() -> None:
    own = make_pipeline()
    expected = draw(own)
    stored = io.BytesIO()
    torch.save(own, stored)
    stored.seek(0)
    for other in (copy.deepcopy(own), torch.load(stored, weights_only=False)):
        assert torch.equal(draw(other), expected)
        with torch.no_grad():
            other.transformer.boi += 1
        assert not torch.equal(draw(other), expected)
    assert torch.equal(draw(own), expected)


def test_a_compiled_transformer(tmp_path: Path) -> None:
    own = make_pipeline()
    expected = draw(own)
    own.transformer = torch.compile(own.transformer, backend="eager")
    assert torch.allclose(draw(own), expected, atol=1e-5)
    own.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"] == ["madformer", "MADFormer"]
    assert torch.allclose(draw(MADFormerPipeline.from_pretrained(tmp_path)), expected, atol=1e-5)


def test_dtypes_and_offloading() -> None:
    expected = draw(make_pipeline())
    assert relative_error(draw(make_pipeline().to(torch.float64)), expected) < 1e-4
    assert relative_error(draw(make_pipeline().to(dtype=torch.bfloat16)), expected) < 0.1
    offloaded = make_pipeline()
    offloaded.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.allclose(draw(offloaded), expected, atol=1e-5)
    grouped = make_pipeline()
    grouped.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.allclose(draw(grouped), expected, atol=1e-3)
    sliced = make_pipeline()
    sliced.enable_vae_slicing()
    sliced.enable_attention_slicing()
    assert torch.allclose(draw(sliced), expected, atol=1e-5)
    sliced.enable_vae_tiling()
    assert sliced.vae.use_tiling
    with pytest.raises(ValueError, match="enable_sequential_cpu_offload has no place here"):
        make_pipeline().enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="NoneType as the autoencoder has no enable_tiling"):
        make_pipeline(vae=None).enable_vae_tiling()
