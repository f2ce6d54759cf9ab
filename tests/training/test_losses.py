"""The objective against its closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from madformer.config import PredictionType, TextConfig, tiny
from madformer.model import MADFormer, MADFormerOutput
from madformer.training.losses import Batch, LossWeights, next_token_loss, training_losses
from madformer.training.noise import FlowTimesteps, min_snr_weight, noise_schedule, prediction_target
from tests.helpers.testing import perturb


def make_model(**changes: object) -> MADFormer:
    torch.manual_seed(0)
    model = perturb(MADFormer(tiny().replace(**changes)))
    assert isinstance(model, MADFormer)
    return model


TIMESTEP = torch.tensor([[1, 250, 600, 999], [10, 20, 30, 40], [900, 800, 700, 500]])


def draw_noise() -> Tensor:
    return torch.randn(3, 4, 16, 4, generator=torch.Generator().manual_seed(2))


class Spy(nn.Module):
    """Records what the model was given and what it said."""

    def __init__(self, module: MADFormer) -> None:
        super().__init__()
        self.module = module

    def forward(self, clean: Tensor, noisy: Tensor, timestep: Tensor, *told: Any, **options: Any) -> MADFormerOutput:
        self.inputs, self.options = (clean, noisy, timestep), options
        self.output = self.module(clean, noisy, timestep, *told, **options)
        return self.output


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_losses_are_their_definition(prediction_type: PredictionType) -> None:
    """Noise is recovered from the noisy block, so the target is computed another way than the code does."""
    spy = Spy(make_model(prediction_type=prediction_type))
    clean = torch.randn(3, 4, 16, 4, generator=torch.Generator().manual_seed(1))
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    weights = LossWeights(image=0.5, hidden=0.1, clean=0.2)
    losses = training_losses(spy, Batch(clean, draw_noise(), TIMESTEP), scheduler, weights)

    _, noisy, timestep = spy.inputs
    signal = scheduler.alphas_cumprod[timestep][..., None, None].double()
    noise = (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()
    torch.testing.assert_close(noise.float(), draw_noise(), rtol=0, atol=1e-3)
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
    total = 0.5 * losses.image + 0.1 * losses.hidden + 0.2 * losses.clean
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-6)
    assert set(losses.parts()) == {"loss", "image", "hidden", "clean"}


def test_losses_without_weight_are_not_computed() -> None:
    spy = Spy(make_model())
    losses = training_losses(spy, Batch(draw_noise(), draw_noise(), TIMESTEP), DDPMScheduler(), LossWeights(hidden=0))
    assert spy.options == {
        "diffusion_layers": None, "order_BM": None,
        "return_condition": False, "return_clean": False, "return_logits": False,
    }  # fmt: skip
    assert losses.hidden is None
    assert losses.clean is None
    assert losses.total == losses.image


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weights_the_clean_sample(prediction_type: PredictionType) -> None:
    """Whatever is predicted, an error counts by what it does to the clean sample, times ``min(snr, gamma)``."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    timestep = torch.tensor([1, 100, 400, 999])
    signal = scheduler.alphas_cumprod[timestep].double()
    wrong_by = 0.3
    # the clean sample that follows from x = sqrt(a) clean + sqrt(1 - a) noise and a prediction that is wrong by so much
    clean_error = {
        "epsilon": wrong_by * ((1 - signal) / signal).sqrt(),
        "sample": torch.full_like(signal, wrong_by),
        "v_prediction": wrong_by * (1 - signal).sqrt(),
    }[prediction_type]
    expected = (signal / (1 - signal)).clamp(max=5) * clean_error**2
    weight = min_snr_weight(prediction_type, scheduler, timestep, 5.0)
    torch.testing.assert_close(weight.double() * wrong_by**2, expected, rtol=1e-3, atol=0)


def test_min_snr_of_a_flow() -> None:
    share = torch.tensor([0.001, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    expected = (((1 - share) / share) ** 2).clamp(max=5) * share**2
    weight = min_snr_weight("flow", noise_schedule("flow"), 1000 * share, 5.0)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=0)


def test_a_flow_is_straight() -> None:
    """From the clean sample to the noise at the speed that is to be predicted, whatever the shift of its scheduler."""
    spy, clean = Spy(make_model(prediction_type="flow")), torch.randn(3, 4, 16, 4)
    share_BM = torch.rand(3, 4, generator=torch.Generator().manual_seed(4))
    losses = training_losses(
        spy, Batch(clean, draw_noise(), 1000 * share_BM), noise_schedule("flow", shift=3.0), LossWeights(hidden=0)
    )
    _, noisy, timestep = spy.inputs
    torch.testing.assert_close(noisy, clean + share_BM[..., None, None] * (draw_noise() - clean))
    torch.testing.assert_close(timestep, 1000 * share_BM)
    expected = (spy.output.prediction - (draw_noise() - clean)).square().mean()
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shares_of_noise(shift: float) -> None:
    """Quantiles against those of the distributions, moved by the shift."""
    random, quantiles = np.random.default_rng(0), np.array([0.1, 0.25, 0.5, 0.75, 0.9])
    normal = np.array([-1.2816, -0.6745, 0.0, 0.6745, 1.2816])
    for times, expected in (
        (FlowTimesteps(shift=shift), quantiles),
        (FlowTimesteps(True, 0.5, 2.0, shift), 1 / (1 + np.exp(-(0.5 + 2 * normal)))),
    ):
        shares = times.shares(random, 100_000)
        assert 0 < shares.min() < shares.max() <= 1
        moved = shift * expected / (1 + (shift - 1) * expected)
        np.testing.assert_allclose(np.quantile(shares, quantiles), moved, atol=0.01)


def test_min_snr_is_in_the_loss() -> None:
    spy = Spy(make_model())
    losses = training_losses(
        spy, Batch(draw_noise(), draw_noise(), TIMESTEP), DDPMScheduler(), LossWeights(hidden=0, min_snr_gamma=5.0)
    )
    errors = (spy.output.prediction - draw_noise()).square().mean((2, 3))
    weight = min_snr_weight("epsilon", DDPMScheduler(), TIMESTEP, 5.0)
    assert losses.total.item() == pytest.approx((weight * errors).mean().item(), rel=1e-5)


def test_targets() -> None:
    clean, noise = torch.ones(2, 1), torch.full((2, 1), 3.0)
    scheduler, timestep = DDPMScheduler(), torch.tensor([0, 999])
    assert prediction_target("epsilon", scheduler, clean, noise, timestep) is noise
    assert prediction_target("sample", scheduler, clean, noise, timestep) is clean
    velocity = prediction_target("v_prediction", scheduler, clean, noise, timestep)
    torch.testing.assert_close(velocity[0], torch.tensor([3.0]), atol=0.05, rtol=0)  # hardly noisy: v is the noise
    torch.testing.assert_close(velocity[1], torch.tensor([-1.0]), atol=0.05, rtol=0)  # all noise: v is minus the image


@pytest.mark.parametrize("padding", [None, 8])
def test_the_text_loss_is_that_of_the_next_token(padding: int | None) -> None:
    """Summed token by token in float64; padding is not to be predicted."""
    config = {"text": TextConfig(vocab_size=9, length=6, pad_token_id=padding)}
    spy, text = Spy(make_model(**config)), torch.tensor([[3, 1, 8, 8, 8, 8], [0, 5, 7, 2, 8, 8], [4, 8, 8, 8, 8, 8]])
    weights = LossWeights(image=1.0, hidden=0.0, text=0.3, padding=padding)
    losses = training_losses(spy, Batch(draw_noise(), draw_noise(), TIMESTEP, text_BP=text), DDPMScheduler(), weights)
    logits = spy.output.logits
    assert logits is not None
    terms = [
        -logits[row, place].double().log_softmax(0)[text[row, place + 1]]
        for row in range(3)
        for place in range(5)
        if text[row, place + 1] != padding
    ]
    assert losses.text is not None
    assert losses.text.item() == pytest.approx(float(sum(terms)) / len(terms), rel=1e-5)
    assert losses.total.item() == pytest.approx((losses.image + 0.3 * losses.text).item(), rel=1e-6)


def test_a_batch_of_empty_texts_has_no_text_loss() -> None:
    logits = torch.randn(2, 4, 9, requires_grad=True)
    loss = next_token_loss(logits, torch.full((2, 4), 8), padding=8)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
