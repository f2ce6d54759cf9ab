"""Every module is called where it is more than its own weights; other dtypes, checkpointing, export and casting."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from madformer import MADFormer, MADFormerConfig
from madformer.config import emoji64, tiny
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.model.unet import PixelAttention
from tests.helpers.engine_cases import FLAT, draw_noise, draw_prompt
from tests.helpers.testing import assert_within_budget, perturb, relative_error

CONFIGS = {
    "U-Net": FLAT,
    "text, classes, AdaLN": emoji64().replace(num_layers=2, diffusion_layers=1, num_classes=3),
    "patches": tiny().replace(unet=None, time_conditioning="adaln", mlp="gelu"),
    "no QK norm": FLAT.replace(qk_norm=False, context="clean"),
}


def make(config: MADFormerConfig) -> tuple[MADFormer, dict[str, Any]]:
    torch.manual_seed(0)
    model = MADFormer(config)
    perturb(model)
    latents = torch.randn(2, 2, config.num_blocks, config.latents_per_block, config.latent_channels)
    given = {"clean_BMLC": latents[0], "noisy_BMLC": latents[1], "return_clean": config.has_clean_stream}
    given["timestep_BM"] = torch.randint(0, 1000, (2, config.num_blocks))
    if config.text is not None:
        given["text_BT"] = torch.randint(0, config.text.vocab_size - 1, (2, config.text_length))
        given["return_logits"] = True
    if config.num_classes:
        given["labels_B"] = torch.tensor([1, -1])
    return model.eval(), given


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    floats = ("clean_BMLC", "noisy_BMLC")
    return {name: value.to(dtype) if name in floats else value for name, value in given.items()}


def assert_close(actual: Any, expected: Any, bound: float = 2e-5) -> None:
    for name in expected:
        assert relative_error(actual[name].float(), expected[name].float()) < bound, name


@pytest.mark.parametrize("name", CONFIGS)
def test_every_module_with_weights_is_called_where_it_has_hooks(name: str) -> None:
    model, given = make(CONFIGS[name])
    expected = model(**given)
    called: set[str] = set()
    for path, module in model.named_modules():
        if list(module.parameters(recurse=False)) and path:
            module.register_forward_hook(lambda *_, path=path: called.add(path))
    assert_close(model(**given), expected)
    owners = {path for path, module in model.named_modules() if path and list(module.parameters(recurse=False))}
    assert owners == called


class Fetch(ModelHook):
    """Weights are there while their module is called alone, as with every kind of offloading."""

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.weights = {name: tensor.data for name, tensor in module.named_parameters(recurse=False)}
        return self.post_forward(module, module)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, tensor in module.named_parameters(recurse=False):
            tensor.data = self.weights[name].clone()
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for _, tensor in module.named_parameters(recurse=False):
            tensor.data = torch.full_like(tensor, torch.nan)
        return output


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_that_are_fetched_at_the_call(name: str) -> None:
    model, given = make(CONFIGS[name])
    with torch.no_grad():
        expected = model(**given)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding, nn.RMSNorm, nn.GroupNorm)):
                HookRegistry.check_if_exists_or_initialize(module).register_hook(Fetch(), "fetch")
        assert_close(model(**given), expected)


class Halved(nn.Module):
    """Stands for a layer, and is not one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) / 2


@pytest.mark.parametrize("name", CONFIGS)
def test_replaced_projections_and_norms(name: str) -> None:
    """The last layer's clean keys and values among them, whose queries nobody needs."""
    model, given = make(CONFIGS[name])
    del given["return_clean"]
    given.pop("return_logits", None)
    replaced, halved = copy.deepcopy(model), copy.deepcopy(model)
    for owner, other in list(zip(replaced.modules(), halved.modules(), strict=True)):
        for path, layer in list(owner.named_children()):
            if isinstance(layer, (nn.Linear, nn.RMSNorm, nn.GroupNorm)):
                setattr(owner, path, Halved(layer))
                for parameter in other.get_submodule(path).parameters():
                    parameter.data /= 2
    expected = halved(**given)
    assert_close(replaced(**given), expected)
    assert relative_error(model(**given).prediction, expected.prediction) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_float64_is_closer_than_float32(name: str) -> None:
    model, given = make(CONFIGS[name])
    exact, wide = model(**given), copy.deepcopy(model).double()
    output = wide(**cast(given, torch.float64))
    assert {tensor.dtype for tensor in output.values()} == {torch.float64}
    assert_close(output, exact)
    # the embeddings of time are not rounded on the way
    down, up, modulation = wide.time_embeddings(torch.tensor([999]))
    assert {part.dtype for part in (down, up, modulation) if part.numel()} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_and_autocast(name: str, dtype: torch.dtype) -> None:
    model, given = make(CONFIGS[name])
    exact = model(**given)
    with torch.autocast("cpu", dtype):
        assert_close(model(**given), exact, 0.05)
    rounded = copy.deepcopy(model).to(dtype)
    output = rounded(**cast(given, dtype))
    assert {tensor.dtype for tensor in output.values()} == {dtype}
    assert_close(output, exact, 0.05)
    near, far = rounded.time_embeddings(torch.tensor([998, 999]))[0] if model.config.unet else (0, 1)
    assert not torch.equal(torch.as_tensor(near), torch.as_tensor(far))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    model, given = make(CONFIGS[name])
    other = copy.deepcopy(model).train()
    other.enable_gradient_checkpointing()
    assert other.is_gradient_checkpointing
    for network in (model.train(), other):
        sum(tensor.square().mean() for tensor in network(**given).values()).backward()
    for (path, own), given_back in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (own.grad is None) == (given_back.grad is None), path
        assert own.grad is None or torch.equal(own.grad, given_back.grad), path
    other.disable_gradient_checkpointing()
    assert not other.is_gradient_checkpointing


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_export(name: str) -> None:
    model, given = make(CONFIGS[name])
    exported = torch.export.export(model, (), given).module()
    assert_close(exported(**given), model(**given), 1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_layerwise_casting(name: str) -> None:
    """Stored in 8 bits, computed in 32: as the weights rounded by hand."""
    model, given = make(CONFIGS[name])
    rounded, stored = copy.deepcopy(model), copy.deepcopy(model)
    stored.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert stored.dtype == torch.float32
    cast_names = {path for path, tensor in stored.named_parameters() if tensor.dtype == torch.float8_e4m3fn}
    assert any(path.endswith("qkv.weight") for path in cast_names)
    assert not any("norm" in path or "time_embedding" in path or "conditioner" in path for path in cast_names)
    for path, parameter in rounded.named_parameters():
        if path in cast_names:
            parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    assert_close(stored(**given), rounded(**given))


@pytest.mark.parametrize("name", CONFIGS)
def test_layerwise_casting_to_another_dtype_than_the_weights(name: str) -> None:
    """Layers that are left as they are stored meet activations of the others' dtype."""
    model, given = make(CONFIGS[name])
    stored = copy.deepcopy(model)
    stored.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    cast_names = {path for path, tensor in stored.named_parameters() if tensor.dtype == torch.float8_e4m3fn}
    for path, parameter in model.named_parameters():
        if path in cast_names:
            parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    with torch.no_grad():
        assert_close(stored(**cast(given, torch.bfloat16)), model(**given), 0.05)
        assert relative_error(draw(stored), draw(model)) < 0.05


@pytest.mark.parametrize(
    ("own", "storage", "compute"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float8_e4m3fn, torch.bfloat16),
        (torch.float32, torch.float32, torch.float64),
        (torch.float32, torch.bfloat16, torch.float64),
    ],
)
def test_layerwise_casting_to_a_more_precise_dtype_than_the_weights(
    own: torch.dtype, storage: torch.dtype, compute: torch.dtype
) -> None:
    """PyTorch's normalisations take no activations that are more precise than their weights."""
    model, given = make(CONFIGS["text, classes, AdaLN"])
    stored = copy.deepcopy(model).to(own)
    stored.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    assert stored.dtype == compute
    model = model.double()
    for parameter, kept in zip(model.parameters(), stored.parameters(), strict=True):
        parameter.data = parameter.data.to(own).to(kept.dtype).double()
    exact = cast(given, torch.float64)
    with torch.no_grad():
        expected = model(**exact)
        assert_close(stored(**cast(given, compute)), expected, 0.05 if compute == torch.bfloat16 else 1e-4)


def draw(model: MADFormer) -> Tensor:
    """A sample, of fixed noise and prompt."""
    config, scheduler = model.config, DDIMScheduler(clip_sample=False)
    return Sampler(model, scheduler).plan(2, SamplingOptions(2)).run(draw_noise(config), draw_prompt(config))


def test_sequential_offload_of_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    for config in CONFIGS.values():
        model, given = make(config)
        with torch.no_grad():
            expected = model(**given)
            offloaded = accelerate.cpu_offload(copy.deepcopy(model), torch.device("cpu"), offload_buffers=True)
            assert all(parameter.device.type == "meta" for parameter in offloaded.parameters())
            assert_close(offloaded(**given), expected)


@torch.no_grad()
def test_what_is_projected_of_the_time_ahead_is_what_residual_blocks_project() -> None:
    """Unless somebody may want to see it: then they do it themselves, whatever they are told."""
    model, _ = make(CONFIGS["text, classes, AdaLN"])
    half: Any = model.downsampler
    E = model.config.time_widths[0]
    maps, told = torch.randn(3, 4, 8, 8), half.told(torch.tensor([0, 500, 999]))
    assert told.shape == (3, model.config.told_widths[0])
    own, _ = half(maps, told[:, :E])
    for scale in (1.0, 2.0):
        told[:, E:] *= scale
        assert (relative_error(half(maps, told)[0], own) < 1e-6) == (scale == 1)
    section = half.down_blocks[1]
    for part in (half, section, section.resnets[0], section.resnets[0].time_emb_proj):
        handle = part.register_forward_hook(lambda *_: None)
        assert torch.equal(half(maps, told)[0], own)
        again = half.told(torch.tensor([0, 500, 999]))
        assert torch.equal(again[:, :E], told[:, :E])
        assert again[:, E:].isnan().all()
        handle.remove()
    assert half.told(torch.tensor([7])).isfinite().all()


@torch.no_grad()
def test_attention_of_pixels_is_diffusers() -> None:
    model, _ = make(CONFIGS["U-Net"])
    layer = next(module for module in model.modules() if isinstance(module, PixelAttention))
    x = torch.randn(3, layer.query_dim, 4, 6)
    oracle = Attention.forward(copy.deepcopy(layer).double(), x.double())
    for layout in (torch.channels_last, torch.contiguous_format):
        laid_out = x.contiguous(memory_format=layout)
        assert_within_budget(layer(laid_out), oracle, Attention.forward(layer, laid_out))
    layer.group_norm.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(layer(x), Attention.forward(layer, x))
