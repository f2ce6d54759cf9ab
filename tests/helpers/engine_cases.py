"""Models, noise and configurations that the engine's tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from madformer.conditioning.prompt import Prompt
from madformer.config import MADFormerConfig, TextConfig, tiny
from madformer.model import MADFormer
from tests.helpers.testing import perturb

BATCH, STEPS = 2, 3
TEXT = TextConfig(vocab_size=11, length=5)
ACDIT = tiny().replace(
    unet=None, time_conditioning="adaln", num_classes=7, context="clean", diffusion_layers=3, shared_towers=True,
    mlp="gelu", mlp_bias=True, rope_pairing="released",
)  # fmt: skip

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
    "AdaLN and U-Net": tiny().replace(time_conditioning="unet+adaln", num_classes=7),
    "AdaLN alone": tiny().replace(time_conditioning="adaln"),
    "patches": tiny().replace(unet=None, time_conditioning="adaln", num_classes=7),
    "text and classes": tiny().replace(text=TEXT, time_conditioning="unet+adaln", num_classes=7),
    "ACDiT": ACDIT,
    "DiT": ACDIT.replace(num_blocks=1),
    "wide blocks in a tall image": tiny().replace(block_shape=(1, 4), block_grid=(3, 2), num_blocks=6),
    "spiral": tiny().replace(block_order="spiral", block_grid=(2, 3), num_blocks=6, text=TEXT),
    "any order": tiny().replace(block_order="random"),
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


def draw_prompt(config: MADFormerConfig, batch: int = BATCH, seed: int = 5, *, guided: bool = False) -> Prompt:
    """What the model asks for."""
    generator = torch.Generator().manual_seed(seed)
    texts: list[Tensor | None] = [None, None]
    if config.text is not None:
        shape = (batch, config.text.length)
        texts = [torch.randint(0, config.text.vocab_size, shape, generator=generator) for _ in range(1 + guided)]
    label = torch.randint(0, config.num_classes, (batch,), generator=generator) if config.num_classes else None
    return Prompt(texts[0], texts[1] if guided else None, label)


def one_of(prompt: Prompt, index: int) -> Prompt:
    """The prompt of one image."""
    return Prompt(*(None if ids is None else ids[index] for ids in (prompt.text, prompt.negative_text, prompt.label)))
