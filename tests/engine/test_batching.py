"""In-flight batching: every image is the one drawn alone, whoever shared its steps; who goes first, and who leaves."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from madformer.conditioning.prompt import Prompt
from madformer.engine import sharing
from madformer.engine.batching import InFlightBatcher, QueueFullError
from madformer.engine.graphs import EagerLauncher, Launcher
from madformer.engine.options import SamplingOptions
from madformer.engine.progress import FinishedBlock
from madformer.engine.running import NonFiniteError
from madformer.engine.sampler import Sampler
from madformer.model import MADFormer
from madformer.model.blocks import order_around
from tests.helpers.engine_cases import CASES, FLAT, draw_noise, draw_prompt, make_model, one_of
from tests.helpers.recording import RecordingLauncher
from tests.helpers.testing import relative_error

TOLERANCE = 1e-4
LAUNCHERS: dict[str, Callable[[], Launcher]] = {"eager": EagerLauncher, "captured": RecordingLauncher}


def make_batcher(model: MADFormer, slots: int, launcher: Launcher | None = None, **options: int) -> InFlightBatcher:
    scheduler = DPMSolverMultistepScheduler(prediction_type=model.config.prediction_type)
    sampler = Sampler(model, scheduler, pack_weights=False, launcher=launcher or EagerLauncher())
    batcher = InFlightBatcher(sampler, slots, **options)
    if batcher.launcher.captures:
        batcher.cache.on_host = False
    return batcher


def drawn_alone(model: MADFormer, noise_MLC: Tensor, steps: int) -> Tensor:
    scheduler = DPMSolverMultistepScheduler(prediction_type=model.config.prediction_type)
    return Sampler(model, scheduler, pack_weights=False).plan(1, SamplingOptions(steps)).run(noise_MLC[None])[0]


@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        *((name, "eager") for name in ("both", "condition only", "noisy blocks only", "clean only", "one block")),
        *((name, "captured") for name in ("both", "condition only", "block-local", "released quirks")),
    ],
)
def test_each_image_is_the_one_drawn_alone(name: str, launcher: str) -> None:
    """Five requests of several step counts through three slots: images at different blocks and steps share passes."""
    model = make_model(CASES[name])
    noise = draw_noise(CASES[name], batch=5)
    batcher = make_batcher(model, 3, LAUNCHERS[launcher](), max_steps=4)
    steps = (3, 1, 4, 2, 3)
    futures = [batcher.submit(noise[index], SamplingOptions(count)) for index, count in enumerate(steps)]
    batcher.run_until_idle()
    for index, (future, count) in enumerate(zip(futures, steps, strict=True)):
        assert relative_error(future.result(timeout=0), drawn_alone(model, noise[index], count)) < TOLERANCE


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("name", ["text", "ACDiT"])
def test_guided_requests(name: str, launcher: str) -> None:
    """Each with a prompt and a scale of its own."""
    config = CASES[name]
    model, noise = make_model(config), draw_noise(config, batch=4)
    prompts = draw_prompt(config, batch=4, guided=True)
    batcher = make_batcher(model, 3, LAUNCHERS[launcher](), max_steps=3, guided=True)
    scales = (1.0, 2.0, 5.0, 2.0)
    futures = [
        batcher.submit(noise[i], SamplingOptions(2 + i % 2, guidance=scale), one_of(prompts, i))
        for i, scale in enumerate(scales)
    ]
    batcher.run_until_idle()
    sampler = Sampler(model, DPMSolverMultistepScheduler(), pack_weights=False)
    for i, scale in enumerate(scales):
        alone = Prompt(*(None if ids is None else ids[None] for ids in vars(one_of(prompts, i)).values()))
        if scale == 1.0:
            alone = dataclasses.replace(alone, negative_text=None)
        drawn = sampler.plan(1, SamplingOptions(2 + i % 2, guidance=scale)).run(noise[i : i + 1], alone)
        assert relative_error(futures[i].result(timeout=0), drawn[0]) < TOLERANCE


def test_company_does_not_change_an_image() -> None:
    """Nor do the neighbours' numbers: the same image beside others, bit for bit where the batch has the same size."""
    model, noise = make_model(FLAT), draw_noise(FLAT, batch=3)
    images = []
    for neighbour in (1, 2):
        batcher = make_batcher(model, 2)
        future = batcher.submit(noise[0], SamplingOptions(3))
        batcher.submit(noise[neighbour], SamplingOptions(3))
        batcher.run_until_idle()
        images.append(future.result(timeout=0))
    assert torch.equal(*images)


def test_joining_between_steps() -> None:
    model, noise = make_model(FLAT), draw_noise(FLAT)
    batcher = make_batcher(model, 2)
    early = batcher.submit(noise[0], SamplingOptions(3))
    assert batcher.step() == 1
    late = batcher.submit(noise[1], SamplingOptions(3))
    assert batcher.step() == 2
    while not early.done():
        batcher.step()
    assert not late.done()
    batcher.run_until_idle()
    for future, index in ((early, 0), (late, 1)):
        assert relative_error(future.result(timeout=0), drawn_alone(model, noise[index], 3)) < TOLERANCE


def order_of(futures: dict[str, Future[Tensor]], batcher: InFlightBatcher) -> list[str]:
    order: list[str] = []
    for name, future in futures.items():
        future.add_done_callback(lambda _, name=name: order.append(name))
    batcher.run_until_idle()
    return order


def test_an_image_is_there_after_its_last_step() -> None:
    """Not after the next one of the others, for which whoever waits for it would wait too."""
    config = CASES["both"]
    batcher, noise = make_batcher(make_model(config), 2, max_steps=3), draw_noise(config, batch=2)
    short, long = (batcher.submit(noise[i], SamplingOptions(steps)) for i, steps in enumerate((1, 3)))
    for done in range(1, 3 * config.num_blocks + 1):
        batcher.step()
        assert short.done() is (done >= config.num_blocks)
        assert long.done() is (done == 3 * config.num_blocks)
    assert batcher.num_running == 0


def test_priorities_then_arrival() -> None:
    batcher = make_batcher(make_model(FLAT), 1)
    noise = draw_noise(FLAT, batch=1)[0]
    priorities = {"late": 1, "first": 0, "urgent": -1, "second": 0}
    futures = {name: batcher.submit(noise, SamplingOptions(1), priority=value) for name, value in priorities.items()}
    assert order_of(futures, batcher) == ["urgent", "first", "second", "late"]


def test_cancelling_frees_the_slot() -> None:
    """One that waits never starts; one that is being drawn leaves at the next step, and its slot is drawn in anew."""
    model, noise = make_model(FLAT), draw_noise(FLAT, batch=3)
    batcher = make_batcher(model, 1)
    running, waiting, kept = (batcher.submit(noise[index], SamplingOptions(3)) for index in range(3))
    for _ in range(4):
        batcher.step()
    assert running.cancel()
    assert waiting.cancel()
    batcher.step()
    assert batcher.num_running == 1
    batcher.run_until_idle()
    for future in (running, waiting):
        with pytest.raises(CancelledError):
            future.result(timeout=0)
    assert relative_error(kept.result(timeout=0), drawn_alone(model, noise[2], 3)) < TOLERANCE


def test_admission_limit() -> None:
    batcher = make_batcher(make_model(FLAT), 1, max_waiting=2)
    noise = draw_noise(FLAT, batch=1)[0]
    futures = [batcher.submit(noise, SamplingOptions(1)) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        batcher.submit(noise, SamplingOptions(1))
    futures[0].cancel()
    futures.append(batcher.submit(noise, SamplingOptions(1)))
    batcher.run_until_idle()
    assert [future.cancelled() for future in futures] == [True, False, False]


def test_a_fault_is_one_images_own() -> None:
    model, noise = make_model(FLAT), draw_noise(FLAT)
    noise[0, 2, 0, 0] = torch.nan
    batcher = make_batcher(model, 2)
    bad, good = (batcher.submit(noise[index], SamplingOptions(3)) for index in range(2))
    batcher.run_until_idle()
    with pytest.raises(NonFiniteError, match="the image is not finite from block 2, step 0 on"):
        bad.result(timeout=0)
    assert relative_error(good.result(timeout=0), drawn_alone(model, noise[1], 3)) < TOLERANCE


def test_new_weights_are_seen_once_nothing_runs() -> None:
    model, noise = make_model(FLAT), draw_noise(FLAT)[0]
    batcher = make_batcher(model, 1)
    for scale in (1.0, 0.5):
        with torch.no_grad():
            model.downsampler.time_embedding.linear_2.weight.mul_(scale)
        future = batcher.submit(noise, SamplingOptions(2))
        batcher.run_until_idle()
        assert relative_error(future.result(timeout=0), drawn_alone(model, noise, 2)) < TOLERANCE


def test_rows_are_copied_to_the_device_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every step: a step is a launch and nothing else."""
    batcher = make_batcher(make_model(FLAT), 2, RecordingLauncher(), max_steps=2).warmup()
    noise = draw_noise(FLAT, batch=2)
    futures = [batcher.submit(noise[0], SamplingOptions(2)), batcher.submit(noise[1], SamplingOptions(2))]
    make, copied = torch.tensor, []

    def tensor(data: object, **options: object) -> Tensor:
        copied.append(data)
        return make(data, **options)

    monkeypatch.setattr(torch, "tensor", tensor)
    for _ in range(2 * FLAT.num_blocks):
        batcher.step()
    assert [data for data in copied if data == [0, 1]] == [[0, 1]] * 3  # first block, denoise, next block
    monkeypatch.undo()
    futures[1].cancel()
    later = batcher.submit(noise[1], SamplingOptions(1))
    batcher.run_until_idle()
    assert relative_error(futures[0].result(timeout=0), drawn_alone(batcher.sampler.source, noise[0], 2)) < TOLERANCE
    assert relative_error(later.result(timeout=0), drawn_alone(batcher.sampler.source, noise[1], 1)) < TOLERANCE


def test_a_request_touches_no_device() -> None:
    """It may come from any thread, while a pass is being captured in another."""
    batcher = make_batcher(make_model(FLAT), 1)
    batcher.device = torch.device("cuda:7")  # none that could be touched here
    batcher.submit(draw_noise(FLAT, batch=1)[0], SamplingOptions(2))
    (job,) = batcher._waiting
    parts = (job.schedule.timesteps_T, job.schedule.guidance_T, job.schedule.coefficients_T6)
    assert {part.device.type for part in parts} == {"cpu"}


def test_captured_sizes() -> None:
    """A batch is filled up to the next captured size, never replayed at another."""
    launcher = RecordingLauncher()
    batcher = make_batcher(make_model(FLAT), 3, launcher, max_steps=1).warmup()
    sizes = [f"{name}, {size} slots" for size in (1, 2, 3) for name in ("first_block", "denoise", "next_block")]
    assert launcher.prepared == sizes
    batcher.submit(draw_noise(FLAT, batch=1)[0], SamplingOptions(1))
    batcher.step()
    with pytest.raises(RuntimeError, match=r"warmup\(\) while 1 images are being drawn"):
        batcher.warmup()


def test_bad_requests() -> None:
    model, noise = make_model(FLAT), draw_noise(FLAT, batch=1)[0]
    batcher = make_batcher(model, 1, max_steps=5)
    with pytest.raises(ValueError, match=r"noise must have the shape \(4, 16, 4\), got \(3, 16, 4\)"):
        batcher.submit(noise[:3], SamplingOptions(1))
    with pytest.raises(ValueError, match="num_inference_steps=6 must be at most max_steps=5"):
        batcher.submit(noise, SamplingOptions(6))
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        batcher.submit(noise, SamplingOptions(0))
    with pytest.raises(ValueError, match=r"guidance=2\.0 needs a batcher made with guided=True"):
        batcher.submit(noise, SamplingOptions(1, guidance=2.0))
    with pytest.raises(ValueError, match="text has no place in a model without text"):
        batcher.submit(noise, SamplingOptions(1), Prompt(torch.zeros(5, dtype=torch.int64)))
    assert batcher.num_waiting == 0
    with pytest.raises(ValueError, match="guidance needs a model with text"):
        make_batcher(model, 1, guided=True)
    with pytest.raises(ValueError, match="slots=0 must be at least 1"):
        make_batcher(model, 0)
    with pytest.raises(ValueError, match="in-flight batching needs a scheduler that can be tabulated, and this UniPC"):
        InFlightBatcher(Sampler(model, UniPCMultistepScheduler()), 1)


def test_packed_weights_and_ddim() -> None:
    """As a user has it: defaults, in whatever way this machine packs."""
    model, noise = make_model(FLAT), draw_noise(FLAT)
    sampler = Sampler(model, DDIMScheduler())
    batcher = InFlightBatcher(sampler, 2)
    futures = [batcher.submit(noise[index], SamplingOptions(3)) for index in range(2)]
    batcher.run_until_idle()
    expected = sampler.plan(2, SamplingOptions(3)).run(noise)
    for index, future in enumerate(futures):
        assert relative_error(future.result(timeout=0), expected[index]) < TOLERANCE


class Failure(Exception):
    pass


def fail_at(model: MADFormer, call: int) -> None:
    """Once, in so many calls of the first layer: before the first block, in a step or between two blocks."""
    calls = itertools.count(1)

    def fail(*_: object) -> None:
        if next(calls) == call:
            raise Failure

    model.layers[0].register_forward_hook(fail)


@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_what_a_step_raises_ends_the_images_it_was_drawing(call: int) -> None:
    """They are not gone on with from what it left half done, nor waited for in vain; the others are drawn."""
    config = FLAT.replace(num_blocks=2, block_grid=(1, 2))
    noise, model = draw_noise(config, batch=3), make_model(config)
    batcher = make_batcher(model, 2, max_steps=1)
    fail_at(model, call)
    futures = [batcher.submit(noise_MLC, SamplingOptions(1)) for noise_MLC in noise]
    with pytest.raises(Failure):
        batcher.run_until_idle()
    batcher.run_until_idle()
    failed = [isinstance(future.exception(timeout=0), Failure) for future in futures]
    assert failed == ([False, False, True] if call == 5 else [True, True, False])
    for index, future in enumerate(futures):
        if not failed[index]:
            assert relative_error(future.result(), drawn_alone(model, noise[index], 1)) < TOLERANCE


def test_a_model_of_another_dtype_ends_what_was_asked_for() -> None:
    model, noise = make_model(FLAT), draw_noise(FLAT, batch=1)[0]
    batcher = make_batcher(model, 1, max_steps=1)
    model.bfloat16()
    future = batcher.submit(noise, SamplingOptions(1))
    message = "the model is not what this batcher was made for: dtype=torch.bfloat16, not torch.float32"
    with pytest.raises(RuntimeError, match=message):
        batcher.step()
    with pytest.raises(RuntimeError, match=message):
        future.result(timeout=0)


def test_a_request_is_what_it_was_when_it_was_made() -> None:
    """Whatever is written to its memory while it waits."""
    config = CASES["text and classes"]
    model, noise = make_model(config), draw_noise(config, batch=2)
    batcher = make_batcher(model, 1, max_steps=1)
    prompt = one_of(draw_prompt(config, 1), 0)
    expected = batcher.submit(noise[0].clone(), SamplingOptions(1), prompt.clone())
    batcher.run_until_idle()
    future = batcher.submit(noise[0], SamplingOptions(1), prompt)
    noise[0] = noise[1]
    for ids in (prompt.text, prompt.label):
        assert ids is not None
        ids.zero_()
    batcher.run_until_idle()
    assert torch.equal(future.result(), expected.result())


@pytest.mark.parametrize(
    ("name", "blocks", "launcher"),
    [("both", [1, 2], "eager"), ("any order", [0, 3], "captured"), ("spiral", [4], "eager")],
)
def test_blocks_of_a_given_image_are_drawn_anew(name: str, blocks: list[int], launcher: str) -> None:
    """As a plan draws them, with the others as they were given; beside an image that is drawn whole."""
    config = CASES[name]
    model, noise, prompts = make_model(config), draw_noise(config), draw_prompt(config)
    given, order = draw_noise(config, seed=9)[0], order_around(blocks, config)
    batcher = make_batcher(model, 2, LAUNCHERS[launcher](), max_steps=3)
    whole = batcher.submit(noise[0], SamplingOptions(3), one_of(prompts, 0))
    changed = batcher.submit(
        noise[1], SamplingOptions(2), one_of(prompts, 1), given=given, blocks=blocks, order=order
    )  # fmt: skip
    again = batcher.submit(noise[0], SamplingOptions(3), one_of(prompts, 0))  # in the slot of one or the other
    batcher.run_until_idle()
    scheduler = DPMSolverMultistepScheduler()
    sampler = Sampler(model, scheduler, pack_weights=False)
    alone = [Prompt(*(None if ids is None else ids[i : i + 1] for ids in vars(prompts).values())) for i in range(2)]
    expected = sampler.plan(1, SamplingOptions(2)).run(
        noise[1:], alone[1], given=given[None], blocks=blocks, order=order
    )[0]
    assert relative_error(changed.result(timeout=0), expected) < TOLERANCE
    kept = [place for place in range(config.num_blocks) if place not in blocks]
    assert torch.equal(changed.result()[kept], given[kept])
    first = sampler.plan(1, SamplingOptions(3)).run(noise[:1], alone[0])[0]
    for future in (whole, again):
        assert relative_error(future.result(timeout=0), first) < TOLERANCE


def test_who_is_called_while_an_image_is_drawn() -> None:
    """After every step, and with every block as a plan reports it; what a callback raises ends its own image alone."""
    model, noise = make_model(FLAT), draw_noise(FLAT, batch=3)
    batcher = make_batcher(model, 3)
    steps: list[tuple[int, int]] = []
    blocks: dict[int, Tensor] = {}

    def on_block(finished: FinishedBlock) -> None:
        blocks[finished.place] = finished.latents_BLC

    def fail(place: int, step: int) -> None:
        if place == 1:
            raise Failure

    told = batcher.submit(noise[0], SamplingOptions(2), on_step=lambda *at: steps.append(at), on_block=on_block)
    failed = batcher.submit(noise[1], SamplingOptions(3), on_step=fail)
    other = batcher.submit(noise[2], SamplingOptions(3))
    batcher.run_until_idle()
    assert steps == [(place, step) for place in range(FLAT.num_blocks) for step in (1, 2)]
    reported: dict[int, Tensor] = {}
    plan = Sampler(model, batcher.sampler.scheduler, pack_weights=False).plan(1, SamplingOptions(2))
    plan.run(noise[:1], on_block=lambda place, latents_BLC: reported.update({place: latents_BLC[0]}))
    assert blocks.keys() == reported.keys() == set(range(FLAT.num_blocks))
    for place, latents_LC in blocks.items():
        assert relative_error(latents_LC, reported[place]) < TOLERANCE
        assert torch.equal(latents_LC, told.result()[place])
    with pytest.raises(Failure):
        failed.result(timeout=0)
    assert relative_error(other.result(timeout=0), drawn_alone(model, noise[2], 3)) < TOLERANCE


def test_a_request_may_have_a_scheduler_of_its_own() -> None:
    model, noise = make_model(FLAT), draw_noise(FLAT)
    batcher = make_batcher(model, 2)
    ddim = DDIMScheduler(prediction_type=FLAT.prediction_type, clip_sample=False)
    futures = [
        batcher.submit(noise[0], SamplingOptions(3), scheduler=ddim),
        batcher.submit(noise[1], SamplingOptions(3)),
    ]
    batcher.run_until_idle()
    expected = Sampler(model, ddim, pack_weights=False).plan(1, SamplingOptions(3)).run(noise[:1])[0]
    assert relative_error(futures[0].result(timeout=0), expected) < TOLERANCE
    assert relative_error(futures[1].result(timeout=0), drawn_alone(model, noise[1], 3)) < TOLERANCE
    with pytest.raises(ValueError, match=r"one that clips at 1\.0 has no place beside one at None"):
        batcher.submit(noise[0], SamplingOptions(3), scheduler=DDIMScheduler(clip_sample=True))
    with pytest.raises(ValueError, match="this UniPC"):
        batcher.submit(noise[0], SamplingOptions(3), scheduler=UniPCMultistepScheduler())


def test_what_cannot_be_changed() -> None:
    model, noise = make_model(FLAT), draw_noise(FLAT)
    batcher = make_batcher(model, 1, max_steps=2)
    with pytest.raises(ValueError, match=r"blocks=\[1\]: what the others hold must be given"):
        batcher.submit(noise[0], SamplingOptions(1), blocks=[1])
    with pytest.raises(ValueError, match=r"blocks=.4. must be some of 0 to 3"):
        batcher.submit(noise[0], SamplingOptions(1), given=noise[1], blocks=[4])
    with pytest.raises(ValueError, match=r"given must have the shape \(4, 16, 4\)"):
        batcher.submit(noise[0], SamplingOptions(1), given=noise, blocks=[1])
    with pytest.raises(ValueError, match=r"order=.* is none for this model"):
        batcher.submit(noise[0], SamplingOptions(1), order=[3, 2, 1, 0])
    with pytest.raises(ValueError, match="on_step must be callable"):
        batcher.submit(noise[0], SamplingOptions(1), on_step=1)  # type: ignore[arg-type]
    noise[1, 2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="given is not finite: image 0, block 2"):
        batcher.submit(noise[0], SamplingOptions(1), given=noise[1], blocks=[1])
    assert batcher.num_waiting == 0


def test_images_are_shared_out_among_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as PyTorch has; each image is the one drawn alone. A model with a hook is drawn by one thread."""
    model, noise = make_model(FLAT), draw_noise(FLAT, batch=3)
    batcher = make_batcher(model, 3)
    threads: set[int] = set()
    denoise = batcher.passes.denoise

    def noted(rows_B: Tensor | None) -> None:
        threads.add(threading.get_ident())
        denoise(rows_B)

    monkeypatch.setattr(batcher.passes, "denoise", noted)
    torch.set_num_threads(2)
    try:
        # an image that is alone has one of the threads where its steps are short, else all, as its caller has them
        for hooked, short, expected in ((False, True, 2), (False, False, 3), (True, True, 1)):
            monkeypatch.setattr(sharing, "SHORT", math.inf if short else 0)
            threads.clear()
            if hooked:
                model.layers[0].register_forward_hook(lambda *_: None)
            with batcher.at_work():
                futures = [batcher.submit(one, SamplingOptions(2 + index)) for index, one in enumerate(noise)]
                batcher.run_until_idle()
            for index, future in enumerate(futures):
                assert relative_error(future.result(timeout=0), drawn_alone(model, noise[index], 2 + index)) < TOLERANCE
            assert len(threads) == expected
            assert (threading.get_ident() in threads) == (expected != 2)
    finally:
        torch.set_num_threads(1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("madformer-share")]


def test_who_trusts_that_nothing_changed_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    model, noise = make_model(FLAT), draw_noise(FLAT)
    batcher = make_batcher(model, 1).warmup()
    expected = [drawn_alone(model, one, 2) for one in noise]
    looks: list[int] = []
    monkeypatch.setattr(batcher, "_follow", lambda: looks.append(1))
    futures = [batcher.submit(one, SamplingOptions(2)) for one in noise]
    while batcher.step(unchanged=True):
        pass
    assert not looks
    for future, own in zip(futures, expected, strict=True):
        assert relative_error(future.result(timeout=0), own) < TOLERANCE
