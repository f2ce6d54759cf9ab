"""The autoencoder between pixels and latents: diffusers' ``AutoencoderKL``, loaded and used in one place.

Shape legend: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from madformer.model.persistence import resolve_folder


def load_vae(name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> AutoencoderKL:
    """An ``AutoencoderKL`` from a folder or hub id, frozen, in eval mode.

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
    return vae.to(device).eval().requires_grad_(False)


@torch.inference_mode()
def encode(vae: AutoencoderKL, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scaled latents, each ``(B, C, H, W)``, of images in [-1, 1]."""
    posterior = vae.encode(images_BCHW.to(vae.device, vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    return posterior.mean.float() * scale, posterior.std.float() * scale


@torch.no_grad()
def decode(vae: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
    """Pictures ``(B, 3, H, W)`` in [0, 1], fp32 on the CPU, of scaled latents.

    One image at a time: decoding takes far more memory than its latents, and no picture then depends on its
    neighbours.
    """
    latents = (latents_BCHW / vae.config.scaling_factor).to(vae.device, vae.dtype)
    pixels = torch.cat([vae.decode(latent[None]).sample.float() for latent in latents])
    return (pixels / 2 + 0.5).clamp(0, 1).cpu()
