"""The pipeline: the same image whatever the batch, diffusers' conventions, folders."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

from madformer.conditioning.prompt import Prompt
from madformer.conditioning.reader import PromptReader
from madformer.conditioning.tokenizer import ByteTokenizer
from madformer.config import MADFormerConfig, TextConfig, tiny
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.engine.schedulers import default_scheduler
from madformer.model import MADFormer
from madformer.model.blocks import from_blocks, to_blocks
from madformer.pipeline import MADFormerPipeline
from madformer.sheets import image_grid
from madformer.streaming import reports
from tests.helpers.engine_cases import FLAT
from tests.helpers.testing import perturb, relative_error, small_vae

TEXT = FLAT.replace(text=TextConfig(vocab_size=257, length=6, pad_token_id=256))
CLASSES = FLAT.replace(time_conditioning="unet+adaln", num_classes=3)
NAMES = ["Flags", "Food & Drink", "Animals"]


def make_pipeline(config: MADFormerConfig, **options: Any) -> MADFormerPipeline:
    torch.manual_seed(0)
    model = perturb(MADFormer(config))
    assert isinstance(model, MADFormer)
    made = MADFormerPipeline(model, small_vae(scaling_factor=0.5), default_scheduler("epsilon"), **options)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipeline() -> MADFormerPipeline:
    return make_pipeline(FLAT)


@pytest.fixture(scope="module")
def writing() -> MADFormerPipeline:
    """Of a model with text."""
    return make_pipeline(TEXT, tokenizer=ByteTokenizer())


@pytest.fixture(scope="module")
def sorting() -> MADFormerPipeline:
    """Of a model with classes."""
    return make_pipeline(CLASSES, class_names=NAMES)


def by_the_engine(pipeline: MADFormerPipeline, seeds: list[int], prompt: Prompt, **options: Any) -> torch.Tensor:
    """Three steps, with nothing of the pipeline but its model and scheduler."""
    config = pipeline.transformer.config
    shape = (config.num_blocks, config.latents_per_block, config.latent_channels)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    plan = Sampler(pipeline.transformer, pipeline.scheduler).plan(len(seeds), SamplingOptions(3, **options))
    return from_blocks(plan.run(noise, prompt), config)


def latents(pipeline: MADFormerPipeline, num_images: int = 1, steps: int = 25, **kwargs: Any) -> torch.Tensor:
    """Of seed 0, where nothing else is said."""
    if "generator" not in kwargs:
        kwargs.setdefault("seed", 0)
    images = pipeline(
        num_images_per_prompt=num_images, num_inference_steps=steps, **kwargs, output_type="latent"
    ).images
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
        pipeline(num_inference_steps=3, seed=0, generator=shared)
    with pytest.raises(ValueError, match="generator has 1 entries for 2 images"):
        pipeline(num_images_per_prompt=2, num_inference_steps=3, generator=[shared])


@pytest.mark.parametrize("scheduler", [None, EulerAncestralDiscreteScheduler])
def test_without_a_seed_they_are_pytorchs_own(pipeline: MADFormerPipeline, scheduler: Any) -> None:
    """As in diffusers; the scheduler's noise is of the same, and a stream takes turns with whoever reads it."""
    own = pipeline.scheduler
    try:
        if scheduler is not None:
            pipeline.scheduler = scheduler.from_config(own.config)
        with torch.random.fork_rng(devices=[]):
            expected = latents(pipeline, 2, 3, generator=torch.manual_seed(5))
            torch.manual_seed(5)
            drawn, next_one = (latents(pipeline, 2, 3, seed=None) for _ in range(2))
            torch.manual_seed(5)
            streamed = [
                output.images
                for output in pipeline.stream(num_images_per_prompt=2, num_inference_steps=3, output_type="latent")
            ]
    finally:
        pipeline.scheduler = own
    assert torch.equal(drawn, expected)
    assert torch.equal(streamed[-1], expected)
    assert relative_error(next_one, drawn) > 0.1


def test_from_pipe(pipeline: MADFormerPipeline) -> None:
    """With all parts of the other, or some in their place."""
    made = MADFormerPipeline.from_pipe(pipeline, scheduler=DDIMScheduler(clip_sample=False))
    assert (made.transformer, made.vae) == (pipeline.transformer, pipeline.vae)
    assert type(made.scheduler) is DDIMScheduler
    assert MADFormerPipeline.from_pipe(pipeline).scheduler is pipeline.scheduler


def test_output_types_agree(pipeline: MADFormerPipeline) -> None:
    raw = latents(pipeline, 2, 3, seed=1)
    with torch.no_grad():
        decoded = pipeline.vae.decode(raw / 0.5).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1)
    pixels = pipeline(num_images_per_prompt=2, num_inference_steps=3, seed=1, output_type="pt").images
    torch.testing.assert_close(pixels, expected, rtol=1e-4, atol=1e-4)
    array = pipeline(num_images_per_prompt=2, num_inference_steps=3, seed=1, output_type="np").images
    np.testing.assert_allclose(array, expected.permute(0, 2, 3, 1).numpy(), atol=1e-4)
    pictures = pipeline(num_images_per_prompt=2, num_inference_steps=3, seed=1).images
    assert all(isinstance(picture, Image.Image) and picture.size == (16, 16) for picture in pictures)
    np.testing.assert_allclose(np.stack([np.asarray(p) for p in pictures]), array * 255, atol=0.51)


def test_callback_and_progress_bar(pipeline: MADFormerPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[int, int, int]] = []
    blocks: list[torch.Tensor] = []

    def callback(own: MADFormerPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> None:
        assert own is pipeline
        calls.append((step, int(timestep), tensors["block"]))
        if step % 3 == 2:
            blocks.append(to_blocks(tensors["latents"], FLAT)[:, tensors["block"]].clone())

    pipeline.set_progress_bar_config(disable=False)
    try:
        result = latents(pipeline, 1, 3, seed=0, callback_on_step_end=callback)
    finally:
        pipeline.set_progress_bar_config(disable=True)
    timesteps = [999, 666, 332]
    assert calls == [(4 * 0 + 3 * block + step, timesteps[step], block) for block in range(4) for step in range(3)]
    assert torch.equal(from_blocks(torch.stack(blocks, dim=1), FLAT), result)
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


def test_the_split_can_be_changed() -> None:
    """Of an elastic model; the plan for the other split is not used again."""
    elastic = make_pipeline(FLAT.replace(elastic_diffusion_layers=(1, 2)))
    before = latents(elastic, 1, 3, seed=0)
    elastic.transformer.set_split(1)
    changed = latents(elastic, 1, 3, seed=0)
    assert torch.equal(changed, by_the_engine(elastic, [0], Prompt()))
    assert relative_error(changed, before) > 1e-3


def test_save_and_load(pipeline: MADFormerPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = MADFormerPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    public = [{k: v for k, v in s.config.items() if k[0] != "_"} for s in (loaded.scheduler, pipeline.scheduler)]
    assert public[0] == public[1]
    loaded.set_progress_bar_config(disable=True)
    assert relative_error(latents(loaded, 2, 3, seed=3), latents(pipeline, 2, 3, seed=3)) < 1e-5
    assert loaded(num_inference_steps=3, seed=3).images[0].size == (16, 16)


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
        loaded(num_inference_steps=3)
    small_vae(scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    loaded = MADFormerPipeline.from_pretrained(tmp_path / "model", vae=tmp_path / "vae", dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert loaded(num_inference_steps=3).images[0].size == (16, 16)


def test_bad_requests(pipeline: MADFormerPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_images=0"):
        pipeline(num_images=0)
    with pytest.raises(ValueError, match="num_inference_steps=0 must be between 1"):
        pipeline(num_inference_steps=0)
    with pytest.raises(ValueError, match="output_type='jpeg'"):
        pipeline(num_inference_steps=3, output_type="jpeg")  # type: ignore[arg-type]
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no diffusers scheduler"):
        MADFormerPipeline.from_pretrained(tmp_path)
    for file in (tmp_path / "vae").iterdir():
        file.write_text("")
    pipeline.scheduler.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match="holds no readable AutoencoderKL"):
        MADFormerPipeline.from_pretrained(tmp_path)


# Prompts and classes


def test_texts_reach_the_engine(writing: MADFormerPipeline) -> None:
    cat, longer, nothing, wrong = (
        [99, 97, 116, 256, 256, 256], [97, 32, 114, 101, 100, 32], [256] * 6, [110, 111, 256, 256, 256, 256]
    )  # fmt: skip
    texts, drawn = torch.tensor([cat, longer]), ["cat", "a red heart"]
    plain = latents(writing, 1, 3, prompt=drawn, seed=4)
    assert torch.equal(plain, by_the_engine(writing, [4, 5], Prompt(texts)))
    for negative, ids in ((None, [nothing, nothing]), ("no", [wrong, wrong]), (["", "no"], [nothing, wrong])):
        guided = latents(writing, 1, 3, prompt=drawn, negative_prompt=negative, guidance_scale=2.5, seed=4)
        prompt = Prompt(texts, torch.tensor(ids))
        assert torch.equal(guided, by_the_engine(writing, [4, 5], prompt, guidance=2.5))
        assert relative_error(guided, plain) > 1e-3
    interval = latents(writing, 1, 3, prompt=drawn, guidance_scale=2.5, guidance_interval=(300, 700), seed=4)
    options = {"guidance": 2.5, "guidance_interval": (300, 700)}
    assert torch.equal(interval, by_the_engine(writing, [4, 5], Prompt(texts, torch.tensor([nothing] * 2)), **options))
    assert relative_error(interval, plain) > 1e-4


def test_classes_reach_the_engine(sorting: MADFormerPipeline) -> None:
    drawn = latents(sorting, 1, 3, labels=["Food & Drink", 0, "2", -1], guidance_scale=2.0, seed=1)
    expected = by_the_engine(sorting, [1, 2, 3, 4], Prompt(label=torch.tensor([1, 0, 2, -1])), guidance=2.0)
    assert torch.equal(drawn, expected)
    assert relative_error(latents(sorting, 1, 3, labels=1), latents(sorting, 1, 3, labels="Animals")) > 5e-5


def test_one_entry_stands_for_all_images() -> None:
    both = make_pipeline(CLASSES.replace(text=TEXT.text), tokenizer=ByteTokenizer())
    drawn = latents(both, 1, 3, prompt="cat", labels=[0, 2], seed=0)
    assert torch.equal(drawn, latents(both, 1, 3, prompt=["cat", "cat"], labels=[0, 2], seed=0))
    assert torch.equal(latents(both, 2, 3, prompt="cat", labels=1), latents(both, 1, 3, prompt="cat", labels=[1, 1]))


def test_guidance_of_one_is_none(writing: MADFormerPipeline) -> None:
    plain = latents(writing, 1, 3, prompt="cat", seed=0)
    assert torch.equal(latents(writing, 1, 3, prompt="cat", guidance_scale=1.0, seed=0), plain)
    nowhere = {"guidance_scale": 4.0, "guidance_interval": (2000, 3000)}
    assert relative_error(latents(writing, 1, 3, prompt="cat", seed=0, **nowhere), plain) < 1e-5
    nearly = latents(writing, 1, 3, prompt="cat", guidance_scale=1 + 1e-6, negative_prompt="dog", seed=0)
    assert relative_error(nearly, plain) < 1e-5


def test_an_image_depends_on_its_own_prompt_alone(writing: MADFormerPipeline) -> None:
    """``num_images`` of each prompt, one prompt's after the other's."""
    together = latents(writing, 2, 3, prompt=["cat", "dog"], guidance_scale=3.0, seed=7)
    assert len(together) == 4
    for index, text in enumerate(["cat", "cat", "dog", "dog"]):
        alone = latents(writing, 1, 3, prompt=text, guidance_scale=3.0, seed=7 + index)
        assert relative_error(alone[0], together[index]) < 1e-5
    other = latents(writing, 1, 3, prompt="dog", guidance_scale=3.0, seed=7)
    assert relative_error(other[0], together[0]) > 1e-3


def test_tokenizer_and_class_names_are_saved(
    writing: MADFormerPipeline, sorting: MADFormerPipeline, tmp_path: Path
) -> None:
    for pipeline, options in ((writing, {"prompt": "cat"}), (sorting, {"labels": "Animals"})):
        folder = tmp_path / str(options)
        pipeline.save_pretrained(folder)
        loaded = MADFormerPipeline.from_pretrained(folder, dtype=torch.float32)
        loaded.set_progress_bar_config(disable=True)
        assert (
            relative_error(latents(loaded, 1, 3, seed=3, **options), latents(pipeline, 1, 3, seed=3, **options)) < 1e-5
        )
        assert loaded.config.class_names == pipeline.config.class_names


def test_a_missing_tokenizer(writing: MADFormerPipeline, tmp_path: Path) -> None:
    """Bytes need no files, only their name; for any other somebody has to say which."""
    writing.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "tokenizer")
    assert isinstance(MADFormerPipeline.from_pretrained(tmp_path).tokenizer, ByteTokenizer)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for entry in ({"tokenizer": ["madformer", "PretrainedTokenizer"]}, {}):
        without = {name: value for name, value in index.items() if name != "tokenizer"}
        (tmp_path / "model_index.json").write_text(json.dumps({**without, **entry}))
        with pytest.raises(ValueError, match=f"{tmp_path} holds no tokenizer/, and its model reads text"):
            MADFormerPipeline.from_pretrained(tmp_path)
        assert MADFormerPipeline.from_pretrained(tmp_path, tokenizer="bytes").tokenizer.vocab_size == 257
    with pytest.raises(ValueError, match="transformer holds no tokenizer/"):
        MADFormerPipeline.from_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no index of a pipeline"):
        MADFormerPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        ("pipeline", {"prompt": "cat"}, "a prompt has no place: the model was made without text"),
        ("pipeline", {"labels": 1}, "a class has no place: the model was made without classes"),
        ("pipeline", {"guidance_scale": 2.0}, "guidance needs a model with text or classes"),
        ("writing", {}, "a prompt is missing: the model was made for text"),
        ("writing", {"prompt": "cat", "labels": 1}, "a class has no place"),
        ("writing", {"prompt": ["a", "b"], "negative_prompt": ["c"] * 3, "guidance_scale": 2.0}, "got [2, 3]"),
        ("writing", {"prompt": "cat", "negative_prompt": "dog"}, "guidance_scale=1 is none"),
        ("sorting", {}, "a class is missing: the model was made for classes"),
        ("sorting", {"labels": 1, "negative_prompt": "", "guidance_scale": 2.0}, "a negative prompt has no place"),
        ("sorting", {"labels": 3}, "no class 3: there are 3, Flags, Food & Drink, Animals"),
        ("sorting", {"labels": [0, -2]}, "no class -2"),
        ("sorting", {"labels": "Cars"}, "no class 'Cars': there are 3, Flags, Food & Drink, Animals"),
    ],
)  # fmt: skip
def test_prompts_that_do_not_go_with_the_model(
    which: str, options: dict[str, Any], message: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        request.getfixturevalue(which)(num_inference_steps=3, **options)
    assert len(str(raised.value).splitlines()) == 1


def test_parts_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="class_names has 2 entries for num_classes=3"):
        make_pipeline(CLASSES, class_names=["a", "b"])
    with pytest.raises(ValueError, match=r"has 257 tokens, and the model text\.vocab_size=11"):
        make_pipeline(FLAT.replace(text=TextConfig(11, 4)), tokenizer=ByteTokenizer())
    with pytest.raises(ValueError, match="a prompt needs a tokenizer, and this pipeline has none"):
        make_pipeline(TEXT)(num_inference_steps=3, prompt="cat")
    strict = make_pipeline(CLASSES.replace(null_class=False))
    with pytest.raises(ValueError, match="no class -1: there are 3, from 0 to 2"):
        strict(num_inference_steps=3, labels=-1)
    with pytest.raises(ValueError, match="guidance needs a model with text or classes"):
        strict(num_inference_steps=3, labels=1, guidance_scale=2.0)


def test_a_model_of_both_takes_one_alone() -> None:
    both = make_pipeline(
        TEXT.replace(time_conditioning="unet+adaln", num_classes=3), tokenizer=ByteTokenizer(), class_names=NAMES
    )
    said, sorted_ = latents(both, 1, 3, prompt="cat"), latents(both, 1, 3, labels="Flags")
    assert torch.equal(said, latents(both, 1, 3, prompt="cat", labels=-1))
    assert torch.equal(sorted_, latents(both, 1, 3, prompt="", labels=0))
    assert relative_error(said, sorted_) > 1e-3
    with pytest.raises(ValueError, match="a prompt is missing"):
        latents(both, 1, 3)
    strict = make_pipeline(both.transformer.config.replace(null_class=False), tokenizer=ByteTokenizer())
    with pytest.raises(ValueError, match="a class is missing"):
        latents(strict, 1, 3, prompt="cat")


def test_grid_of_rows() -> None:
    """Five pictures dealt to two rows: 0 2 4 and 1 3."""
    pictures = [Image.new("RGB", (1, 1), (value, 0, 0)) for value in range(1, 6)]
    assert np.asarray(image_grid(pictures, 2))[..., 0].tolist() == [[1, 3, 5], [2, 4, 255]]
    assert np.asarray(image_grid(pictures))[..., 0].tolist() == [[1, 2, 3], [4, 5, 255]]


# Streaming


def test_blocks_as_they_are_done(writing: MADFormerPipeline) -> None:
    options: dict[str, Any] = {"prompt": "cat", "guidance_scale": 2.0, "seed": 3}
    blocks: list[tuple[int, torch.Tensor]] = []
    whole = latents(writing, 2, 3, **options, on_block=lambda *done: blocks.append(done))
    assert [block for block, _ in blocks] == [0, 1, 2, 3]
    assert torch.equal(from_blocks(torch.stack([done for _, done in blocks], dim=1), FLAT), whole)
    outputs = [
        output.images
        for output in writing.stream(num_images_per_prompt=2, num_inference_steps=3, output_type="latent", **options)
    ]
    assert len(outputs) == 4
    assert torch.equal(outputs[-1], whole)
    side = whole.shape[-1] // 2  # of a block: there are 2 x 2, in raster order
    for done, output in enumerate(outputs, start=1):
        for block in range(4):
            where = (
                ...,
                slice(block // 2 * side, (block // 2 + 1) * side),
                slice(block % 2 * side, (block % 2 + 1) * side),
            )
            assert torch.equal(output[where], whole[where] if block < done else torch.zeros_like(whole[where]))
    *_, last = writing.stream(num_images_per_prompt=2, num_inference_steps=3, **options)
    assert [picture.tobytes() for picture in last.images] == [
        p.tobytes() for p in writing(num_images_per_prompt=2, num_inference_steps=3, **options).images
    ]


def test_blocks_under_a_scheduler_of_any_kind(pipeline: MADFormerPipeline) -> None:
    own = pipeline.scheduler
    try:
        pipeline.scheduler = UniPCMultistepScheduler.from_config(own.config)
        *_, last = pipeline.stream(num_inference_steps=4, output_type="latent", seed=0)
        assert torch.equal(last.images, latents(pipeline, 1, 4, seed=0))
    finally:
        pipeline.scheduler = own


def test_errors_of_a_stream(pipeline: MADFormerPipeline) -> None:
    for options, message in (({"num_images": 0}, "num_images=0"), ({"prompt": "cat"}, "a prompt has no place")):
        with pytest.raises(ValueError, match=message):
            next(pipeline.stream(**options))
    with pytest.raises(ValueError, match="output_type='jpeg'"):
        next(pipeline.stream(output_type="jpeg"))  # type: ignore[arg-type]


def test_leaving_a_stream_ends_the_work() -> None:
    ended: list[int] = []

    def work(report: Callable[[int], None]) -> None:
        deadline = time.monotonic() + 60
        try:
            for index in itertools.count():
                assert time.monotonic() < deadline
                report(index)
        finally:
            ended.append(index)

    stream = reports(work)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    stream.close()  # type: ignore[attr-defined]
    assert len(ended) == 1


def test_an_error_comes_after_what_was_reported() -> None:
    def work(report: Callable[[int], None]) -> None:
        report(1)
        raise OSError("No space left on device")

    stream = reports(work)
    assert next(stream) == 1
    with pytest.raises(OSError, match="No space left"):
        next(stream)


# Going on from an image


def test_blocks_of_an_image_are_drawn_anew() -> None:
    """With its own seed and prompt the image comes again; the kept blocks are the given ones."""
    writing = make_pipeline(tiny().replace(text=TEXT.text), tokenizer=ByteTokenizer())
    options: dict[str, Any] = {"prompt": "cat", "guidance_scale": 2.0}
    whole = latents(writing, 1, 3, **options, seed=3)
    assert torch.equal(latents(writing, 1, 3, **options, seed=3, image=whole[0], blocks=[2, 3]), whole)
    other = latents(writing, 2, 3, **options, seed=8, image=whole, blocks=[2])
    blocks, expected = to_blocks(other, FLAT), to_blocks(whole, FLAT).expand(2, -1, -1, -1)
    assert torch.equal(blocks[:, [0, 1, 3]], expected[:, [0, 1, 3]])
    assert all(relative_error(block, expected[0, 2]) > 0.1 for block in blocks[:, 2])
    outputs = writing.stream(
        num_images_per_prompt=2,
        num_inference_steps=3,
        **options,
        seed=8,
        image=whole,
        blocks=[2, 1],
        output_type="latent",
    )
    first, last = (to_blocks(output.images, FLAT) for output in outputs)
    assert torch.equal(first[:, [0, 3]], expected[:, [0, 3]])
    assert torch.equal(first[:, 1], last[:, 1])
    assert not first[:, 2].any()
    assert torch.equal(last[:, [0, 3]], expected[:, [0, 3]])


def test_a_picture_is_encoded(pipeline: MADFormerPipeline) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    (drawn,) = latents(pipeline, 1, 3, seed=0, image=Image.fromarray(pixels), blocks=[3])
    values = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    with torch.no_grad():
        expected = pipeline.vae.encode(values).latent_dist.mode()[0] * 0.5
    torch.testing.assert_close(drawn[:, :4], expected[:, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn[:, 4:, :4], expected[:, 4:, :4], rtol=1e-4, atol=1e-5)
    assert relative_error(drawn[:, 4:, 4:], expected[:, 4:, 4:]) > 0.1


def test_images_of_another_size(writing: MADFormerPipeline) -> None:
    """As the engine draws them with the model set to that size; the pipeline's own keeps its own."""
    options: dict[str, Any] = {"prompt": "cat", "seed": 3}
    own = latents(writing, 1, 3, **options)
    wide = latents(writing, 1, 3, **options, width=24)
    assert wide.shape == (1, 4, 8, 12)
    *_, last = writing.stream(num_inference_steps=3, **options, width=24, output_type="latent")
    assert torch.equal(last.images, wide)
    assert writing(num_inference_steps=3, **options, height=8).images[0].size == (16, 8)
    assert torch.equal(latents(writing, 1, 3, **options, height=16), own)
    trained = {name: tensor.clone() for name, tensor in writing.transformer.state_dict().items()}
    other = {name: tensor + 0.01 for name, tensor in trained.items()}
    latents(writing, 1, 3, **options, width=24)
    writing.transformer.load_state_dict(other, assign=True)
    assert relative_error(latents(writing, 1, 3, **options, width=24), wide) > 1e-3
    writing.transformer.load_state_dict(trained, assign=True)
    assert torch.equal(latents(writing, 1, 3, **options, width=24), wide)
    model = copy.deepcopy(writing.transformer).set_grid(2, 3)
    resized = MADFormerPipeline(model, writing.vae, writing.scheduler, writing.tokenizer)
    assert torch.equal(latents(resized, 1, 3, **options), wide)
    redrawn = latents(writing, 1, 3, **options, width=24, image=wide, blocks=[5])
    assert relative_error(redrawn, wide) < 1e-5
    with pytest.raises(ValueError, match="height=20 must be a multiple of a block's 8 pixels"):
        latents(writing, 1, 3, **options, height=20)
    with pytest.raises(ValueError, match="height=0 must be at least 1"):
        latents(writing, 1, 3, **options, height=0)


def test_a_block_is_drawn_anew_from_all_others() -> None:
    """Of a model for every order: what lies behind the block counts, too."""
    free = make_pipeline(tiny().replace(block_order="random"))
    image = latents(free, 1, 3, seed=0)
    drawn = latents(free, 1, 3, seed=1, image=image, blocks=[1])
    behind = to_blocks(image, tiny())
    behind[:, 3] += 1
    other = latents(free, 1, 3, seed=1, image=from_blocks(behind, tiny()), blocks=[1])
    before, after = (to_blocks(x, tiny())[:, 1] for x in (drawn, other))
    assert relative_error(after, before) > 1e-3
    assert torch.equal(to_blocks(drawn, tiny())[:, [0, 2, 3]], to_blocks(image, tiny())[:, [0, 2, 3]])


def test_bad_edits(pipeline: MADFormerPipeline) -> None:
    for options, message in (
        ({"blocks": [1]}, "image and blocks go together"),
        ({"image": torch.zeros(4, 8, 8)}, "image and blocks go together"),
        ({"image": torch.zeros(4, 8, 8), "blocks": []}, "blocks=[] must be some of 0 to 3"),
        ({"image": torch.zeros(4, 8, 8), "blocks": [-1]}, "blocks=[-1] must be some of 0 to 3"),
        ({"image": torch.zeros(4, 8, 8), "blocks": range(2, 5)}, "blocks=range(2, 5) must be some of 0 to 3"),
        ({"image": torch.zeros(4, 8, 4), "blocks": [1]}, "image must have the shape (4, 8, 8), one or 1 of it"),
        ({"image": Image.new("RGB", (16, 8)), "blocks": [1]}, "16 x 16 pixels, width by height, got 16 x 8"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            latents(pipeline, 1, 3, **options)


# As diffusers' pipelines are called


def test_the_prompt_comes_first(writing: MADFormerPipeline) -> None:
    named = latents(writing, 2, 3, prompt="cat", seed=3)
    images = writing("cat", 3, num_images_per_prompt=2, seed=3, output_type="latent").images
    assert torch.equal(images, named)
    assert torch.equal(writing("cat", 3, num_images=2, seed=3, output_type="latent").images, named)
    *_, last = writing.stream("cat", 3, num_images=2, seed=3, output_type="latent")
    assert torch.equal(last.images, named)


def test_outputs_are_subscriptable(writing: MADFormerPipeline) -> None:
    output = writing("cat", 3, seed=3, output_type="np")
    assert output[0] is output["images"] is output.images
    (images,) = writing("cat", 3, seed=3, output_type="np", return_dict=False)
    assert np.array_equal(images, output.images)


def test_latents_are_the_noise_to_start_from(writing: MADFormerPipeline) -> None:
    """Standard normal: the scheduler's scale, 157 for Euler's method from this last timestep on, comes on top."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    texts = torch.tensor([[99, 97, 116, 256, 256, 256]] * 2)
    own = writing.scheduler
    try:
        for scheduler in (own, EulerDiscreteScheduler.from_config(own.config)):
            writing.scheduler = scheduler
            drawn = latents(writing, 2, 3, prompt="cat", latents=noise)
            plan = Sampler(writing.transformer, scheduler).plan(2, SamplingOptions(3))
            expected = from_blocks(plan.run(to_blocks(noise, TEXT), Prompt(texts)), TEXT)
            assert torch.equal(drawn, expected)
        assert relative_error(latents(writing, 2, 3, prompt="cat", latents=noise.double()), drawn) < 1e-6
    finally:
        writing.scheduler = own
    # what the generators draw is such noise
    blocks = torch.randn(4, 16, 4, generator=torch.Generator().manual_seed(7))
    given = latents(writing, 1, 3, prompt="cat", latents=from_blocks(blocks[None], TEXT))
    assert torch.equal(given, latents(writing, 1, 3, prompt="cat", seed=7))


def test_guidance_up_to_one_is_none(writing: MADFormerPipeline) -> None:
    plain = latents(writing, 1, 3, prompt="cat", seed=0)
    for scale in (0, 0.7, np.float32(1)):
        assert torch.equal(latents(writing, 1, 3, prompt="cat", seed=0, guidance_scale=scale), plain)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((2,), {}, "the prompt comes first: write num_images_per_prompt=2 for a number of images"),
        ((2, 3), {"prompt": "cat"}, "the prompt comes first: write num_images_per_prompt=2 for a number of images"),
        ((["cat", 2],), {}, "prompt=['cat', 2] must be a text or a list of texts"),
        (("cat",), {"num_images_per_prompt": 2, "num_images": 2}, "which are the same, not both"),
        (("cat",), {"negative_prompt_embeds": torch.zeros(1, 6, 64)}, "so give negative_prompt"),
    ],
)
def test_bad_calls(writing: MADFormerPipeline, arguments: Any, options: dict[str, Any], message: str) -> None:
    for draw in (writing, lambda *args, **kwargs: list(writing.stream(*args, **kwargs))):
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            draw(*arguments, **options)
        assert len(str(raised.value).splitlines()) == 1


def test_a_picture_is_read_as_training_data_are(pipeline: MADFormerPipeline) -> None:
    """Turned as its EXIF says, on white where it is transparent, 16 bits down to 8."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    alpha = np.where(np.arange(256).reshape(16, 16) < 128, 255, 0).astype(np.uint8)
    on_white = np.where(alpha[..., None] > 0, pixels, 255).astype(np.uint8)
    turned = Image.fromarray(np.rot90(pixels, 1).copy())
    turned.getexif()[0x0112] = 6  # to be turned clockwise
    grey = random.integers(0, 256, (16, 16), dtype=np.uint8)
    for given, meant in (
        (Image.fromarray(np.dstack([pixels, alpha])), on_white),
        (turned, pixels),
        (Image.fromarray(grey.astype(np.uint16) * 257), np.dstack([grey] * 3)),
    ):
        drawn = latents(pipeline, 1, 2, seed=0, image=given, blocks=[3])
        assert torch.equal(drawn, latents(pipeline, 1, 2, seed=0, image=Image.fromarray(meant), blocks=[3]))


def test_a_name_that_two_classes_have() -> None:
    reader = PromptReader(FLAT.replace(num_classes=3, time_conditioning="unet+adaln"), None, ["crane", "ox", "crane"])
    assert [reader.class_number(label) for label in ("ox", "2", 0)] == [1, 2, 0]
    with pytest.raises(ValueError, match="class 'crane' is the name of 0, 2: give a number"):
        reader.class_number("crane")
