"""Cached sampling against the training pass, which knows no cache: at every block and step, for every case."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from madformer.conditioning.prompt import Prompt
from madformer.config import tiny
from madformer.engine.options import SamplingOptions
from madformer.engine.progress import Change, Progress
from madformer.engine.reference import sample_uncached
from madformer.engine.running import NonFiniteError
from madformer.engine.sampler import Sampler
from madformer.model.madformer import MADFormer, MADFormerOutput
from tests.helpers.engine_cases import (
    ACDIT,
    BATCH,
    CASES,
    FLAT,
    STEPS,
    draw_noise,
    draw_prompt,
    make_model,
    shared_model,
)
from tests.helpers.testing import relative_error

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", CASES)
def test_cached_equals_uncached(name: str) -> None:
    config = CASES[name]
    model, noise = make_model(config), draw_noise(config)
    scheduler = DDIMScheduler(prediction_type=config.prediction_type)
    prompt = draw_prompt(config)
    order = [3, 4, 5, 2, 1, 0] if name == "spiral" else range(config.num_blocks)
    # Two steps: what the first leaves in the cache, and what is there when the next block comes.
    expected = sample_uncached(model, scheduler, 2, noise[:, order], prompt)
    latents = Sampler(model, scheduler).plan(BATCH, SamplingOptions(2)).run(noise, prompt)
    for number, place in enumerate(order):
        assert relative_error(latents[:, place], expected[:, number]) < TOLERANCE, f"block {number}"


@pytest.mark.parametrize("batch", [1, 3])
def test_blocks_in_an_order_of_ones_choice(batch: int) -> None:
    """Of a model for every order; without its text, as the uncached loop has it with the tables of that order."""
    config, order = CASES["any order"], [2, 0, 3, 1]
    model, noise = make_model(config), draw_noise(config, batch)
    latents = Sampler(model, DDIMScheduler()).plan(batch, SamplingOptions(STEPS)).run(noise, order=order)
    told = functools.partial(model, order_BM=torch.tensor([order] * batch))
    expected = sample_uncached(told, DDIMScheduler(), STEPS, noise[:, order])
    assert relative_error(latents[:, order], expected) < TOLERANCE
    assert (
        relative_error(latents, Sampler(model, DDIMScheduler()).plan(batch, SamplingOptions(STEPS)).run(noise)) > 0.01
    )


@pytest.mark.parametrize(
    ("scheduler", "interval"),
    [
        (DDIMScheduler, (0, 1000)),
        (UniPCMultistepScheduler, (300, 800)),
        pytest.param(DDIMScheduler, (300, 800), marks=pytest.mark.slow),
        pytest.param(UniPCMultistepScheduler, (0, 1000), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "name", ["text", "text, condition only", "text, block-local", "patches", "text and classes", "ACDiT", "DiT"]
)
def test_guidance(name: str, scheduler: Callable[[], Any], interval: tuple[int, int]) -> None:
    """Two uncached passes a step, mixed by the formula; tabulated and through the scheduler's own step."""
    config = CASES[name]
    if config.num_blocks > 1:
        config = config.replace(num_blocks=3, block_grid=(1, 3))  # the third is the first with two before it
    model, noise = shared_model(config), draw_noise(config)
    prompt = draw_prompt(config, guided=True)

    def scale(t: int) -> float:
        return 2.5 if interval[0] <= t <= interval[1] else 1.0

    expected = sample_uncached(model, scheduler(), STEPS, noise, prompt, scale)
    plan = Sampler(model, scheduler()).plan(BATCH, SamplingOptions(STEPS, guidance=2.5, guidance_interval=interval))
    assert relative_error(plan.run(noise, prompt), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["text", "ACDiT"])
def test_guidance_of_one_is_none(name: str) -> None:
    model, noise = make_model(CASES[name]), draw_noise(CASES[name])
    guided = draw_prompt(CASES[name], guided=True)
    prompt = dataclasses.replace(guided, negative_text=None)
    sampler = Sampler(model, DDIMScheduler())
    plain = sampler.plan(BATCH, SamplingOptions(STEPS)).run(noise, prompt)
    assert torch.equal(sampler.plan(BATCH, SamplingOptions(STEPS, guidance=1.0)).run(noise, prompt), plain)
    never = sampler.plan(BATCH, SamplingOptions(STEPS, guidance=4.0, guidance_interval=(1001, 1002)))
    assert relative_error(never.run(noise, guided), plain) < TOLERANCE


def test_guidance_that_a_callback_changes_is_of_one_run() -> None:
    model, noise = make_model(CASES["text"]), draw_noise(CASES["text"])
    plan = Sampler(model, DDIMScheduler()).plan(BATCH, SamplingOptions(STEPS, guidance=4.0))
    prompt = draw_prompt(CASES["text"], guided=True)
    first = plan.run(noise, prompt)
    assert not torch.equal(plan.run(noise, prompt, callback=lambda _: Change(guidance=1.0)), first)
    assert torch.equal(plan.run(noise, prompt), first)


def test_prompts_that_have_no_place() -> None:
    model, noise, text = make_model(CASES["text"]), draw_noise(CASES["text"]), draw_prompt(CASES["text"]).text
    assert text is not None
    plan = Sampler(model, DDIMScheduler()).plan(BATCH, SamplingOptions(STEPS))
    for given, message in (
        (Prompt(), r"text must be ids of the shape \(2, 5\), got none"),
        (Prompt(text[:, 1:]), r"text must be ids of the shape \(2, 5\), got the shape \(2, 4\)"),
        (Prompt(text + 11), "text must hold ids from 0 to 10, got 1[1-9] to [12][0-9]"),
        (Prompt(text, text), "negative_text has no place in sampling without guidance"),
        (Prompt(text, label=text[:, 0]), "label has no place in a model without classes"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.run(noise, given)
    with pytest.raises(ValueError, match="text has no place in a model without text"):
        Sampler(make_model(FLAT), DDIMScheduler()).plan(BATCH, SamplingOptions(STEPS)).run(noise, Prompt(text))
    with pytest.raises(ValueError, match=r"label must be ids of the shape \(2,\), got none"):
        Sampler(make_model(ACDIT), DDIMScheduler()).plan(BATCH, SamplingOptions(STEPS)).run(draw_noise(ACDIT))
    config = ACDIT.replace(null_class=False)
    plan = Sampler(make_model(config), DDIMScheduler()).plan(1, SamplingOptions(1))
    with pytest.raises(ValueError, match="label must hold ids from 0 to 6, got -1 to -1"):
        plan.run(draw_noise(config, 1), Prompt(label=torch.tensor([-1])))
    with pytest.raises(ValueError, match="guidance needs a model with text or classes"):
        Sampler(make_model(FLAT), DDIMScheduler()).plan(BATCH, SamplingOptions(STEPS, guidance=2.0))
    with pytest.raises(ValueError, match="must be the lower timestep, then the higher"):
        Sampler(model, DDIMScheduler()).plan(1, SamplingOptions(STEPS, guidance=2.0, guidance_interval=(3, 2)))
    with pytest.raises(ValueError, match="guidance=nan must be finite"):
        Sampler(model, DDIMScheduler()).plan(1, SamplingOptions(STEPS, guidance=float("nan")))


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "dpmpp": lambda: DPMSolverMultistepScheduler.from_config(DDIMScheduler().config),
    "dpmpp order 3": lambda: DPMSolverMultistepScheduler(solver_order=3),
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
    "ddim thresholding": lambda: DDIMScheduler(thresholding=True),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler(name: str) -> None:
    """Tabulated or through its own ``step``: as the uncached loop has it, and for the next block from the beginning."""
    config = FLAT.replace(num_blocks=2, block_grid=(1, 2))
    model, noise = shared_model(config), draw_noise(config)
    expected = sample_uncached(model, SCHEDULERS[name](), 4, noise)
    latents = Sampler(model, SCHEDULERS[name]()).plan(BATCH, SamplingOptions(4)).run(noise)
    assert relative_error(latents, expected) < TOLERANCE


def test_a_stochastic_scheduler_draws_from_the_generators() -> None:
    model, noise = make_model(FLAT), draw_noise(FLAT)
    plan = Sampler(model, EulerAncestralDiscreteScheduler()).plan(BATCH, SamplingOptions(STEPS))

    def draw(seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return plan.run(noise, generator=generators)

    first, again, other = draw([1, 2]), draw([1, 2]), draw([1, 3])
    assert torch.equal(first, again)
    assert torch.equal(first[0], other[0])
    assert not torch.allclose(first[1], other[1])


@pytest.mark.parametrize("context", ["clean+condition", "condition"])
def test_a_plan_is_reused(context: str) -> None:
    """A second request, with other inputs in between, leaves no trace in the cache."""
    config = FLAT.replace(context=context)
    model = make_model(config)
    plan = Sampler(model, DDIMScheduler()).plan(BATCH, SamplingOptions(STEPS))
    noise, other = draw_noise(config), draw_noise(config, seed=2)
    first = plan.run(noise)
    different = plan.run(other)
    again = plan.run(noise)
    assert torch.equal(first, again)
    assert not torch.allclose(first, different)


def test_the_users_scheduler_and_weights_are_untouched() -> None:
    model, scheduler = make_model(FLAT), DDIMScheduler()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = dict(scheduler.config)
    Sampler(model, scheduler).plan(1, SamplingOptions(STEPS)).run(draw_noise(FLAT, 1))
    assert scheduler.num_inference_steps is None
    assert dict(scheduler.config) == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_progress_tells_every_step() -> None:
    model, noise = make_model(FLAT), draw_noise(FLAT)
    seen: list[tuple[int, int]] = []
    last: list[Tensor] = []

    def callback(progress: Progress) -> None:
        seen.append((progress.block, progress.step))
        if progress.step == STEPS - 1:
            last.append(progress.latents_BLC.clone())

    latents = Sampler(model, DDIMScheduler()).plan(BATCH, SamplingOptions(STEPS)).run(noise, callback=callback)
    assert seen == [(block, step) for block in range(4) for step in range(STEPS)]
    assert torch.equal(torch.stack(last, dim=1), latents)


def test_bf16_follows_fp32() -> None:
    """Each layer rounds to 8 bits; what the model says must survive that."""
    config, noise = tiny(), draw_noise(tiny())
    exact = Sampler(make_model(config), DDIMScheduler()).plan(BATCH, SamplingOptions(STEPS)).run(noise)
    low = make_model(config).to(torch.bfloat16)
    latents = Sampler(low, DDIMScheduler()).plan(BATCH, SamplingOptions(STEPS)).run(noise)
    assert latents.dtype == torch.float32
    assert relative_error(latents, exact) < 0.05


@pytest.mark.parametrize("steps", [0, -3])
def test_nonsensical_step_counts(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps={steps} must be at least 1"):
        SamplingOptions(steps)


def test_more_steps_than_the_scheduler_has() -> None:
    with pytest.raises(ValueError, match="num_inference_steps=1001 must be between 1 and num_train_timesteps=1000"):
        Sampler(make_model(FLAT), DDIMScheduler()).plan(1, SamplingOptions(1001))


def test_empty_batch() -> None:
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        Sampler(make_model(FLAT), DDIMScheduler()).plan(0, SamplingOptions(1))


@pytest.mark.parametrize(("block", "step"), [(0, 0), (1, 2), (3, 1)])
def test_numbers_that_are_not_finite_stop_the_run(block: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names where they began; what was drawn before is not blamed."""
    plan = Sampler(make_model(FLAT), DDIMScheduler()).plan(BATCH, SamplingOptions(STEPS)).warmup()
    calls, predict = iter(range(1000)), plan.passes.predict

    def faulty(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        outputs = predict(*arguments, **options)
        if next(calls) == block * STEPS + step:
            outputs[0][1, 0, 0] = float("inf")
        return outputs

    monkeypatch.setattr(plan.passes, "predict", faulty)
    with pytest.raises(NonFiniteError, match=f"image 1 of the batch is not finite from block {block}, step {step} on"):
        plan.run(draw_noise(FLAT))


def test_warmup_says_what_it_made_ready(caplog: pytest.LogCaptureFixture) -> None:
    plan = Sampler(make_model(FLAT), DDIMScheduler()).plan(BATCH, SamplingOptions(STEPS))
    with caplog.at_level("INFO", "madformer.engine"):
        plan.warmup()
    assert [record.message.split(":")[0] for record in caplog.records[:3]] == [
        "first block, batch 2",
        "denoising step, batch 2",
        "next block, batch 2",
    ]
    caplog.clear()
    with caplog.at_level("INFO", "madformer.engine"):
        plan.run(draw_noise(FLAT))
    assert not caplog.records, "the run made something ready that warmup() had not"


def test_a_compiled_unet_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves trace without a graph break, once each, and the model that was given stays uncompiled."""
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=backend, **options))
    model, noise = make_model(FLAT), draw_noise(FLAT)
    expected = Sampler(model, DDIMScheduler(), pack_weights=False).plan(BATCH, SamplingOptions(STEPS)).run(noise)
    actual = Sampler(model, DDIMScheduler(), compile_unet=True).plan(BATCH, SamplingOptions(STEPS)).run(noise)
    assert relative_error(actual, expected) < TOLERANCE
    assert len(graphs) == 2
    assert model.downsampler._compiled_call_impl is None


# Layers that do not run at every step


@torch.no_grad()
def sample_refreshing(model: MADFormer, scheduler: Any, steps: int, noise: Tensor, every: int) -> Tensor:
    """By the training pass, with the last layer's output put together from what the layers added when they ran last."""
    added: dict[str, Tensor] = {}
    index = 0

    def transform(streams: Any, noisy: Tensor, *arguments: Any) -> Any:
        streams, condition = type(model).transform(model, streams, noisy, *arguments)
        entered = noisy if condition is None else condition + noisy
        if index % every == 0:
            added["noise"] = streams["noise"] - entered
        return streams | {"noise": entered + added["noise"]}, condition

    def told(*arguments: Any) -> MADFormerOutput:
        nonlocal index
        output = model(*arguments)
        index += 1
        return output

    model.transform = transform  # type: ignore[method-assign]
    try:
        return sample_uncached(told, scheduler, steps, noise)
    finally:
        del model.transform


@pytest.mark.parametrize(
    ("steps", "every", "scheduler"),
    [
        (4, 2, DDIMScheduler),
        (6, 3, UniPCMultistepScheduler),
        pytest.param(4, 2, UniPCMultistepScheduler, marks=pytest.mark.slow),
        pytest.param(6, 3, DDIMScheduler, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["both", pytest.param("clean only", marks=pytest.mark.slow), "one block"])
def test_layers_run_in_every_so_many_steps(name: str, steps: int, every: int, scheduler: Callable[[], Any]) -> None:
    model, noise = make_model(CASES[name]), draw_noise(CASES[name])
    drawn = Sampler(model, scheduler()).plan(BATCH, SamplingOptions(steps, refresh_every=every)).run(noise)
    assert relative_error(drawn, sample_refreshing(model, scheduler(), steps, noise, every)) < TOLERANCE
    assert relative_error(drawn, Sampler(model, scheduler()).plan(BATCH, SamplingOptions(steps)).run(noise)) > TOLERANCE


@pytest.mark.parametrize("steps", [1, 5])
def test_steps_that_make_no_whole_round(steps: int) -> None:
    """The first of a block runs the layers; told or not, each is one step."""
    model, noise = make_model(FLAT), draw_noise(FLAT)
    plan = Sampler(model, DDIMScheduler()).plan(BATCH, SamplingOptions(steps, refresh_every=3))
    calls: list[int] = []
    drawn = plan.run(noise)
    assert torch.equal(plan.run(noise, callback=lambda progress: calls.append(progress.step)), drawn)
    assert calls == [*range(steps)] * 4
    if steps == 1:
        assert torch.equal(drawn, Sampler(model, DDIMScheduler()).plan(BATCH, SamplingOptions(1)).run(noise))
    with pytest.raises(ValueError, match="refresh_every=0 must be at least 1"):
        Sampler(model, DDIMScheduler()).plan(BATCH, SamplingOptions(2, refresh_every=0))


# Changing images block by block


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        pytest.param(name, blocks, id=f"{name}-{blocks}", marks=() if name in often else pytest.mark.slow)
        for blocks, often in (
            ([1, 3], ("both", "clean only", "block-local", "text", "ACDiT", "released quirks")),
            (range(2, 4), ("both", "text")),
            (range(4), ("both", "ACDiT")),
            ([0], ()),
            ([1], ()),
        )
        for name in ("both", "clean only", "block-local", "text", "ACDiT", "released quirks")
    ],
)
def test_blocks_are_drawn_anew_from_what_is_before_them(name: str, blocks: Collection[int]) -> None:
    """From their own noise, what was drawn comes again; from other noise, they alone change."""
    config = CASES[name]
    model, noise, prompt = make_model(config), draw_noise(config), draw_prompt(config)
    plan = Sampler(model, DPMSolverMultistepScheduler()).plan(BATCH, SamplingOptions(STEPS))
    image = plan.run(noise, prompt)
    again = plan.run(noise, prompt, given=image, blocks=blocks)
    assert relative_error(again, image) < TOLERANCE
    other = plan.run(draw_noise(config, seed=7), prompt, given=image, blocks=blocks)
    for block in range(4):
        assert torch.equal(other[:, block], image[:, block]) == (block not in blocks)
    if 1 in blocks and 0 not in blocks:
        # drawn after the same first block, and no more than that: as the image whose second block had this noise
        mixed = noise.clone()
        mixed[:, 1] = draw_noise(config, seed=7)[:, 1]
        assert relative_error(other[:, 1], plan.run(mixed, prompt)[:, 1]) < TOLERANCE


def test_a_block_is_drawn_anew_from_all_others() -> None:
    """By a model for every order: what it is depends on blocks before and behind it, and they stay."""
    config = CASES["any order"]
    model, noise, image = make_model(config), draw_noise(config), draw_noise(config, seed=7)
    plan = Sampler(model, DDIMScheduler()).plan(BATCH, SamplingOptions(STEPS))
    order = [0, 2, 3, 1]
    drawn = plan.run(noise, given=image, blocks=[1], order=order)
    assert torch.equal(drawn[:, [0, 2, 3]], image[:, [0, 2, 3]])
    for place in (0, 2, 3):
        other = image.clone()
        other[:, place] += 1
        assert relative_error(plan.run(noise, given=other, blocks=[1], order=order)[:, 1], drawn[:, 1]) > 1e-3
        unread = plan.run(noise, given=other, blocks=[1])[:, 1]
        assert torch.equal(unread, plan.run(noise, given=image, blocks=[1])[:, 1]) == (place > 1)


def test_blocks_that_cannot_be_drawn_anew() -> None:
    noise = draw_noise(FLAT)
    plan = Sampler(make_model(FLAT), DDIMScheduler()).plan(BATCH, SamplingOptions(STEPS))
    for options, message in (
        ({"blocks": [1]}, r"blocks=\[1\]: what the others hold must be given"),
        ({"blocks": [], "given": noise}, r"blocks=\[\] must be some of 0 to 3"),
        ({"blocks": [4], "given": noise}, r"blocks=\[4\] must be some of 0 to 3"),
        ({"order": [0, 1, 2]}, r"order=\[0, 1, 2\] must name every block from 0 to 3 once"),
        ({"order": [1, 0, 2, 3]}, r"order=\[1, 0, 2, 3\] is none for this model, .* block_order='raster' alone"),
        ({"blocks": [1], "given": noise[:1]}, r"given must have the shape \(2, 4, 16, 4\), got \(1, 4, 16, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.run(noise, **options)
    config = CASES["condition only"]
    plan = Sampler(make_model(config), DDIMScheduler()).plan(BATCH, SamplingOptions(STEPS))
    with pytest.raises(ValueError, match="context='condition' reads blocks as it drew them"):
        plan.run(noise, given=noise, blocks=[1])
