"""MADFormer: images made block by block, autoregression across blocks and diffusion within.

from madformer import MADFormerPipeline

pipeline = MADFormerPipeline.from_pretrained("assets/emoji64")
images = pipeline("red apple", num_images_per_prompt=4, guidance_scale=3, seed=0).images
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from madformer.config import MADFormerConfig, UNetConfig, preset
from madformer.kernels import optional

if TYPE_CHECKING:
    from madformer.compat.accelerate import accelerate, restore
    from madformer.compat.released import from_released
    from madformer.model import MADFormer, MADFormerOutput
    from madformer.pipeline import MADFormerPipeline

__version__ = "0.1.0"
__all__ = [
    "MADFormer",
    "MADFormerConfig",
    "MADFormerOutput",
    "MADFormerPipeline",
    "UNetConfig",
    "accelerate",
    "from_released",
    "preset",
    "restore",
]

# torch and diffusers take seconds to import: `madformer --help` need not wait for them
_LAZY = {
    "MADFormer": "madformer.model",
    "MADFormerOutput": "madformer.model",
    "MADFormerPipeline": "madformer.pipeline",
    "ByteTokenizer": "madformer.tokenizer",
    "PretrainedTokenizer": "madformer.tokenizer",
    "accelerate": "madformer.compat.accelerate",
    "from_released": "madformer.compat.released",
    "restore": "madformer.compat.accelerate",
}

optional.shield_diffusers()  # before anything imports diffusers; takes time where xFormers is installed alone


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# DiffusionPipeline.from_pretrained finds the pipeline by then; who has not imported diffusers need not wait for it
if "diffusers" in sys.modules:
    importlib.import_module("madformer.pipeline")
