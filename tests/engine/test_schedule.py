"""Tabulated coefficients against the scheduler's own ``step``, over trajectories of a nonlinear model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from madformer.engine.schedule import Schedule, ScheduleTable, tabulate
from madformer.engine.schedulers import initial_deviation
from madformer.kernels.denoise_step import denoise_step
from tests.helpers.testing import relative_error

# The longest trajectories of the grid differ by 4e-6: diffusers computes its coefficients in float32, the
# table in float64.
FP32_ROUNDING = 1e-5
DPM = DPMSolverMultistepScheduler
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
# 14 and 15 lie on both sides of diffusers' bound for a lower order at the end.
NUM_STEPS = (1, 2, 14, 15, 50)


def toy_model(x: Tensor, timestep: Tensor) -> Tensor:
    return torch.tanh(1.3 * x) + 0.1 * math.sin(int(timestep) / 100)


def initial_sample() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def run_own_steps(scheduler: Any, num_steps: int) -> Tensor:
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_steps)
    if isinstance(scheduler, DPM):
        scheduler.set_begin_index(0)  # Or a first timestep that occurs twice would start at its second place.
    sample = initial_sample() * initial_deviation(scheduler)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(toy_model(sample, timestep), timestep, sample).prev_sample
    return sample


def run_table(table: ScheduleTable) -> Tensor:
    sample = initial_sample() * table.init_noise_sigma
    previous = torch.full_like(sample, torch.nan)
    for timestep, coefficients in zip(table.timesteps, table.coefficients, strict=True):
        model_output = toy_model(sample, timestep)
        denoise_step(sample, model_output, previous, coefficients.expand(len(sample), -1), clip=table.clip)
    return sample


def check(scheduler: Any, num_steps: int, rounding: float = FP32_ROUNDING) -> ScheduleTable:
    table = tabulate(scheduler, num_steps)
    assert table is not None
    assert relative_error(run_table(table), run_own_steps(scheduler, num_steps)) < rounding
    return table


@pytest.mark.parametrize("num_steps", NUM_STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim(prediction_type: str, clip: float | None, spacing: str, num_steps: int) -> None:
    clipping = {"clip_sample": False} if clip is None else {"clip_sample": True, "clip_sample_range": clip}
    scheduler = DDIMScheduler(prediction_type=prediction_type, timestep_spacing=spacing, **clipping)
    assert check(scheduler, num_steps).clip == clip


DDIM_OPTIONS = {
    "final alpha of step 0": {"set_alpha_to_one": False},
    "offset": {"steps_offset": 1},
    "scaled betas": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine betas": {"beta_schedule": "squaredcos_cap_v2"},
    "given betas": {"trained_betas": [0.001 * (i + 1) for i in range(100)], "num_train_timesteps": 100},
}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("options", DDIM_OPTIONS.values(), ids=DDIM_OPTIONS)
def test_ddim_options(options: dict[str, Any], prediction_type: str) -> None:
    check(DDIMScheduler(prediction_type=prediction_type, **options), 20)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_ddim_from_pure_noise(prediction_type: str) -> None:
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    check(DDIMScheduler(prediction_type=prediction_type, **options), 20)


@pytest.mark.parametrize("num_steps", NUM_STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("order", "solver"), [(1, "midpoint"), (2, "midpoint"), (2, "heun")])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_dpm_solver(prediction_type: str, order: int, solver: str, spacing: str, num_steps: int) -> None:
    scheduler = DPM(prediction_type=prediction_type, solver_order=order, solver_type=solver, timestep_spacing=spacing)
    table = check(scheduler, num_steps)
    assert table.clip is None
    reads_previous = table.coefficients[:, 5] != 0
    assert reads_previous[1:-1].all() == (order == 2 or num_steps <= 2)
    assert not reads_previous[[0, -1]].any()


DPM_OPTIONS = {
    "higher order at the end": {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    "lower order at the end": {"lower_order_final": True, "final_sigmas_type": "sigma_min"},
    "euler at the end": {
        "euler_at_final": True,
        "lower_order_final": False,
        "final_sigmas_type": "sigma_min",
    },
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "from pure noise": {"rescale_betas_zero_snr": True},
    "offset": {"timestep_spacing": "leading", "steps_offset": 1},
    "cosine betas, clipped lambda": {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    "scaled betas": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}


@pytest.mark.parametrize("num_steps", [14, 15])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("options", DPM_OPTIONS.values(), ids=DPM_OPTIONS)
def test_dpm_solver_options(options: dict[str, Any], prediction_type: str, solver: str, num_steps: int) -> None:
    check(DPM(prediction_type=prediction_type, solver_type=solver, **options), num_steps)


@pytest.mark.parametrize("num_steps", NUM_STEPS)
@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"shift": 0.5}], ids=["plain", "more noise", "less noise"])
@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_flow_matching(kind: Any, options: dict[str, Any], num_steps: int) -> None:
    heun = kind is FlowMatchHeunDiscreteScheduler
    # Heun's in diffusers divides a difference of samples by the noise at the end of a step, 1 / 1000 with this shift
    # applied twice: what the samples are rounded by grows as much
    smallest = 1e-3 * min(options.get("shift", 1.0), 1) ** 2
    table = check(kind(**options), num_steps, torch.finfo(torch.float32).eps / smallest if heun else FP32_ROUNDING)
    assert table.timesteps.dtype == torch.float32
    assert table.num_steps == (2 * num_steps - 1 if heun else num_steps)
    assert table.timesteps[0] == 1000
    assert table.init_noise_sigma == 1


@pytest.mark.parametrize("options", [{"use_karras_sigmas": True}, {"shift_terminal": 0.1}, {"use_beta_sigmas": True}])
def test_flow_matching_options(options: dict[str, Any]) -> None:
    check(FlowMatchEulerDiscreteScheduler(**options), 20)


@pytest.mark.parametrize("num_steps", NUM_STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("order", "solver"), [(1, "midpoint"), (2, "midpoint"), (2, "heun")])
def test_dpm_solver_of_a_flow(order: int, solver: str, shift: float, num_steps: int) -> None:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    check(DPM(solver_order=order, solver_type=solver, **flow), num_steps)


def test_last_two_sigmas_alike() -> None:
    """Karras sigmas end on the lowest one already. Heun's update is 0 / 0 there, in diffusers as well."""
    options = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    check(DPM(solver_type="midpoint", **options), 20)
    assert tabulate(DPM(solver_type="heun", **options), 20) is None
    assert run_own_steps(DPM(solver_type="heun", **options), 20).isnan().any()


def test_released_sampler() -> None:
    """DPM-Solver++ from DDIM's configuration, as in the released code; DDIM's clipping is lost on the way."""
    scheduler = DPM.from_config(DDIMScheduler(prediction_type="v_prediction").config)
    table = check(scheduler, 250)
    assert table.clip is None
    assert table.timesteps.dtype == torch.int64
    assert table.coefficients.shape == (250, 6)
    assert table.coefficients.dtype == torch.float32


def test_one_step_more_than_asked_for() -> None:
    """1000 / 61 is rounded, so that diffusers' spacing "trailing" ends with a timestep of -1."""
    table = check(DDIMScheduler(timestep_spacing="trailing"), 61)
    assert table.num_steps == 62
    assert table.timesteps[-1] == -1


class StepsItsOwnWay(DDIMScheduler):
    """A subclass may override ``step``."""


NOT_TABULATED = {
    "another class": DDPMScheduler(),
    "euler": EulerDiscreteScheduler(),
    "flow matching, stochastic": FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "a subclass": StepsItsOwnWay(),
    "ddim, thresholding": DDIMScheduler(thresholding=True),
    "ddim, unknown prediction": DDIMScheduler(prediction_type="flow_prediction"),
    "ddim, no signal": DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    "dpm, thresholding": DPM(thresholding=True),
    "dpm, stochastic": DPM(algorithm_type="sde-dpmsolver++"),
    "dpm, stochastic, order 1": DPM(algorithm_type="sde-dpmsolver++", solver_order=1),
    "dpm, order 3": DPM(solver_order=3),
    "dpm, flow prediction alone": DPM(prediction_type="flow_prediction"),
    "dpm, flow sigmas": DPM(use_flow_sigmas=True),
    "dpm, learned variance": DPM(variance_type="learned_range"),
}


@pytest.mark.parametrize("scheduler", NOT_TABULATED.values(), ids=NOT_TABULATED)
def test_everything_else_keeps_its_own_step(scheduler: Any) -> None:
    assert tabulate(scheduler, 10) is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [(DDIMScheduler, "step"), (DDIMScheduler, "scale_model_input"), (DPM, "convert_model_output")],
)
def test_methods_that_were_replaced_for_all(kind: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tabulate(copy.deepcopy(kind()), 10) is not None
    monkeypatch.setattr(kind, name, lambda *_, **__: None)
    assert tabulate(kind(), 10) is None


@pytest.mark.parametrize("make", [DDIMScheduler, DPM])
def test_the_scheduler_is_not_changed(make: Any) -> None:
    scheduler = make()
    scheduler.set_timesteps(7)
    before = copy.deepcopy(vars(scheduler))
    tabulate(scheduler, 20)
    assert vars(scheduler).keys() == before.keys()
    for name, value in vars(scheduler).items():
        same = torch.equal(value, before[name]) if isinstance(value, Tensor) else value == before[name]
        assert same, name


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), DPM()])
@pytest.mark.parametrize("num_steps", [0, -3, 1001])
def test_nonsensical_step_counts(scheduler: Any, num_steps: int) -> None:
    message = f"num_inference_steps={num_steps} must be between 1 and num_train_timesteps=1000"
    with pytest.raises(ValueError, match=message):
        tabulate(scheduler, num_steps)


def test_steps_that_a_scheduler_cannot_make() -> None:
    with pytest.raises(ValueError, match="PNDMScheduler cannot make num_inference_steps=2: "):
        Schedule.of(PNDMScheduler(), 2, torch.device("cpu"))


def test_offset_beyond_the_last_timestep() -> None:
    with pytest.raises(ValueError, match="steps_offset=1 moves the first timestep to 1000"):
        tabulate(DDIMScheduler(steps_offset=1), 1000)
