"""The ops: one public function each, which validates and then dispatches to an implementation.

``from madformer.kernels import swiglu`` gives the op, which its own file defines beside its reference and its kernels.
It is imported when somebody asks for it: torch takes seconds.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from madformer.kernels.adaln import adaln
    from madformer.kernels.block_causal_attention import BlockLayout, block_causal_attention
    from madformer.kernels.cached_attention import cached_attention
    from madformer.kernels.conv3x3 import conv3x3
    from madformer.kernels.denoise_step import denoise_step
    from madformer.kernels.group_norm_silu import group_norm_silu
    from madformer.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_cached
    from madformer.kernels.rms_norm import rms_norm
    from madformer.kernels.self_attention import self_attention
    from madformer.kernels.swiglu import swiglu

__all__ = [
    "BlockLayout",
    "adaln",
    "block_causal_attention",
    "cached_attention",
    "conv3x3",
    "denoise_step",
    "group_norm_silu",
    "qk_norm_rope",
    "qk_norm_rope_cached",
    "rms_norm",
    "self_attention",
    "swiglu",
]


class _Ops(ModuleType):
    """This package. What is called as its file is means the op, also once Python has bound the file to the name."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        home = {"BlockLayout": "block_causal_attention", "qk_norm_rope_cached": "qk_norm_rope"}.get(name, name)
        return getattr(importlib.import_module(f"{self.__name__}.{home}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Ops
