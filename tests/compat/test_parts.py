"""What a user puts under a released name is what ``forward`` and ``sample`` run: adapters, hooks, other layers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.nn.utils import parametrize

import madformer
from madformer.compat import madformer_ffhq, madformer_imagenet
from madformer.compat.acdit import ACDiT
from madformer.compat.parts import Released
from tests.helpers.compat_cases import Released as StandIn
from tests.helpers.testing import perturb, relative_error

CONFIG = {
    "intermediate_size": 32, "unet_block_out_channels": [8], "unet_num_layers_per_block": [1], "unet_resnet_groups": 4,
    "unet_transformer_layers_per_block": [1], "unet_time_emb_dim": 16, "unet_num_heads": 2,
    "vocab_size": 7, "pad_token_id": 0, "max_position_embeddings": 3,
}  # fmt: skip
SIZES = {"hidden_size": 32, "num_heads": 2, "block_size": 4, "spatial_len": 16}
LAYERS = {"depth": 3, "diff_depth": 2}
SHAPES = {"ffhq": (2, 4, 4, 4), "imagenet": (2, 4, 4, 4), "acdit": (2, 4, 4, 16)}
ADAPTED = {
    "ffhq": r"blocks\..*(qkv|proj)_list\.\d|.*(gate|up|down)_proj|.*to_q|.*conv_out|.*linear_[12]",
    "imagenet": r"blocks\..*(qkv|proj)_list\.\d|.*(gate|up|down)_proj|.*conv_in|.*linear_[12]|lm_head|embed_tokens",
    "acdit": r".*(qkv|proj|fc1|fc2|linear|x_embedder|modulation\.1|mlp\.[02]|embedding_table)",
}
each_family = pytest.mark.parametrize("family", SHAPES)


def make(family: str) -> Released:
    torch.manual_seed(0)
    if family == "acdit":
        model: Released = ACDiT(latent_size=16, num_classes=3, depth=2, mlp_ratio=1.0, **SIZES)
        model.y_embedder.dropout_prob = 0
    elif family == "ffhq":
        model = madformer_ffhq.MADFormer(model_config_path=CONFIG, **SIZES, **LAYERS)
    else:
        # it has a second network over the same parts, for the condition
        model = madformer_imagenet.MADFormer(model_config_path=CONFIG, clear_cond=True, **SIZES, **LAYERS)
    perturb(model)
    return model


def inputs_of(family: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of ``forward``, and those of them that ``sample`` takes first."""
    generator = torch.Generator().manual_seed(0)
    latents = tuple(torch.randn(SHAPES[family], generator=generator) for _ in range(2))
    timestep, ids = torch.tensor([[1, 10, 500, 999]]).expand(2, -1), torch.tensor([[0, 2, 5], [0, 1, 6]])
    if family == "acdit":
        return (*latents, timestep, ids[:, 1]), (ids[:, 1],)
    return ((ids, *latents, timestep), (ids,)) if family == "imagenet" else ((*latents, timestep), ())


def predict(model: nn.Module, family: str) -> Tensor:
    """All that ``forward`` gives."""
    outputs = model(*inputs_of(family)[0])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.cat([output.flatten() for output in outputs if output is not None])


def sample(model: Any, family: str) -> Tensor:
    generator, guidance = torch.Generator().manual_seed(1), (2.0,) if family == "acdit" else ()
    first = inputs_of(family)[1]
    return model.sample(*first, DDIMScheduler(), 2, *guidance, SHAPES[family], generator=generator, dtype=torch.float)


def both(model: Any, family: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return predict(model, family), sample(model, family)


def adapted(model: Released, family: str) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules=ADAPTED[family]))


def adapters(model: Any) -> dict[str, Tensor]:
    """What an adapter adds is a multiple of this; by the name of the part that it adapts."""
    found = {}
    for name, part in model.base_model.model.named_modules():
        if hasattr(part, "get_delta_weight"):
            up = part.lora_embedding_B if "default" in part.lora_embedding_A else part.lora_B
            found[name] = getattr(up["default"], "weight", up["default"])
    return found


def fill(model: nn.Module) -> None:
    """Give every adapter something to say."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)


@each_family
def test_adapters_train(family: str) -> None:
    """All whose weights the loss reaches, and no other parameter."""
    target = torch.randn(predict(make(family), family).shape, generator=torch.Generator().manual_seed(1))
    plain = make(family)
    (predict(plain, family) - target).square().mean().backward()
    model = adapted(make(family), family)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=1e-3), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (predict(model, family) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    moved = {name for name, up in adapters(model).items() if up.any()}
    reached = {name for name in adapters(model) if plain.get_parameter(f"{name}.weight").grad.any()}
    assert moved == reached


@each_family
def test_adapted_is_merged_by_hand(family: str) -> None:
    """Predictions, samples and the native model; and again after merging, disabling and unloading."""
    plain = make(family)
    model = adapted(copy.deepcopy(plain), family)
    fill(model)
    merged, state = copy.deepcopy(plain), plain.state_dict()
    for name in adapters(model):
        part = model.base_model.model.get_submodule(name)
        state[f"{name}.weight"] = state[f"{name}.weight"] + part.get_delta_weight("default").detach()
    merged.load_state_dict(state)
    expected, before = both(merged, family), both(plain, family)

    def assert_equal(actual: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
        for a, w in zip(actual, wanted, strict=True):
            assert relative_error(a, w) < 1e-4

    assert all(relative_error(e, b) > 1e-2 for e, b in zip(expected, before, strict=True))
    assert_equal(both(model, family), expected)
    with model.disable_adapter():
        assert_equal(both(model, family), before)
    held = model.base_model.model.to_native()
    model.merge_adapter()
    assert_equal(both(model, family), expected)
    model.unmerge_adapter()
    assert_equal(both(model, family), expected)
    whole = model.merge_and_unload()
    assert_equal(both(whole, family), expected)
    assert whole.to_native() is held
    assert held.state_dict().keys() == plain.to_native().state_dict().keys()


@each_family
def test_copies_of_an_adapted_model_stand_alone(family: str) -> None:
    model = adapted(make(family), family)
    fill(model)
    expected = both(model, family)
    duplicate = copy.deepcopy(model)
    fill(model)
    for actual, wanted in zip(both(duplicate, family), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert relative_error(both(model, family)[0], expected[0]) > 1e-3


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Scaled(nn.Module):
    """Another module in a part's place, with a strength that is an attribute."""

    def __init__(self, inner: nn.Module, strength: float) -> None:
        super().__init__()
        self.inner, self.strength = inner, strength
        # what the network asks of a whole half of the U-Net
        for name in ("time_embedding", "conv_out"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        return self.strength * output if isinstance(output, Tensor) else (self.strength * output[0], output[1])


PARTS = {
    "ffhq": [
        *("blocks.1.self_attn.qkv_list.1", "blocks.2.self_attn.qkv_list.0", "blocks.0.self_attn.proj_list.1"),
        *("blocks.2.mlp_list.1", "blocks.2.mlp_list.1.gate_proj", "blocks.1.input_layernorm_list.0"),
        *("blocks.1.post_attention_layernorm_list.1", "blocks.2.self_attn.q_norm_list.1"),
        *("blocks.1.self_attn.k_norm_list.0", "downsampler.conv_in", "upsampler.conv_out", "downsampler", "upsampler"),
        *(
            "upsampler.up_blocks.0.resnets.0.norm1",
            "downsampler.time_embedding.linear_1",
            "upsampler.up_blocks.0.attentions.0",
        ),
    ],
    "imagenet": [
        *("embed_tokens", "lm_head", "blocks.0.self_attn.qkv_list.0", "blocks.2.self_attn.qkv_list.0"),
        *("blocks.1.self_attn.proj_list.2", "blocks.1.post_attention_layernorm_list.0"),
    ],
    "acdit": [
        *("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table", "x_embedder", "blocks.0.attn.qkv"),
        *("blocks.1.attn.k_norm", "blocks.1.norm2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "final_layer.norm_final"),
        *("blocks.0.adaLN_modulation.1", "final_layer.linear", "final_layer.adaLN_modulation.1"),
    ],
}


def replaced(model: nn.Module, name: str) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, Scaled(model.get_submodule(name), 0.5))


def hooked(model: nn.Module, name: str) -> None:
    def halve(_: nn.Module, __: Any, output: Any) -> Any:
        return output / 2 if isinstance(output, Tensor) else (output[0] / 2, output[1])

    model.get_submodule(name).register_forward_hook(halve)


@functools.cache
def unchanged(family: str) -> tuple[Tensor, Tensor]:
    return both(make(family), family)


# The others are of the same kinds.
OFTEN = {
    *("blocks.1.self_attn.qkv_list.1", "blocks.0.self_attn.proj_list.1", "blocks.2.mlp_list.1.gate_proj"),
    *("blocks.1.input_layernorm_list.0", "blocks.1.self_attn.k_norm_list.0", "upsampler.conv_out", "downsampler"),
    *("upsampler.up_blocks.0.resnets.0.norm1", "downsampler.time_embedding.linear_1", "embed_tokens", "lm_head"),
    *("upsampler.up_blocks.0.attentions.0", "blocks.0.self_attn.qkv_list.0", "blocks.2.mlp_list.1", "upsampler"),
    *PARTS["acdit"],
}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=() if name in OFTEN else pytest.mark.slow)
        for family, names in PARTS.items()
        for name in names
    ],
)
def test_a_part_replaced_or_hooked_is_run(family: str, name: str) -> None:
    """Both halve what the part gives, and both do the same, in predictions and in samples."""
    before, after = unchanged(family), []
    for change in (replaced, hooked):
        model = make(family)
        change(model, name)
        after.append(both(model, family))
    for index, (one, other) in enumerate(zip(*after, strict=True)):
        assert relative_error(one, other) < 1e-5
        if index == 0 or name != "lm_head":
            assert relative_error(one, before[index]) > 1e-6


def test_a_parametrised_root_parameter() -> None:
    model = make("ffhq")
    expected = make("ffhq")
    with torch.no_grad():
        expected.boi_block.mul_(2)
    parametrize.register_parametrization(model, "boi_block", Doubled())
    for actual, wanted in zip(both(model, "ffhq"), both(expected, "ffhq"), strict=True):
        assert torch.equal(actual, wanted)
    predict(model, "ffhq").square().mean().backward()
    predict(expected, "ffhq").square().mean().backward()
    gradient = model.parametrizations.boi_block.original.grad
    assert relative_error(gradient, 2 * expected.boi_block.grad) < 1e-5


def test_functional_calls_reach_the_root_parameter() -> None:
    model = make("ffhq")
    before = predict(model, "ffhq")
    doubled = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
    expected = make("ffhq")
    expected.load_state_dict(doubled, assign=True)
    outputs = torch.func.functional_call(model, doubled, inputs_of("ffhq")[0])
    assert relative_error(torch.cat([output.flatten() for output in outputs]), predict(expected, "ffhq")) < 1e-5
    assert torch.equal(predict(copy.deepcopy(model), "ffhq"), before)


def test_the_native_side_may_change_too() -> None:
    """A part put into the native model is run by the drop-in, and stays; both at once is an error."""
    model = make("ffhq")
    native = model.to_native()
    expected = make("ffhq")
    replaced(expected, "blocks.1.self_attn.proj_list.1")
    tower = native.layers[1].towers["noise"]
    tower.proj = Scaled(tower.proj, 0.5)
    for actual, wanted in zip(both(model, "ffhq"), both(expected, "ffhq"), strict=True):
        assert torch.equal(actual, wanted)
    assert model.to_native() is native
    assert model.blocks[1].self_attn.proj_list[1] is tower.proj
    assert model.state_dict().keys() == expected.state_dict().keys()
    tower.proj, model.blocks[1].self_attn.proj_list[1] = nn.Identity(), nn.Identity()
    with pytest.raises(ValueError, match=r"blocks.1.self_attn.proj_list.1 was replaced, and so was the native model's"):
        predict(model, "ffhq")


REFUSED: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("ffhq", "hook", lambda m: m.blocks[1].register_forward_hook(print), "blocks.1 has hooks or a forward of its own"),
    ("ffhq", "own", lambda m: setattr(m.blocks[0].self_attn, "forward", print), "blocks.0.self_attn has hooks or"),
    (
        "ffhq",
        "wrap",
        lambda m: m.blocks.__setitem__(2, nn.Sequential(m.blocks[2])),
        "blocks.2 was replaced by a Sequen",
    ),
    ("ffhq", "more", lambda m: m.blocks.append(copy.deepcopy(m.blocks[2])), "blocks has 4 parts and not 3"),
    ("ffhq", "gone", lambda m: delattr(m, "upsampler"), "upsampler was removed"),
    ("imagenet", "rope", lambda m: m.text_rope.register_forward_hook(print), "text_rope has hooks"),
    ("acdit", "act", lambda m: m.t_embedder.mlp.__setitem__(1, nn.GELU()), "t_embedder.mlp.1 was replaced by a GELU"),
    ("acdit", "mlp", lambda m: setattr(m.blocks[0], "mlp", nn.Identity()), "blocks.0.mlp was replaced by a Identity"),
    (
        "acdit",
        "label",
        lambda m: setattr(m, "y_embedder", nn.Embedding(9, 9)),
        "y_embedder was replaced by a Embedding",
    ),
]


@pytest.mark.parametrize(("family", "kind", "change", "message"), REFUSED, ids=[case[1] for case in REFUSED])
def test_what_would_not_run_is_refused(family: str, kind: str, change: Callable[[Any], Any], message: str) -> None:
    model = make(family)
    change(model)
    for call in (lambda: predict(model, family), lambda: sample(model, family), model.to_native):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


# Accelerated


def inject(model: nn.Module) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=r".*qkv_list\.\d"), model)


LATER: list[tuple[str, Callable[[Any], Any], str]] = [
    ("adapter", inject, "unknown parameter blocks.0.self_attn.qkv_list.0.base_layer.weight|no parameter blocks.0"),
    ("hook", lambda m: m.blocks[1].self_attn.qkv_list[0].register_forward_hook(print), "qkv_list.0 has hooks"),
    ("block hook", lambda m: m.blocks[1].register_forward_pre_hook(print), "blocks.1 has hooks"),
    ("parametrization", lambda m: parametrize.register_parametrization(m.lm, "weight", Doubled()), "no parameter blo"),
    ("activation", lambda m: setattr(m.blocks[0].mlp_list[1], "act_fn", nn.GELU()), "mlp_list.1.act_fn is not SiLU"),
    ("class", lambda m: m.blocks[0].mlp_list.__setitem__(1, nn.Identity()), "no parameter blocks.0.mlp_list.1"),
    ("epsilon", lambda m: setattr(m.blocks[0].input_layernorm_list[1], "variance_epsilon", 0.1), "is no RMS norm with"),
    ("forward", lambda m: setattr(m.lm, "forward", print), "forward was replaced"),
    ("dropout", lambda m: setattr(m.blocks[1].self_attn.attn_drop, "p", 0.5), "attn_drop drops 0.5"),
    ("switch", lambda m: setattr(m, "square_block", False) or setattr(m, "ar_len", 3), "ar_len=3|spatial_len=16"),
]


@pytest.mark.parametrize(("kind", "change", "message"), LATER, ids=[case[0] for case in LATER])
def test_changes_after_accelerate_are_refused_at_the_next_call(
    kind: str, change: Callable[[Any], Any], message: str
) -> None:
    model: Any = StandIn(make("ffhq"))
    for block in model.blocks:
        block.self_attn.attn_drop = nn.Dropout(0.0)
    madformer.accelerate(model)
    predict(model, "ffhq")
    object.__setattr__(model, "lm", model.blocks[2].self_attn.proj_list[1])
    change(model)
    for call in (predict, sample):
        with pytest.raises(ValueError, match=message) as error:
            call(model, "ffhq")
        assert "\n" not in str(error.value)


def test_changes_after_accelerate_that_keep_it_released_are_followed() -> None:
    model: Any = StandIn(make("ffhq"))
    madformer.accelerate(model, backend="reference")
    predict(model, "ffhq")
    other: Any = StandIn(make("ffhq"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    expected = both(madformer.accelerate(other, backend="reference"), "ffhq")
    for name in ("downsampler", "upsampler", "blocks", "boi_block"):
        setattr(model, name, getattr(other, name))
    for actual, wanted in zip(both(model, "ffhq"), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-5
    assert model.forward.__self__.model.to_native().layers[0].backend == "reference"
