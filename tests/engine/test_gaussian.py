"""Solvers against a truth in closed form: Gaussian data, whose best predictor is linear.

Data of mean m and deviation d, noised to ``x = alpha x0 + sigma noise``, are normal at every noise level, and what a
network would say at best follows from Bayes' rule. The ordinary differential equation that a deterministic sampler
solves takes a quantile at one noise level to the same quantile at another, so where it should end is known.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor

from madformer.engine.schedule import tabulate
from madformer.engine.schedulers import predicted_by
from madformer.kernels.denoise_step import denoise_step_ref

MEAN, DEVIATION = 0.7, 0.4
QUANTILES = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
LU = {"use_lu_lambdas": True, "final_sigmas_type": "sigma_min", "lower_order_final": False}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def levels(scheduler: Any) -> tuple[Tensor, Tensor]:
    """Signal and noise at every evaluation, and at the end."""
    if isinstance(scheduler, DDIMScheduler):
        signal = torch.cat(
            (scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None])
        ).double()
        return signal.sqrt(), (1 - signal).sqrt()
    sigmas = scheduler.sigmas.double()
    if predicted_by(scheduler) == "flow":
        if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):  # a second evaluation is at the end of its step
            sigmas = torch.cat((scheduler.timesteps.double() / 1000, sigmas[-1:]))
        return 1 - sigmas, sigmas
    alphas = (sigmas**2 + 1).rsqrt()
    return alphas, sigmas * alphas


def best_prediction(prediction_type: str, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    variance = alpha**2 * DEVIATION**2 + sigma**2
    off = (x - alpha * MEAN) / variance
    clean, noise = MEAN + alpha * DEVIATION**2 * off, sigma * off
    return {
        "sample": clean, "epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "flow": noise - clean,
    }[prediction_type]  # fmt: skip


def marginal(alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha * MEAN + QUANTILES * (alpha**2 * DEVIATION**2 + sigma**2).sqrt()


def errors(scheduler: Any, num_steps: int, *, own_steps: bool) -> Tensor:
    """Of mean and deviation of what is drawn."""
    table = tabulate(scheduler, num_steps)
    assert table is not None
    scheduler.set_timesteps(num_steps)
    alphas, sigmas = levels(scheduler)
    x, previous = marginal(alphas[0], sigmas[0])[:, None], torch.zeros(3, 1, dtype=torch.float64)
    for step, timestep in enumerate(scheduler.timesteps):
        output = best_prediction(predicted_by(scheduler), x, alphas[step], sigmas[step])
        if own_steps:
            x = scheduler.step(output, timestep, x).prev_sample
        else:
            denoise_step_ref(x, output, previous, table.coefficients[step].expand(3, -1), table.clip)
    drawn, expected = x[:, 0], marginal(alphas[-1], sigmas[-1])
    return torch.stack((drawn[0] - expected[0], (drawn[1] - drawn[2] - expected[1] + expected[2]) / 3)).abs()


CASES = {
    **{f"DDIM, {kind}": (DDIMScheduler(prediction_type=kind, clip_sample=False, timestep_spacing="trailing"), 50, 1.0)
       for kind in ("epsilon", "sample", "v_prediction")},
    **{f"DPM-Solver++, {kind}": (DPMSolverMultistepScheduler(prediction_type=kind, **LU), 40, 2.0)
       for kind in ("epsilon", "sample", "v_prediction")},
    "Euler, flow": (FlowMatchEulerDiscreteScheduler(), 40, 1.0),
    "Euler, shifted flow": (FlowMatchEulerDiscreteScheduler(shift=3.0), 40, 1.0),
    "Heun, flow": (FlowMatchHeunDiscreteScheduler(), 20, 2.0),
    "Heun, shifted flow": (FlowMatchHeunDiscreteScheduler(shift=0.5), 20, 2.0),
    # the last step, from a noise that is less the more steps there are, is of first order
    "DPM-Solver++, flow": (DPMSolverMultistepScheduler(**FLOW), 40, 1.5),
}  # fmt: skip


@pytest.mark.parametrize("own_steps", [False, True], ids=["table", "step"])
@pytest.mark.parametrize(("scheduler", "steps", "order"), CASES.values(), ids=CASES)
def test_mean_and_deviation_to_the_solvers_order(scheduler: Any, steps: int, order: float, own_steps: bool) -> None:
    """With twice the steps, ``2 ** order`` times less of an error; the mean's path is straight, so it is exact."""
    (mean, coarse), (finer_mean, fine) = (errors(scheduler, n, own_steps=own_steps) for n in (steps, 2 * steps))
    assert max(mean, finer_mean) < 1e-6
    assert coarse < 0.1 * DEVIATION
    assert (coarse / fine).log2().item() == pytest.approx(order, abs=0.15)
