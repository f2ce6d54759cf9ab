"""Many models and ways to sample them, held against one reference: a table of quality and cost, and its report.

```python
from madformer.sweeps import Sweep, plot, run_sweep, write_report

sweep = Sweep.of({"models": ["assets/emoji64"], "sample": {"steps": [2, 8]}, "evaluate": {"reference": "emoji:64"}})
table = run_sweep(sweep, "sweeps/emoji64", workers=2)
write_report("sweeps/emoji64")
figures = plot("sweeps/emoji64")
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from madformer.lazy import exporter

if TYPE_CHECKING:
    from madformer.sweeps.config import Cell, Judging, Model, Sampling, Sweep, Training, Tuning
    from madformer.sweeps.figures import plot
    from madformer.sweeps.folder import SweepFolder, read_table
    from madformer.sweeps.page import write_report
    from madformer.sweeps.running import run_sweep
    from madformer.sweeps.summary import Comparison, Line, Point, comparisons, lines

__all__ = [
    "Cell",
    "Comparison",
    "Judging",
    "Line",
    "Model",
    "Point",
    "Sampling",
    "Sweep",
    "SweepFolder",
    "Training",
    "Tuning",
    "comparisons",
    "lines",
    "plot",
    "read_table",
    "run_sweep",
    "write_report",
]

__getattr__ = exporter(
    __name__,
    {
        "madformer.sweeps.config": ("Cell", "Judging", "Model", "Sampling", "Sweep", "Training", "Tuning"),
        "madformer.sweeps.figures": ("plot",),
        "madformer.sweeps.folder": ("SweepFolder", "read_table"),
        "madformer.sweeps.page": ("write_report",),
        "madformer.sweeps.running": ("run_sweep",),
        "madformer.sweeps.summary": ("Comparison", "Line", "Point", "comparisons", "lines"),
    },
)
