"""What a released-style training loop does with its model: copies for the EMA, autocast, DDP, clipping, compilation."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import madformer
from madformer.compat.madformer_ffhq import MADFormer as CompatMADFormer
from tests.helpers import environment
from tests.helpers.compat_cases import BASELINE, CASES, TEXT_BASELINE, Released, arguments, loss_of, make_compat
from tests.helpers.testing import GoldenCase, relative_error

STEPS, LEARNING_RATE, MAX_NORM, EMA_DECAY = 2, 1e-4, 1.0, 0.5


def make_model(kind: str, case: GoldenCase = BASELINE) -> nn.Module:
    return of_kind(kind, make_compat(case))


def of_kind(kind: str, model: CompatMADFormer) -> nn.Module:
    return model if kind == "compat" else madformer.accelerate(Released(model))


each_family = pytest.mark.parametrize("case", [BASELINE, TEXT_BASELINE], ids=lambda case: case.folder.name)
each_kind = pytest.mark.parametrize("kind", ["compat", "accelerated"])


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module) -> None:
    """By name, as the released loop averages."""
    weights = dict(model.named_parameters())
    for name, parameter in average.named_parameters():
        parameter.mul_(EMA_DECAY).add_(weights[name], alpha=1 - EMA_DECAY)


@each_kind
@each_family
def test_ema_of_a_copy_follows_and_predicts(kind: str, case: GoldenCase) -> None:
    """A copy's ``forward`` must read the copy's weights, after updates in place too."""
    model = make_model(kind, case)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    first = average(*arguments(case))[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    loss_of(model, case).backward()
    optimizer.step()
    update_ema(average, model)
    halfway, start = copy.deepcopy(model), case.weights()
    halfway.load_state_dict({name: (new + start[name]) / 2 for name, new in model.state_dict().items()})
    assert relative_error(average(*arguments(case))[0], halfway(*arguments(case))[0]) < 1e-6
    assert relative_error(average(*arguments(case))[0], first) > 1e-3
    assert not any(parameter.requires_grad for parameter in average.parameters())


@each_kind
@pytest.mark.parametrize("case", [BASELINE, CASES[-1], TEXT_BASELINE], ids=lambda case: case.name)
def test_autocast_is_as_near_as_bf16_is(kind: str, case: GoldenCase) -> None:
    model, golden = make_model(kind, case), case.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        prediction, condition, *_ = model(*arguments(case))
        loss = loss_of(model, case)
    assert relative_error(prediction, golden["prediction"]) < 0.03
    assert relative_error(condition, golden["condition"]) < 0.03
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=0.02)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        if f"grad.{name}" in golden and golden[f"gradnorm.{name}"] > 1e-3:
            assert relative_error(parameter.grad, golden[f"grad.{name}"]) < 0.1, name


@each_kind
@each_family
def test_clipping_sees_every_gradient(kind: str, case: GoldenCase) -> None:
    model, golden = make_model(kind, case), case.tensors()
    loss_of(model, case).backward()
    expected = torch.stack([golden[f"gradnorm.{name}"] for name, _ in model.named_parameters()]).norm().item()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), expected / 4).item() == pytest.approx(expected, rel=1e-3)
    clipped = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm().item()
    assert clipped == pytest.approx(expected / 4, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compat", "accelerated"])
def test_compiles_whole(kind: str) -> None:
    """Traced by Dynamo without a break, on the shallowest model; what Inductor makes of it is not looked at here."""
    config = {"intermediate_size": 64, "unet_block_out_channels": [16], "unet_num_layers_per_block": [1]}
    config |= {"unet_transformer_layers_per_block": [1], "unet_time_emb_dim": 32}
    sizes = {"hidden_size": 64, "num_heads": 1, "depth": 2, "diff_depth": 1, "block_size": 4, "spatial_len": 16}
    torch.manual_seed(0)
    model = of_kind(kind, CompatMADFormer(model_config_path=config, **sizes))
    inputs = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.randint(0, 1000, (2, 4))

    def run(network: nn.Module) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad(set_to_none=True)
        prediction, condition, _ = network(*inputs)
        (prediction.square().mean() + condition.square().mean()).backward()
        return prediction, [parameter.grad for parameter in model.parameters()]

    expected, expected_gradients = run(model)
    prediction, gradients = run(torch.compile(model, backend="eager", fullgraph=True))
    assert relative_error(prediction, expected) < 1e-6
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict: bool) -> None:
    model = make_compat(BASELINE).eval()
    with torch.no_grad():
        exported = torch.export.export(model, arguments(BASELINE), strict=strict).module()
        for actual, expected in zip(exported(*arguments(BASELINE)), model(*arguments(BASELINE)), strict=True):
            assert torch.equal(actual, expected)


# DDP

WORKER = """
import os
import sys
import torch
import torch.distributed as dist
from tests.compat.test_training_use import RUNS, train

child, world, folder = os.fork(), 2, sys.argv[1]
rank = int(child == 0)
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
results = [train(kind, case, rank, world) for kind, case in RUNS]
if rank == 0:
    torch.save(results, f"{folder}/results.pt")
dist.destroy_process_group()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
RUNS = [("compat", BASELINE), ("accelerated", BASELINE), ("accelerated", TEXT_BASELINE)]


def train(kind: str, case: GoldenCase, rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    """A few steps on this rank's of two images; the gradients of the first and the weights after the last."""
    model = make_model(kind, case)
    network = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    gradients: dict[str, Tensor] = {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(network, case, slice(rank, 2, world)).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients = gradients or {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
    return {"gradients": gradients, "weights": model.state_dict()}


@pytest.mark.slow
def test_ddp_without_find_unused_parameters(tmp_path: Path) -> None:
    """Two ranks with an image each take the steps that one process takes with both."""
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    own = environment(OMP_NUM_THREADS="1")
    run = subprocess.run(command, env=own, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for (kind, case), result in zip(RUNS, torch.load(tmp_path / "results.pt"), strict=True):
        expected = train("compat", case, 0, 1)
        scale = max(gradient.norm() for gradient in expected["gradients"].values())
        for name, gradient in expected["gradients"].items():
            error = (result["gradients"][name] - gradient).norm()
            assert error < 1e-4 * gradient.norm() + 1e-6 * scale, (kind, case.folder.name, name)
        for name, weight in expected["weights"].items():
            error = (result["weights"][name] - weight).norm()
            assert error < 1e-4 * weight.norm() + 1e-4, (kind, case.folder.name, name)
