"""Native models as released ones: the way back of ``to_native`` of our drop-ins."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from madformer.compat import madformer_ffhq, madformer_imagenet
from madformer.compat.madformer_ffhq import CONTEXTS
from madformer.compat.released_config import VAE_DOWNSCALE
from madformer.config import MADFormerConfig
from madformer.files.atomic import atomic_path, write_json
from madformer.model import MADFormer as NativeMADFormer


def to_released(native: NativeMADFormer) -> madformer_ffhq.MADFormer:
    """The released class, ImageNet's for a model with text, over the native weights, which both then share.

    Raises:
        ValueError: the released code computes something else from such weights; names the fields.
    """
    family = madformer_ffhq if native.config.text is None else madformer_imagenet
    with torch.device("meta"):
        model = family.MADFormer(**released_arguments(native.config))
    ours, theirs = (dataclasses.asdict(config) for config in (native.config, model.config))
    if different := [f"{name}={ours[name]!r} (there {theirs[name]!r})" for name in ours if ours[name] != theirs[name]]:
        raise ValueError(f"the released code has no {', '.join(different)}")
    model._adopt(native)
    return model


def released_arguments(config: MADFormerConfig) -> dict[str, Any]:
    """Keywords of the released constructor; raises ``ValueError`` for a model without a U-Net, which it has not."""
    flags = {context: flags for flags, context in CONTEXTS.items()}
    clear_clean, clear_cond = flags[config.context]
    unet = config.unet
    if unet is None:
        raise ValueError("the released code has no unet=None")
    vocabulary: dict[str, Any] = {}
    if config.text is not None:
        vocabulary = {
            "vocab_size": config.text.vocab_size,
            "pad_token_id": config.text.pad_token_id,
            "max_position_embeddings": config.text.length,
            "rope_theta": config.text.rope_theta,
        }
    return {
        "hidden_size": config.hidden_size,
        "depth": config.num_layers,
        "num_heads": config.num_heads,
        "block_size": config.block_size,
        "ar_len": config.num_blocks,
        "spatial_len": config.block_size * config.num_blocks,
        "diff_depth": config.diffusion_layers,
        "no_qk_norm": not config.qk_norm,
        "square_block": config.square_blocks,
        "clear_clean": clear_clean,
        "clear_cond": clear_cond,
        "denoising_mlp": not config.cross_block_attention,
        "model_config_path": {
            "hidden_act": "silu",
            "intermediate_size": config.intermediate_size,
            "rms_norm_eps": config.norm_eps,
            "mlp_bias": config.mlp_bias,
            "unet_block_out_channels": list(unet.block_out_channels),
            "unet_num_layers_per_block": list(unet.layers_per_block),
            "unet_transformer_layers_per_block": [int(attention) for attention in unet.attention],
            "unet_num_heads": unet.num_heads,
            "unet_resnet_groups": unet.norm_groups,
            "unet_time_emb_dim": unet.time_embed_dim,
            **vocabulary,
        },
    }


def save_released(path: str | Path, averaged: NativeMADFormer, raw: NativeMADFormer) -> Path:
    """Write what the released scripts sample from: ``{"model", "ema", "opt", "lrs", "args"}``.

    ``args`` holds what the released ``sample.py`` reads of a run's arguments. Optimiser and schedule are left empty:
    training does not go on from there. Both scripts make the model at their class's default sizes, 1152 wide and 28
    deep; at others it must be told ``hidden_size``, ``depth`` and ``num_heads``, which are in ``args`` too.

    Returns:
        The model configuration that ``args`` names, written beside ``path`` as ``.json``.

    Raises:
        ValueError: as :func:`to_released`, and for tokens numbered over the whole image, which it does not know.
    """
    config = averaged.config
    if not config.square_blocks:
        raise ValueError("the released sample.py has no square_blocks=False")
    states = {"model": to_released(raw).state_dict(), "ema": to_released(averaged).state_dict()}
    arguments = released_arguments(config)
    model_config = arguments["model_config_path"] | {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "pretraining_tp": 1,
    }
    config_path = Path(path).with_suffix(".json")
    arguments |= {
        "model_config_path": str(config_path.absolute()),
        "image_size": config.latent_shape[1] * VAE_DOWNSCALE,
        "patch_size": 1,
        "vae_latent_size": config.latent_channels,
        "pre_downsample_block_size": config.latents_per_block,
    }
    write_json(config_path, model_config)
    with atomic_path(path) as temporary:
        torch.save({**states, "opt": {}, "lrs": {}, "args": argparse.Namespace(**arguments)}, temporary)
    return config_path
