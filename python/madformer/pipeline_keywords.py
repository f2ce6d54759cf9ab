"""Keywords that the pipeline does not have: those of other pipelines of diffusers, with a reason, and misspelt ones."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import re
from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_ABSENT = {
    "class_labels": "classes are labels=",
    "batch_size|num_(videos|waveforms|samples)_per_prompt": "a number of images is num_images_per_prompt=",
    "steps": "the number of steps is num_inference_steps=",
    "cfg_scale|guidance|cfg": "the scale of classifier-free guidance is guidance_scale=",
    "eta": "noise in the steps is the scheduler's: assign pipeline.scheduler one that adds some, as DDPMScheduler or "
    "EulerAncestralDiscreteScheduler",
    "timesteps|sigmas|mu": "which timesteps are taken is the scheduler's: give num_inference_steps=, or assign "
    "pipeline.scheduler one that spaces them in another way",
    "scheduler|use_.*_sigmas|solver_order|algorithm_type|timestep_spacing|clip_sample|rescale_betas_zero_snr":
    "it is the scheduler's: pipeline.scheduler = type(scheduler).from_config(pipeline.scheduler.config, ...)",
    "denoising_(start|end)": "every block is denoised from noise to the end",
    r"(negative_)?prompt_\d": "the model reads one text: give prompt= and negative_prompt=",
    "(negative_)?ip_adapter.*": "these models have no IP adapter",
    "max_sequence_length": "texts are cut at the length that the model was made for",
    ".*_embeds.*|.*attention_mask.*|prompt_(template|enhancement.*)":
    "the model reads token ids: give prompt= and negative_prompt=",
    "clip_skip|clean_caption|text_encoder_.*|system_prompt": "the model reads token ids itself, without a text encoder",
    "(cross_|joint_)?attention_kwargs": "the strength of LoRA is set by pipeline.set_adapters",
    "guidance_(rescale|scale_2)|true_cfg_scale|cfg_(normalization|truncation)|[ps]ag_.*|.*_guidance_scale|use_dynamic_cfg":
    "guidance is guidance_scale= alone, within guidance_interval=",
    "strength|mask_image|masked_image.*|padding_mask_crop|mask|noise_level":
    "image= and blocks= keep a picture but for some of its blocks",
    "control.*|guess_mode|adapter_conditioning.*": "these models have no ControlNet",
    "callback|callback_steps": "the callback is callback_on_step_end=, or on_block=",
    "(negative_)?(original_size|target_size|crops_coords_top_left|aesthetic_score)|use_resolution_binning":
    "the size is height= and width= alone",
    ".*(video|frame|audio|fps|duration).*": "these models draw images",
    "seeds": "image i of a call has seed + i: give seed=, or generator= for a list of any",
}  # fmt: skip
"""Patterns of names that a call has in other pipelines of diffusers, and what there is in their place."""


def keywords_checked(call: Callable[P, R]) -> Callable[P, R]:
    """Tell whoever gives what the pipeline does not have, or a number first, where the prompt belongs, what to write.

    A function with ``**options`` hands them to a call of the pipeline.

    Raises:
        TypeError: a keyword that there is not. ValueError: a number first.
    """
    parameters = inspect.signature(call).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    @functools.wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > 1 and isinstance(args[1], numbers.Number):
            raise ValueError(f"the prompt comes first: write num_images_per_prompt={args[1]} for a number of images")
        known = set(parameters)
        if passes_on:
            own = set(inspect.signature(type(args[0]).__call__).parameters)
            known |= own - {"on_block", "return_dict"}
        if unknown := [name for name in kwargs if name not in known]:
            raise TypeError(_refusal(call.__name__, unknown[0], known))
        return call(*args, **kwargs)

    return checked


def _refusal(call: str, name: str, known: Collection[str]) -> str:
    where = "this pipeline" if call == "__call__" else f"{call} of this pipeline"
    for pattern, instead in _ABSENT.items():
        if re.fullmatch(pattern, name):
            return f"{where} has no {name}: {instead}"
    offered = sorted(set(known) - {"self", "options", "prompt_embeds", "negative_prompt_embeds"})
    near = difflib.get_close_matches(name.lower(), offered, 1)
    return f"{where} has no {name}: " + (f"did you mean {near[0]}=?" if near else f"there are {', '.join(offered)}")
