"""Every scheduler class of diffusers: it samples as its own loop over the whole network does, or says why not."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from madformer.engine.options import SamplingOptions
from madformer.engine.reference import sample_uncached
from madformer.engine.sampler import Sampler
from madformer.engine.schedulers import (
    FLOW_SCHEDULERS,
    SHORT_NAMES,
    USABLE,
    check_name,
    check_scheduler,
    converted,
    default_scheduler,
    predicted_by,
    scheduler_class,
)
from tests.helpers.engine_cases import FLAT, TEXT, draw_noise, draw_prompt, shared_model
from tests.helpers.testing import relative_error

EVERY = [
    name
    for name in dir(diffusers)  # Asking for anything else would import every pipeline of diffusers.
    if name.endswith("Scheduler") and inspect.isclass(kind := getattr(diffusers, name)) and kind is not SchedulerMixin
]
STEPS = 5
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# one layer of each kind: the network is not what differs
SMALL = FLAT.replace(num_layers=2, diffusion_layers=1, num_blocks=2, block_grid=(1, 2))
CONFIG = SMALL.replace(text=TEXT)


def make_scheduler(name: str, **options: Any) -> Any:
    return getattr(diffusers, name)(**options)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("name", EVERY)
def test_it_samples_or_says_why_not(name: str) -> None:
    if name not in USABLE:
        with pytest.raises(ValueError, match=f"{name} .*: use another, such as DPMSolverMultistepScheduler") as raised:
            check_name(name)
        assert "is none of the schedulers" not in str(raised.value), "a new class: decide, and say why"
        assert len(str(raised.value).splitlines()) == 1
        return
    model, noise, prompt = shared_model(CONFIG), draw_noise(CONFIG), draw_prompt(CONFIG, guided=True)
    scheduler = make_scheduler(name)
    check_scheduler(scheduler, "flow" if name in FLOW_SCHEDULERS else "epsilon")
    keywords = {"generator": generator()} if "generator" in inspect.signature(scheduler.step).parameters else {}
    expected = sample_uncached(model, make_scheduler(name), STEPS, noise, prompt, lambda _: 2.5, **keywords)
    plan = Sampler(model, scheduler).plan(len(noise), SamplingOptions(STEPS, guidance=2.5))
    assert expected.isfinite().all()
    assert relative_error(plan.run(noise, prompt, generator=generator()), expected) < 1e-3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DPMSolverMultistepScheduler", FLOW, "use another class, such as DPMSolverMultistepScheduler"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "flow sigmas and flow_prediction belong together"),
        ("DEISMultistepScheduler", {"prediction_type": "flow_prediction"}, "belong together"),
        ("UniPCMultistepScheduler", {**FLOW, "use_karras_sigmas": True}, "use_karras_sigmas=True leaves the path"),
        (
            "FlowMatchEulerDiscreteScheduler",
            {},
            "prediction_type='flow' and the model 'epsilon': their noise is another",
        ),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"use_dynamic_shifting": True},
            "use_dynamic_shifting=True leaves the path",
        ),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas=True leaves the path"),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, "prediction_type='v_prediction' and the model"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "asks for variances, and no model has any"),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, "asks for variances, and no model has any"),
    ],
)
def test_options_that_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        check_scheduler(make_scheduler(name, **options), "epsilon")
    assert len(str(raised.value).splitlines()) == 1


def test_a_class_of_somebody_elses() -> None:
    class Mine(diffusers.DDIMScheduler):
        pass

    Mine.__module__ = "mine"
    check_scheduler(Mine(), "epsilon")
    with pytest.raises(ValueError, match="dict is no scheduler of diffusers: it has no set_timesteps"):
        check_scheduler({})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("DPMSolverMultistepScheduler", FLOW | {"solver_order": 3}),
        *((name, FLOW | {"flow_shift": 3.0}) for name in USABLE if "use_flow_sigmas" in make_scheduler(name).config),
    ],
)
def test_a_flow_by_steps_of_their_own(name: str, options: dict[str, Any]) -> None:
    """What diffusers offers for flow matching beside the two classes that are made for it."""
    config = SMALL.replace(prediction_type="flow")
    model, noise, scheduler = shared_model(config), draw_noise(config), make_scheduler(name, **options)
    check_scheduler(scheduler, "flow")
    keywords = {"generator": generator()} if "generator" in inspect.signature(scheduler.step).parameters else {}
    expected = sample_uncached(model, make_scheduler(name, **options), STEPS, noise, **keywords)
    drawn = Sampler(model, scheduler).plan(len(noise), SamplingOptions(STEPS)).run(noise, generator=generator())
    assert relative_error(drawn, expected) < 1e-3


def test_another_class_over_the_same_noise() -> None:
    for name, shift in (("dpmpp", "flow_shift"), ("unipc", "flow_shift"), ("flow-heun", "shift")):
        other = converted(default_scheduler("flow", shift=3.0), name)
        check_scheduler(other, "flow")
        assert other.config[shift] == 3
        assert converted(other, "flow-euler").config.shift == 3
    other = converted(default_scheduler("v_prediction", beta_schedule="squaredcos_cap_v2"), "ddim")
    assert (predicted_by(other), other.config.beta_schedule) == ("v_prediction", "squaredcos_cap_v2")
    assert not other.config.clip_sample
    for prediction_type, name in (("flow", "ddim"), ("epsilon", "flow-euler")):
        with pytest.raises(ValueError, match="their noise is another, so use another class, such as"):
            check_scheduler(converted(default_scheduler(prediction_type), name), prediction_type)


@pytest.mark.parametrize("options", [{"algorithm_type": "sde-dpmsolver++"}, {"solver_type": "heun"}, {}], ids=str)
def test_a_class_that_cannot_take_over_the_options_says_so(options: dict[str, str]) -> None:
    """Whichever it is: diffusers' NotImplementedError is no line for a user."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**options)
    refused = {"deis", "sa"} if "algorithm_type" in options else set()
    for name in SHORT_NAMES.keys() - refused:
        converted(scheduler, name)
    for name in refused:
        with pytest.raises(ValueError, match="cannot take over the options of DPMSolverMultistepScheduler: sde-dpm"):
            converted(scheduler, name)
    noise = diffusers.DDPMScheduler(beta_schedule="sigmoid")
    with pytest.raises(ValueError, match="DDIMScheduler cannot take over the options of DDPMScheduler: sigmoid is not"):
        converted(noise, "ddim")


def test_names_for_the_command_line() -> None:
    """Every class by a short name or its own; those that are refused, with their reason."""
    assert set(SHORT_NAMES.values()) <= set(USABLE)
    for name in USABLE:
        for said in (name, name.lower(), name.removesuffix("Scheduler")):
            assert scheduler_class(said) == name
    for short, name in SHORT_NAMES.items():
        assert scheduler_class(short) == name
    for said, reason in (
        ("lcm", "LCMScheduler is for consistency models"),
        ("flow-match-lcm", "FlowMatchLCMScheduler is for flow matching of other models"),
        ("edm-euler", "told the noise's standard deviation"),
        ("k_lms2", "no scheduler 'k_lms2': there are dpmpp, ddim"),
        ("", "no scheduler '': there are"),
    ):
        with pytest.raises(ValueError, match=reason):
            scheduler_class(said)
