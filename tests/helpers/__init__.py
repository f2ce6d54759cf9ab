"""What several tests share; some are programs too, run as ``python -m tests.helpers.NAME`` from the project's root."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**changes: str) -> dict[str, str]:
    """This process's, with changes, for one that imports ``tests`` and ``benchmarks`` from any folder."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **changes}
