"""Released training checkpoints: ``{"model", "ema", "opt", "lrs", "args": argparse.Namespace}``."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

Weights = Literal["ema", "model"]

# The released model configuration, for what no shape tells.
RELEASED_MODEL_CONFIG = {"rms_norm_eps": 1e-5, "unet_resnet_groups": 8, "unet_num_heads": 8}
RELEASED_HEAD_DIM = 64
MAX_TOKENS = 2**20
"""Of an image. There are tables with a row for each."""
WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """Weights under their released names, and the arguments of the run that made them."""

    state: dict[str, Tensor]
    arguments: dict[str, Any]
    path: Path

    @classmethod
    def load(cls, path: str | Path, weights: Weights = "ema") -> Self:
        """Read a checkpoint with ``weights_only=True`` and ``argparse.Namespace`` as the one class allowed.

        Names are read without what DDP, ``torch.compile`` and wrappers put before them, and ``args`` as a dict too.
        Weights of several dtypes become fp32.

        Raises:
            FileNotFoundError: no such file. ValueError: damaged, no checkpoint, or one that wants to run code.
        """
        path = Path(path)
        if weights not in get_args(Weights):
            raise ValueError(f"weights={weights!r} must be one of {', '.join(map(repr, get_args(Weights)))}")
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint at {path}")
        content = _read(path)
        if not isinstance(content, dict) or not {weights, "args"} <= content.keys():
            hint = "; it has 'model'" if weights == "ema" and isinstance(content, dict) and "model" in content else ""
            raise ValueError(f"{path} is no released checkpoint: it needs the entries {weights!r} and 'args'{hint}")
        arguments = content["args"]
        arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
        if not isinstance(arguments, dict):
            raise ValueError(f"{path}: its 'args' is a {type(arguments).__name__}, and no argparse.Namespace or dict")
        return cls(_state(content[weights], weights, path), {**arguments}, path)

    @property
    def has_text(self) -> bool:
        """Whether it is of the ``imagenet`` branch; else it is of FFHQ's."""
        return "embed_tokens.weight" in self.state

    def constructor_arguments(self, model_config: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
        """Keywords of the released constructor; sizes that ``args`` lacks are read off the weights.

        Raises:
            ValueError: a tensor that every released model has is missing.
        """
        arguments = self.arguments
        try:
            _, _, hidden_size = self.state["boi_block"].shape
            head_norm = self.state.get("blocks.0.self_attn.q_norm_list.0.weight")
            head_dim = RELEASED_HEAD_DIM if head_norm is None else max(1, head_norm.numel())
            config = self._infer_model_config() if model_config is None else model_config
            named = {name: arguments[name] for name in ("block_size", "ar_len", "spatial_len", "diff_depth")}
        except KeyError as error:
            raise ValueError(f"{self.path} is no released checkpoint: {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is no released checkpoint: a tensor has another shape") from error
        for name, value in named.items():
            if type(value) is not int or not 0 < value <= MAX_TOKENS:
                raise ValueError(
                    f"{self.path}: its args have {name}={value!r}, and not a number from 1 to {MAX_TOKENS}"
                )
        defaults = {"square_block": True, "clear_clean": False, "clear_cond": False, "denoising_mlp": False}
        flags = {flag: arguments.get(flag, default) for flag, default in defaults.items()}
        for name, value in flags.items():
            if value not in (True, False) or not isinstance(value, int):
                raise ValueError(f"{self.path}: its args have {name}={value!r}, and neither True nor False")
        return {
            "hidden_size": hidden_size,
            "num_heads": hidden_size // head_dim,
            "depth": self._count(r"blocks\.(\d+)\."),
            "no_qk_norm": head_norm is None,
            "model_config_path": config,
            **named,
            **{name: bool(value) for name, value in flags.items()},
        }

    def _infer_model_config(self) -> dict[str, Any]:
        levels = range(self._count(r"downsampler\.down_blocks\.(\d+)\."))
        blocks = [f"downsampler.down_blocks.{level}." for level in levels]
        return {
            **RELEASED_MODEL_CONFIG,
            "intermediate_size": len(self.state["blocks.0.mlp_list.0.gate_proj.weight"]),
            "mlp_bias": "blocks.0.mlp_list.0.gate_proj.bias" in self.state,
            "unet_block_out_channels": [len(self.state[f"{block}resnets.0.conv1.weight"]) for block in blocks],
            "unet_num_layers_per_block": [self._count(re.escape(block) + r"resnets\.(\d+)\.") for block in blocks],
            "unet_transformer_layers_per_block": [
                int(any(name.startswith(f"{block}attentions.") for name in self.state)) for block in blocks
            ],
            "unet_time_emb_dim": len(self.state["downsampler.time_embedding.linear_1.weight"]),
        }

    def _count(self, pattern: str) -> int:
        """How many numbered modules there are."""
        found = {match[1] for name in self.state if (match := re.match(pattern, name))}
        if found != {str(number) for number in range(len(found))}:
            raise ValueError(f"{self.path} is no released checkpoint: its modules are not numbered from 0 on")
        return len(found)


def _read(path: Path) -> Any:
    """What a file holds; raises ``ValueError`` in one line, whatever is in it."""
    if path.suffix == ".safetensors":
        raise ValueError(
            f"{path} holds weights alone: a released checkpoint is a torch file with the arguments of its run"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # files of before torch 1.6 are no archives, and cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {named[1]}" if named else "it holds more than tensors"
        raise ValueError(f"{path} is refused, {reason}: a checkpoint may hold weights, not code") from error
    except OSError:
        raise
    except Exception as error:  # a pickle may raise anything
        raise ValueError(f"{path} is damaged or truncated, or no torch checkpoint") from error


def _state(content: Any, weights: str, path: Path) -> dict[str, Tensor]:
    """Tensors of their own under their released names."""
    if not isinstance(content, Mapping) or not content:
        what = "empty" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(f"{path} is no released checkpoint: its {weights!r} is {what}, and no state dict")
    size = path.stat().st_size
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path} is no released checkpoint: {str(name)[:80]!r} in its {weights!r} is no tensor")
        # one number in a file may stand for any number of them
        if tensor.layout is not torch.strided or not tensor.is_floating_point() or tensor.nbytes > size:
            described = f"{tensor.layout}, {tensor.dtype}, {tuple(tensor.shape)}"
            raise ValueError(f"{path} is no released checkpoint: {name[:80]} is no dense array of floats ({described})")
    names = [WRAPPERS.sub("", name) for name in content]
    while all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    if len(set(names)) < len(names):
        raise ValueError(f"{path} is no released checkpoint: two tensors have one name")
    dtypes = {tensor.dtype for tensor in content.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    # out of the mapped file: its alignment is not what matrix kernels like, and the file may be replaced
    return {name: tensor.to(dtype, copy=True) for name, tensor in zip(names, content.values(), strict=True)}
