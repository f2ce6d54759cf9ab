"""Released training checkpoints: ``{"model", "ema", "opt", "lrs", "args": argparse.Namespace}``."""

from __future__ import annotations

import argparse
import pickle
import re
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


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """Weights under their released names, and the arguments of the run that made them."""

    state: dict[str, Tensor]
    arguments: dict[str, Any]
    path: Path

    @classmethod
    def load(cls, path: str | Path, weights: Weights = "ema") -> Self:
        """Read a checkpoint with ``weights_only=True`` and ``argparse.Namespace`` as the one class allowed.

        Raises:
            FileNotFoundError: no such file. ValueError: damaged, no checkpoint, or one that wants to run code.
        """
        path = Path(path)
        if weights not in get_args(Weights):
            raise ValueError(f"weights={weights!r} must be one of {', '.join(map(repr, get_args(Weights)))}")
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint at {path}")
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"it asks for {named[1]}" if named else "it holds more than tensors"
            raise ValueError(f"{path} is refused, {reason}: a checkpoint may hold weights, not code") from error
        except (RuntimeError, EOFError) as error:
            raise ValueError(f"{path} is damaged or truncated, or no torch checkpoint") from error
        if not isinstance(content, dict) or not {weights, "args"} <= content.keys():
            raise ValueError(f"{path} is no released checkpoint: it needs the entries {weights!r} and 'args'")
        # out of the mapped file: its alignment is not what matrix kernels like, and the file may be replaced
        state = {name: tensor.clone() for name, tensor in content[weights].items()}
        return cls(state, dict(vars(content["args"])), path)

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
            hidden_size = self.state["boi_block"].shape[2]
            head_norm = self.state.get("blocks.0.self_attn.q_norm_list.0.weight")
            config = self._infer_model_config() if model_config is None else model_config
            named = {name: arguments[name] for name in ("block_size", "ar_len", "spatial_len", "diff_depth")}
        except KeyError as error:
            raise ValueError(f"{self.path} is no released checkpoint: {error} is missing") from error
        head_dim = RELEASED_HEAD_DIM if head_norm is None else len(head_norm)
        return {
            "hidden_size": hidden_size,
            "num_heads": hidden_size // head_dim,
            "depth": self._count(r"blocks\.(\d+)\."),
            "no_qk_norm": head_norm is None,
            "model_config_path": config,
            **named,
            **{
                flag: arguments.get(flag, default)
                for flag, default in (
                    ("square_block", True),
                    ("clear_clean", False),
                    ("clear_cond", False),
                    ("denoising_mlp", False),
                )
            },
        }

    def _infer_model_config(self) -> dict[str, Any]:
        levels = range(self._count(r"downsampler\.down_blocks\.(\d+)\."))
        block = "downsampler.down_blocks.{}."
        return {
            **RELEASED_MODEL_CONFIG,
            "intermediate_size": len(self.state["blocks.0.mlp_list.0.gate_proj.weight"]),
            "mlp_bias": "blocks.0.mlp_list.0.gate_proj.bias" in self.state,
            "unet_block_out_channels": [
                len(self.state[block.format(level) + "resnets.0.conv1.weight"]) for level in levels
            ],
            "unet_num_layers_per_block": [
                self._count(re.escape(block.format(level)) + r"resnets\.(\d+)\.") for level in levels
            ],
            "unet_transformer_layers_per_block": [
                int(any(name.startswith(block.format(level) + "attentions.") for name in self.state))
                for level in levels
            ],
            "unet_time_emb_dim": len(self.state["downsampler.time_embedding.linear_1.weight"]),
        }

    def _count(self, pattern: str) -> int:
        """How many numbered modules there are."""
        found = [int(match[1]) for name in self.state if (match := re.match(pattern, name))]
        return max(found, default=-1) + 1
