"""ACDiT as a configuration of the native model, against what the released code computed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from madformer.compat.acdit import ACDiT
from madformer.conditioning.prompt import Prompt
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.model import MADFormer as NativeMADFormer
from tests.helpers.compat_cases import CLASS_CASE as CASE
from tests.helpers.compat_cases import (
    OUTPUT_TOLERANCE,
    SAMPLE_TOLERANCE,
    SCHEDULERS,
    assert_golden_gradients,
    make_acdit,
)
from tests.helpers.testing import relative_error

SCALES = (1.0, 2.0)


def arguments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    golden = CASE.tensors()
    return golden["clean"], golden["noised"], golden["t"], golden["label"]


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_forward_loss_and_gradients(patch_size: int) -> None:
    """However many latents a token is said to be of."""
    model, golden = make_acdit(patch_size=patch_size), CASE.tensors()
    prediction = model(*arguments())
    assert relative_error(prediction, golden["prediction"]) < OUTPUT_TOLERANCE
    loss = F.mse_loss(prediction, golden["noise"].flatten(1, 2))
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=OUTPUT_TOLERANCE)
    loss.backward()
    assert_golden_gradients(model, golden)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_samples(scheduler: str, scale: float) -> None:
    model, golden = make_acdit().eval(), CASE.tensors()
    expected = golden[f"sample.{scheduler}.cfg{scale:g}"]
    generator = torch.Generator().manual_seed(CASE.sampler_seed)
    tokens = model.sample(
        golden["label"], SCHEDULERS[scheduler](), CASE.steps, scale, tuple(expected.shape), generator, torch.float
    )
    assert relative_error(tokens, expected) < SAMPLE_TOLERANCE


@pytest.mark.parametrize("scale", SCALES)
def test_native_model(tmp_path: Path, scale: float) -> None:
    """Saved, loaded and run by the native classes alone, on latents of 2 x 2 to a token."""
    compat, golden = make_acdit(), CASE.tensors()
    compat.to_native().save_pretrained(tmp_path)
    native = NativeMADFormer.from_pretrained(tmp_path)
    assert native.config.latent_shape == (4, 16, 16)
    clean, noised, t, label = arguments()
    with torch.no_grad():
        output = native(compat.to_latents(clean), compat.to_latents(noised), t, labels_B=label)
    assert relative_error(compat.to_tokens(output.prediction).flatten(1, 2), golden["prediction"]) < OUTPUT_TOLERANCE
    for scheduler, make_scheduler in SCHEDULERS.items():
        plan = Sampler(native, make_scheduler()).plan(len(label), SamplingOptions(CASE.steps, guidance=scale))
        latents = plan.run(compat.to_latents(golden[f"sample_noise.{scheduler}"]), Prompt(label=label))
        expected = golden[f"sample.{scheduler}.cfg{scale:g}"]
        assert relative_error(compat.to_tokens(latents), expected) < SAMPLE_TOLERANCE


def test_names_and_shapes_are_the_released_ones() -> None:
    weights, model = CASE.weights(), make_acdit()
    assert {name: t.shape for name, t in model.state_dict().items()} == {n: t.shape for n, t in weights.items()}
    assert {name for name, _ in model.named_parameters()} == weights.keys()


def test_tokens_are_patches_of_latents() -> None:
    """As the released script puts them together for the autoencoder: rows, columns, channels."""
    model, side = make_acdit(), 4
    tokens = torch.randn(1, 4, 16, 16)
    image = tokens.view(1, 2, 2, side, side, 2, 2, 4)  # blocks' rows and columns, tokens', latents', channels
    image = image.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(1, 16, 16, 4)
    latents = model.to_latents(tokens)
    assert torch.equal(latents[0, 1].view(8, 8, 4), image[0, :8, 8:])
    assert torch.equal(model.to_tokens(latents), tokens)


def test_labels_drop_even_in_eval_mode() -> None:
    model = make_acdit().eval()
    kept, unlabelled = model(*arguments()), model(*arguments()[:3], None)
    assert not torch.allclose(kept, unlabelled)
    model.y_embedder.dropout_prob = 1.0
    assert torch.equal(model(*arguments()), unlabelled)


def test_one_timestep_for_all_blocks() -> None:
    model = make_acdit()
    clean, noised, t, label = arguments()
    assert torch.equal(model(clean, noised, t[:, 0], label), model(clean, noised, t[:, :1].expand_as(t), label))


def test_without_dropout_there_is_no_null_class() -> None:
    model = ACDiT(**(CASE.geometry | {"class_dropout_prob": 0.0}))
    assert model.y_embedder.embedding_table.weight.shape == (9, 128)
    with pytest.raises(ValueError, match="guidance needs a model with text or classes"):
        model.sample(torch.zeros(1, dtype=torch.int64), DDIMScheduler(), 2, 2.0, (1, 4, 16, 16))


def test_a_copy_shares_nothing() -> None:
    model = make_acdit()
    before, duplicate = model(*arguments()), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    assert torch.equal(model(*arguments()), before)
    assert not duplicate(*arguments()).any()


def test_impossible_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="temporal_len=4"):
        ACDiT(temporal_len=4)
    with pytest.raises(ValueError, match="spatial_len=64 must be block_size=16"):
        ACDiT(block_size=16, ar_len=2, spatial_len=64)
    with pytest.raises(ValueError, match=r"target_shape=\(1, 4, 16, 4\) must be \(N, 4, 16, 16\)"):
        make_acdit().sample(torch.zeros(1, dtype=torch.int64), DDIMScheduler(), 2, 1.0, (1, 4, 16, 4))
    with pytest.raises(ValueError, match="label must hold ids from -1 to 8, got 9 to 9"):
        make_acdit().sample(torch.full((1,), 9), DDIMScheduler(), 2, 1.0, (1, 4, 16, 16))
