"""Low-rank adapters (LoRA, arXiv:2106.09685) on the projections of attention and MLP, by ``peft``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from madformer.arguments import whole_number
from madformer.model.madformer import MADFormer

TARGETS = ("qkv", "proj", "gate_proj", "up_proj", "down_proj")
"""Projections of attention and MLP, by the last part of their names in the towers."""


def add_lora(model: MADFormer, rank: int, alpha: float = 0.0, targets: Sequence[str] = TARGETS) -> MADFormer:
    """Put a new adapter on the towers' projections and freeze all else; it changes nothing before it is trained.

    Args:
        rank: of each update ``B @ A``.
        alpha: an update is multiplied by ``alpha / rank``; 0 for the rank.
        targets: of :data:`TARGETS`.

    Raises:
        ValueError: no such target, or a rank below 1. ImportError: ``peft`` is not installed.
    """
    whole_number("rank", rank, 1)
    own = {name.rpartition(".")[2] for name, layer in model.layers.named_modules() if isinstance(layer, nn.Linear)}
    if unknown := [target for target in targets if target not in TARGETS]:
        raise ValueError(f"targets={', '.join(unknown)} must be some of {', '.join(TARGETS)}")
    if not (names := [target for target in targets if target in own]):
        raise ValueError(
            f"targets={', '.join(targets)} name no layer of this model, which has {', '.join(sorted(own))}"
        )
    model.requires_grad_(False)
    model.add_adapter(lora_config(rank, alpha, names))
    return model


def lora_config(rank: int, alpha: float = 0.0, targets: Sequence[str] = TARGETS) -> Any:
    """``peft.LoraConfig`` for the towers' layers of these names.

    Raises:
        ImportError: ``peft`` is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'madformer[lora]'") from error
    pattern = rf"layers\.\d+\.towers\.\w+\.(mlp\.)?({'|'.join(targets)})"
    # peft takes any number, and says whole ones
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha or rank, "target_modules": pattern}
    return LoraConfig(**options)


def adapter_weights(model: MADFormer) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters of the adapters alone."""
    return ((name, tensor) for name, tensor in model.named_parameters() if ".lora_" in name)
