"""Which of diffusers' schedulers sample these models: those over the noise schedule that they are trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from madformer.arguments import shown

if TYPE_CHECKING:
    from diffusers import DPMSolverMultistepScheduler

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

USABLE = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""The classes of diffusers whose steps are those of a network that is told an integer timestep of the training's
discrete, variance-preserving schedule (arXiv:2006.11239) and predicts noise, picture or velocity."""

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
}
"""For the command line, which takes the names of the classes, too."""

_FLOW = "is for flow matching, and these models are trained to denoise"
_REFUSED = {
    _FLOW: "FlowMapEulerDiscrete FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM Helios HeliosDMD "
    "LTXEulerAncestralRF MiniMaxH3 Piflow",
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
    # those of flow matching are all refused for one reason
    found = known.get(_bare(name)) or ("FlowMatchEulerDiscreteScheduler" if _bare(name).startswith("flow") else None)
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
    methods = ("set_timesteps", "step", "scale_model_input", "init_noise_sigma", "config")
    if missing := [method for method in methods if not hasattr(scheduler, method)]:
        raise ValueError(f"{name} is no scheduler of diffusers: it has no {missing[0]}")
    config = scheduler.config
    predicted = config.get("prediction_type", PREDICTION_TYPES[0])
    if config.get("use_flow_sigmas") or str(predicted).startswith("flow"):
        raise ValueError(f"{name} with flow sigmas or prediction_type={predicted!r} {_FLOW}")
    if str(config.get("variance_type") or "").startswith("learned"):
        raise ValueError(
            f"{name} with variance_type={config['variance_type']!r} asks for variances, and no model has any"
        )
    if prediction_type is not None and predicted != prediction_type:
        raise ValueError(
            f"{name} has prediction_type={predicted!r} and the model {prediction_type!r}: make it with "
            f"from_config(pipeline.scheduler.config), or prediction_type={prediction_type!r}"
        )


def default_scheduler(prediction_type: str, **noise: Any) -> DPMSolverMultistepScheduler:
    """DPM-Solver++(2M) from the last training timestep on, over the schedule that training uses.

    Not ``DDIMScheduler()``: that clamps the predicted latents to [-1, 1], and latents have a standard deviation of 1,
    so colours fade.

    Args:
        noise: what diffusers' schedulers are told of it, see
            :meth:`madformer.training.config.TrainingConfig.noise_options`; nothing for the linear schedule.
    """
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(prediction_type=prediction_type, timestep_spacing="trailing", **noise)
