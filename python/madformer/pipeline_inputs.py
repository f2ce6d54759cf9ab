"""What a call of the pipeline is given, checked and brought into the engine's shapes.

Shape legend: B images, M blocks, L latents of a block, C channels, H rows, W columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from madformer.arguments import floats, shown, whole_number
from madformer.config import MADFormerConfig
from madformer.model.blocks import to_blocks
from madformer.seeds import check_seed, generator_of

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
