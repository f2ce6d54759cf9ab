"""The released-style loop under Hugging Face's ``Accelerator``, its average by diffusers' ``EMAModel``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from madformer.compat.madformer_ffhq import MADFormer
from madformer.model.blocks import to_maps
from tests.helpers.testing import perturb, relative_error

accelerate = pytest.importorskip("accelerate")

CONFIG = {
    "intermediate_size": 32, "unet_block_out_channels": [8], "unet_num_layers_per_block": [1], "unet_resnet_groups": 4,
    "unet_transformer_layers_per_block": [0], "unet_time_emb_dim": 16,
}  # fmt: skip
SIZES = {"hidden_size": 32, "num_heads": 2, "block_size": 4, "spatial_len": 16, "depth": 2, "diff_depth": 1}
MICRO_BATCHES, STEPS = 2, 2


def make(kind: str) -> Any:
    torch.manual_seed(0)
    model = MADFormer(model_config_path=CONFIG, **SIZES)
    perturb(model)
    return (model if kind == "compat" else copy.deepcopy(model.to_native())).train()


def batch(index: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    clean, noise = (torch.randn(2, 4, 4, 4, generator=generator) for _ in range(2))
    return clean, noise, torch.randint(0, 1000, (2, 4), generator=generator)


def loss_of(model: nn.Module, index: int) -> Tensor:
    clean, noise, t = batch(index)
    output = model(clean, clean + noise, t)
    if isinstance(output, tuple):
        return F.mse_loss(output[0].float(), to_maps(noise)) + 0.1 * F.mse_loss(output[1].float(), to_maps(clean))
    image, hidden = output.prediction.float(), output.condition.float()
    return F.mse_loss(image, noise) + 0.1 * F.mse_loss(hidden, clean)


def plain_losses(kind: str, dtype: torch.dtype | None) -> list[float]:
    model = make(kind)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in range(STEPS):
        for part in range(MICRO_BATCHES):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = loss_of(model, step * MICRO_BATCHES + part)
            (loss / MICRO_BATCHES).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", ["compat", "native"])
def test_losses_accumulation_and_resume(kind: str, precision: str, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    # one for a process, unless told to forget
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=MICRO_BATCHES)
    raw = make(kind)
    model, optimizer = accelerator.prepare(raw, torch.optim.AdamW(raw.parameters(), lr=1e-3))
    assert accelerator.unwrap_model(model) is raw
    losses = []

    def steps(first: int, last: int) -> None:
        for index in range(first * MICRO_BATCHES, last * MICRO_BATCHES):
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = loss_of(model, index)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())

    steps(0, 1)
    accelerator.save_state(str(tmp_path / "state"))
    steps(1, STEPS)
    assert losses == pytest.approx(plain_losses(kind, torch.bfloat16 if precision == "bf16" else None), rel=1e-4)
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    steps(1, STEPS)
    assert losses[-MICRO_BATCHES:] == losses[-2 * MICRO_BATCHES : -MICRO_BATCHES]


def test_the_average_by_diffusers_is_drawn_from() -> None:
    """``copy_to`` and ``restore`` write to the parameters' data; each sample is drawn from what they hold then."""
    model = make("compat")
    ema = EMAModel(model.parameters(), decay=0.5, min_decay=0.5)
    # the first step takes the weights as they are
    for seed in (2, 3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
        ema.step(model.parameters())

    def sample(model: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return model.eval().sample(DDIMScheduler(), 2, (1, 4, 4, 4), generator=generator, dtype=torch.float)

    raw, averaged = copy.deepcopy(model), copy.deepcopy(model)
    averaged.load_state_dict(dict(zip(dict(model.named_parameters()), ema.shadow_params, strict=True)))
    wanted_raw, wanted_averaged = sample(raw), sample(averaged)
    assert relative_error(wanted_raw, wanted_averaged) > 1e-3
    assert torch.equal(sample(model), wanted_raw)
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    assert torch.equal(sample(model), wanted_averaged)
    ema.restore(model.parameters())
    assert torch.equal(sample(model), wanted_raw)
