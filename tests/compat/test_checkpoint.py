"""Released checkpoints as they are found, and files that only say that they are some."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from madformer.cli.main import main
from madformer.compat.checkpoint import ReleasedCheckpoint
from madformer.compat.madformer_ffhq import MADFormer, read_model_config
from madformer.model import MADFormer as NativeMADFormer
from tests.helpers.compat_cases import BASELINE

SIZES = ("block_size", "ar_len", "spatial_len", "diff_depth")
ARGUMENTS = {name: BASELINE.geometry[name] for name in SIZES}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return BASELINE.weights()


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def compiled_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("self_attn.", "_orig_mod.self_attn."): tensor for name, tensor in state.items()}


VARIANTS = {
    "dict": lambda state: {"ema": state, "args": ARGUMENTS},
    "ddp": lambda state: {"ema": prefixed("module.", state), "args": argparse.Namespace(**ARGUMENTS)},
    "compiled": lambda state: {"ema": prefixed("_orig_mod.", state), "args": argparse.Namespace(**ARGUMENTS)},
    "both": lambda state: {"ema": prefixed("module._orig_mod.", state), "args": ARGUMENTS},
    "other way": lambda state: {"ema": prefixed("_orig_mod.module.", state), "args": ARGUMENTS},
    "blocks": lambda state: {"ema": compiled_blocks(state), "args": ARGUMENTS, "steps": 3, "opt": None},
    "mixed": lambda state: {"ema": {**state, "boi_block": state["boi_block"].bfloat16()}, "args": ARGUMENTS},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("archive", [True, False])
def test_found_in_the_wild(variant: str, archive: bool, weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(VARIANTS[variant](weights), tmp_path / "ckpts.pt", _use_new_zipfile_serialization=archive)
    read = ReleasedCheckpoint.load(tmp_path / "ckpts.pt")
    assert read.arguments == ARGUMENTS
    assert read.state.keys() == weights.keys()
    for name, tensor in weights.items():
        assert read.state[name].dtype == torch.float32
        wanted = tensor.bfloat16().float() if (variant, name) == ("mixed", "boi_block") else tensor
        assert torch.equal(read.state[name], wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_kept_and_computes(dtype: torch.dtype, weights: dict[str, Tensor], tmp_path: Path) -> None:
    low = {name: tensor.to(dtype) for name, tensor in weights.items()}
    torch.save({"ema": low, "args": ARGUMENTS}, tmp_path / "ckpts.pt")
    model = MADFormer.from_released(tmp_path / "ckpts.pt")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert main(["convert", "--checkpoint", str(tmp_path / "ckpts.pt"), "--out", str(tmp_path / "out")]) == 0
    native = NativeMADFormer.from_pretrained(tmp_path / "out" / "transformer")
    assert native.dtype == torch.float32
    assert torch.equal(native.boi, low["boi_block"].float())


STATE = {"boi_block": torch.zeros(1, 2, 3)}
HUGE = torch.zeros(1).expand(2**40)
BAD_CONTENTS: list[tuple[Any, str]] = [
    ([1, 2], "it needs the entries 'ema' and 'args'"),
    (torch.zeros(3), "it needs the entries 'ema' and 'args'"),
    ({"model": STATE, "args": ARGUMENTS}, "it needs the entries 'ema' and 'args'; it has 'model'"),
    ({"ema": None, "args": ARGUMENTS}, "its 'ema' is a NoneType, and no state dict"),
    ({"ema": {}, "args": ARGUMENTS}, "its 'ema' is empty, and no state dict"),
    ({"ema": [STATE], "args": ARGUMENTS}, "its 'ema' is a list, and no state dict"),
    ({"ema": STATE, "args": None}, "its 'args' is a NoneType, and no argparse.Namespace or dict"),
    ({"ema": STATE, "args": [1]}, "its 'args' is a list, and no argparse.Namespace or dict"),
    ({"ema": {"step": 3, **STATE}, "args": ARGUMENTS}, "'step' in its 'ema' is no tensor"),
    ({"ema": {3: torch.zeros(1)}, "args": ARGUMENTS}, "'3' in its 'ema' is no tensor"),
    ({"ema": {"w": torch.zeros(3, dtype=torch.int8)}, "args": ARGUMENTS}, r"w is no dense array of floats \(.*int8"),
    ({"ema": {"w": torch.zeros(3).to_sparse()}, "args": ARGUMENTS}, r"w is no dense array of floats \(.*sparse"),
    ({"ema": {"w": HUGE}, "args": ARGUMENTS}, r"w is no dense array of floats \(.*1099511627776"),
    ({"ema": {"module.w": HUGE[:1], "_orig_mod.module.w": HUGE[:1]}, "args": ARGUMENTS}, "two tensors have one name"),
]


@pytest.mark.parametrize(("content", "message"), BAD_CONTENTS)
def test_other_contents_are_refused_in_one_line(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=message) as error:
        ReleasedCheckpoint.load(tmp_path / "bad.pt")
    assert "\n" not in str(error.value)


def changed(**changes: Any) -> dict[str, Any]:
    return {**ARGUMENTS, **changes}


def test_other_arguments_and_weights_are_refused_in_one_line(
    weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, which leaves nothing behind."""
    flat = {name: tensor.flatten()[:3].clone() for name, tensor in weights.items()}
    far = {**weights, "blocks.999999999.mlp_list.0.gate_proj.weight": torch.zeros(1)}
    for state, arguments, message in (
        (weights, changed(ar_len="4"), "have ar_len='4', and not a number from 1"),
        (weights, changed(ar_len=10**12, spatial_len=16 * 10**12), "ar_len=1000000000000, and not a number from 1"),
        (weights, changed(ar_len=True), "have ar_len=True"),
        (weights, changed(diff_depth=-1), "have diff_depth=-1"),
        (weights, changed(denoising_mlp="False"), "have denoising_mlp='False', and neither True nor False"),
        (weights, changed(clear_clean=None), "have clear_clean=None"),
        (weights, changed(diff_depth=99), "are of no model: "),
        (weights, changed(block_size=5, spatial_len=20), "are of no model: "),
        (weights, {"block_size": 16}, "'ar_len' is missing"),
        (flat, ARGUMENTS, "a tensor has another shape"),
        (far, ARGUMENTS, "its modules are not numbered from 0 on"),
        ({**weights, "extra": torch.zeros(1)}, ARGUMENTS, r"1 tensors unexpected (extra)"),
    ):
        torch.save({"ema": state, "args": arguments}, tmp_path / "bad.pt")
        status = main(["convert", "--checkpoint", str(tmp_path / "bad.pt"), "--out", str(tmp_path / "out")])
        lines = capsys.readouterr().err.strip().splitlines()
        assert (status, len(lines)) == (1, 1), lines
        assert message in lines[0]
        assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"PK\x03\x04", b"\x80\x02}q\x00.", b"hello\n", b"\x80\x02cos\nsystem\n", bytes(1000)]
)
@pytest.mark.parametrize("name", ["bad.pt", "bad.safetensors", "model.safetensors.index.json"])
def test_no_checkpoint_at_all(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        ReleasedCheckpoint.load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_safetensors_hold_no_arguments(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(
        ValueError, match=r"model-00001-of-00002.safetensors holds weights alone: a released checkpoint"
    ):
        ReleasedCheckpoint.load(tmp_path / "model-00001-of-00002.safetensors")


BAD_CONFIGS: list[tuple[Any, str]] = [
    ([1, 2], "holds a list, and no model configuration"),
    (3, "holds a int, and no model configuration"),
    (None, "holds a NoneType, and no model configuration"),
    ("text", "holds a str, and no model configuration"),
    ({"unet_num_layers_per_block": [10**9]}, "has unet_num_layers_per_block="),
    ({"unet_num_layers_per_block": "22"}, "has unet_num_layers_per_block='22'"),
    ({"max_position_embeddings": 10**12}, "has max_position_embeddings=1000000000000"),
    ({"unet_block_out_channels": [[1], 2]}, "has unet_block_out_channels="),
    ({"unet_block_out_channels": 5, "hidden_act": "silu"}, "are of no model: "),
    ({"hidden_act": 5}, "hidden_act=5: the released models and this one use 'silu'"),
    ({"rms_norm_eps": "small"}, "are of no model: "),
    ({"intermediate_size": None}, "are of no model: "),
    ({"unet_num_heads": 0}, "are of no model: "),
]


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS)
def test_other_configurations_are_refused_in_one_line(
    config: Any, message: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    checkpoint = ReleasedCheckpoint(weights, ARGUMENTS, tmp_path / "ckpts.pt")
    (tmp_path / "model.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        MADFormer.from_checkpoint(checkpoint, tmp_path / "model.json")
    assert "\n" not in str(error.value)


def test_configurations_that_are_no_json(tmp_path: Path) -> None:
    for content in (b"[" * 100_000, b"\xff\xfe{}", b"{", b""):
        (tmp_path / "model.json").write_bytes(content)
        with pytest.raises(ValueError, match="is no JSON"):
            read_model_config(tmp_path / "model.json")
    (tmp_path / "model.json").write_bytes(b"\xef\xbb\xbf" + BASELINE.model_config.read_bytes())
    assert read_model_config(tmp_path / "model.json") == read_model_config(BASELINE.model_config)
