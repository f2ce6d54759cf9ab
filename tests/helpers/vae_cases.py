"""A small autoencoder of every class of diffusers that the pipeline takes."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

CLASSES = (
    "AutoencoderKL",
    "AutoencoderTiny",
    "AsymmetricAutoencoderKL",
    "AutoencoderDC",
    "AutoencoderKLHunyuanImage",
    "VQModel",
)
_DOWN, _UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
_KL = {"block_out_channels": (8, 8), "down_block_types": _DOWN, "up_block_types": _UP, "norm_num_groups": 4}
_CONFIGS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {**_KL, "scaling_factor": 0.7, "shift_factor": 0.3},
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1), "scaling_factor": 0.9, "shift_factor": 0.2,
    },
    "AsymmetricAutoencoderKL": {
        "down_block_types": _DOWN, "down_block_out_channels": (8, 8), "up_block_types": _UP,
        "up_block_out_channels": (8, 8), "norm_num_groups": 4,
    },
    "AutoencoderDC": {
        "latent_channels": 4, "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock",
        "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()), "downsample_block_type": "conv", "scaling_factor": 0.5,
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32),
        "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 16, "scaling_factor": 0.6,
    },
    "VQModel": {**_KL, "latent_channels": 4, "num_vq_embeddings": 16},
}  # fmt: skip


def make_vae(name: str, **changes: Any) -> Any:
    """Random weights, pictures of 3 channels, latents of 4 at half the resolution."""
    torch.manual_seed(0)
    return getattr(diffusers, name)(**{**_CONFIGS[name], **changes}).eval().requires_grad_(False)
