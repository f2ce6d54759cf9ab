"""Models, noise and configurations that the engine's tests share."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from madformer.conditioning.prompt import Prompt
from madformer.config import MADFormerConfig, TextConfig, UNetConfig, tiny
from madformer.model import MADFormer
from tests.helpers.testing import perturb

BATCH, STEPS = 2, 3
TEXT = TextConfig(vocab_size=11, length=5)
ACDIT = tiny().replace(
    unet=None, time_conditioning="adaln", num_classes=7, context="clean", diffusion_layers=3, shared_towers=True,
    mlp="gelu", mlp_bias=True, rope_pairing="released",
)  # fmt: skip
# A U-Net of one level, for what is not about it. Its norms see 8 channels of 16 places each: of fewer numbers, what is
# rounded grows beyond the tests' tolerances.
FLAT = tiny().replace(block_size=16, unet=UNetConfig((32,), (1,), (True,), 4, norm_groups=4, time_embed_dim=32))

CASES: dict[str, MADFormerConfig] = {
    "a U-Net of two levels": tiny(),
    "both": FLAT,
    "clean only": FLAT.replace(context="clean"),
    "condition only": FLAT.replace(context="condition"),
    "noisy blocks only": FLAT.replace(context="noise"),
    "block-local": FLAT.replace(cross_block_attention=False),
    "block-local, condition only": FLAT.replace(cross_block_attention=False, context="condition"),
    "block-local, clean only": FLAT.replace(cross_block_attention=False, context="clean"),
    "shared towers": FLAT.replace(shared_towers=True),
    "one block": FLAT.replace(num_blocks=1),
    "one block, condition only": FLAT.replace(num_blocks=1, context="condition"),
    "all layers diffusion": FLAT.replace(diffusion_layers=3),
    "one layer diffusion": FLAT.replace(diffusion_layers=1),
    "nine blocks": FLAT.replace(num_blocks=9),
    "released quirks": FLAT.replace(rope_pairing="released", clean_timestep="noisy", square_blocks=False),
    "released quirks, condition only": FLAT.replace(
        rope_pairing="released", clean_timestep="noisy", context="condition"
    ),
    "text": FLAT.replace(text=TEXT),
    "text, condition only": FLAT.replace(text=TEXT, context="condition"),
    "text, clean only": FLAT.replace(text=TEXT, context="clean"),
    "text, block-local": FLAT.replace(text=TEXT, cross_block_attention=False),
    "text, released pairing": FLAT.replace(text=TEXT, rope_pairing="released"),
    "AdaLN and U-Net": tiny().replace(time_conditioning="unet+adaln", num_classes=7),
    "AdaLN alone": FLAT.replace(time_conditioning="adaln"),
    "patches": tiny().replace(unet=None, time_conditioning="adaln", num_classes=7),
    "text and classes": FLAT.replace(text=TEXT, time_conditioning="unet+adaln", num_classes=7),
    "ACDiT": ACDIT,
    "DiT": ACDIT.replace(num_blocks=1),
    "wide blocks in a tall image": FLAT.replace(block_shape=(2, 8), block_grid=(3, 2), num_blocks=6),
    "spiral": FLAT.replace(block_order="spiral", block_grid=(2, 3), num_blocks=6, text=TEXT),
    "any order": FLAT.replace(block_order="random"),
    "no QK-norm": FLAT.replace(qk_norm=False),
    "sample prediction": FLAT.replace(prediction_type="sample"),
    "v prediction": FLAT.replace(prediction_type="v_prediction"),
}


def make_model(config: MADFormerConfig) -> MADFormer:
    torch.manual_seed(0)
    model = perturb(MADFormer(config))
    assert isinstance(model, MADFormer)
    return model


@functools.cache
def shared_model(config: MADFormerConfig) -> MADFormer:
    """The same one each time, for tests that leave it as it is: to make one takes as long as three of its passes."""
    return make_model(config)


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
