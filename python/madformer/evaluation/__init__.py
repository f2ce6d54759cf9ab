"""How good pictures are: metrics with intervals and protocols, of folders, shards, and of what a model draws.

```python
from madformer.evaluation import evaluate, load_extractor, open_images, open_reference

found = evaluate(open_images("samples"), open_reference("data/emoji64"), load_extractor(), metrics=["fd", "kid"])
print(found.scores["kid"].estimate)
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from madformer.lazy import exporter

if TYPE_CHECKING:
    from madformer.evaluation.extractors import EXTRACTORS, Extractor, load_extractor
    from madformer.evaluation.features import FeatureSet, default_cache, extract
    from madformer.evaluation.images import ArrayImages, DrawnImages, ImageSet, Part, StoredImages, open_images
    from madformer.evaluation.protocol import MEASURED, PRESETS, Preset, Protocol, Score, check_comparable, preset
    from madformer.evaluation.scoring import (
        METRICS,
        Evaluation,
        Metric,
        Statistics,
        evaluate,
        open_reference,
        save_statistics,
    )
    from madformer.evaluation.uncertainty import Estimate, Spread, variance_components

__all__ = [
    "EXTRACTORS",
    "MEASURED",
    "METRICS",
    "PRESETS",
    "ArrayImages",
    "DrawnImages",
    "Estimate",
    "Evaluation",
    "Extractor",
    "FeatureSet",
    "ImageSet",
    "Metric",
    "Part",
    "Preset",
    "Protocol",
    "Score",
    "Spread",
    "Statistics",
    "StoredImages",
    "check_comparable",
    "default_cache",
    "evaluate",
    "extract",
    "load_extractor",
    "open_images",
    "open_reference",
    "preset",
    "save_statistics",
    "variance_components",
]

__getattr__ = exporter(
    __name__,
    {
        "madformer.evaluation.scoring": (
            "METRICS", "Evaluation", "Metric", "Statistics", "evaluate", "open_reference", "save_statistics",
        ),
        "madformer.evaluation.extractors": ("EXTRACTORS", "Extractor", "load_extractor"),
        "madformer.evaluation.features": ("FeatureSet", "default_cache", "extract"),
        "madformer.evaluation.images": (
            "ArrayImages", "DrawnImages", "ImageSet", "Part", "StoredImages", "open_images",
        ),
        "madformer.evaluation.protocol": (
            "MEASURED", "PRESETS", "Preset", "Protocol", "Score", "check_comparable", "preset",
        ),
        "madformer.evaluation.uncertainty": ("Estimate", "Spread", "variance_components"),
    },
)  # fmt: skip
