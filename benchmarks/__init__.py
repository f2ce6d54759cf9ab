"""What is measured: one module a question, run as ``python -m benchmarks.NAME`` from the project's root."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The last place to look at: its `kernels` would hide Hugging Face's package of that name, which transformers looks for,
# and is a second copy of madformer.kernels.
sys.path[:] = [*(entry for entry in sys.path if Path(entry).resolve() != ROOT), str(ROOT)]
