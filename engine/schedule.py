"""Turns a diffusers scheduler into a table of per-step coefficients for ``denoise_step``.

The scheduler owns the noise maths: timesteps, alphas and sigmas are read from it after its own
``set_timesteps``, and only the update that its ``step`` would make is written out as a linear combination.

Shape legend: S steps.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from madformer.arguments import whole_number
from madformer.engine.schedulers import initial_deviation, predicted_by


def _attributes(cls: type) -> dict[str, Any]:
    """Its methods and the like; Python keeps things of its own under names with two underscores."""
    return {name: value for name, value in vars(cls).items() if not name.startswith("__")}


# what the tables write out, and not what was put in its place
_ORIGINALS = {
    cls: _attributes(cls)
    for cls in (
        DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler,
    )
}  # fmt: skip
TABULATED = frozenset(cls.__name__ for cls in _ORIGINALS)
"""The classes of diffusers that can be tabulated, most of their options with them."""


@dataclass(frozen=True)
class ScheduleTable:
    """A deterministic sampler as numbers.

    Attributes:
        timesteps: (S,) int64, or fp32 of flow matching: what the model is given, from noise to clean.
        coefficients: (S, 6) float32, computed in float64; what each is, ``denoise_step`` says.
        clip: bound of the predicted clean sample, or None.
        init_noise_sigma: standard deviation of the noise that sampling starts from.
    """

    timesteps: Tensor
    coefficients: Tensor
    clip: float | None
    init_noise_sigma: float

    @property
    def num_steps(self) -> int:
        """S: what was asked for, one more, which diffusers' spacing "trailing" makes for some numbers, or for Heun's
        method twice as many less one: evaluations of the network."""
        return len(self.timesteps)


def check_num_steps(scheduler: SchedulerMixin, num_steps: int) -> int:
    """A number of steps that the scheduler has; raises ``ValueError`` for another."""
    number = whole_number("num_inference_steps", num_steps)
    limit = getattr(scheduler.config, "num_train_timesteps", number)
    if not 1 <= number <= limit:
        raise ValueError(f"num_inference_steps={number} must be between 1 and num_train_timesteps={limit}")
    return number


def tabulate(scheduler: SchedulerMixin, num_steps: int, device: torch.device | str = "cpu") -> ScheduleTable | None:
    """The scheduler's ``num_steps`` steps as a table, or None where its own ``step`` has to be called.

    Supported are ``DDIMScheduler`` with ``eta = 0`` and ``DPMSolverMultistepScheduler`` with the algorithm
    ``dpmsolver++`` of order one or two, each with all its options for betas, spacing, sigmas and final steps,
    and with the prediction types epsilon, sample and v_prediction, the second with flow prediction as well; and of flow
    matching ``FlowMatchEulerDiscreteScheduler`` and ``FlowMatchHeunDiscreteScheduler``. Everything else gives None:
    other classes and subclasses, methods that were replaced, dynamic thresholding, stochastic variants, learned
    variances, and schedules with a step whose coefficients are not finite, such as epsilon prediction where no signal
    is left.

    Args:
        scheduler: a diffusers scheduler; it is not changed.
        num_steps: what would be passed to ``set_timesteps``.
        device: where the table goes.

    Raises:
        ValueError: ``num_steps`` is no whole number, below 1 or above the scheduler's ``num_train_timesteps``, or
            ``steps_offset`` moves a timestep of ``DDIMScheduler`` beyond the last one.
    """
    num_steps = check_num_steps(scheduler, num_steps)
    # `is`, not isinstance: a subclass may step differently.
    kind = type(scheduler)
    if any(callable(value) for value in vars(scheduler).values()) or _attributes(kind) != _ORIGINALS.get(kind):
        return None
    if not _has_supported_options(scheduler):
        return None
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_steps)
    if kind in _FLOW_COEFFICIENTS:
        coefficients = _FLOW_COEFFICIENTS[kind](scheduler.sigmas.double().cpu())
    else:
        coefficients = (_ddim_coefficients if kind is DDIMScheduler else _dpm_solver_coefficients)(scheduler)
    if not coefficients.isfinite().all():
        return None
    return ScheduleTable(
        timesteps=scheduler.timesteps.to(device),
        coefficients=coefficients.float().to(device),
        clip=float(scheduler.config.clip_sample_range) if scheduler.config.get("clip_sample") else None,
        init_noise_sigma=initial_deviation(scheduler),
    )


@dataclass(frozen=True)
class Schedule:
    """What a run steps by: a table, or where a scheduler has none its own ``step``.

    Attributes:
        scheduler: a copy in the state before the first step, which nothing changes.
        num_inference_steps: what was asked for.
        timesteps: (S,), of which a scheduler of several evaluations a step has more.
    """

    scheduler: SchedulerMixin
    num_inference_steps: int
    table: ScheduleTable | None
    timesteps: Tensor

    @classmethod
    def of(cls, scheduler: SchedulerMixin, num_steps: int, device: torch.device) -> Schedule:
        """The scheduler as it is now.

        Raises:
            ValueError: a number of steps that it does not have.
        """
        scheduler, num_steps = copy.deepcopy(scheduler), check_num_steps(scheduler, num_steps)
        with torch.device("cpu"):  # whatever the process makes tensors on
            table = tabulate(scheduler, num_steps, device)
        if table is None:
            try:
                scheduler.set_timesteps(num_steps, device=device)
            except (ValueError, IndexError) as error:
                raise ValueError(
                    f"{type(scheduler).__name__} cannot make num_inference_steps={num_steps}: {error}"
                ) from error
        timesteps = (scheduler if table is None else table).timesteps.to(device)
        return cls(scheduler, num_steps, table, timesteps)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that sampling starts from."""
        return initial_deviation(self.table or self.scheduler)

    def start(self) -> SchedulerMixin:
        """A scheduler to step by, that remembers no step: multistep ones remember the last block's predictions."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.num_inference_steps, device=self.timesteps.device)
        return scheduler


def _has_supported_options(scheduler: SchedulerMixin) -> bool:
    config = scheduler.config
    if type(scheduler) in _FLOW_COEFFICIENTS:
        return not config.get("stochastic_sampling")
    flow = config.get("use_flow_sigmas", False)
    known = ("flow_prediction",) if flow else ("epsilon", "sample", "v_prediction")
    if config.prediction_type not in known or config.thresholding:
        return False
    return isinstance(scheduler, DDIMScheduler) or (
        config.algorithm_type == "dpmsolver++" and config.solver_order in (1, 2) and config.variance_type is None
    )


def _weights(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(S,) weights of sample and model output: in the predicted clean sample, then in the predicted noise."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha, zero, one
    if prediction_type == "sample":
        return zero, one, 1 / sigma, -alpha / sigma
    if prediction_type == "flow":  # noise less clean sample, and alpha + sigma is 1
        return one, -sigma, one, alpha
    return alpha, -sigma, sigma, alpha


def _ddim_coefficients(scheduler: DDIMScheduler) -> Tensor:
    """(S, 6) float64: arXiv:2010.02502, eq. 12, with sigma_t = 0; the noise is the unclipped prediction's."""
    config, timesteps = scheduler.config, scheduler.timesteps
    alphas_cumprod = scheduler.alphas_cumprod.double().cpu()  # `add_noise` may have moved it to a GPU.
    final_signal = scheduler.final_alpha_cumprod.double()
    if timesteps.max() >= len(alphas_cumprod):
        raise ValueError(
            f"steps_offset={config.steps_offset} moves the first timestep to {timesteps.max()}, "
            f"which must be below num_train_timesteps={config.num_train_timesteps}"
        )
    # Not the next timestep of the table: diffusers goes down by this stride whatever the spacing.
    next_timesteps = timesteps - config.num_train_timesteps // scheduler.num_inference_steps
    signal = alphas_cumprod[timesteps]
    next_signal = torch.where(next_timesteps >= 0, alphas_cumprod[next_timesteps.clamp(min=0)], final_signal)
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    next_alpha, next_sigma = next_signal.sqrt(), (1 - next_signal).sqrt()
    *to_x0, epsilon_sample, epsilon_output = _weights(config.prediction_type, alpha, sigma)
    columns = (
        *to_x0,
        next_sigma * epsilon_sample,
        next_sigma * epsilon_output,
        next_alpha,
        torch.zeros_like(alpha),
    )
    return torch.stack(columns, dim=1)


def _dpm_solver_coefficients(scheduler: DPMSolverMultistepScheduler) -> Tensor:
    """(S, 6) float64: arXiv:2211.01095, algorithm 2 (midpoint), and its Heun variant in diffusers."""
    config = scheduler.config
    sigmas = scheduler.sigmas.double()
    if config.use_flow_sigmas:
        alpha, sigma = 1 - sigmas, sigmas
    else:
        alpha = (sigmas**2 + 1).rsqrt()
        sigma = sigmas * alpha
    log_snr = (alpha / sigma).log()  # Half of it; lambda in the paper, infinite where the last sigma is 0.
    h = log_snr.diff()
    to_x0 = -alpha[1:] * torch.expm1(-h)
    slope = alpha[1:] * (torch.expm1(-h) / h + 1) if config.solver_type == "heun" else 0.5 * to_x0
    # The weight of x0 - x0_previous: the slope over the ratio of this step's length and the one before.
    previous_h = torch.cat([h.new_full((1,), torch.nan), h[:-1]])
    correction = torch.where(_is_second_order(scheduler), slope * h / previous_h, 0.0)
    columns = (
        *_weights(predicted_by(scheduler), alpha[:-1], sigma[:-1])[:2],
        sigma[1:] / sigma[:-1],
        torch.zeros_like(h),
        to_x0 + correction,
        -correction,
    )
    return torch.stack(columns, dim=1)


def _is_second_order(scheduler: DPMSolverMultistepScheduler) -> Tensor:
    """(S,) bool: the steps that use the previous prediction; the first never does, the last not always."""
    config, num_steps = scheduler.config, len(scheduler.timesteps)
    lower_order_final = config.lower_order_final and num_steps < 15  # The bound is diffusers' own.
    second = torch.full((num_steps,), config.solver_order == 2)
    second[0] = False
    if config.euler_at_final or lower_order_final or config.final_sigmas_type == "zero":
        second[-1] = False
    return second


def _flow_euler_coefficients(sigmas: Tensor) -> Tensor:
    """(S, 6) float64 from (S + 1,) shares of noise: a straight step along the velocity."""
    step = sigmas.diff()
    one, zero = torch.ones_like(step), torch.zeros_like(step)
    return torch.stack((one, -sigmas[:-1], one, step, zero, zero), dim=1)


def _flow_heun_coefficients(sigmas: Tensor) -> Tensor:
    """(2 S - 1, 6) float64 from diffusers' sigmas, all but first and last twice: Heun's method, arXiv:2206.00364, 1.

    Every first evaluation of a step goes as far as Euler's method, and leaves its velocity where other solvers leave
    the predicted clean sample. The second one, at the end of the step, goes back half of that, and half along its own.
    """
    ends = torch.cat((sigmas[:1], sigmas[1:-1:2], sigmas[-1:]))
    step = ends.diff()
    one, zero = torch.ones_like(step), torch.zeros_like(step)
    first = torch.stack((zero, one, one, step, zero, zero), dim=1)
    second = torch.stack((zero, one, one, step / 2, zero, -step / 2), dim=1)
    # the last step, to a noise of 0, is one of Euler's
    return torch.stack((first, second), dim=1).flatten(0, 1)[:-1]


_FLOW_COEFFICIENTS = {
    FlowMatchEulerDiscreteScheduler: _flow_euler_coefficients,
    FlowMatchHeunDiscreteScheduler: _flow_heun_coefficients,
}
