"""What a traced step says it costs, against a real one and closed forms."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from madformer.config import MADFormerConfig
from madformer.model import MADFormer
from madformer.training.config import TrainingConfig, ffhq1024
from madformer.training.costs import Costs, costs_of, loss_weights
from madformer.training.losses import Batch, training_losses
from tests.helpers.testing import small_config


def config_of(model: MADFormerConfig, **changes: object) -> TrainingConfig:
    return TrainingConfig(model=model, precision="fp32", **changes)  # type: ignore[arg-type]


def test_operations_are_those_of_a_real_step() -> None:
    """With one block there is nothing to mask, so PyTorch's own count of attention is right too."""
    config = config_of(small_config(num_blocks=1))
    model = MADFormer(config.model).set_backend("reference")
    shape = (1, 1, config.model.latents_per_block, config.model.latent_channels)
    latents, timestep = torch.randn(shape), torch.zeros(1, 1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        training_losses(
            model, Batch(latents, latents, timestep), DDPMScheduler(), loss_weights(config)
        ).total.backward()
    assert costs_of(config).flops == counter.get_total_flops()
    assert costs_of(config).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_attention_counts_what_the_mask_lets_through() -> None:
    """Without heads' work the layers of a model with and without cross-block attention are the same."""
    config = small_config(num_layers=3, diffusion_layers=2)
    across, local = (
        costs_of(config_of(config.replace(cross_block_attention=cross), hidden_loss_weight=0.0))
        for cross in (True, False)
    )
    size, blocks, layers = config.block_size, config.num_blocks, config.diffusion_layers
    # noise block i sees i clean blocks; of those the last layer's clean queries, and the clean stream, do not run
    dense_noise = sum(range(blocks)) * size**2
    assert across.flops - local.flops >= layers * 6 * 2 * dense_noise * config.hidden_size


def test_memory_adds_up() -> None:
    costs = Costs(parameters=1000, unread=frozenset(), flops=1, activation_bytes=50)
    config = dataclasses.replace(ffhq1024(), batch_size=64, accumulation_steps=2, ema_decays=(0.9, 0.99))
    alone = costs.memory(config, 1)
    assert alone == {
        "weights": 4000, "gradients": 4000, "optimizer": 8000, "averages": 8000, "activations": 32 * 50
    }  # fmt: skip
    sharded = costs.memory(dataclasses.replace(config, parallel="fsdp"), 8)
    assert sharded == {"weights": 500, "gradients": 500, "optimizer": 1000, "averages": 1000, "activations": 4 * 50}
    grouped = costs.memory(dataclasses.replace(config, parallel="hsdp", shard_group=4), 8)
    assert grouped["weights"] == 1000


@pytest.mark.slow
def test_the_papers_model() -> None:
    costs = costs_of(ffhq1024())
    assert costs.parameters == pytest.approx(1.30e9, rel=0.01)
    assert costs.flops == pytest.approx(49e12, rel=0.02)
