"""The pipeline: the same image whatever the batch, diffusers' conventions, folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UniPCMultistepScheduler
from PIL import Image

from madformer.config import tiny
from madformer.model import MADFormer
from madformer.model.blocks import from_blocks
from madformer.pipeline import MADFormerPipeline, default_scheduler
from testing import perturb, relative_error


def make_vae() -> AutoencoderKL:
    """Two levels: latents of half the resolution."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    return vae.eval()


@pytest.fixture(scope="module")
def pipeline() -> MADFormerPipeline:
    torch.manual_seed(0)
    model = perturb(MADFormer(tiny()))
    assert isinstance(model, MADFormer)
    made = MADFormerPipeline(model, make_vae(), default_scheduler("epsilon"))
    made.set_progress_bar_config(disable=True)
    return made


def latents(pipeline: MADFormerPipeline, *args: Any, **kwargs: Any) -> torch.Tensor:
    images = pipeline(*args, **kwargs, output_type="latent").images
    assert isinstance(images, torch.Tensor)
    return images


def test_an_image_does_not_depend_on_its_batch(pipeline: MADFormerPipeline) -> None:
    together = latents(pipeline, 5, 3, seed=10)
    pairs = torch.cat([latents(pipeline, 2, 3, seed=10), latents(pipeline, 3, 3, seed=12)])
    alone = torch.cat([latents(pipeline, 1, 3, seed=10 + index) for index in range(5)])
    for index in range(5):
        assert relative_error(pairs[index], together[index]) < 1e-5
        assert relative_error(alone[index], together[index]) < 1e-5
    assert relative_error(together[1], together[0]) > 0.1


def test_generators(pipeline: MADFormerPipeline) -> None:
    """One for each image is the same as seeds; one for all draws from it in turn, whatever the batch."""
    seeded = latents(pipeline, 2, 3, seed=5)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    assert torch.equal(latents(pipeline, 2, 3, generator=generators), seeded)
    shared = torch.Generator().manual_seed(5)
    together = latents(pipeline, 2, 3, generator=shared)
    shared = torch.Generator().manual_seed(5)
    in_turn = torch.cat([latents(pipeline, 1, 3, generator=shared) for _ in range(2)])
    assert relative_error(in_turn, together) < 1e-5
    with pytest.raises(ValueError, match="seed or generator, not both"):
        pipeline(1, 3, seed=0, generator=shared)
    with pytest.raises(ValueError, match="generator has 1 entries for num_images=2"):
        pipeline(2, 3, generator=[shared])


def test_output_types_agree(pipeline: MADFormerPipeline) -> None:
    raw = latents(pipeline, 2, 3, seed=1)
    with torch.no_grad():
        decoded = pipeline.vae.decode(raw / 0.5).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1)
    pixels = pipeline(2, 3, seed=1, output_type="pt").images
    torch.testing.assert_close(pixels, expected, rtol=1e-4, atol=1e-4)
    array = pipeline(2, 3, seed=1, output_type="np").images
    np.testing.assert_allclose(array, expected.permute(0, 2, 3, 1).numpy(), atol=1e-4)
    pictures = pipeline(2, 3, seed=1).images
    assert all(isinstance(picture, Image.Image) and picture.size == (16, 16) for picture in pictures)
    np.testing.assert_allclose(np.stack([np.asarray(p) for p in pictures]), array * 255, atol=0.51)


def test_callback_and_progress_bar(pipeline: MADFormerPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[int, int, int]] = []
    blocks: list[torch.Tensor] = []

    def callback(own: MADFormerPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> None:
        assert own is pipeline
        calls.append((step, int(timestep), tensors["block"]))
        if step % 3 == 2:
            blocks.append(tensors["latents"].clone())

    pipeline.set_progress_bar_config(disable=False)
    try:
        result = latents(pipeline, 1, 3, seed=0, callback_on_step_end=callback)
    finally:
        pipeline.set_progress_bar_config(disable=True)
    timesteps = [999, 666, 332]
    assert calls == [(4 * 0 + 3 * block + step, timesteps[step], block) for block in range(4) for step in range(3)]
    assert torch.equal(from_blocks(torch.stack(blocks, dim=1)), result)
    assert "12/12" in capsys.readouterr().err


def test_the_scheduler_can_be_changed(pipeline: MADFormerPipeline) -> None:
    """As in diffusers: assigned from the old one's configuration, used from the next call on."""
    own = pipeline.scheduler
    before = latents(pipeline, 1, 4, seed=0)
    try:
        pipeline.scheduler = UniPCMultistepScheduler.from_config(own.config)
        changed = latents(pipeline, 1, 4, seed=0)
        pipeline.scheduler = DDIMScheduler.from_config(own.config, clip_sample=False)
        ddim = latents(pipeline, 1, 4, seed=0)
    finally:
        pipeline.scheduler = own
    assert not torch.allclose(before, changed)
    assert not torch.allclose(before, ddim)
    assert torch.equal(latents(pipeline, 1, 4, seed=0), before)


def test_save_and_load(pipeline: MADFormerPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = MADFormerPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    public = [{k: v for k, v in s.config.items() if k[0] != "_"} for s in (loaded.scheduler, pipeline.scheduler)]
    assert public[0] == public[1]
    loaded.set_progress_bar_config(disable=True)
    assert relative_error(latents(loaded, 2, 3, seed=3), latents(pipeline, 2, 3, seed=3)) < 1e-5
    assert loaded(1, 3, seed=3).images[0].size == (16, 16)


def test_half_size_folder(pipeline: MADFormerPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = MADFormerPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.float32
    assert loaded.transformer.dtype == loaded.vae.dtype == torch.float32
    assert relative_error(loaded.transformer.boi, pipeline.transformer.boi) < 0.005


def test_a_bare_model_folder_gives_latents(pipeline: MADFormerPipeline, tmp_path: Path) -> None:
    pipeline.transformer.save_pretrained(tmp_path / "model")
    loaded = MADFormerPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert relative_error(latents(loaded, 1, 3), latents(pipeline, 1, 3)) < 1e-5
    with pytest.raises(ValueError, match="needs an autoencoder"):
        loaded(1, 3)
    make_vae().save_pretrained(tmp_path / "vae")
    loaded = MADFormerPipeline.from_pretrained(tmp_path / "model", vae=tmp_path / "vae", dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert loaded(1, 3).images[0].size == (16, 16)


def test_bad_requests(pipeline: MADFormerPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_images=0"):
        pipeline(0)
    with pytest.raises(ValueError, match="num_inference_steps=0 must be between 1"):
        pipeline(1, 0)
    with pytest.raises(ValueError, match="output_type='jpeg'"):
        pipeline(1, 3, output_type="jpeg")  # type: ignore[arg-type]
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no diffusers scheduler"):
        MADFormerPipeline.from_pretrained(tmp_path)
    for file in (tmp_path / "vae").iterdir():
        file.write_text("")
    pipeline.scheduler.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match="holds no readable AutoencoderKL"):
        MADFormerPipeline.from_pretrained(tmp_path)
