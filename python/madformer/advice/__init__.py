"""A proposal of block count and split, from statistics of latents and from what a sweep has measured.

```python
from madformer.advice import advise

advice = advise("data/latents", budget=60)
print(advice.proposal, advice.because)
scores = advice.rank([(1, 6), (4, 3), (16, 2)])  # pairs of M and D; a higher score is a better place
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from madformer.lazy import exporter

if TYPE_CHECKING:
    from madformer.advice.advising import Advice, BlockStatistics, Ranked, advise
    from madformer.advice.measured import Measured, Measurement, read_measured, spearman
    from madformer.advice.proposal import Candidate, Unit, expected_error, steps_within
    from madformer.advice.statistics import Predictability, Spectrum, predictability, spectrum

__all__ = [
    "Advice",
    "BlockStatistics",
    "Candidate",
    "Measured",
    "Measurement",
    "Predictability",
    "Ranked",
    "Spectrum",
    "Unit",
    "advise",
    "expected_error",
    "predictability",
    "read_measured",
    "spearman",
    "spectrum",
    "steps_within",
]

__getattr__ = exporter(
    __name__,
    {
        "madformer.advice.advising": ("Advice", "BlockStatistics", "Ranked", "advise"),
        "madformer.advice.measured": ("Measured", "Measurement", "read_measured", "spearman"),
        "madformer.advice.proposal": ("Candidate", "Unit", "expected_error", "steps_within"),
        "madformer.advice.statistics": ("Predictability", "Spectrum", "predictability", "spectrum"),
    },
)
