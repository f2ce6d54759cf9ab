"""What a call of the pipeline is given, checked and brought into the engine's shapes.

Shape legend: B images, M blocks, L latents of a block, C channels, H rows, W columns.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from madformer.config import MADFormerConfig
from madformer.model.blocks import to_blocks
from madformer.seeds import check_seed, generator_of

P = ParamSpec("P")
R = TypeVar("R")


def prompt_first(call: Callable[P, R]) -> Callable[P, R]:
    """Tell whoever passes a number of images first, where it once was, what to write."""

    @functools.wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > 1 and isinstance(args[1], numbers.Number):
            raise ValueError(f"the prompt comes first: write num_images_per_prompt={args[1]} for a number of images")
        return call(*args, **kwargs)

    return checked


def check_prompts(**prompts: Any) -> None:
    """Raises ``ValueError`` for a prompt that is neither a text nor a list of texts."""
    for name, prompt in prompts.items():
        entries = prompt if isinstance(prompt, (list, tuple)) else [prompt]
        if prompt is not None and not all(isinstance(entry, str) for entry in entries):
            raise ValueError(f"{name} must be a text or a list of texts, got {_kind(prompt)}")


def check_no_embeddings(**embeddings: Any) -> None:
    """Raises ``ValueError`` where there are any."""
    for name, given in embeddings.items():
        if given is not None:
            raise ValueError(f"{name} has no place: the model reads token ids, so give {name.removesuffix('_embeds')}")


def images_each(num_images_per_prompt: int, num_images: int | None) -> int:
    """How many images of every prompt or class, by whichever of its two names it was given.

    Raises:
        ValueError: given by both, or no positive integer.
    """
    name, count = "num_images_per_prompt", num_images_per_prompt
    if num_images is not None:
        if num_images_per_prompt != 1:
            raise ValueError("give num_images_per_prompt or num_images, which are the same, not both")
        name, count = "num_images", num_images
    if isinstance(count, bool) or not isinstance(count, numbers.Integral):
        raise ValueError(f"{name}={count!r} must be an integer")
    if count < 1:
        raise ValueError(f"{name}={count} must be at least 1")
    return int(count)


def generators_of(
    count: int, seed: int | None, generator: torch.Generator | list[torch.Generator] | None
) -> list[torch.Generator]:
    """One for each image: what seeds give, what was given, or PyTorch's own for all, as in diffusers.

    Raises:
        ValueError: given beside a seed, or in another number.
    """
    if seed is not None:
        if generator is not None:
            raise ValueError("give seed or generator, not both")
        first = check_seed(seed, count)
        return [generator_of(first + index) for index in range(count)]
    if generator is None:
        # the processor's, wherever the model is: a picture does not depend on the device
        return [torch.default_generator] * count
    generators = [generator] * count if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != count:
        raise ValueError(f"generator has {len(generators)} entries for {count} images")
    return generators


def noise_of(latents: Tensor | None, generators: list[torch.Generator], config: MADFormerConfig) -> Tensor:
    """Standard normal noise ``(B, M, L, C)`` in fp32: the given ``(B, C, H, W)``, else what the generators draw.

    Raises:
        ValueError: latents of another shape, or that are not finite.
    """
    if latents is None:
        block = (config.num_blocks, config.latents_per_block, config.latent_channels)
        drawn = (torch.randn(block, generator=g, device=g.device, dtype=torch.float32) for g in generators)
        drawn = (torch.randn(block, generator=g, device=g.device, dtype=torch.float32) for g in generators)
        return torch.stack([noise.cpu() for noise in drawn])
    shape = (len(generators), *config.latent_shape)
    if not isinstance(latents, Tensor) or latents.shape != shape:
        given = tuple(latents.shape) if hasattr(latents, "shape") else _kind(latents)
        raise ValueError(f"latents must be noise of the shape {shape}, got {given}")
    if not latents.isfinite().all():
        raise ValueError("latents must be noise, and these are not finite")
    return to_blocks(latents.detach().float(), config)


def _kind(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {', '.join(sorted({type(entry).__name__ for entry in value}))}"
    return type(value).__name__
