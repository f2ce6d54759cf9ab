"""What a call is given of another kind is refused in one line, before a random number is drawn."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from madformer.arguments import interval, number, shown, whole_number
from madformer.conditioning.prompt import Prompt
from madformer.conditioning.tokenizer import ByteTokenizer
from madformer.config import TextConfig, tiny
from madformer.engine.batching import InFlightBatcher
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.engine.schedulers import default_scheduler
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from tests.helpers.testing import small_vae

CONFIG = tiny().replace(
    text=TextConfig(vocab_size=257, length=6, pad_token_id=256), time_conditioning="unet+adaln", num_classes=3
)
SHAPE = (1, 4, 8, 8)
KEPT: dict[str, Any] = {"image": torch.zeros(SHAPE[1:]), "blocks": [1]}
GUIDED = {"guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipeline() -> MADFormerPipeline:
    made = MADFormerPipeline(MADFormer(CONFIG), small_vae(), default_scheduler("epsilon"), ByteTokenizer(), list("abc"))
    made.set_progress_bar_config(disable=True)
    return made


def no(kind: str, *values: object) -> list[tuple[object, str]]:
    return [(value, kind) for value in values]


REFUSED: dict[str, list[tuple[object, str]]] = {
    "guidance_scale": [
        *no("must be a number", "a", None, [3.0], True, torch.ones(2), 1j),
        *no("must be finite", math.nan, math.inf, np.float32("inf")),
        (-1, "guidance_scale=-1.0 must be at least 0"),
    ],
    "guidance_interval": no(
        "the lower timestep, then the higher", (5,), 5, "ab", (1, 2, 3), ("a", 2), (math.nan, 2), (5, 1), None
    ),
    "num_inference_steps": [
        *no("must be a whole number", "2", 2.5, 2.0, True, None, [2], torch.tensor(2.0), torch.tensor(True)),
        *no("must be between 1 and num_train_timesteps=1000", 0, -1, 1001, 10**30),
    ],
    "num_images_per_prompt": [
        *no("must be a whole number", 1.5, "1", True, None),
        *no("must be at least 1", 0, -1),
        (10**9, "at most 65536"),
    ],
    "num_images": [*no("must be a whole number", 1.5, True), (0, "must be at least 1")],
    "refresh_every": [*no("must be a whole number", 1.5, "2", True, None), (0, "must be at least 1")],
    "height": [
        *no("must be a whole number", 64.0, "64", True),
        *no("must be at least 1", 0, -8),
        (15, "height=15 must be a multiple of a block's 8 pixels"),
        (8 * 10**9, "at most 16777216 tokens"),
    ],
    "width": [(64.0, "width=64.0 must be a whole number")],
    "latents": [
        (np.zeros(SHAPE, np.float32), "must be a torch.Tensor of the shape (1, 4, 8, 8), got <ndarray of the shape"),
        *no("must be a torch.Tensor", "x", 5, [1.0]),
        (torch.zeros(1, 4, 8, 9), "latents must have the shape (1, 4, 8, 8), got (1, 4, 8, 9)"),
        *no("must hold floating-point numbers, got", torch.zeros(SHAPE, dtype=torch.int64), torch.zeros(SHAPE) + 1j),
        *no("must be a dense tensor", torch.zeros(SHAPE, device="meta"), torch.zeros(SHAPE).to_sparse()),
        (torch.full(SHAPE, math.nan), "not finite"),
    ],
    "generator": [
        *no("must be a torch.Generator, or a list of one for each image", "x", 5, [5], np.random.default_rng(0)),
        ([], "generator has 0 entries for 1 images"),
        ([torch.Generator()] * 2, "generator has 2 entries for 1 images"),
    ],
    "seed": [
        *no("must be a whole number", "1", 1.0, True, torch.tensor(True)),
        *no("must be from 0 to 2^63 - 1", -1, 2**63),
    ],
    "output_type": no("must be 'pil', 'np', 'pt' or 'latent'", "foo", None, 5, ["pil"]),
    "return_dict": no("must be True or False", "no", None, 0),
    "prompt": [
        *no("must be a text or a list of texts", 5, b"a", [5], ["a", None], {"a"}),
        ([], "prompt=[] must hold one text"),
    ],
    "negative_prompt": [
        *no("must be a text or a list of texts", 5, b"a"),
        ([], "must hold one text"),
        ("x", "guidance_scale=1 is none"),
    ],
    "labels": [
        *no("must be a class's number or name", 1.5, True, [None], {1}, np.array([1.5])),
        ([], "labels=[] must hold one class"),
        *no("no class", 3, "x", "1.5"),
    ],
    "callback_on_step_end": no("must be callable, got", 5, "x"),
    "on_block": no("must be callable, got", 5),
    "callback_on_step_end_tensor_inputs": [
        *no("must be a list of names", 5, "latents"),
        *no("among latents, block", ["foo"], [5]),
    ],
    "image": [
        *no(
            "must be a PIL.Image, or a torch.Tensor of latents",
            "x.png",
            5,
            np.zeros(SHAPE),
            [Image.new("RGB", (16, 16))],
        ),
        (torch.zeros(SHAPE[1:], dtype=torch.uint8), "must hold floating-point numbers"),
    ],
    "blocks": no("must be some of 0 to 3", 5, "1", [1.0], [True], [4], [-1], ["a"], []),
    "prompt_embeds": no("has no place: the model reads token ids, so give prompt", torch.zeros(1, 6, 64)),
}


def refused(call: Any, message: str, *arguments: Any, kind: type[Exception] = ValueError, **options: Any) -> None:
    before = torch.get_rng_state()
    with pytest.raises(kind, match=re.escape(message)) as raised:
        call(*arguments, **options)
    assert type(raised.value) is kind
    assert len(str(raised.value).splitlines()) == 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", REFUSED)
def test_of_the_pipeline(pipeline: MADFormerPipeline, name: str) -> None:
    for value, message in REFUSED[name]:
        options = KEPT if name in ("image", "blocks") else GUIDED if name == "guidance_interval" else {}
        refused(pipeline, message, **{"prompt": "cat", "num_inference_steps": 1, **options, name: value})


def test_whole_numbers_and_numbers_of_any_library() -> None:
    for two in (2, np.int64(2), np.uint8(2), torch.tensor(2)):
        assert type(whole_number("n", two, 1)) is int
        assert number("x", two) == 2.0
    for half in (0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])[0]):
        assert number("x", half) == 0.5
    assert interval("i", [0, math.inf]) == (0.0, math.inf)
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        whole_number("n", 0, 1)
    assert shown(torch.zeros(2, 3)) == "<Tensor of the shape (2, 3)>"
    assert len(shown("x" * 1000)) == 60


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("eta", "noise in the steps is the scheduler's"),
        ("timesteps", "which timesteps are taken is the scheduler's"),
        ("sigmas", "which timesteps are taken is the scheduler's"),
        ("prompt_2", "the model reads one text"),
        ("pooled_prompt_embeds", "the model reads token ids"),
        ("clip_skip", "without a text encoder"),
        ("cross_attention_kwargs", "set_adapters"),
        ("guidance_rescale", "guidance is guidance_scale= alone"),
        ("ip_adapter_image_embeds", "no IP adapter"),
        ("control_image", "no ControlNet"),
        ("strength", "image= and blocks="),
        ("class_labels", "classes are labels="),
        ("batch_size", "num_images_per_prompt="),
        ("callback_steps", "callback_on_step_end="),
        ("use_karras_sigmas", "from_config(pipeline.scheduler.config"),
        ("promt", "did you mean prompt=?"),
        ("guidence_scale", "did you mean guidance_scale=?"),
        ("num_inference_step", "did you mean num_inference_steps=?"),
        ("Height", "did you mean height=?"),
        ("zebra", "there are blocks, callback_on_step_end"),
    ],
)
def test_keywords_that_there_are_not(pipeline: MADFormerPipeline, keyword: str, message: str) -> None:
    for call in (pipeline, pipeline.stream):
        refused(call, message, "cat", kind=TypeError, **{keyword: None})
        refused(call, f"has no {keyword}: ", "cat", kind=TypeError, **{keyword: 1})


def test_of_the_engine() -> None:
    config = tiny()
    noise = torch.zeros(2, config.num_blocks, config.latents_per_block, config.latent_channels)
    sampler = Sampler(MADFormer(config), DDIMScheduler())
    for name, value, message in (
        ("batch", "2", "batch='2' must be a whole number"),
        ("batch", 0, "batch=0 must be at least 1"),
        ("options", 25, "options=25 must be SamplingOptions(steps, ...)"),
    ):
        refused(sampler.plan, message, **{"batch": 2, "options": SamplingOptions(1), name: value})
    for name, value, message in (
        ("steps", 2.5, "steps=2.5 must be a whole number"),
        ("steps", 0, "steps=0 must be at least 1"),
        ("guidance", "a", "guidance='a' must be a number"),
        ("guidance", math.nan, "guidance=nan must be finite"),
        ("guidance", -1, "guidance=-1.0 must be at least 0"),
        ("guidance_interval", (5,), "guidance_interval=(5,) must be two numbers"),
        ("refresh_every", True, "refresh_every=True must be a whole number"),
    ):
        refused(SamplingOptions, message, **{name: value})
    plan = sampler.plan(2, SamplingOptions(1))
    for given, message in (
        (None, "noise must be a torch.Tensor"),
        (noise.numpy(), "got <ndarray"),
        (noise.long(), "noise must hold floating-point numbers, got torch.int64"),
        (noise[:1], "noise must have the shape"),
        (lambda block: noise[:1, block], "noise of block 0 must have the shape"),
    ):
        refused(plan.run, message, given)
    refused(plan.run, "given must be a torch.Tensor", noise, given=5, blocks=[1])
    batcher = InFlightBatcher(sampler, 1, max_steps=2)
    refused(InFlightBatcher, "slots=1.5 must be a whole number", sampler, 1.5)
    for name, value, message in (
        ("noise_MLC", noise[0].numpy(), "noise must be a torch.Tensor"),
        ("noise_MLC", noise[0].int(), "noise must hold floating-point numbers"),
        ("options", 1, "options=1 must be SamplingOptions(steps, ...)"),
        ("options", SamplingOptions(1, refresh_every=2), "refresh_every=2 has no place in in-flight batching"),
        ("priority", "high", "priority='high' must be a whole number"),
    ):
        refused(
            batcher.submit,
            message,
            **{"noise_MLC": noise[0], "options": SamplingOptions(1), "prompt": Prompt(), name: value},
        )
    assert batcher.num_waiting == 0
