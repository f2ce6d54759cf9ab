"""The paper's findings as sweeps: a file for each, the tables that they came to, and the page that shows them.

madformer sweep benchmarks/experiments/emoji-split.toml --out runs/emoji-split --workers 2
cp runs/emoji-split/table.parquet benchmarks/results/experiments/emoji-split.parquet
python -m benchmarks.experiments.page
"""

from benchmarks import ROOT

TABLES = ROOT / "benchmarks" / "results" / "experiments"
SWEEPS = ROOT / "benchmarks" / "experiments"
FIGURE = "kid"
"""What the page shows of a table's figures."""
