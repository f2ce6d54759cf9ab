"""The released implementation beside ours, with equal weights: loading, drawing, and whether the results agree.

Running the released code needs a clone of ``Junhaoo-Chen/MADFormer`` (branch ``main``) and ``pip install transformers
einops``. Two things in it are changed from outside so that it can run here, neither to its disadvantage: the device
name in its ``sample``, and, where FlexAttention cannot train (CPU), its BlockMask, for the same mask as a dense tensor.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from benchmarks.record import CannotCompare
from madformer.compat.madformer_ffhq import MADFormer as CompatMADFormer
from madformer.engine.plan import Plan

MAX_RELATIVE_ERROR = 3e-3
LATENT_CHANNELS = 4
SEED = 0
RELEASED_MODULES = ("models", "rope", "config")


@dataclass(frozen=True)
class Shape:
    """Geometry of model and batch, and the sampling steps of a block."""

    batch: int
    hidden_size: int
    num_layers: int
    diffusion_layers: int
    num_heads: int
    intermediate_size: int
    num_blocks: int
    block_size: int
    unet_channels: tuple[int, ...]
    norm_groups: int
    steps: int

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """``(images, blocks, latents of a block, channels)``."""
        per_block = self.block_size * 4 ** (len(self.unet_channels) - 1)
        return self.batch, self.num_blocks, per_block, LATENT_CHANNELS

    def constructor_arguments(self) -> dict[str, Any]:
        """Of the released class, and so of our drop-in; ``model_config_path`` is the rest."""
        return {
            "latent_size": LATENT_CHANNELS,
            "block_size": self.block_size,
            "hidden_size": self.hidden_size,
            "depth": self.num_layers,
            "diff_depth": self.diffusion_layers,
            "num_heads": self.num_heads,
            "ar_len": self.num_blocks,
            "spatial_len": self.num_blocks * self.block_size,
        }

    def model_config(self) -> dict[str, Any]:
        """The JSON file that both constructors read."""
        levels = len(self.unet_channels)
        return {
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "unet_block_out_channels": list(self.unet_channels),
            "unet_num_layers_per_block": [2] * levels,
            "unet_resnet_groups": self.norm_groups,
            "unet_transformer_layers_per_block": [0] * (levels - 1) + [1],
            "unet_num_heads": 8,
            "unet_time_emb_dim": 128,
        }


# batch, hidden, layers, diffusion layers, heads, intermediate, blocks, tokens of a block, U-Net, groups, steps
SMALL = Shape(2, 512, 12, 6, 8, 1536, 9, 64, (128, 256), 8, steps=10)
FFHQ_1024 = Shape(1, 1152, 28, 14, 18, 4096, 16, 256, (512, 1024), 8, steps=20)
TINY = Shape(2, 128, 4, 2, 2, 64, 4, 4, (16, 32), 4, steps=3)


# The released code


def load_released(path: Path, device: str) -> ModuleType:
    """The released ``models`` module, imported from a clone without leaving its generic names behind.

    Args:
        path: the clone, or the folder ``src`` in it.
        device: what every ``'cuda'`` in the module becomes: its ``sample`` names that device and no other.

    Raises:
        CannotCompare: no such clone, or a package that it imports is not installed.
    """
    source = next((f for f in (path / "src" / "models.py", path / "models.py") if f.is_file()), None)
    if source is None:
        raise CannotCompare(f"{path} holds neither src/models.py nor models.py: not a clone of the released code")
    tree = ast.parse(source.read_text(), filename=str(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value == "cuda":
            node.value = device
    module = ModuleType("released_models")
    # torch.compile looks up the globals of functions that it inlines by the name of their module.
    sys.modules[module.__name__] = module
    hidden = {name: sys.modules.pop(name) for name in RELEASED_MODULES if name in sys.modules}
    sys.path.insert(0, str(source.parent))
    try:
        # It prints on import; stdout is for the table and the record.
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(tree, str(source), "exec"), module.__dict__)
    except ModuleNotFoundError as error:
        raise CannotCompare(f"the released code imports {error.name}, which is not installed (pip)") from error
    finally:
        sys.path.remove(str(source.parent))
        for name in RELEASED_MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
    return module


def dense_mask(released: Any, device: torch.device) -> Tensor:
    """The BlockMask as numbers to add. With a tensor for a mask, the released attention calls SDPA.

    Not as bool: SDPA would make these numbers of it in every layer anew.
    """
    if hasattr(released, "text_rope"):  # ImageNet's makes the mask with the text as a BlockMask alone.
        queries, keys = (torch.arange(length, device=device) for length in released.flex_attnmask.seq_lengths)
        allowed = released.flex_attnmask.mask_mod(0, 0, queries[:, None], keys[None])
    else:
        allowed = released.build_attention_mask(released.ar_len, released.block_size, device)
    return torch.zeros(allowed.shape, device=device).masked_fill_(~allowed, -torch.inf)


# Two models, one batch


@dataclass(frozen=True)
class Models:
    """The released model and ours, with equal weights. ``native`` shares those of ``compat``."""

    released: Any
    compat: CompatMADFormer

    @property
    def native(self) -> Any:
        return self.compat.to_native()


def make_models(module: ModuleType, shape: Shape, device: torch.device) -> Models:
    """Initialised as released, except that no bias is zero and no norm one: every parameter matters."""
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        path.write_text(json.dumps(shape.model_config()))
        arguments = {**shape.constructor_arguments(), "model_config_path": str(path)}
        released = module.MADFormer(**arguments).to(device)
        compat = CompatMADFormer(**arguments).to(device)
    with torch.no_grad():
        for parameter in released.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    compat.load_state_dict(released.state_dict())
    # What the sampling plan and the trainer do to our U-Net, and what the released code does not do to its own.
    for unet in (compat.downsampler, compat.upsampler):
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Models(released.train(), compat.train())


# Sampling


def make_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler.from_config(DDIMScheduler().config)


def sample_released(model: Any, shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return model.sample(make_scheduler(), shape.steps, shape.latents, generator=generator, dtype=torch.float)


def sample_ours(plan: Plan, shape: Shape) -> Tensor:
    """Draws the noise as the released ``sample`` does, block after block, and gives it whole, as our pipeline does."""
    generator = torch.Generator().manual_seed(SEED)
    images, blocks, latents, channels = shape.latents
    drawn = [torch.randn(images, 1, latents, channels, generator=generator) for _ in range(blocks)]
    return plan.run(torch.cat(drawn, dim=1))


# The gate


def relative_error(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Euclidean norm of all differences over that of all expected values, in fp64."""
    difference = norm = 0.0
    for a, e in zip(actual, expected, strict=True):
        difference += (a.double() - e.double()).square().sum().item()
        norm += e.double().square().sum().item()
    return (difference / norm) ** 0.5


def check(errors: Mapping[str, float], limit: float = MAX_RELATIVE_ERROR) -> float:
    """The largest error.

    Raises:
        CannotCompare: it is above the limit, or not a number.
    """
    failed = {name: error for name, error in errors.items() if not error <= limit}
    if failed:
        listed = ", ".join(f"{name} {error:.1e}" for name, error in failed.items())
        raise CannotCompare(f"no speeds: relative error above {limit:g} in {listed}")
    return max(errors.values())


# Settings


@contextlib.contextmanager
def tf32(matmul: bool, convolution: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value
