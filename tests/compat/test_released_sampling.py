"""What ``madformer export --format released`` writes, in the hands of the released ``sample.py``."""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from madformer.compat import madformer_ffhq, madformer_imagenet
from madformer.compat.export import save_released
from madformer.compat.madformer_ffhq import read_model_config
from tests.helpers.compat_cases import BASELINE, SAMPLE_TOLERANCE, TEXT_BASELINE, make_compat
from tests.helpers.testing import GoldenCase, relative_error, small_vae

CLONES = {"ffhq": "MADFORMER_RELEASED", "imagenet": "MADFORMER_RELEASED_IMAGENET"}
FAMILIES = {"ffhq": madformer_ffhq.MADFormer, "imagenet": madformer_imagenet.MADFormer}
CASES = {"ffhq": BASELINE, "imagenet": TEXT_BASELINE}
SIZES = ("hidden_size", "depth", "num_heads")
# What the scripts of both branches read of a checkpoint's args.
READ = {
    *("vae_latent_size", "patch_size", "block_size", "ar_len", "spatial_len", "model_config_path", "diff_depth"),
    *("pre_downsample_block_size", "image_size", "clear_cond", "clear_clean", "denoising_mlp"),
}
each_branch = pytest.mark.parametrize("branch", CASES)


@pytest.fixture
def exported(branch: str, tmp_path: Path) -> Path:
    native = make_compat(CASES[branch]).to_native()
    save_released(tmp_path / "ckpts.pt", native, native)
    return tmp_path / "ckpts.pt"


def clone_of(branch: str) -> Path:
    for package in ("transformers", "einops"):
        pytest.importorskip(package)
    if CLONES[branch] not in os.environ:
        pytest.skip(f"{CLONES[branch]} does not name a clone")
    return Path(os.environ[CLONES[branch]])


@each_branch
def test_args_are_those_that_the_script_reads(branch: str, exported: Path) -> None:
    case: GoldenCase = CASES[branch]
    arguments = torch.load(exported, weights_only=False)["args"]
    assert isinstance(arguments, argparse.Namespace)
    values = vars(arguments)
    assert values.keys() >= READ
    assert {name: values[name] for name in case.geometry} == case.geometry
    assert (values["vae_latent_size"], values["patch_size"]) == (4, 1)
    assert (values["pre_downsample_block_size"], values["image_size"]) == (64, 128)
    written = json.loads(Path(values["model_config_path"]).read_text())
    released = read_model_config(case.model_config)
    sizes = {name: case.geometry[name] for name in ("hidden_size",)}
    expected = {**released, **sizes, "num_attention_heads": case.geometry["num_heads"]}
    assert written == {name: expected[name] for name in written}
    names = [name for name in released if name.startswith("unet_")]
    assert written.keys() >= {*names, "intermediate_size", "rms_norm_eps", "mlp_bias", "hidden_act", "pretraining_tp"}


@each_branch
def test_args_are_those_that_the_clone_reads(branch: str) -> None:
    source = (clone_of(branch) / "src" / "sample.py").read_text()
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    objects = {"args", "args_model"} & {argument.arg for argument in function.args.args}
    read = {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in objects
    }
    assert {"vae_latent_size", "image_size", "diff_depth"} <= read <= READ


@pytest.mark.slow
@each_branch
def test_the_script_draws_what_we_draw(branch: str, exported: Path) -> None:
    """Run twice, with its own class and with ours: both load the file strictly, and give the same pictures."""
    from benchmarks.released import load_released

    clone = clone_of(branch)
    module = load_released(clone, "cpu")
    module.MADFormerConfig.rope_theta = 10_000.0
    pictures = [run_script(clone, exported, CASES[branch], cls, module) for cls in (module.MADFormer, FAMILIES[branch])]
    assert pictures[0].shape == (4, 3, 128, 128)
    assert pictures[0].std() > 1e-3
    assert relative_error(pictures[1], pictures[0]) < SAMPLE_TOLERANCE


def run_script(clone: Path, file: Path, case: GoldenCase, cls: Callable[..., nn.Module], module: Any) -> Tensor:
    """The pictures that ``sample.py`` saves, with the sizes that it does not pass."""
    saved: list[Tensor] = []

    def factory(**arguments: Any) -> nn.Module:
        model = cls(**arguments, **{name: case.geometry[name] for name in SIZES})
        # constructors draw differently many numbers
        torch.manual_seed(1)
        return model

    class Tokenizer:
        eos_token = "0"

        def __call__(self, texts: list[str], *, max_length: int, **_: Any) -> dict[str, Tensor]:
            return {
                "input_ids": torch.tensor([[len(text) % 48] * (max_length - 1) + [int(text) % 48] for text in texts])
            }

    stubs = {
        name: ModuleType(name) for name in ("models", "config", "torchvision", "torchvision.utils", "tokenizers_stub")
    }
    stubs["models"].MADFormer = factory  # type: ignore[attr-defined]
    stubs["config"].MADFormerConfig = module.MADFormerConfig  # type: ignore[attr-defined]
    stubs["torchvision.utils"].save_image = lambda image, *_, **__: saved.append(image.clone())  # type: ignore[attr-defined]
    vae = small_vae(block_out_channels=(8, 8, 8, 8))
    source = clone / "src" / "sample.py"
    steps = ["--sample_step=3", "--range_start=0", "--range_end=3", "--max_bs=3", f"--save_dir={file.parent / 'out'}"]
    steps += ["--gen_num=4", "--class_num=2"] if case.folder.name == "imagenet" else []
    import transformers

    with (
        mock.patch.dict(sys.modules, stubs),
        mock.patch.object(sys, "argv", ["sample.py", f"--ckpt={file}", *steps]),
        mock.patch.object(AutoencoderKL, "from_pretrained", return_value=vae),
        mock.patch.object(transformers.AutoTokenizer, "from_pretrained", return_value=Tokenizer()),
        mock.patch.object(torch.cuda, "is_available", return_value=False),
    ):
        exec(compile(source.read_text(), str(source), "exec"), {"__name__": "__main__"})
    return torch.stack(saved)
