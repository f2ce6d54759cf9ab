"""Evaluations against counts by hand, and against what the engine runs; operations against PyTorch's counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from torch import nn

from madformer.conditioning.prompt import Prompt
from madformer.config import MADFormerConfig, TextConfig
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.measuring.bare import Work
from madformer.model import MADFormer
from madformer.model.layer import TransformerLayer
from madformer.sweeps.costs import evaluations_of, flops_per_image
from tests.helpers.testing import small_config

SPLIT: dict[str, Any] = {"num_layers": 5, "diffusion_layers": 2}


def model_of(**changes: Any) -> MADFormer:
    with torch.device("meta"):
        return MADFormer(small_config(**changes))


@pytest.mark.parametrize(
    ("changes", "scheduler", "options", "steps", "layers"),
    [
        # 3 for the condition, 5 for 3 of 4 finished blocks, 2 in each of 4 steps
        (SPLIT, DDIMScheduler(), {"steps": 4}, 4, 3 + 5 * 3 / 4 + 2 * 4),
        (SPLIT, DDIMScheduler(), {"steps": 4, "guidance": 3.0}, 8, 2 * (3 + 5 * 3 / 4 + 2 * 4)),
        # the layers run in steps 0, 3 and 6 of 8
        (SPLIT, DDIMScheduler(), {"steps": 8, "refresh_every": 3}, 8, 3 + 5 * 3 / 4 + 2 * 3),
        # Heun's second order looks twice, but for the last step
        (SPLIT, HeunDiscreteScheduler(), {"steps": 4}, 7, 3 + 5 * 3 / 4 + 2 * 7),
        # plain diffusion: nothing is finished before, and all layers are diffusion layers
        ({"num_layers": 5, "diffusion_layers": 5, "num_blocks": 1}, DDIMScheduler(), {"steps": 4}, 4, 5 * 4),
        (SPLIT | {"context": "condition"}, DDIMScheduler(), {"steps": 4}, 4, 3 + 2 * 4),
        # without attention across blocks the clean stream ends where the condition does
        (SPLIT | {"cross_block_attention": False}, DDIMScheduler(), {"steps": 4}, 4, 3 + 3 * 3 / 4 + 2 * 4),
    ],
)
def test_evaluations_by_hand(
    changes: dict[str, Any], scheduler: Any, options: dict[str, Any], steps: int, layers: float
) -> None:
    found = evaluations_of(model_of(**changes), scheduler, SamplingOptions(**options))
    assert (found.steps, found.layers) == (steps, layers)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("refresh", [1, 2])
def test_evaluations_are_what_the_engine_runs(guidance: float, refresh: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(**SPLIT, text=TextConfig(11, 3))
    model, tokens = MADFormer(config), 0
    forward = TransformerLayer.forward

    def counted(self: nn.Module, streams: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        nonlocal tokens
        tokens += sum(x.shape[0] * x.shape[1] for name, x in streams.items() if name != "text")
        return forward(self, streams, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(TransformerLayer, "forward", counted)
    options = SamplingOptions(3, guidance, refresh_every=refresh)
    sampler = Sampler(model, DDIMScheduler(clip_sample=False))
    plan = sampler.plan(2, options)
    text = torch.zeros(2, 3, dtype=torch.int64)
    plan.run(torch.randn(plan.slots.canvas_RMLC.shape), Prompt(text, text if guidance > 1 else None))
    expected = evaluations_of(model, sampler.scheduler, options)
    assert tokens / (2 * config.num_blocks * config.block_size) == expected.layers


def test_operations() -> None:
    model = model_of(num_layers=3, diffusion_layers=2, text=TextConfig(11, 3))
    work, scheduler = Work.of(model), DDIMScheduler()

    def flops(steps: int, guidance: float = 1.0, refresh: int = 1) -> int:
        options = SamplingOptions(steps, guidance, refresh_every=refresh)
        return flops_per_image(model, evaluations_of(model, scheduler, options), guided=options.guided)

    assert flops(5) == work.flops(5)
    assert flops(6, refresh=3) == work.ar_flops + 2 * work.step_flops + 4 * work.unet_flops
    # under guidance all twice, but for the embedding of 4 blocks in 5 steps and of 3 finished ones
    downsampler = embedding_flops(model.config)
    assert flops(5, 2.0) == 2 * work.flops(5) - (5 * 4 + 3) * downsampler


def embedding_flops(config: MADFormerConfig) -> int:
    """Of the U-Net's first half, by its convolutions' and linear layers' shapes."""
    assert config.unet is not None
    model, total = MADFormer(config), 0

    def count(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        total += 2 * weight[0].numel() * output.numel()

    for module in model.downsampler.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model.embed(
            torch.zeros(1, 1, config.latents_per_block, config.latent_channels),
            torch.zeros(1, config.unet.time_embed_dim),
        )
    return total
