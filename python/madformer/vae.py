"""The autoencoder between pixels and latents: diffusers' ``AutoencoderKL``, loaded and used in one place.

Shape legend: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from madformer.model.persistence import resolve_folder

MAX_UNTILED = 1024
"""Pixels a side: larger pictures are decoded in tiles of this size, unless :func:`set_tile` says otherwise."""
ENCODED_PIXELS = 2**21
"""Of the pictures that a GPU encodes at once: with Stable Diffusion's encoder 5 GiB of activations in fp32, counted by
torch's ``MemTracker``."""


def load_vae(name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> AutoencoderKL:
    """An ``AutoencoderKL`` from a folder or hub id, frozen, in eval mode, channels-last, tiled above ``MAX_UNTILED``.

    Args:
        dtype: cast the weights; None keeps the stored dtype.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged; one line.
    """
    folder = resolve_folder(name)
    try:
        # low_cpu_mem_usage would need accelerate, and says so on every load
        vae = AutoencoderKL.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False)
    except Exception as error:
        # diffusers raises several kinds for one cause, over several lines
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{folder} holds no readable AutoencoderKL: {reason}") from error
    set_tile(vae, MAX_UNTILED)
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def downscale(vae: AutoencoderKL) -> int:
    """Pixels a latent, along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def set_tile(vae: AutoencoderKL, tile: int) -> None:
    """Decode pictures with a side of more than ``tile`` pixels in tiles of that size; 0 never tiles.

    The tiles are diffusers': they overlap by a quarter and are blended linearly. Memory is then a tile's, and the
    result is not quite the untiled one: GroupNorm and attention see a tile, not the picture.

    Raises:
        ValueError: ``tile`` is neither 0 nor a multiple of four times :func:`downscale`, whose quarter is a whole
            number of latents.
    """
    if tile == 0:
        vae.disable_tiling()
        return
    unit = 4 * downscale(vae)
    if tile < 0 or tile % unit:
        raise ValueError(f"tile={tile} must be a multiple of {unit} pixels, or 0 for no tiles")
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // downscale(vae)


def tile_of(vae: AutoencoderKL) -> int:
    """What :func:`set_tile` was given."""
    return vae.tile_sample_min_size if vae.use_tiling else 0


@torch.inference_mode()
def encode(vae: AutoencoderKL, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scaled latents, each ``(B, C, H, W)``, of images in [-1, 1].

    On a GPU in groups of ``ENCODED_PIXELS``; on a CPU all together, which for pictures of 64 pixels takes half as long
    as one by one.
    """
    images = images_BCHW.to(vae.device, vae.dtype)
    group = len(images) if images.device.type == "cpu" else max(1, ENCODED_PIXELS // images[0, 0].numel())
    posteriors = [vae.encode(some).latent_dist for some in images.split(group)]
    scale = vae.config.scaling_factor
    mean = torch.cat([posterior.mean for posterior in posteriors]).float() * scale
    return mean, torch.cat([posterior.std for posterior in posteriors]).float() * scale


@torch.no_grad()
def decode(vae: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
    """Pictures ``(B, 3, H, W)`` in [0, 1] of scaled latents, fp32 on the autoencoder's device; waits for nothing.

    On a CPU one at a time, so that no picture depends on its neighbours: oneDNN's results change with the batch, by
    4e-6 in fp32 and 8e-3 in bf16 (``assets/emoji64``, values in [-1, 1]). On a GPU in groups, whose size depends on
    the device and the picture's size alone.
    """
    latents = latents_BCHW / vae.config.scaling_factor
    latents = latents.to(vae.device, vae.dtype, memory_format=torch.channels_last)
    groups = latents.split(_group_size(vae, latents))
    pixels = torch.cat([vae.decode(group).sample.float() for group in groups])
    return (pixels / 2 + 0.5).clamp(0, 1)


def to_uint8(pixels_BCHW: Tensor) -> Tensor:
    """Values in [0, 1] to ``(B, H, W, 3)`` bytes, rounded."""
    return (pixels_BCHW * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def bytes_per_picture(vae: AutoencoderKL, latents_BCHW: Tensor) -> int:
    """What decoding one picture of these latents takes besides the weights, or one tile of it.

    A decoder holds at most three of its widest activations, those behind the last upsampling, at a time: counted
    with torch's ``MemTracker`` on Stable Diffusion's geometry, at 512, 1024 and 2048 pixels.
    """
    tile = tile_of(vae)
    sides = [side * downscale(vae) for side in latents_BCHW.shape[2:]]
    area = math.prod(min(side, tile or side) for side in sides)
    return 3 * area * max(vae.config.block_out_channels[:2]) * vae.dtype.itemsize


def _group_size(vae: AutoencoderKL, latents_BCHW: Tensor) -> int:
    """How many pictures an eighth of the GPU's memory decodes at once.

    Free memory is not asked for: the grouping, and with it the rounding, would differ from run to run.
    """
    if latents_BCHW.device.type != "cuda":
        return 1
    memory = torch.cuda.get_device_properties(latents_BCHW.device).total_memory
    return max(1, memory // 8 // bytes_per_picture(vae, latents_BCHW))
