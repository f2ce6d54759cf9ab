"""However a model is changed, between two runs or in what a run calls, the next pass computes with what it is."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import accelerate
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.utils import parametrize

from madformer.config import tiny
from madformer.engine import packing
from madformer.engine.batching import InFlightBatcher
from madformer.engine.options import SamplingOptions
from madformer.engine.packing import PackedWeights, packed
from madformer.engine.plan import Plan
from madformer.engine.progress import Progress
from madformer.engine.sampler import Sampler
from madformer.engine.structure import UnknownPartError, signature
from madformer.model import MADFormer
from madformer.model.layer import Tower
from tests.helpers.engine_cases import CASES, draw_noise, draw_prompt, make_model
from tests.helpers.recording import RecordingLauncher
from tests.helpers.testing import relative_error

STEPS = 2


@pytest.fixture(autouse=True)
def _packs_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LEAST_WEIGHTS", 0)


Change = Callable[[MADFormer], object]


def tower(model: MADFormer, layer: int = -1) -> Tower:
    """Of the noise, in a diffusion layer."""
    return cast(Any, model.layers[layer]).tower("noise")


class Scaled(nn.Module):
    """An adapter, whose strength is an attribute."""

    def __init__(self, linear: nn.Module, strength: float) -> None:
        super().__init__()
        self.linear, self.strength = linear, strength

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.strength


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _through_numpy(model: MADFormer) -> None:
    tower(model).proj.weight.detach().numpy()[...] *= 3


def _signs(model: MADFormer) -> None:
    """A digest that sums the bits would not see it."""
    tower(model).proj.weight.data.neg_()


def _reordered(model: MADFormer) -> None:
    weight = tower(model).proj.weight
    weight.data.copy_(weight.data.flip(0))


def _new_parameter(model: MADFormer) -> None:
    linear = tower(model).proj
    linear.weight = nn.Parameter(linear.weight.detach() * 3)


def _assigned(model: MADFormer) -> None:
    model.load_state_dict({name: tensor * 1.05 for name, tensor in model.state_dict().items()}, assign=True)


def _new_layer(model: MADFormer) -> None:
    mlp = cast(Any, tower(model).mlp)
    mlp.down_proj = nn.Linear(mlp.down_proj.in_features, mlp.down_proj.out_features)
    nn.init.constant_(mlp.down_proj.weight, 0.03)


def _own_forward(model: MADFormer) -> None:
    linear = tower(model).proj
    forward = linear.forward
    linear.forward = lambda x: 3 * forward(x)  # type: ignore[method-assign]


def _adapter(model: MADFormer) -> None:
    tower(model).proj = Scaled(tower(model).proj, 3.0)  # type: ignore[assignment]


def _parametrized(model: MADFormer) -> None:
    parametrize.register_parametrization(tower(model).proj, "weight", Doubled())


class Tripled(Tensor):
    """Of a library that computes in a way of its own."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        return 3 * result if function is nn.functional.linear else result


def _in_place_of_a_parameter(model: MADFormer) -> None:
    linear = tower(model).proj
    weight = linear._parameters.pop("weight")
    assert weight is not None
    linear.__dict__["weight"] = weight.detach().as_subclass(Tripled)


def _pixel_attention(model: MADFormer) -> Any:
    return cast(Any, model.upsampler).up_blocks[0].attentions[0]


def _residual_block(model: MADFormer) -> Any:
    return cast(Any, model.upsampler).up_blocks[0].resnets[1]


class Louder(AttnProcessor2_0):
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 3 * super().__call__(*args, **kwargs)


def _activation(model: MADFormer) -> None:
    cast(Any, model.upsampler).up_blocks[0].resnets[0].nonlinearity = nn.Tanh()


CHANGES: dict[str, Change] = {
    "data": lambda model: tower(model).proj.weight.data.mul_(3),
    "NumPy": _through_numpy,
    "signs": _signs,
    "order": _reordered,
    "convolution": lambda model: cast(Any, model.upsampler).conv_in.weight.data.mul_(2),
    "bias": lambda model: tower(model).proj.bias.data.add_(0.5),
    "norm": lambda model: tower(model).input_norm.weight.data.mul_(3),
    "time embedding": lambda model: cast(Any, model.downsampler).time_embedding.linear_2.weight.data.mul_(3000),
    "time projection": lambda model: _residual_block(model).time_emb_proj.weight.data.mul_(300),
    "hook on a time projection": lambda model: _residual_block(model).time_emb_proj.register_forward_hook(
        lambda module, args, output: 300 * output
    ),
    "hook on a residual block": lambda model: _residual_block(model).register_forward_pre_hook(
        lambda module, args: (args[0], 300 * args[1])
    ),
    "activation of a time projection": lambda model: setattr(_residual_block(model), "nonlinearity", nn.ReLU()),
    "pixel attention": lambda model: _pixel_attention(model).to_v.weight.data.mul_(30),
    "hook in pixel attention": lambda model: _pixel_attention(model).group_norm.register_forward_hook(
        lambda module, args, output: 30 * output
    ),
    "attention processor": lambda model: _pixel_attention(model).set_processor(Louder()),
    "class embedding": lambda model: model.conditioner.classes.weight.data.mul_(30),
    "buffer": lambda model: model.rope.cos.mul_(-1),
    "parameter": _new_parameter,
    "load_state_dict(assign=True)": _assigned,
    "module": _new_layer,
    "forward": _own_forward,
    "hook": lambda model: tower(model).proj.register_forward_hook(lambda module, args, output: 3 * output),
    "hook above": lambda model: model.downsampler.register_forward_hook(lambda _, args, out: (2 * out[0], out[1])),
    "adapter": _adapter,
    "parametrization": _parametrized,
    "attribute": lambda model: setattr(tower(model).input_norm, "eps", 300.0),
    "head norm": lambda model: [
        setattr(layer.tower("noise").q_norm, "eps", 300.0) for layer in cast(Any, model.layers)
    ],
    "in place of a parameter": _in_place_of_a_parameter,
    "activation": _activation,
    "cast and back": lambda model: model.to(torch.bfloat16).float(),
}

CONFIG = CASES["text and classes"].replace(num_blocks=2, block_grid=(1, 2))


def no_clamp() -> DDIMScheduler:
    """What is clamped shows no small difference."""
    return DDIMScheduler(clip_sample=False)


def make_plan(model: MADFormer, way: str, scheduler: Callable[[], Any] = no_clamp) -> Plan:
    launcher = RecordingLauncher() if way == "recorded" else None
    plan = Sampler(model, scheduler(), pack_weights=way == "packed", launcher=launcher).plan(1, SamplingOptions(STEPS))
    if launcher is not None:
        plan.cache.on_host = False  # as on a GPU, where nothing is
    return plan


def draw(plan: Plan, **options: Any) -> Tensor:
    return plan.run(draw_noise(CONFIG, 1), draw_prompt(CONFIG, 1), **options)


@pytest.mark.parametrize("way", ["packed", "recorded"])
@pytest.mark.parametrize("name", CHANGES)
def test_between_two_runs(name: str, way: str) -> None:
    """As a plan draws that was made after it, and has nothing packed or recorded."""
    model = make_model(CONFIG)
    plan = make_plan(model, way)
    before = draw(plan)
    CHANGES[name](model)
    after = draw(plan)
    assert relative_error(after, draw(make_plan(model, "plain"))) < 1e-5
    assert relative_error(after, before) > 1e-4
    assert torch.equal(draw(plan), after)


# seen by the same code as others are, whenever it looks
ONCE = (
    "head norm",
    "in place of a parameter",
    "activation",
    "activation of a time projection",
    "pixel attention",
    "hook in pixel attention",
    "attention processor",
)


LATER = [name for name in CHANGES if name not in ("cast and back", "bias", "norm", *ONCE)]


@functools.cache
def drawn_unchanged() -> Tensor:
    return draw(make_plan(make_model(CONFIG), "plain"))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=pytest.mark.slow if (number + turn) % 2 else ())
        for number, name in enumerate(LATER)
        for turn, way in enumerate(("packed", "recorded"))
    ],
)
def test_in_a_callback(name: str, way: str) -> None:
    """From the next pass on, and what was drawn before stays; by default each change in one of the two ways."""

    def changed(way: str) -> Tensor:
        model = make_model(CONFIG)

        def callback(progress: Progress) -> None:
            if (progress.block, progress.step) == (0, STEPS - 1):
                CHANGES[name](model)

        return draw(make_plan(model, way), callback=callback)

    ours, expected, before = changed(way), changed("plain"), drawn_unchanged()
    assert relative_error(ours, expected) < 1e-5
    assert relative_error(ours[:, 0], before[:, 0]) < 1e-5
    assert relative_error(ours[:, 1], before[:, 1]) > 1e-5


def test_in_everything_that_a_run_calls() -> None:
    """A source of noise, what is told of blocks, the body of a loop over them, and a scheduler of one's own."""
    noise, prompt = draw_noise(CONFIG, 1), draw_prompt(CONFIG, 1)

    class Scheduler(EulerDiscreteScheduler):
        def step(self, *arguments: Any, **options: Any) -> Any:
            change()
            return super().step(*arguments, **options)

    def change() -> None:
        weight = tower(model).proj.weight.data
        weight.mul_(1.1)

    def source(place: int) -> Tensor:
        change()
        return noise[:, place]

    def loop(plan: Plan) -> Tensor:
        drawing = plan.blocks(noise, prompt)
        while True:
            try:
                next(drawing)
            except StopIteration as end:
                return end.value
            change()

    ways: dict[str, tuple[Callable[[], Any], Callable[[Plan], Tensor]]] = {
        "noise": (no_clamp, lambda plan: plan.run(source, prompt)),
        "on_block": (no_clamp, lambda plan: plan.run(noise, prompt, on_block=lambda *_: change())),
        "loop": (no_clamp, loop),
        "scheduler": (Scheduler, lambda plan: plan.run(noise, prompt)),
    }
    for name, (scheduler, run) in ways.items():
        drawn = []
        for way in ("packed", "plain"):
            model = make_model(CONFIG)
            drawn.append(run(make_plan(model, way, scheduler)))
        assert relative_error(*drawn) < 1e-5, name
        assert relative_error(drawn[0], draw(make_plan(make_model(CONFIG), "plain", scheduler))) > 2e-5, name


def test_a_hook_is_called_with_the_module_it_was_put_on() -> None:
    """What it keeps there is found there."""
    model, seen = make_model(CONFIG), []
    for module in (tower(model), tower(model).proj, model.downsampler):
        module.register_forward_hook(lambda module, args, output: seen.append(module))
    cast(Any, model.layers[-1]).register_forward_pre_hook(lambda module, args: seen.append(module))
    draw(make_plan(model, "packed"))
    assert {*seen} == {tower(model).proj, model.downsampler, model.layers[-1]}


def test_what_is_put_around_the_whole_is_told() -> None:
    """Since it is never called; but not what moves or casts weights, and needs no call."""
    model = make_model(tiny())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sampler(accelerate.hooks.add_hook_to_module(make_model(tiny()), accelerate.hooks.ModelHook()), no_clamp())
        Sampler(torch.compile(model, backend="eager"), no_clamp())
    forward = model.forward
    model.forward = functools.wraps(forward)(lambda *args: forward(*args))  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="a forward of its own on the model as a whole"):
        Sampler(model, no_clamp())
    del model.forward  # type: ignore[method-assign]
    handle = model.register_forward_pre_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="a hook on the model as a whole: sampling calls its parts"):
        Sampler(model, no_clamp())
    handle.remove()


def test_a_layer_that_keeps_something_keeps_it() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = make_model(CONFIG)
    proj = tower(model).proj
    tower(model).proj = Counting(proj.in_features, proj.out_features)
    draw(make_plan(model, "packed"))
    assert cast(Counting, tower(model).proj).calls == CONFIG.num_blocks * STEPS


def test_layers_of_the_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CONFIG)
    plan = make_plan(model, "packed")
    before, forward = draw(plan), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 1.1 * forward(self, x))
    assert relative_error(draw(plan), draw(make_plan(model, "plain"))) < 1e-5
    assert relative_error(draw(plan), before) > 1e-4


def test_the_model_stays_as_it_is() -> None:
    """Values, layout in memory, classes, hooks and all; and what is packed is packed once."""
    model = make_model(CONFIG)
    strides = [tensor.stride() for tensor in model.parameters()]
    before, state = signature(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = make_plan(model, "packed")
    draw(plan)
    entries = dict(plan.packed.entries)
    draw(plan)
    assert len(entries) > 50
    assert all(plan.packed.entries[name][1] is entry[1] for name, entry in entries.items())
    assert signature(model) == before
    assert [tensor.stride() for tensor in model.parameters()] == strides
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_change_of_kind() -> None:
    """Another dtype, split or backend: followed by the next run, refused within one."""
    model, noise = make_model(tiny().replace(elastic_diffusion_layers=(1, 2, 3))), draw_noise(tiny(), 1)
    plan = Sampler(model, DDIMScheduler()).plan(1, SamplingOptions(STEPS))
    plan.run(noise)
    for change in (lambda: model.set_split(3), lambda: model.double(), lambda: model.set_backend("reference")):
        change()
        expected = Sampler(model, DDIMScheduler(), pack_weights=False).plan(1, SamplingOptions(STEPS)).run(noise)
        assert relative_error(plan.run(noise), expected) < 1e-5
    with pytest.raises(RuntimeError, match="configuration, dtype, device or backend changed while it was drawing"):
        plan.run(noise, callback=lambda _: model.set_split(1))
    expected = Sampler(model, DDIMScheduler(), pack_weights=False).plan(1, SamplingOptions(STEPS)).run(noise)
    assert relative_error(plan.run(noise), expected) < 1e-5


def test_what_may_change_unseen_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    model, launcher = make_model(CONFIG), RecordingLauncher()
    plan = Sampler(model, no_clamp(), launcher=launcher).plan(1, SamplingOptions(STEPS))
    plan.cache.on_host = False
    draw(plan)
    assert len(launcher.prepared) == 3
    _adapter(model)
    with caplog.at_level("WARNING", "madformer.engine"):
        draw(plan)
        draw(plan)
    assert [record.message for record in caplog.records] == [
        f"not captured or compiled: layers.2.towers.noise.proj is a {__name__}.Scaled"
    ]
    # its strength is seen, by Python that runs the passes
    before = draw(plan)
    cast(Any, tower(model).proj).strength = 2.0
    assert relative_error(draw(plan), draw(make_plan(model, "plain"))) < 1e-5
    assert relative_error(draw(plan), before) > 1e-4
    assert len(launcher.prepared) == 3
    tower(model).proj = cast(Any, tower(model).proj).linear
    draw(plan)
    assert len(launcher.prepared) == 6


@pytest.mark.parametrize("name", ["forward", "hook", "adapter", "parametrization"])
def test_signatures_refuse_what_may_do_anything(name: str) -> None:
    model = make_model(CONFIG)
    signature(model)
    CHANGES[name](model)
    with pytest.raises(UnknownPartError):
        signature(model)


def test_packed_weights_follow_what_they_are_made_of() -> None:
    """A tree computes with the weights that it met first, until it is made anew."""
    model, weights = make_model(tiny()), PackedWeights()
    x = torch.randn(3, tiny().hidden_size)

    def project(tree: MADFormer) -> Tensor:
        with torch.inference_mode():
            return tower(tree).proj(x)

    first = packed(model, weights)
    before = project(first)
    tower(model).proj.weight.data.mul_(2)
    assert torch.equal(project(first), before)
    anew = packed(model, weights)
    assert relative_error(project(anew), tower(model).proj(x)) < 1e-6
    assert tower(anew).proj is tower(first).proj
    # nor is a layer taken over that stands in for another one
    other = nn.Linear(tiny().hidden_size, tiny().hidden_size)
    tower(model).proj = other
    assert relative_error(project(packed(model, weights)), other(x)) < 1e-6


# The batcher's plan is one like others, as is the code that finds a change.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if number % 2 else ())
        for number, name in enumerate(name for name in CHANGES if name not in ("cast and back", *ONCE))
    ],
)
def test_a_batcher_follows(name: str) -> None:
    """At every step: one that another batcher draws with nothing packed, and a step at a time."""

    def drawn(pack: bool) -> list[Tensor]:
        model = make_model(CONFIG)
        batcher = InFlightBatcher(Sampler(model, DDIMScheduler(), pack_weights=pack), 2, max_steps=STEPS)
        prompt = draw_prompt(CONFIG, 1)
        alone = type(prompt)(*(None if ids is None else ids[0] for ids in vars(prompt).values()))
        futures = [batcher.submit(noise, SamplingOptions(STEPS), alone) for noise in draw_noise(CONFIG, 2)]
        for _ in range(3):
            batcher.step()
        CHANGES[name](model)
        futures.append(batcher.submit(draw_noise(CONFIG, 3)[2], SamplingOptions(STEPS), alone))
        batcher.run_until_idle()
        return [future.result() for future in futures]

    for ours, expected in zip(drawn(True), drawn(False), strict=True):
        assert relative_error(ours, expected) < 1e-5
