"""The objective against its closed forms."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from madformer.config import PredictionType, tiny
from madformer.model import MADFormer, MADFormerOutput
from madformer.training.losses import prediction_target, training_losses
from testing import perturb


def make_model(**changes: object) -> MADFormer:
    torch.manual_seed(0)
    model = perturb(MADFormer(tiny().replace(**changes)))
    assert isinstance(model, MADFormer)
    return model


class Spy(nn.Module):
    """Records what the model was given and what it said."""

    def __init__(self, module: MADFormer) -> None:
        super().__init__()
        self.module = module

    def forward(self, clean: Tensor, noisy: Tensor, timestep: Tensor, **options: bool) -> MADFormerOutput:
        self.inputs, self.options = (clean, noisy, timestep), options
        self.output = self.module(clean, noisy, timestep, **options)
        return self.output


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_losses_are_their_definition(prediction_type: PredictionType) -> None:
    """Noise is recovered from the noisy block, so the target is computed another way than the code does."""
    spy = Spy(make_model(prediction_type=prediction_type))
    clean = torch.randn(3, 4, 16, 4, generator=torch.Generator().manual_seed(1))
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(2)
    losses = training_losses(spy, clean, scheduler, hidden_weight=0.1, clean_weight=0.2, generator=generator)

    _, noisy, timestep = spy.inputs
    assert timestep.unique().numel() > 4, "every block has a timestep of its own"
    signal = scheduler.alphas_cumprod[timestep][..., None, None].double()
    noise = (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    target = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": signal.sqrt() * noise - (1 - signal).sqrt() * clean,
    }[prediction_type]
    output = spy.output
    assert losses.image.item() == pytest.approx((output.prediction - target).square().mean().item(), rel=1e-4)
    assert losses.hidden.item() == pytest.approx((output.condition - clean).square().mean().item(), rel=1e-5)
    expected = (output.clean - clean)[:, :-1].square().mean().item()
    assert losses.clean.item() == pytest.approx(expected, rel=1e-5)
    total = losses.image + 0.1 * losses.hidden + 0.2 * losses.clean
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-6)
    assert set(losses.parts()) == {"loss", "image", "hidden", "clean"}


def test_losses_without_weight_are_not_computed() -> None:
    spy = Spy(make_model())
    losses = training_losses(spy, torch.randn(1, 4, 16, 4), DDPMScheduler(), hidden_weight=0)
    assert spy.options == {"return_condition": False, "return_clean": False}
    assert losses.hidden is None
    assert losses.clean is None
    assert losses.total is losses.image


def test_the_generator_decides_everything() -> None:
    model, clean = make_model(), torch.randn(2, 4, 16, 4)
    first, again, other = (
        training_losses(model, clean, DDPMScheduler(), generator=torch.Generator().manual_seed(seed)).total.item()
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_targets() -> None:
    clean, noise = torch.ones(2, 1), torch.full((2, 1), 3.0)
    scheduler, timestep = DDPMScheduler(), torch.tensor([0, 999])
    assert prediction_target("epsilon", scheduler, clean, noise, timestep) is noise
    assert prediction_target("sample", scheduler, clean, noise, timestep) is clean
    velocity = prediction_target("v_prediction", scheduler, clean, noise, timestep)
    torch.testing.assert_close(velocity[0], torch.tensor([3.0]), atol=0.05, rtol=0)  # hardly noisy: v is the noise
    torch.testing.assert_close(velocity[1], torch.tensor([-1.0]), atol=0.05, rtol=0)  # all noise: v is minus the image
