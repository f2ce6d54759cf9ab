"""MADFormer: images made block by block, autoregression across blocks and diffusion within.

```python
from madformer import MADFormerPipeline

pipeline = MADFormerPipeline.from_pretrained("assets/emoji64")
images = pipeline("red apple", num_images_per_prompt=4, guidance_scale=3, seed=0).images
```
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from madformer.config import MADFormerConfig, UNetConfig, preset
from madformer.kernels import optional
from madformer.lazy import exporter

if TYPE_CHECKING:
    from madformer.compat.accelerate import accelerate, restore
    from madformer.compat.released import from_released
    from madformer.conditioning.tokenizer import ByteTokenizer, PretrainedTokenizer
    from madformer.model import MADFormer, MADFormerOutput
    from madformer.pipeline import MADFormerPipeline

__version__ = "0.1.0"
__all__ = [
    "ByteTokenizer",
    "MADFormer",
    "MADFormerConfig",
    "MADFormerOutput",
    "MADFormerPipeline",
    "PretrainedTokenizer",
    "UNetConfig",
    "accelerate",
    "from_released",
    "preset",
    "restore",
]

__getattr__ = exporter(
    __name__,
    {
        "madformer.compat.accelerate": ("accelerate", "restore"),
        "madformer.compat.released": ("from_released",),
        "madformer.conditioning.tokenizer": ("ByteTokenizer", "PretrainedTokenizer"),
        "madformer.model": ("MADFormer", "MADFormerOutput"),
        "madformer.pipeline": ("MADFormerPipeline",),
    },
)

optional.shield_diffusers()  # before anything imports diffusers; takes time where xFormers is installed alone

# DiffusionPipeline.from_pretrained finds the pipeline by then; who has not imported diffusers need not wait for it
if "diffusers" in sys.modules:
    importlib.import_module("madformer.pipeline")
