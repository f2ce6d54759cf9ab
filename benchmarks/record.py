"""Where records are kept; what they say and how they are written is the package's."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from madformer.benchmark.environment import device_name, environment, git_commit, write

__all__ = ["RESULTS", "ROOT", "environment", "git_commit", "results_folder", "write"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def results_folder(device: torch.device) -> Path:
    """``benchmarks/results/<device>``, as in ``nvidia-h200``."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
