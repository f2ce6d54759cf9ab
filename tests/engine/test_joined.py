"""Gate and up as one product, and the residual in the last: the towers' own numbers, whatever becomes of the model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from madformer.config import MADFormerConfig, tiny
from madformer.engine.joined import JoinedSwiGLU, JoinedTower, join, together
from madformer.engine.options import SamplingOptions
from madformer.engine.precision import apply, unquantized
from madformer.engine.sampler import Sampler
from madformer.model import MADFormer
from madformer.model.layer import Tower
from tests.helpers.engine_cases import draw_noise
from tests.helpers.testing import DEVICE, perturb


class Ops(TorchDispatchMode):
    """Counts what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def make_towers(dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[Tower, Tower]:
    """One as it is, and one of the same weights that is joined."""
    torch.manual_seed(0)
    plain = Tower(tiny().replace(**changes)).to(DEVICE, dtype)
    for norm in (plain.input_norm, plain.post_attention_norm):
        norm.backend = "reference"
    plain.mlp.backend = "reference"
    joined = copy.deepcopy(plain)
    join(joined)
    return plain, joined


def make_inputs(tower: Tower) -> tuple[Tensor, Tensor]:
    config: MADFormerConfig = tiny()
    weight = tower.proj.weight
    shape = (2, 3, config.num_heads, config.head_dim)
    generator = torch.Generator().manual_seed(1)
    x, attended = (torch.randn(shape, generator=generator).to(weight) for _ in range(2))
    return x.flatten(2), attended.transpose(1, 2)


@torch.no_grad()
def output(tower: Tower) -> Tensor:
    """The tower's, which leaves its inputs as they are."""
    inputs = make_inputs(tower)
    result = tower.output(*inputs)
    assert all(map(torch.equal, inputs, make_inputs(tower)))
    return result


def products(tower: Tower) -> Counter[str]:
    with Ops() as ops:
        output(tower)
    return Counter({name: ops.calls[name] for name in ("mm", "addmm", "addmm_", "add")})


@pytest.mark.parametrize("bias", [False, True])
def test_two_launches_fewer(bias: bool) -> None:
    plain, joined = make_towers(mlp_bias=bias)
    assert type(joined) is JoinedTower
    assert type(joined.mlp) is JoinedSwiGLU
    torch.testing.assert_close(output(joined), output(plain), rtol=1e-12, atol=1e-12)
    before, after = products(plain), products(joined)
    kept = before - after
    # A bias is the last product's to add: then the residual is not.
    assert kept == ({"addmm": 1} if bias else {"mm": 2, "add": 1})
    assert after - before == ({} if bias else {"addmm_": 1})


class Adapter(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


def write(tower: Tower) -> None:
    for parameter in tower.mlp.parameters():
        parameter.data.mul_(-1.5)


def replace_data(name: str) -> Callable[[Tower], None]:
    def change(tower: Tower) -> None:
        layer = tower.mlp.get_submodule(name)
        layer.weight.data = layer.weight.data * 3

    return change


def load(*, assign: bool) -> Callable[[Tower], None]:
    def change(tower: Tower) -> None:
        state = {name: 2 * tensor for name, tensor in tower.state_dict().items()}
        tower.load_state_dict(state, assign=assign)

    return change


def adapt(name: str) -> Callable[[Tower], None]:
    def change(tower: Tower) -> None:
        setattr(tower.mlp, name, Adapter(tower.mlp.get_submodule(name)))

    return change


def hook(name: str, *, before: bool = False) -> Callable[[Tower], None]:
    def change(tower: Tower) -> None:
        module = tower.get_submodule(name)
        if before:
            module.register_forward_pre_hook(lambda module, args: (args[0] / 2,))
        else:
            module.register_forward_hook(lambda module, args, result: result + 1)

    return change


def own_forward(tower: Tower) -> None:
    tower.mlp.up_proj.forward = lambda x: x.new_ones(*x.shape[:-1], tower.mlp.up_proj.out_features)


def swap(tower: Tower) -> None:
    tower.mlp.gate_proj, tower.mlp.up_proj = tower.mlp.up_proj, tower.mlp.gate_proj


def narrow(tower: Tower) -> None:
    """Weights that still follow one another in memory, and are of another shape."""
    for name in ("gate_proj", "up_proj"):
        layer = tower.mlp.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach()[:-8])
    tower.mlp.down_proj.weight = nn.Parameter(tower.mlp.down_proj.weight.detach()[:, :-8])


def biased(tower: Tower) -> None:
    tower.mlp.up_proj.bias = nn.Parameter(torch.ones_like(tower.mlp.up_proj.weight[:, 0]))


CHANGES: dict[str, Callable[[Tower], Any]] = {
    "written to": write,
    **{f"data of {name}": replace_data(name) for name in ("gate_proj", "up_proj", "down_proj")},
    "loaded": load(assign=False),
    "loaded, assigned": load(assign=True),
    **{f"adapter on {name}": adapt(name) for name in ("gate_proj", "up_proj", "down_proj")},
    **{f"hook on {name}": hook(name) for name in ("mlp", "mlp.gate_proj", "mlp.down_proj", "post_attention_norm")},
    "hook before up": hook("mlp.up_proj", before=True),
    "a forward of its own": own_forward,
    "swapped": swap,
    "narrower": narrow,
    "a bias of one": biased,
    "cast": lambda tower: tower.to(torch.float32),
    "cast and back": lambda tower: tower.to(torch.float32).to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_becomes_of_a_tower_becomes_of_a_joined_one(change: str) -> None:
    plain, joined = make_towers()
    before = output(joined)
    for tower in (plain, joined):
        CHANGES[change](tower)
    after = output(joined)
    atol = 1e-12 if after.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(after, output(plain), rtol=atol, atol=atol)
    assert change.startswith("cast") or not torch.equal(after, before)


def test_hooks_and_layers_of_the_whole_process() -> None:
    _, joined = make_towers()
    seen: list[type[nn.Module]] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        output(joined)
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 4


def test_a_copy_and_gradients() -> None:
    plain, joined = make_towers()
    torch.testing.assert_close(output(copy.deepcopy(joined)), output(plain), rtol=1e-12, atol=1e-12)
    joined.requires_grad_()
    for tower in (plain, joined):
        tower.output(*make_inputs(tower)).square().sum().backward()
    for (name, ours), theirs in zip(joined.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_what_lies_together() -> None:
    x = torch.arange(24.0).view(6, 4)
    assert torch.equal(together(x[:2], x[2:5]), x[:5])  # type: ignore[arg-type]
    for first, second in [(x[:2], x[3:]), (x[2:4], x[:2]), (x[:2], x[2:].clone()), (x[:3, :2], x[3:, :2])]:
        assert together(first, second) is None
    assert together(x[:2], x[2:4].view(torch.int32)) is None


@pytest.fixture(scope="module")
def model() -> MADFormer:
    torch.manual_seed(0)
    return perturb(MADFormer(tiny())).to(DEVICE, torch.bfloat16)


def test_a_snapshot_is_joined_and_its_source_is_not(model: MADFormer, tmp_path: Path) -> None:
    joined, default = apply(model, "default", join_mlp=True), apply(model, "default")
    assert any(isinstance(module, JoinedTower) for module in joined.modules())
    assert not any(isinstance(module, (JoinedTower, JoinedSwiGLU)) for module in model.modules())
    assert any(isinstance(module, JoinedTower) for module in default.modules()) == (DEVICE.type == "cuda")
    joined.save_pretrained(tmp_path)
    stored = MADFormer.from_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name].to(tensor), tensor), name


@pytest.mark.parametrize("pack_weights", [False, True])
def test_draws_the_same(model: MADFormer, pack_weights: bool) -> None:
    options = SamplingOptions(steps=2)
    plans = [
        Sampler(apply(model, "exact", join_mlp=join_mlp), DDIMScheduler(), pack_weights=pack_weights).plan(1, options)
        for join_mlp in (True, False)
    ]
    joined, plain = (plan.run(draw_noise(model.config, 1)) for plan in plans)
    torch.testing.assert_close(joined, plain, rtol=1e-4, atol=1e-4)


def test_a_joined_snapshot_is_quantised_as_its_source(model: MADFormer) -> None:
    for each in (apply(model, "default", join_mlp=True), model):
        quantised = apply(each, "fp8", join_mlp=True)
        assert not unquantized(quantised)
        assert not any(isinstance(module, (JoinedTower, JoinedSwiGLU)) for module in quantised.modules())
