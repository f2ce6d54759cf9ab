"""Every combination of the configuration's switches: it trains and samples, or says why it is none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from madformer.config import MADFormerConfig, TextConfig, UNetConfig
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.training.losses import Batch, LossWeights, training_losses
from tests.helpers.engine_cases import draw_noise, draw_prompt, make_model

BASE: dict[str, Any] = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 16, "num_blocks": 4, "block_size": 1,
    "diffusion_layers": 1,
}  # fmt: skip
UNET = UNetConfig((8,), (1,), (False,), num_heads=1, norm_groups=2, time_embed_dim=4)
SWITCHES: dict[str, tuple[Any, ...]] = {
    "cross_block_attention": (True, False),
    "shared_towers": (False, True),
    "time_conditioning": ("unet", "adaln", "unet+adaln"),
    "text": (None, TextConfig(vocab_size=5, length=3)),
    "num_classes": (0, 2),
    "elastic_diffusion_layers": ((), (1, 2)),
    "mlp": ("swiglu", "gelu"),
}
CONTEXTS = ("clean+condition", "clean", "condition", "noise")


def reason_against(fields: dict[str, Any]) -> str | None:
    """A field that the refusal names; None for what is possible."""
    adaln = "adaln" in fields["time_conditioning"]
    clean, condition = "clean" in fields["context"], "condition" in fields["context"]
    if fields["shared_towers"] and not clean:
        return "shared_towers"
    if fields["unet"] is None and fields["time_conditioning"] != "adaln":
        return "unet=None"
    if fields["num_classes"] and not adaln:
        return "num_classes"
    if fields["elastic_diffusion_layers"] and (not condition or not fields["cross_block_attention"] or adaln):
        return "elastic_diffusion_layers"
    return None


def values_of_switches(every: bool) -> Iterator[tuple[Any, ...]]:
    """All combinations, or a quarter: whatever three switches are looked at, all their combinations are among them."""
    for choice in itertools.product(*(range(len(values)) for values in SWITCHES.values())):
        attention, towers, time, text, classes, elastic, mlp = choice
        if every or (attention + towers + time + text) % 2 == (time + text + classes + elastic + mlp) % 2 == 0:
            yield tuple(values[index] for index, values in zip(choice, SWITCHES.values(), strict=True))


def test_a_quarter_of_the_combinations_has_every_three() -> None:
    chosen = [tuple(map(str, values)) for values in values_of_switches(every=False)]
    names = [[str(value) for value in values] for values in SWITCHES.values()]
    for three in itertools.combinations(range(len(names)), 3):
        wanted = set(itertools.product(*(names[index] for index in three)))
        assert {tuple(values[index] for index in three) for values in chosen} == wanted


@pytest.mark.parametrize("unet", [UNET, None], ids=["U-Net", "patches"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["a quarter", "all"])
def test_it_trains_and_samples_or_says_why_not(every: bool, context: str, unet: UNetConfig | None) -> None:
    tried = 0
    for values in values_of_switches(every):
        fields = {**BASE, "context": context, "unet": unet, **dict(zip(SWITCHES, values, strict=True))}
        if (named := reason_against(fields)) is not None:
            with pytest.raises(ValueError, match=named) as caught:
                MADFormerConfig(**fields)
            assert "\n" not in str(caught.value)
            continue
        tried += 1
        train_and_sample(MADFormerConfig(**fields))
    assert tried > 0


@pytest.mark.parametrize("block_order", ["raster", "spiral", "random"])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["half", "all"])
def test_every_geometry_trains_and_samples_or_says_why_not(every: bool, block_order: str) -> None:
    """Half of them has every four of the five switches."""
    geometry = {"num_blocks": 4, "block_size": 2, "block_shape": (1, 2), "block_order": block_order}
    others = (CONTEXTS, ((), (1, 4)), (True, False), (UNET, None), (None, SWITCHES["text"][1]))
    for choice in itertools.product(*(range(len(values)) for values in others)):
        if not every and sum(choice) % 2:
            continue
        context, grid, square_blocks, unet, text = (values[at] for values, at in zip(others, choice, strict=True))
        fields = {**BASE, **geometry, "context": context, "block_grid": grid, "unet": unet, "text": text}
        fields |= {"square_blocks": square_blocks, "time_conditioning": "unet" if unet else "adaln"}
        if square_blocks:
            train_and_sample(MADFormerConfig(**fields))
        else:
            with pytest.raises(ValueError, match="square_blocks=False is for squares in raster order"):
                MADFormerConfig(**fields)


def train_and_sample(config: MADFormerConfig) -> None:
    model, noise, prompt = make_model(config), draw_noise(config), draw_prompt(config, guided=config.can_be_guided)
    order = torch.tensor([[2, 0, 3, 1]] * len(noise)) if config.block_order == "random" else None
    weights = LossWeights(hidden=0.1, clean=0.1, text=0.1 if config.text else 0.0)
    timestep = torch.tensor([[0, 300, 600, 999]] * len(noise))
    splits = config.elastic_diffusion_layers or (None,)
    for split in splits:
        batch = Batch(noise, -noise, timestep, prompt.label, text_BP=prompt.text, order_BM=order)
        losses = training_losses(model, batch, DDPMScheduler(), weights, diffusion_layers=split)
        losses.total.backward()
        assert all(math.isfinite(value) for value in losses.parts().values()), config
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), config
    for split in splits:
        guidance = 2.0 if config.can_be_guided else 1.0
        plan = Sampler(model.set_split(split or config.diffusion_layers), DDIMScheduler()).plan(
            2, SamplingOptions(1, guidance=guidance)
        )
        assert plan.run(noise, prompt).shape == noise.shape  # and finite, or it had raised
