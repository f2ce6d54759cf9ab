"""diffusers' callbacks: what they return, the guidance that they set and their interrupt reach the run."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
    SDXLControlnetCFGCutoffCallback,
)

from madformer.conditioning.tokenizer import ByteTokenizer
from madformer.config import TextConfig
from madformer.engine.schedulers import default_scheduler
from madformer.model import MADFormer
from madformer.model.blocks import to_blocks
from madformer.pipeline import MADFormerPipeline
from tests.helpers.engine_cases import FLAT
from tests.helpers.testing import perturb, small_vae

CONFIG = FLAT.replace(text=TextConfig(vocab_size=257, length=6, pad_token_id=256))
GUIDED: dict[str, Any] = {"prompt": "cat", "num_inference_steps": 3, "guidance_scale": 2.5, "seed": 4}


@pytest.fixture(scope="module")
def pipeline() -> MADFormerPipeline:
    torch.manual_seed(0)
    model = perturb(MADFormer(CONFIG))
    assert isinstance(model, MADFormer)
    made = MADFormerPipeline(model, small_vae(), default_scheduler("epsilon"), ByteTokenizer())
    made.set_progress_bar_config(disable=True)
    return made


def latents(pipeline: MADFormerPipeline, **options: Any) -> torch.Tensor:
    return pipeline(**GUIDED | options, output_type="latent").images


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler])
def test_a_callback_that_returns_what_it_got_changes_nothing(pipeline: MADFormerPipeline, scheduler: Any) -> None:
    own, seen = pipeline.scheduler, []
    try:
        if scheduler is not None:
            pipeline.scheduler = scheduler.from_config(own.config)

        def callback(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append((step, tensors["block"]))
            return tensors

        assert torch.equal(latents(pipeline, callback_on_step_end=callback), latents(pipeline))
    finally:
        pipeline.scheduler = own
    assert seen == [(step, step // 3) for step in range(12)]
    assert pipeline.num_timesteps == 12


def test_returned_latents_are_gone_on_with(pipeline: MADFormerPipeline) -> None:
    """A finished block that a callback replaced is what later blocks are drawn from, as with ``image``."""
    other = latents(pipeline, seed=9)

    def callback(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any] | None:
        if step != 2:
            return None
        changed = tensors["latents"].clone()
        changed[:, :, :4, :4] = other[:, :, :4, :4]
        return {"latents": changed}

    drawn = latents(pipeline, callback_on_step_end=callback)
    assert torch.equal(drawn, latents(pipeline, image=other, blocks=[1, 2, 3]))

    def clear(own: MADFormerPipeline, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last = step == own.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"]) if last else tensors["latents"]}

    assert not latents(pipeline, callback_on_step_end=clear).any()


def test_noise_to_come_can_be_replaced(pipeline: MADFormerPipeline) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = latents(pipeline, latents=noise)

    def callback(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            tensors["latents"][:, :, 4:] = noise[:, :, 4:]
        return tensors

    started = noise.clone()
    started[:, :, 4:] = 0
    assert torch.equal(latents(pipeline, latents=started, callback_on_step_end=callback), expected)


def test_guidance_is_that_of_the_next_step(pipeline: MADFormerPipeline) -> None:
    """Set back and forth as ``guidance_interval`` has it for timesteps 999, 666 and 332."""

    def callback(own: MADFormerPipeline, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        own._guidance_scale = 0.0 if step % 3 == 1 else 2.5
        return tensors

    expected = latents(pipeline, guidance_interval=(600, 1000))
    assert torch.equal(latents(pipeline, callback_on_step_end=callback), expected)
    assert not torch.equal(latents(pipeline), expected)
    assert pipeline.guidance_scale == 2.5
    assert pipeline.do_classifier_free_guidance


@pytest.mark.parametrize("kind", [SDCFGCutoffCallback, SDXLCFGCutoffCallback])
def test_a_guidance_cut_off_of_diffusers(pipeline: MADFormerPipeline, kind: Any) -> None:
    def by_hand(own: MADFormerPipeline, step: int, _: Any, tensors: dict[str, Any]) -> None:
        if step == 6:
            own._guidance_scale = 1.0

    expected = latents(pipeline, callback_on_step_end=by_hand)
    drawn = latents(pipeline, callback_on_step_end=kind(cutoff_step_ratio=0.5))
    assert torch.equal(drawn, expected)
    assert pipeline.guidance_scale == 0.0
    assert torch.equal(drawn[:, :, :4], latents(pipeline)[:, :, :4])
    several = MultiPipelineCallbacks([kind(cutoff_step_ratio=None, cutoff_step_index=6)])
    assert torch.equal(latents(pipeline, callback_on_step_end=several), expected)


def test_an_interrupt_ends_the_call_with_the_images_as_they_are(pipeline: MADFormerPipeline) -> None:
    seen: list[torch.Tensor] = []

    def callback(own: MADFormerPipeline, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].clone())
        own._interrupt = step == 4
        return tensors

    drawn = latents(pipeline, callback_on_step_end=callback)
    assert len(seen) == 5
    assert torch.equal(drawn, seen[-1])
    assert pipeline.interrupt
    whole = latents(pipeline)
    assert not pipeline.interrupt
    assert torch.equal(to_blocks(drawn, CONFIG)[:, 0], to_blocks(whole, CONFIG)[:, 0])
    noise = torch.randn(4, 16, 4, generator=torch.Generator().manual_seed(4))
    assert torch.equal(to_blocks(drawn, CONFIG)[0, 2:], noise[2:] * pipeline.scheduler.init_noise_sigma)


def test_an_interrupt_without_a_callback_and_from_another_thread(pipeline: MADFormerPipeline) -> None:
    def interrupt() -> None:
        pipeline._interrupt = True

    def on_block(*_: Any) -> None:
        thread = threading.Thread(target=interrupt)
        thread.start()
        thread.join()

    whole, drawn = latents(pipeline), latents(pipeline, on_block=on_block)
    blocks, expected = to_blocks(drawn, CONFIG), to_blocks(whole, CONFIG)
    assert torch.equal(blocks[:, 0], expected[:, 0])
    noise = torch.randn(4, 16, 4, generator=torch.Generator().manual_seed(4))
    assert torch.equal(blocks[0, 2:], noise[2:])


def test_every_call_has_its_own_state(pipeline: MADFormerPipeline) -> None:
    inner: list[torch.Tensor] = []

    def callback(own: MADFormerPipeline, step: int, _: Any, tensors: dict[str, Any]) -> None:
        if step == 1:
            inner.append(latents(own, guidance_scale=7.0, num_inference_steps=2))
        assert (own.guidance_scale, own.num_timesteps) == (2.5, 12)

    assert torch.equal(latents(pipeline, callback_on_step_end=callback), latents(pipeline))
    assert torch.equal(inner[0], latents(pipeline, guidance_scale=7.0, num_inference_steps=2))


@pytest.mark.parametrize(
    ("returned", "options", "message"),
    [
        (
            {"latents": torch.zeros(1, 4, 4, 4)},
            {},
            r"must give latents of the shape \(1, 4, 8, 8\), got \(1, 4, 4, 4\)",
        ),
        ({"latents": None}, {}, "must give latents of the shape .*, got NoneType"),
        ({"prompt_embeds": torch.zeros(2, 6, 128)}, {}, "a callback changed prompt_embeds, which is for looking at"),
        ({}, {"callback_on_step_end_tensor_inputs": ["image"]}, "no 'image' among latents, block, prompt_embeds"),
        ("raise guidance", {"guidance_scale": 1.0}, "cannot begin within a run that was begun without"),
        ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, {}, "is not finite"),
    ],
)
def test_what_a_callback_must_not_do(
    pipeline: MADFormerPipeline, returned: Any, options: dict[str, Any], message: str
) -> None:
    def callback(own: MADFormerPipeline, *_: Any) -> Any:
        if returned == "raise guidance":
            own._guidance_scale = 3.0
            return {}
        return returned

    with pytest.raises((ValueError, FloatingPointError), match=message) as raised:
        latents(pipeline, callback_on_step_end=callback, **options)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callback_on_step_end": 3}, "must be callable, got 3"),
        ({"callback_on_step_end": IPAdapterScaleCutoffCallback(0.5)}, "no IP adapter"),
        (
            {"callback_on_step_end": MultiPipelineCallbacks([IPAdapterScaleCutoffCallback(0.5)])},
            "no IP adapter",
        ),
        ({"callback_on_step_end": SDXLControlnetCFGCutoffCallback(0.5)}, "no 'image' among latents"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "must be a list of names, got 'latents'"),
    ],
)
def test_callbacks_that_cannot_run(pipeline: MADFormerPipeline, options: dict[str, Any], message: str) -> None:
    """Before anything is drawn, in one line."""
    with pytest.raises(ValueError, match=message) as raised:
        latents(pipeline, **options)
    assert len(str(raised.value).splitlines()) == 1
