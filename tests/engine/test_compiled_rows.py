"""Images in flight by compiled steps: each is the one that is drawn alone, whoever shares its steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from madformer.config import MADFormerConfig
from madformer.engine import compiled
from madformer.engine.batching import InFlightBatcher
from madformer.engine.compiled_rows import CompiledRows, sizes_to
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.engine.ways import Way, Ways
from madformer.model import MADFormer
from tests.helpers.engine_cases import CASES, draw_noise, draw_prompt, make_model, one_of
from tests.helpers.interpreted import Interpreted, interpret
from tests.helpers.testing import relative_error

SLOTS = 3
RICH = CASES["text and classes"].replace(num_blocks=2, block_grid=(1, 2))
PLAIN = CASES["both"].replace(num_blocks=2, block_grid=(1, 2))
STEPS = (3, 1, 4, 2, 3)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Interpreted]:
    return interpret(monkeypatch, tmp_path)


def batcher_of(model: MADFormer, *, compiles: bool = True, slots: int = SLOTS, **options: Any) -> InFlightBatcher:
    sampler = Sampler(model, DDIMScheduler(), compile_step=compiles)
    return InFlightBatcher(sampler, slots, max_steps=max(STEPS), **options)


def draw(
    batcher: InFlightBatcher, seed: int = 0, *, guided: bool = False, between: Callable[[int], object] | None = None
) -> list[Tensor]:
    """An image for each of STEPS; ``between`` is called after each step, with its number."""
    config = batcher.config
    noise = draw_noise(config, len(STEPS), seed)
    prompts = draw_prompt(config, len(STEPS), guided=guided)
    futures = []
    for index, count in enumerate(STEPS):
        options = SamplingOptions(count, guidance=1.0 + index) if guided else SamplingOptions(count)
        futures.append(batcher.submit(noise[index], options, one_of(prompts, index)))
    number = 0
    while batcher.step():
        if between is not None:
            between(number)
        number += 1
    return [future.result(timeout=0) for future in futures]


def same(expected: list[Tensor], drawn: list[Tensor], limit: float = 1e-4) -> bool:
    return all(relative_error(one, other) < limit for one, other in zip(expected, drawn, strict=True))


def test_sizes() -> None:
    assert [sizes_to(largest) for largest in (1, 2, 3, 4, 6, 8)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "guided"),
    [
        (RICH, True),
        (PLAIN, False),
        (CASES["AdaLN and U-Net"].replace(num_blocks=1), False),
        (CASES["text, block-local"].replace(num_blocks=2, block_grid=(1, 2)), True),
    ],
    ids=["both", "plain", "one block", "block-local"],
)
def test_images(config: MADFormerConfig, guided: bool, interpreted: type[Interpreted]) -> None:
    """Rows at different blocks and steps, of batches that are filled up; what others left in a slot is not seen."""
    model = make_model(config)
    plain, batcher = (batcher_of(model, compiles=compiles, slots=5, guided=guided) for compiles in (False, True))
    batcher.warmup()
    for seed in (1, 2):
        with torch.inference_mode():
            for cached in (*batcher.cache.keys_RHSD, *batcher.cache.values_RHSD):
                cached.fill_(torch.nan)
        expected, interpreted.calls = draw(plain, seed, guided=guided), 0
        interpreted.sizes.clear()
        assert same(expected, draw(batcher, seed, guided=guided))
        # one call a step, whatever the batch is
        assert interpreted.calls == max(STEPS) * config.num_blocks
        assert set(interpreted.sizes) == {1, 4, 5}


def test_shared_out_among_threads(interpreted: type[Interpreted]) -> None:
    model = make_model(RICH)
    expected = draw(batcher_of(model, compiles=False, guided=True), guided=True)
    threads, batcher = torch.get_num_threads(), batcher_of(model, guided=True)
    torch.set_num_threads(2)
    try:
        with batcher.at_work():
            batcher.warmup()
            interpreted.calls = 0
            assert same(expected, draw(batcher, guided=True))
        assert interpreted.calls > 0
        # without the threads: a batch of up to all slots, which no program was made for
        interpreted.calls = 0
        assert same(expected, draw(batcher, guided=True))
        assert interpreted.calls == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("way", list(Way), ids=lambda way: way.name)
def test_a_lone_image_by_as_many_threads_as_its_way_has(
    way: Way, monkeypatch: pytest.MonkeyPatch, interpreted: type[Interpreted]
) -> None:
    """It has programs for one thread and for all, which follow the model as the others do."""
    model = make_model(RICH)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, batcher = (batcher_of(model, compiles=compiles, guided=True) for compiles in (False, True))
    layer: Any = model.layers[-1]
    tower = layer.tower("noise")

    def change(number: int) -> None:
        # in the last image's steps, when it is the only one
        if number == 3:
            tower.proj.weight.data.mul_(3)

    def one_image(each: InFlightBatcher, between: Callable[[int], object]) -> Tensor:
        prompt = one_of(draw_prompt(RICH, 1, guided=True), 0)
        future = each.submit(draw_noise(RICH, 1)[0], SamplingOptions(3, guidance=2.0), prompt)
        number = 0
        while each.step():
            between(number)
            number += 1
        model.load_state_dict(kept)
        return future.result(timeout=0)

    expected = [one_image(plain, between) for between in (lambda _: None, change)]
    assert relative_error(*expected) > 1e-3
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with monkeypatch.context() as patch, batcher.at_work():
            patch.setattr(Ways, "of", lambda *_: way)
            batcher.warmup()
            passes: Any = batcher.passes
            assert {key: len(each) for key, each in passes._batches.items()} == {(1, 1): 2, (1, 2): 2, (2, 1): 1}
            used = 2 if way is Way.ALL else 1
            with patch.context() as patch_of_others:
                for key, each in passes._batches.items():
                    for batch in each if key != (used, 1) else ():
                        patch_of_others.setattr(batch, "predict", None)  # whoever calls it fails
                for between, image in zip((lambda _: None, change), expected, strict=True):
                    interpreted.calls = 0
                    assert relative_error(one_image(batcher, between), image) < 1e-4
                    assert interpreted.calls == 3 * RICH.num_blocks
            # all or none: where only the program of all threads is missing, the others are not used, either
            tower.input_norm.eps = 0.5
            image, interpreted.calls = one_image(plain, lambda _: None), 0
            with torch.inference_mode():
                for batch in (*passes._batches[1, 1], *passes._batches[1, 2]):
                    batch.look_at(model, compiled.seen(model), 1, try_out=True)
            assert relative_error(one_image(batcher, lambda _: None), image) < 1e-4
            assert interpreted.calls == 0
    finally:
        torch.set_num_threads(threads)


def test_follows_the_model(interpreted: type[Interpreted]) -> None:
    """Whatever becomes of it between two steps; and what cannot be seen is called."""
    model = make_model(PLAIN)
    plain, batcher = (batcher_of(model, compiles=compiles) for compiles in (False, True))
    batcher.warmup()
    layer: Any = model.layers[-1]
    tower = layer.tower("noise")
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def check(change: Callable[[], object] = lambda: None, *, programmed: bool | None = True) -> list[Tensor]:
        """With a change after the second step."""
        drawn = []
        for each in (plain, batcher):
            interpreted.calls = 0
            drawn.append(draw(each, between=lambda number: change() if number == 1 else None))
            if programmed is None or programmed:
                model.load_state_dict(kept)
        assert same(*drawn)
        if programmed is not None:
            assert (interpreted.calls > 0) == programmed
        return drawn[0]

    before = check()
    assert relative_error(before[0], check(lambda: tower.qkv.weight.detach().numpy().__imul__(2))[0]) > 1e-3
    check(lambda: setattr(tower.proj, "weight", nn.Parameter(tower.proj.weight.detach() * 3)))
    check(lambda: model.downsampler.conv_in.weight.data.mul_(1.5))  # type: ignore[union-attr, operator]
    check(lambda: model.load_state_dict({name: 1.05 * tensor for name, tensor in kept.items()}, assign=True))
    hooks: list[Any] = []

    def hook() -> None:
        hooks.append(tower.proj.register_forward_hook(lambda _, __, output: 2 * output))

    hook()
    check(programmed=False)
    hooks.pop().remove()
    check()
    tower.input_norm.eps = 0.5
    check(programmed=False)  # a step makes no program
    batcher.warmup()
    check()


def test_one_size_without_a_program(interpreted: type[Interpreted], caplog: pytest.LogCaptureFixture) -> None:
    """None is used then, however the others were left: a program of an older model would draw that one's pictures."""
    model = make_model(PLAIN)
    batcher = batcher_of(model).warmup()
    passes: Any = batcher.passes
    assert isinstance(passes, CompiledRows)
    draw(batcher)
    layer: Any = model.layers[-1]
    layer.tower("noise").input_norm.eps = 0.5
    expected = draw(batcher_of(model, compiles=False))
    # of the batch size that is looked at last there is one by now
    (last,) = passes._batches[torch.get_num_threads(), SLOTS]
    with torch.inference_mode():
        last.look_at(model, compiled.seen(model), torch.get_num_threads(), try_out=True)
    assert last.program is not None
    interpreted.calls = 0
    with caplog.at_level(logging.WARNING):
        assert same(expected, draw(batcher))
    assert interpreted.calls == 0


def test_what_is_not_compiled(interpreted: type[Interpreted]) -> None:
    """Passes of one's own, and launchers that capture, are as they were asked for."""
    model = make_model(PLAIN)
    assert not isinstance(batcher_of(model, compiles=False).passes, CompiledRows)

    class Own(compiled.CompiledPasses):
        pass

    sampler = Sampler(model, DDIMScheduler(), compile_step=True, passes=Own)
    assert type(InFlightBatcher(sampler, 2).passes) is Own


def test_why_not_is_told_once(interpreted: type[Interpreted], caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(CASES["noisy blocks only"])
    batcher = batcher_of(model)
    with caplog.at_level(logging.WARNING):
        batcher.warmup()
        drawn = draw(batcher)
    assert same(draw(batcher_of(model, compiles=False)), drawn)
    assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) == 1
    assert "reads the keys and values of its own last step" in caplog.text
    assert interpreted.calls == 0


@pytest.mark.slow
def test_compiled_by_inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The programs are those of plans of so many images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = make_model(RICH)
    expected = draw(batcher_of(model, compiles=False, guided=True), guided=True)
    batcher = batcher_of(model, slots=2, guided=True).warmup()
    passes: Any = batcher.passes
    for size in (1, 2):
        (batch,) = passes._batches[torch.get_num_threads(), size]
        assert isinstance(batch.program, compiled.Program)
        plan = Sampler(model, DDIMScheduler(), compile_step=True, shares=1).plan(size, SamplingOptions(2, guidance=2.0))
        plan.run(draw_noise(RICH, size), draw_prompt(RICH, size, guided=True))
        assert isinstance(plan.passes, compiled.CompiledPasses)
        assert plan.passes._key == batch._key
    assert same(expected, draw(batcher, guided=True))
