"""Models, noise and configurations that the engine's tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from madformer.config import MADFormerConfig, TextConfig, tiny
from madformer.model import MADFormer
from testing import perturb

BATCH, STEPS = 2, 3
TEXT = TextConfig(vocab_size=11, length=5)

CASES: dict[str, MADFormerConfig] = {
    "both": tiny(),
    "clean only": tiny().replace(context="clean"),
    "condition only": tiny().replace(context="condition"),
    "noisy blocks only": tiny().replace(context="noise"),
    "block-local": tiny().replace(cross_block_attention=False),
    "block-local, condition only": tiny().replace(cross_block_attention=False, context="condition"),
    "block-local, clean only": tiny().replace(cross_block_attention=False, context="clean"),
    "shared towers": tiny().replace(shared_towers=True),
    "one block": tiny().replace(num_blocks=1),
    "one block, condition only": tiny().replace(num_blocks=1, context="condition"),
    "all layers diffusion": tiny().replace(diffusion_layers=3),
    "one layer diffusion": tiny().replace(diffusion_layers=1),
    "nine blocks": tiny().replace(num_blocks=9),
    "released quirks": tiny().replace(rope_pairing="released", clean_timestep="noisy", square_blocks=False),
    "released quirks, condition only": tiny().replace(
        rope_pairing="released", clean_timestep="noisy", context="condition"
    ),
    "text": tiny().replace(text=TEXT),
    "text, condition only": tiny().replace(text=TEXT, context="condition"),
    "text, clean only": tiny().replace(text=TEXT, context="clean"),
    "text, block-local": tiny().replace(text=TEXT, cross_block_attention=False),
    "text, released pairing": tiny().replace(text=TEXT, rope_pairing="released"),
    "no QK-norm": tiny().replace(qk_norm=False),
    "sample prediction": tiny().replace(prediction_type="sample"),
    "v prediction": tiny().replace(prediction_type="v_prediction"),
}


def make_model(config: MADFormerConfig) -> MADFormer:
    torch.manual_seed(0)
    model = perturb(MADFormer(config))
    assert isinstance(model, MADFormer)
    return model


def draw_noise(config: MADFormerConfig, batch: int = BATCH, seed: int = 1) -> Tensor:
    shape = (batch, config.num_blocks, config.latents_per_block, config.latent_channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_text(config: MADFormerConfig, batch: int = BATCH, seed: int = 5) -> Tensor | None:
    """``(B, P)``; None for a model without text."""
    if config.text is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.text.vocab_size, (batch, config.text.length), generator=generator)
