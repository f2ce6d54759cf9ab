"""What a call of the pipeline is given, checked and brought into the engine's shapes; and what it has no place for.

Shape legend: B images, M blocks, L latents of a block, C channels, H rows, W columns.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import re
from collections.abc import Callable, Collection
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from madformer.arguments import floats, shown, whole_number
from madformer.config import MADFormerConfig
from madformer.model.blocks import to_blocks
from madformer.seeds import check_seed, generator_of

P = ParamSpec("P")
R = TypeVar("R")

MAX_IMAGES = 65_536
"""They are drawn at once."""


def check_no_embeddings(**embeddings: Any) -> None:
    """Raises ``ValueError`` where there are any."""
    for name, given in embeddings.items():
        if given is not None:
            raise ValueError(f"{name} has no place: the model reads token ids, so give {name.removesuffix('_embeds')}")


def images_each(num_images_per_prompt: int, num_images: int | None) -> int:
    """How many images of every prompt or class, by whichever of its two names it was given.

    Raises:
        ValueError: given by both, or no whole number from 1 to ``MAX_IMAGES``.
    """
    if num_images is None:
        return whole_number("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
    if num_images_per_prompt != 1:
        raise ValueError("give num_images_per_prompt or num_images, which are the same, not both")
    return whole_number("num_images", num_images, 1, MAX_IMAGES)


def generators_of(
    count: int, seed: int | None, generator: torch.Generator | list[torch.Generator] | None
) -> list[torch.Generator]:
    """One for each image: what seeds give, what was given, or PyTorch's own for all, as in diffusers.

    Raises:
        ValueError: given beside a seed, of another kind, or in another number.
    """
    if seed is not None:
        if generator is not None:
            raise ValueError("give seed or generator, not both")
        first = check_seed(seed, count)
        return [generator_of(first + index) for index in range(count)]
    if generator is None:
        # the processor's, wherever the model is: a picture does not depend on the device
        return [torch.default_generator] * count
    generators = [generator] * count if isinstance(generator, torch.Generator) else generator
    if not isinstance(generators, (list, tuple)) or not all(isinstance(one, torch.Generator) for one in generators):
        raise ValueError(f"generator={shown(generator)} must be a torch.Generator, or a list of one for each image")
    if len(generators) != count:
        raise ValueError(f"generator has {len(generators)} entries for {count} images")
    return list(generators)


def noise_of(latents: Tensor | None, generators: list[torch.Generator], config: MADFormerConfig) -> Tensor:
    """Standard normal noise ``(B, M, L, C)`` in fp32: the given ``(B, C, H, W)``, else what the generators draw.

    Raises:
        ValueError: latents of another kind or shape, or that are not finite.
    """
    if latents is None:
        block = (config.num_blocks, config.latents_per_block, config.latent_channels)
        drawn = (torch.randn(block, generator=g, device=g.device, dtype=torch.float32) for g in generators)
        return torch.stack([noise.cpu() for noise in drawn])
    floats("latents", latents, (len(generators), *config.latent_shape))
    if not latents.isfinite().all():
        raise ValueError("latents must be noise, and these are not finite")
    return to_blocks(latents.detach().float(), config)


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
