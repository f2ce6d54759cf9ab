"""Which of diffusers' schedulers sample these models: those over the noise that they are trained on."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from madformer.arguments import shown

if TYPE_CHECKING:
    from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow")
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")

USABLE = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "UniPCMultistepScheduler", *FLOW_SCHEDULERS,
)  # fmt: skip
"""The classes of diffusers whose steps are those of a network that is told a timestep of the training's
variance-preserving schedule (arXiv:2006.11239) and predicts noise, picture or velocity; and those of flow matching on
the straight path from picture to noise (arXiv:2210.02747), whose timesteps are the noise's share times 1000."""

SHORT_NAMES = {
    "dpmpp": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpmpp-single": "DPMSolverSinglestepScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2-a": "KDPM2AncestralDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "sa": "SASolverScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
}
"""For the command line, which takes the names of the classes, too."""

_REFUSED = {
    "is for flow matching of other models, distilled or of videos":
    "FlowMapEulerDiscrete FlowMatchLCM Helios HeliosDMD LTXEulerAncestralRF MiniMaxH3 Piflow",
    "is for models of videos": "CogVideoXDDIM CogVideoXDPM",
    "is for models of discrete tokens": "Amused BlockRefinement DiscreteDDIM EntropyBound VQDiffusion",
    "is for models of proteins": "RFD4Proteina",
    "is for unCLIP's models and their learned variances": "UnCLIP",
    "is for consistency models, and of models that were distilled into such": "CMStochasticIterative LCM SCM TCD",
    "is for networks that are told the noise's standard deviation in place of a timestep":
    "CosineDPMSolverMultistep EDMDPMSolverMultistep EDMEuler KarrasVe ScoreSdeVe",
    "is for continuous times from 1 to 0": "ScoreSdeVp",
    "is for continuous times from 1 to 0 of Wuerstchen's models": "DDPMWuerstchen",
    "has a noise schedule of its own, which these models are not trained on": "IPNDM",
    "adds noise of its own that no seed or generator of a picture decides": "DPMSolverSDE",
    "fills masks; image= and blocks= draw blocks of a picture anew": "RePaint",
    "turns pictures into noise": "DDIMInverse DPMSolverMultistepInverse",
}  # fmt: skip
"""Of the other classes, less the ``Scheduler`` at their ends: why they do not."""
_REASONS = {f"{name}Scheduler": reason for reason, names in _REFUSED.items() for name in names.split()}


def check_name(name: str) -> None:
    """Raises ``ValueError`` for a class of diffusers that no model can be sampled with; one line that says why."""
    if name not in USABLE:
        reason = _REASONS.get(name, "is none of the schedulers whose steps are those of these models")
        raise ValueError(f"{name} {reason}: use another, such as DPMSolverMultistepScheduler")


def scheduler_class(name: str) -> str:
    """The class of diffusers by a name of ``SHORT_NAMES`` or its own, with or without ``Scheduler`` at the end.

    Raises:
        ValueError: no model can be sampled with it, or there is none of the name; one line that says why.
    """
    known = {_bare(own): own for own in (*_REASONS, *USABLE)}
    known |= {_bare(short): own for short, own in SHORT_NAMES.items()}
    found = known.get(_bare(name))
    if found is None:
        raise ValueError(f"no scheduler {shown(name)}: there are {', '.join(SHORT_NAMES)}, and classes by their names")
    check_name(found)
    return found


def _bare(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower())).removesuffix("scheduler")


def check_scheduler(scheduler: Any, prediction_type: str | None = None) -> None:
    """Whether a model can be sampled with it.

    Args:
        prediction_type: what the model predicts; None to leave it open.

    Raises:
        ValueError: it cannot, in one line with the reason and, where it is the class, one that can.
    """
    name = type(scheduler).__name__
    if type(scheduler).__module__.partition(".")[0] == "diffusers":
        check_name(name)
    if missing := [method for method in ("set_timesteps", "step", "config") if not hasattr(scheduler, method)]:
        raise ValueError(f"{name} is no scheduler of diffusers: it has no {missing[0]}")
    config, predicted = scheduler.config, predicted_by(scheduler)
    if config.get("use_flow_sigmas", False) != (config.get("prediction_type") == "flow_prediction"):
        raise ValueError(
            f"{name} has use_flow_sigmas={config.get('use_flow_sigmas', False)} and "
            f"prediction_type={config.get('prediction_type')!r}: flow sigmas and flow_prediction belong together"
        )
    if unfit := [option for option in _unfit_for_flow(scheduler) if config.get(option)]:
        raise ValueError(f"{name} with {unfit[0]}=True leaves the path that these models are trained on: leave it out")
    if str(config.get("variance_type") or "").startswith("learned"):
        raise ValueError(
            f"{name} with variance_type={config['variance_type']!r} asks for variances, and no model has any"
        )
    if prediction_type is not None and predicted != prediction_type:
        raise ValueError(
            f"{name} has prediction_type={predicted!r} and the model {prediction_type!r}: "
            + _remedy(predicted, prediction_type)
        )


def _unfit_for_flow(scheduler: Any) -> tuple[str, ...]:
    """Options that make other noise levels than those of a flow: a shift that the call gives, and sigmas beyond 1."""
    if scheduler.config.get("use_flow_sigmas"):
        return "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"
    return "use_dynamic_shifting", "invert_sigmas"


def _remedy(predicted: str, prediction_type: str) -> str:
    """What to do about a scheduler of one prediction type for a model of another."""
    if "flow" not in (predicted, prediction_type):
        return f"make it with from_config(pipeline.scheduler.config), or prediction_type={prediction_type!r}"
    fitting = FLOW_SCHEDULERS[0] if prediction_type == "flow" else "DPMSolverMultistepScheduler"
    return f"their noise is another, so use another class, such as {fitting}"


def predicted_by(scheduler: Any) -> str:
    """One of :data:`PREDICTION_TYPES` for a scheduler: what a network is to predict that it samples."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler):
        return "flow"
    predicted = str(scheduler.config.get("prediction_type", PREDICTION_TYPES[0]))
    return "flow" if predicted == "flow_prediction" else predicted


def converted(scheduler: Any, name: str) -> Any:
    """A scheduler of another class over the noise of this one.

    Args:
        name: as :func:`scheduler_class` has it.

    Raises:
        ValueError: there is no such class, or none that fits.
    """
    import diffusers

    cls, config = getattr(diffusers, scheduler_class(name)), scheduler.config
    known, options = inspect.signature(cls.__init__).parameters, {}
    if "clip_sample" in known:  # some clamp to [-1, 1] unless told otherwise, which latents are not bounded by
        options["clip_sample"] = config.get("clip_sample", False)
    if predicted_by(scheduler) == "flow":
        shift = config.get("shift", config.get("flow_shift", 1.0))
        if "use_flow_sigmas" in known:
            options |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        elif "shift" in known:
            options["shift"] = shift
    try:
        return cls.from_config(config, **options)
    except NotImplementedError as error:
        raise ValueError(
            f"{cls.__name__} cannot take over the options of {type(scheduler).__name__}: {error}"
        ) from error


def initial_deviation(scheduler: Any) -> float:
    """Standard deviation of the noise that sampling starts from; schedulers of flow matching have no name for 1."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def model_input(scheduler: Any, sample: Tensor, timestep: Tensor) -> Tensor:
    """What the network is given for a sample: itself, but for schedulers that scale it first."""
    scale = getattr(scheduler, "scale_model_input", None)
    return sample if scale is None else scale(sample, timestep)


def default_scheduler(prediction_type: str, **noise: Any) -> Any:
    """DPM-Solver++(2M) from the last training timestep on, over the schedule that training uses; Euler of a flow.

    Not ``DDIMScheduler()``: that clamps the predicted latents to [-1, 1], and latents have a standard deviation of 1,
    so colours fade.

    Args:
        noise: what diffusers' schedulers are told of it, see
            :meth:`madformer.training.config.TrainingConfig.noise_options`; nothing for the linear schedule.
    """
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    if prediction_type == "flow":
        return FlowMatchEulerDiscreteScheduler(**noise)
    return DPMSolverMultistepScheduler(prediction_type=prediction_type, timestep_spacing="trailing", **noise)
