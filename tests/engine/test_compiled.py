"""A denoising step that is one compiled program draws the pictures of one that Python calls, whatever is changed."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from madformer.cli.main import main
from madformer.config import MADFormerConfig
from madformer.engine import compiled
from madformer.engine.compiled import CompiledPasses
from madformer.engine.options import SamplingOptions
from madformer.engine.packing import can_pack
from madformer.engine.plan import Plan
from madformer.engine.running import NonFiniteError
from madformer.engine.sampler import Sampler
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from tests.helpers.engine_cases import CASES, draw_noise, draw_prompt, make_model
from tests.helpers.interpreted import Interpreted, interpret
from tests.helpers.testing import relative_error

BATCH, STEPS = 2, 2
RICH = CASES["text and classes"].replace(num_blocks=2, block_grid=(1, 2))
PLAIN = CASES["both"].replace(num_blocks=2, block_grid=(1, 2))
OPTIONS, GUIDED = SamplingOptions(STEPS), SamplingOptions(STEPS, guidance=2.0)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Interpreted]:
    return interpret(monkeypatch, tmp_path)


def plan_of(model: MADFormer, options: SamplingOptions = OPTIONS, *, compiles: bool = True, **how: Any) -> Plan:
    scheduler = how.pop("scheduler", DDIMScheduler)
    plan = Sampler(model, scheduler(), compile_step=compiles, **how).plan(BATCH, options)
    return plan.warmup() if compiles else plan


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (RICH, SamplingOptions(STEPS, guidance=3.0, guidance_interval=(100, 900))),
        (CASES["AdaLN and U-Net"].replace(num_blocks=1), GUIDED),
        pytest.param(CASES["spiral"].replace(num_blocks=2, block_grid=(1, 2)), OPTIONS, marks=pytest.mark.slow),
        (CASES["text, block-local"].replace(num_blocks=2, block_grid=(1, 2)), GUIDED),
        pytest.param(
            CASES["block-local, condition only"].replace(num_blocks=2, block_grid=(1, 2)),
            OPTIONS,
            marks=pytest.mark.slow,
        ),
        (CASES["ACDiT"], GUIDED),
        pytest.param(
            CASES["text, clean only"].replace(num_blocks=2, block_grid=(1, 2)), OPTIONS, marks=pytest.mark.slow
        ),
    ],
    ids=["both", "two levels", "spiral", "block-local", "block-local condition", "ACDiT", "clean only"],
)
def test_pictures(config: MADFormerConfig, options: SamplingOptions, interpreted: type[Interpreted]) -> None:
    """As without; the program runs at every step of every block, and what a run leaves in the cache is not seen."""
    model, prompt = make_model(config), draw_prompt(config, BATCH, guided=options.guided)
    plan = plan_of(model, options)
    for seed in (1, 2):
        noise, interpreted.calls = draw_noise(config, BATCH, seed), 0
        expected = plan_of(model, options, compiles=False).run(noise, prompt)
        assert relative_error(expected, plan.run(noise, prompt)) < 1e-5
        assert interpreted.calls == STEPS * config.num_blocks


def test_what_a_program_is_given(interpreted: type[Interpreted]) -> None:
    """Packed weights, where Python's step has them; of the cache as much as the longest row has."""
    model, prompt = make_model(RICH), draw_prompt(RICH, BATCH, guided=True)
    for packs in (True, False):
        plan = plan_of(model, GUIDED, pack_weights=packs, shares=1)
        interpreted.lengths.clear()
        plan.run(draw_noise(RICH, BATCH), prompt)
        assert (interpreted.packed > 0) == (packs and can_pack(model))
        first = RICH.text_length
        assert interpreted.lengths == [first] * STEPS + [first + RICH.block_size] * STEPS


def test_in_shares_and_by_other_schedulers(interpreted: type[Interpreted]) -> None:
    model, noise, prompt = make_model(RICH), draw_noise(RICH, BATCH), draw_prompt(RICH, BATCH, guided=True)
    expected = plan_of(model, GUIDED, compiles=False, scheduler=HeunDiscreteScheduler).run(noise, prompt)
    for shares in (1, 2):
        interpreted.calls = 0
        plan = plan_of(model, GUIDED, scheduler=HeunDiscreteScheduler, shares=shares)
        assert relative_error(expected, plan.run(noise, prompt)) < 1e-5
        assert interpreted.calls == shares * (1 + len(plan.timesteps) * RICH.num_blocks)


def test_follows_the_model(interpreted: type[Interpreted]) -> None:
    """Whatever becomes of it between two runs or in one; and what cannot be seen is called."""
    model, noise = make_model(PLAIN), draw_noise(PLAIN, BATCH)
    plan = plan_of(model)
    layer: Any = model.layers[-1]
    tower = layer.tower("noise")

    def check(*, programmed: bool) -> Tensor:
        interpreted.calls = 0
        drawn = plan.run(noise)
        assert relative_error(plan_of(model, compiles=False).run(noise), drawn) < 1e-5
        assert interpreted.calls == (STEPS * PLAIN.num_blocks if programmed else 0)
        return drawn

    before = check(programmed=True)
    tower.qkv.weight.detach().numpy()[...] *= 2
    assert relative_error(before, check(programmed=True)) > 1e-3
    tower.proj.weight = nn.Parameter(tower.proj.weight.detach() * 3)
    check(programmed=True)
    convolution: Any = model.downsampler.conv_in
    convolution.weight.detach().numpy()[...] *= 1.5
    check(programmed=True)
    # the old one's memory, which then gets other data
    old = tower.proj.weight
    tower.proj.weight = nn.Parameter(old.data)
    old.data = torch.zeros_like(old)
    check(programmed=True)
    model.load_state_dict({name: 1.05 * tensor for name, tensor in model.state_dict().items()}, assign=True)
    check(programmed=True)
    hook = tower.proj.register_forward_hook(lambda _, __, output: 2 * output)
    check(programmed=False)
    hook.remove()
    check(programmed=True)
    tower.input_norm.eps = 0.5
    check(programmed=False)  # a run makes no program
    plan.warmup()
    check(programmed=True)

    def change(_: object) -> None:
        tower.proj.weight = nn.Parameter(tower.proj.weight.detach() * 0.9)

    kept, drawn = tower.proj.weight, []
    for other in (plan, plan_of(model, compiles=False)):
        tower.proj.weight = kept
        drawn.append(other.run(noise, callback=change))
    assert relative_error(*drawn) < 1e-5
    # each its own: a pool gives a plan to samplers that compile and to those that do not
    plan.settle(Sampler(model, DDIMScheduler()), plan.schedule, OPTIONS)
    check(programmed=False)
    assert not isinstance(plan.passes, CompiledPasses)


def test_tied_weights(interpreted: type[Interpreted]) -> None:
    """Before and after they are; those of one layer are another one's too."""
    model, noise = make_model(PLAIN), draw_noise(PLAIN, BATCH)
    towers = [layer.tower("noise") for layer in model.layers[-2:]]  # type: ignore[operator]
    for tied in (False, True):
        if tied:
            towers[0].proj.weight = towers[1].proj.weight
        plan = plan_of(model)
        interpreted.calls = 0
        assert relative_error(plan_of(model, compiles=False).run(noise), plan.run(noise)) < 1e-5
        assert interpreted.calls > 0


def test_nothing_is_kept_without_a_program(interpreted: type[Interpreted]) -> None:
    model = make_model(PLAIN)
    plan = Sampler(model, DDIMScheduler(), compile_step=True).plan(BATCH, OPTIONS)
    plan.run(draw_noise(PLAIN, BATCH))
    assert isinstance(plan.passes, CompiledPasses)
    assert not plan.passes._weights
    plan.warmup()
    assert plan.passes._weights
    plan.rest()
    assert not plan.passes._weights


def test_a_fault_is_not_remembered(interpreted: type[Interpreted]) -> None:
    """Numbers that are not finite, left in the cache by a run that failed, reach no other picture."""
    model, noise = make_model(PLAIN), draw_noise(PLAIN, BATCH)
    plan = plan_of(model)
    expected = plan.run(noise)
    weight: Any = model.layers[-1].tower("clean").qkv.weight  # type: ignore[operator]
    kept = weight.detach().clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError):
        plan.run(noise)
    weight.data.copy_(kept)
    assert torch.equal(plan.run(noise), expected)


def test_what_is_not_compiled(
    interpreted: type[Interpreted], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is drawn as without, and one line says why."""
    monkeypatch.setattr(compiled, "_compile", lambda *_: "InvalidCxxCompiler: No working C++ compiler found")
    model, noise = make_model(PLAIN), draw_noise(PLAIN, BATCH)
    expected = plan_of(model, compiles=False).run(noise)
    with caplog.at_level(logging.WARNING, "madformer.engine"):
        plan = plan_of(model)
        assert torch.equal(plan.run(noise), expected)
        assert torch.equal(plan.run(noise), expected)
        plan_of(make_model(PLAIN.replace(context="condition")))
        plan_of(model, SamplingOptions(STEPS, refresh_every=2))
        plan_of(make_model(PLAIN).set_backend("reference", attention="sdpa"))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    reasons = ("No working C++ compiler", "context='condition' reads", "refresh_every keeps", "backend='sdpa'")
    assert all(reason in line for reason, line in zip(reasons, lines, strict=True))
    assert interpreted.calls == 0


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the same model elsewhere in memory, another for whatever a program is made of."""
    model = make_model(PLAIN)
    inputs = [torch.zeros(2, 3), torch.zeros(4)]

    def key(model: MADFormer, *, threads: int = 1, dtype: torch.dtype = torch.float32) -> str:
        return compiled.key_of(compiled.seen(model), inputs, 1, dtype, threads)

    first = key(model)
    assert key(make_model(PLAIN)) == first
    others = {first, key(model, threads=2), key(model, dtype=torch.bfloat16), key(make_model(RICH))}
    inputs[0] = torch.zeros(3, 2).T
    others.add(key(model))
    inputs[0] = torch.zeros(2, 3)
    model.layers[0].tower("noise").input_norm.eps *= 2  # type: ignore[operator]
    others.add(key(model))
    monkeypatch.setattr(compiled, "_surroundings", lambda: ("another machine",))
    others.add(key(model))
    assert len(others) == 7


def test_another_thread_changes_weights(interpreted: type[Interpreted], monkeypatch: pytest.MonkeyPatch) -> None:
    """While a run draws: of that one nothing is promised but an end; the next computes with what they are by then."""
    model, noise = make_model(PLAIN), draw_noise(PLAIN, BATCH)
    plan = plan_of(model, shares=1)
    before = plan.run(noise)
    layer: Any = model.layers[-1]
    call, calls = interpreted.__call__, []

    def change() -> None:
        with torch.no_grad():
            layer.tower("noise").qkv.weight.mul_(2)
        layer.tower("noise").proj.weight = nn.Parameter(layer.tower("noise").proj.weight.detach() * 3)

    def meanwhile(self: Interpreted, *inputs: Any) -> Tensor:
        calls.append(len(calls))
        if len(calls) == 2:
            thread = threading.Thread(target=change)
            thread.start()
            thread.join()
        return call(self, *inputs)

    monkeypatch.setattr(interpreted, "__call__", meanwhile)
    assert plan.run(noise).isfinite().all()
    after = plan.run(noise)
    assert len(calls) == 2 * STEPS * PLAIN.num_blocks
    assert relative_error(plan_of(model, compiles=False).run(noise), after) < 1e-5
    assert relative_error(before, after) > 1e-3


def test_a_pipeline(interpreted: type[Interpreted]) -> None:
    """Calls take the programs that were made when it was warmed up, those of other sizes none."""
    pipeline = MADFormerPipeline(make_model(PLAIN), None, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def draw(count: int) -> Tensor:
        interpreted.calls = 0
        return pipeline(num_images=count, num_inference_steps=STEPS, seed=0, output_type="latent").images

    expected = draw(2)
    pipeline.warmup(2, OPTIONS, compile_step=True)
    for count, calls in ((2, STEPS * PLAIN.num_blocks), (1, 0)):
        assert relative_error(expected[:count], draw(count)) < 1e-5
        assert interpreted.calls == calls
    with pytest.raises(ValueError, match="batch=0"):
        pipeline.warmup(0)
    with pytest.raises(ValueError, match="compile_step=1 must be True or False"):
        pipeline.warmup(1, compile_step=1)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command_line(interpreted: type[Interpreted], tmp_path: Path) -> None:
    drawn = []
    for name, options in (("plain", []), ("compiled", ["--compile"])):
        interpreted.calls, folder = 0, tmp_path / name
        words = "--model assets/emoji64 --prompt heart --guidance 2 --steps 2 --latents --device cpu --precision exact"
        main(["sample", *words.split(), "--out", str(folder), *options])
        drawn.append(load_file(folder / "00000000.safetensors")["latents"])
        assert (interpreted.calls > 0) == (name == "compiled")
    assert relative_error(*drawn) < 1e-4


@pytest.mark.slow
def test_compiled_by_inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pictures, in shares too; of weights as they lie; a kept program is loaded and not made again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, prompt = make_model(RICH), draw_prompt(RICH, BATCH, guided=True)
    noise, tower = draw_noise(RICH, BATCH), model.layers[-1].tower("noise")  # type: ignore[operator]
    plan = plan_of(model, GUIDED)
    assert isinstance(plan.passes, CompiledPasses)
    assert isinstance(plan.passes.program, compiled.Program)

    def never(*_: object) -> str:
        raise AssertionError("a program was made again")

    monkeypatch.setattr(compiled, "_compile", never)
    for change in ("none", "values", "a parameter"):
        if change == "values":
            tower.qkv.weight.data.mul_(1.5)
        elif change == "a parameter":
            tower.proj.weight = nn.Parameter(tower.proj.weight.detach() * 0.7)
        expected = plan_of(model, GUIDED, compiles=False).run(noise, prompt)
        for drawing in (plan, Sampler(model, DDIMScheduler(), compile_step=True).plan(BATCH, GUIDED)):
            assert relative_error(expected, drawing.run(noise, prompt)) < 1e-5
            assert isinstance(drawing.passes, CompiledPasses)
            assert drawing.passes.program is not None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # a part of a larger tensor: its strides are in the program
    wide = torch.cat([tower.proj.weight.detach(), torch.ones_like(tower.proj.weight)], dim=1)
    tower.proj.weight = nn.Parameter(wide[:, : wide.shape[1] // 2])
    convolution: Any = model.downsampler.conv_in
    convolution.weight = nn.Parameter(convolution.weight.detach().repeat(1, 2, 1, 1)[:, : convolution.in_channels])
    expected = plan_of(model, GUIDED, compiles=False).run(noise, prompt)
    drawing = plan_of(model, GUIDED)
    assert isinstance(drawing.passes, CompiledPasses)
    assert isinstance(drawing.passes.program, compiled.Program)
    assert relative_error(expected, drawing.run(noise, prompt)) < 1e-5
    path = Path(compiled.folder(), f"{drawing.passes._key}.pt2")
    path.write_bytes(path.read_bytes()[:1000])
    broken = Sampler(model, DDIMScheduler(), compile_step=True).plan(BATCH, GUIDED)
    assert relative_error(expected, broken.run(noise, prompt)) < 1e-5


@pytest.mark.slow
def test_compiled_in_bf16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As far from fp32 as what Python calls in bf16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, noise = make_model(PLAIN), draw_noise(PLAIN, BATCH)
    exact = plan_of(model, compiles=False).run(noise)
    model.to(torch.bfloat16)
    called = relative_error(exact, plan_of(model, compiles=False).run(noise))
    plan = plan_of(model, shares=1)
    assert isinstance(plan.passes, CompiledPasses)
    assert isinstance(plan.passes.program, compiled.Program)
    assert 0 < relative_error(exact, plan.run(noise)) < 2 * called
