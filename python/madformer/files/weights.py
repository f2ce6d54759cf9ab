"""State dicts: what tells them apart, and loading with a complaint of one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def fingerprint(module: nn.Module, config: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of SHA-256 over configuration and all weights, wherever they were loaded from.

    It reads every byte: about a second for a gigabyte.
    """
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], *, origin: str | Path, assign: bool = False) -> None:
    """``load_state_dict`` whose complaint is one line.

    Raises:
        ValueError: missing, unexpected or misshapen tensors; names the first ones.
    """
    if why := misfit(model, {name: tuple(tensor.shape) for name, tensor in state.items()}):
        raise ValueError(f"{origin} does not fit the configuration: {why}")
    model.load_state_dict(state, assign=assign)


def misfit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why tensors of these names and shapes are not a model's state, naming the first ones; None where they are."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, unexpected = sorted(own.keys() - shapes.keys()), sorted(shapes.keys() - own.keys())
    misshapen = sorted(name for name in own.keys() & shapes.keys() if own[name] != shapes[name])
    complaints = []
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)):
        if names:
            complaints.append(f"{len(names)} tensors {what} ({', '.join(names[:2])}{', ...' if names[2:] else ''})")
    return "; ".join(complaints) or None
