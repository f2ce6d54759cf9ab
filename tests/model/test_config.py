"""The configuration: JSON, presets, and the geometries it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from madformer.config import PRESETS, MADFormerConfig, TextConfig, UNetConfig, preset, tiny
from madformer.training.config import TrainingConfig

GEOMETRY: dict[str, Any] = {
    "num_blocks": 6, "block_shape": (1, 4), "block_grid": (2, 3), "block_order": "random", "rope_base": 300
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_json(name: str) -> None:
    config = preset(name)
    assert MADFormerConfig.from_json(config.to_json()) == config
    assert MADFormerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_field_survives_the_round_trip() -> None:
    config = MADFormerConfig(
        hidden_size=96, num_layers=5, num_heads=4, intermediate_size=10, norm_eps=1e-6, qk_norm=False, mlp_bias=True,
        num_blocks=9, block_size=4, diffusion_layers=2, latent_channels=3, context="clean",
        cross_block_attention=False, shared_towers=True, prediction_type="v_prediction", rope_pairing="released",
        clean_timestep="noisy", hidden_loss_input="condition+noisy", hidden_loss_skips="same_block",
        square_blocks=False, unet=UNetConfig((8, 16, 24), (1, 2, 3), (True, False, True), 2, 4, 16),
        text=TextConfig(vocab_size=100, length=7, pad_token_id=3, rope_theta=500.0), mlp="gelu", patch_size=1,
        num_classes=3, null_class=False, time_conditioning="unet+adaln",
    )  # fmt: skip
    default = MADFormerConfig()
    elsewhere = {"elastic_diffusion_layers", *GEOMETRY}  # not with these
    assert all(getattr(config, name) != getattr(default, name) for name in vars(default).keys() - elsewhere)
    assert MADFormerConfig.from_json(config.to_json()) == config


def test_geometry_of_the_papers_models() -> None:
    """28 layers, half of them diffusion; 128 x 128 latents in 16 blocks, 32 x 32 latents in 4."""
    ffhq, imagenet = preset("ffhq1024"), preset("imagenet256")
    assert (ffhq.ar_layers, ffhq.head_dim, ffhq.latent_shape, ffhq.block_latents) == (14, 64, (4, 128, 128), (32, 32))
    assert (imagenet.latent_shape, imagenet.block_latents, imagenet.latents_per_block) == ((4, 32, 32), (16, 16), 256)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 100}, ["hidden_size=100", "num_heads=18"]),
        ({"hidden_size": 108}, ["hidden_size=108", "num_heads=18", "multiple of 4"]),
        ({"diffusion_layers": 29}, ["diffusion_layers=29", "num_layers=28"]),
        ({"diffusion_layers": 0}, ["diffusion_layers=0"]),
        ({"num_layers": 2.5}, ["num_layers=2.5"]),
        ({"num_blocks": 8}, ["num_blocks=8", "square"]),
        ({"block_size": 200}, ["block_size=200", "square"]),
        ({"context": "both"}, ["context='both'", "'clean+condition'"]),
        ({"prediction_type": "velocity"}, ["prediction_type='velocity'", "'v_prediction'"]),
        ({"context": "condition", "shared_towers": True}, ["shared_towers", "context"]),
        ({"norm_eps": 0.0}, ["norm_eps=0.0"]),
        ({"elastic_diffusion_layers": (7, 21)}, ["elastic_diffusion_layers=(7, 21)", "diffusion_layers=14"]),
        ({"elastic_diffusion_layers": (14, 29)}, ["elastic_diffusion_layers=(14, 29)", "num_layers=28"]),
        ({"elastic_diffusion_layers": (14,), "context": "clean"}, ["elastic_diffusion_layers", "context='clean'"]),
        ({"elastic_diffusion_layers": (14,), "cross_block_attention": False}, ["cross_block_attention=False"]),
        ({"elastic_diffusion_layers": (14,), "time_conditioning": "adaln"}, ["time_conditioning='adaln'"]),
        ({"num_classes": -1}, ["num_classes=-1"]),
        ({"num_classes": 10}, ["num_classes=10", "AdaLN", "time_conditioning='unet'"]),
        ({"unet": None}, ["time_conditioning='unet'", "unet=None"]),
        ({"block_shape": (8, 16)}, ["block_shape=(8, 16)", "block_size=256"]),
        ({"block_shape": (256,)}, ["block_shape=(256,)", "rows and columns"]),
        ({"block_grid": (-4, -4)}, ["block_grid=(-4, -4)", "num_blocks=16"]),
        ({"block_order": "hilbert"}, ["block_order='hilbert'", "'spiral'"]),
        ({"block_order": "spiral", "square_blocks": False}, ["block_order='spiral'", "square_blocks=False"]),
        ({"block_grid": (2, 8), "square_blocks": False}, ["block_grid=(2, 8)", "square_blocks=False"]),
        ({"rope_base": -1}, ["rope_base=-1"]),
    ],
)
def test_impossible_geometry_names_its_fields(changes: dict[str, object], named: list[str]) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        preset("ffhq1024").replace(**changes)
    message = str(caught.value)
    assert all(name in message for name in named), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_out_channels": (512,)}, ["unet.layers_per_block", "unet.block_out_channels=(512,)"]),
        ({"block_out_channels": (100, 200)}, ["unet.norm_groups=8"]),
        ({"num_heads": 3}, ["unet.num_heads=3"]),
        ({"layers_per_block": (0, 2)}, ["unet.layers_per_block=(0, 2)"]),
    ],
)
def test_impossible_unet_names_its_fields(changes: dict[str, object], named: list[str]) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        UNetConfig(**changes)  # type: ignore[arg-type]
    assert all(name in str(caught.value) for name in named), caught.value


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"length": 0}, "text.length=0"),
        ({"vocab_size": 0}, "text.vocab_size=0"),
        ({"pad_token_id": 9}, "text.pad_token_id=9"),
        ({"rope_theta": 0.0}, "text.rope_theta=0.0"),
    ],
)
def test_impossible_text_names_its_fields(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        TextConfig(**{"vocab_size": 9, "length": 2, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", [MADFormerConfig, UNetConfig, TextConfig, TrainingConfig])
def test_every_whole_number_has_a_limit(cls: Any) -> None:
    """Beyond it is a slip, which would fail where nobody says so: in an allocation, or as a process a worker."""
    needed = {"vocab_size": 9, "length": 3} if cls is TextConfig else {}
    hints = {name: hint for name, hint in get_type_hints(cls).items() if hint in (int, int | None, tuple[int, ...])}
    assert hints
    for name, hint in hints.items():
        for number in (10**30, 2**63):
            value = (number, number) if hint == tuple[int, ...] else number
            with pytest.raises(ValueError, match=rf"{name}=\(?{number}.* must be at most \d+$"):
                cls(**{**needed, name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_classes": 2**24 + 1, "time_conditioning": "unet+adaln"},
            "num_classes=16777217 must be at most",
        ),
        ({"num_layers": 10_000}, "num_layers=10000 must be at most 1024"),
        ({"num_blocks": 2**16, "block_size": 2**16}, "must be at most 16777216 tokens"),
    ],
)
def test_sizes_beyond_any_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny().replace(**changes)
    with pytest.raises(ValueError, match=r"unet\.block_out_channels=.* must name from one level to 10"):
        UNetConfig(block_out_channels=(16,) * 11, layers_per_block=(1,) * 11, attention=(False,) * 11)


def test_geometry_and_splits_survive_the_round_trip() -> None:
    config = preset("tiny").replace(elastic_diffusion_layers=(1, 2, 3), **GEOMETRY)
    assert MADFormerConfig.from_json(config.to_json()) == config


def test_a_model_of_patches_survives_the_round_trip() -> None:
    config = preset("tiny").replace(unet=None, time_conditioning="adaln")
    assert MADFormerConfig.from_json(config.to_json()) == config


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown configuration field depth"):
        MADFormerConfig.from_dict({"depth": 3})
    with pytest.raises(ValueError, match=r"unknown configuration field unet\.channels"):
        MADFormerConfig.from_dict({"unet": {"channels": 3}})
    with pytest.raises(ValueError, match=r"unknown preset 'huge'; there are ffhq1024, imagenet256, emoji64, tiny"):
        preset("huge")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        MADFormerConfig.from_file(tmp_path / "config.json")
