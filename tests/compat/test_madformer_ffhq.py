"""The compat class, and the native model with the quirk fields, against what the released code computed."""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import nn
from torch.nn.utils import parametrize

from madformer.compat.madformer_ffhq import MADFormer
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.model import MADFormer as NativeMADFormer
from madformer.model.blocks import to_maps
from tests.helpers.compat_cases import (
    BASELINE,
    CASES,
    GRADIENT_NOISE,
    OUTPUT_TOLERANCE,
    SAMPLE_TOLERANCE,
    SCHEDULERS,
    arguments,
    assert_golden_samples,
    assert_golden_training,
    golden_samples,
    make_compat,
    samples,
)
from tests.helpers.testing import GoldenCase, relative_error


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_losses_and_gradients(case: GoldenCase) -> None:
    assert_golden_training(make_compat(case), case)


@samples(CASES)
def test_samples(case: GoldenCase, scheduler: str) -> None:
    assert_golden_samples(make_compat(case), case, scheduler, times=2 if case is BASELINE else 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_native_model_with_quirk_fields(case: GoldenCase, tmp_path: Path) -> None:
    """Saved, loaded and run by the native classes alone."""
    make_compat(case).to_native().save_pretrained(tmp_path)
    native, inputs, golden = NativeMADFormer.from_pretrained(tmp_path), case.inputs(), case.tensors()
    with torch.no_grad():
        output = native(inputs["clean"], inputs["noised"], inputs["t"], return_clean="clean_tower" in golden)
    assert relative_error(to_maps(output.prediction), golden["prediction"]) < OUTPUT_TOLERANCE
    assert output.condition is not None
    assert relative_error(to_maps(output.condition), golden["condition"]) < OUTPUT_TOLERANCE
    if output.clean is not None:
        assert relative_error(to_maps(output.clean), golden["clean_tower"]) < OUTPUT_TOLERANCE
    for scheduler, make_scheduler in SCHEDULERS.items():
        noise = golden_samples(case)[f"sample_noise.{scheduler}"]
        plan = Sampler(native, make_scheduler()).plan(len(noise), SamplingOptions(case.steps))
        latents = plan.run(noise)
        assert relative_error(latents, golden_samples(case)[f"sample.{scheduler}"]) < SAMPLE_TOLERANCE


def test_exact_savings_change_nothing() -> None:
    """Without the clean tower's output the last clean block is left out: same prediction, same gradients."""
    inputs, gradients, predictions = BASELINE.inputs(), [], []
    for return_clean in (True, False):
        native = make_compat(BASELINE).to_native()
        output = native(inputs["clean"], inputs["noised"], inputs["t"], return_clean=return_clean)
        (F.mse_loss(output.prediction, inputs["noise"]) + F.mse_loss(output.condition, inputs["clean"])).backward()
        predictions.append(output.prediction.detach())
        gradients.append({name: p.grad for name, p in native.named_parameters() if p.grad is not None})
    assert relative_error(predictions[1], predictions[0]) < 1e-5
    assert gradients[1].keys() <= gradients[0].keys()
    for name, gradient in gradients[1].items():
        if gradients[0][name].norm() > GRADIENT_NOISE:
            assert relative_error(gradient, gradients[0][name]) < 1e-4, name


def test_names_and_shapes_are_the_released_ones() -> None:
    weights, model = BASELINE.weights(), make_compat(BASELINE)
    assert {name: t.shape for name, t in model.state_dict().items()} == {n: t.shape for n, t in weights.items()}
    assert {name for name, _ in model.named_parameters()} == weights.keys()


def test_a_copy_of_one_with_a_computed_weight() -> None:
    """After a pass, whose graph hangs on the weight."""

    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model = make_compat()
    parametrize.register_parametrization(model, "boi_block", Doubled())
    before = model(*arguments())[0]
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate(*arguments())[0], before)
    parametrizations: Any = duplicate.parametrizations
    parametrizations.boi_block.original.data.mul_(3)
    assert relative_error(duplicate(*arguments())[0], before) > 1e-3
    assert torch.equal(model(*arguments())[0], before)


def test_copies_and_casts_keep_the_native_model_in_step() -> None:
    """The native model hangs on the same modules: a copy must not share them, a cast must reach them."""
    model, inputs = make_compat(BASELINE), BASELINE.inputs()
    arguments = inputs["clean"], inputs["noised"], inputs["t"]
    before = model(*arguments)[0]
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    assert torch.equal(model(*arguments)[0], before)
    assert not duplicate(*arguments)[0].any()
    low = copy.deepcopy(model).to(torch.bfloat16)
    assert {parameter.dtype for parameter in low.to_native().parameters()} == {torch.bfloat16}
    result = low(arguments[0].bfloat16(), arguments[1].bfloat16(), arguments[2])[0]
    assert result.dtype == torch.bfloat16
    assert relative_error(result, before) < 0.05


def test_impossible_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="spatial_len=64 must be block_size=16"):
        MADFormer(block_size=16, ar_len=2, spatial_len=64, model_config_path=BASELINE.model_config)
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        MADFormer(model_config_path={"hidden_act": "gelu"})
    with pytest.raises(ValueError, match=r"target_shape=\(2, 4, 16, 4\) must be \(N, 4, 64, 4\)"):
        make_compat(BASELINE).sample(DDIMScheduler(), 2, (2, 4, 16, 4))


# Released checkpoints


def released_arguments() -> argparse.Namespace:
    """What the released ``train.py`` leaves in a checkpoint: no hidden size, depth or number of heads."""
    return argparse.Namespace(
        lr=3e-4, image_size=128, patch_size=1, vae_latent_size=4, block_size=16, spatial_len=64, ar_len=4,
        square_block=True, diff_depth=2, clear_clean=False, clear_cond=False, denoising_mlp=False,
        model_config_path="./src/configs/model/madformer.json", results_dir="results",
    )  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    weights = BASELINE.weights()
    content = {
        "model": {name: tensor + 1 for name, tensor in weights.items()},
        "ema": weights,
        "opt": {"state": {}, "param_groups": [{"lr": 3e-4}]},
        "lrs": {"last_epoch": 300},
        "args": released_arguments(),
    }
    torch.save(content, tmp_path / "ckpts.pt")
    return tmp_path / "ckpts.pt"


@pytest.mark.parametrize("model_config", [BASELINE.model_config, None], ids=["model_config", "inferred"])
def test_from_released(checkpoint: Path, model_config: Path | None) -> None:
    model, expected = MADFormer.from_released(checkpoint, model_config=model_config), make_compat(BASELINE)
    assert model.config == expected.config
    inputs = BASELINE.inputs()
    arguments = inputs["clean"], inputs["noised"], inputs["t"]
    assert relative_error(model(*arguments)[0], expected(*arguments)[0]) < OUTPUT_TOLERANCE


def test_from_released_chooses_the_weights(checkpoint: Path) -> None:
    raw = MADFormer.from_released(checkpoint, model_config=BASELINE.model_config, weights="model")
    averaged = MADFormer.from_released(checkpoint, model_config=BASELINE.model_config)
    assert torch.equal(raw.boi_block, averaged.boi_block + 1)
    assert torch.equal(raw.to_native().boi, raw.boi_block)
    with pytest.raises(ValueError, match="weights='best'"):
        MADFormer.from_released(checkpoint, weights="best")  # type: ignore[arg-type]


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("was-run",)


def test_a_malicious_checkpoint_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": Malicious(), "args": released_arguments()}, "bad.pt")
    with pytest.raises(ValueError, match=r"bad.pt is refused, it asks for .*mkdir"):
        MADFormer.from_released("bad.pt")
    assert not Path("was-run").exists()


def test_damaged_and_foreign_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere.pt"):
        MADFormer.from_released(tmp_path / "nowhere.pt")
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(checkpoint.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"truncated.pt is damaged"):
        MADFormer.from_released(truncated)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"text.pt is"):
        MADFormer.from_released(tmp_path / "text.pt")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is no released checkpoint: it needs the entries 'ema' and 'args'"):
        MADFormer.from_released(tmp_path / "other.pt")
    content = torch.load(checkpoint, weights_only=False)
    del content["ema"]["upsampler.conv_out.bias"]
    torch.save(content, tmp_path / "incomplete.pt")
    with pytest.raises(ValueError, match=r"1 tensors missing \(upsampler.conv_out.bias\)"):
        MADFormer.from_released(tmp_path / "incomplete.pt", model_config=BASELINE.model_config)
