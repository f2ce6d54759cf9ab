"""``benchmarks/resume_released.py``: the released scripts go on from their checkpoints with our class."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import resume_released

CLONES = {"main": "MADFORMER_RELEASED", "imagenet": "MADFORMER_RELEASED_IMAGENET"}


@pytest.mark.slow
@pytest.mark.parametrize("branch", CLONES)
def test_losses_go_on_alike(branch: str, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("transformers", "einops"):
        pytest.importorskip(package)
    if CLONES[branch] not in os.environ:
        pytest.skip(f"{CLONES[branch]} does not name a clone")
    assert resume_released.main(["--released", os.environ[CLONES[branch]], "--tiny", "--steps", "2"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["branch"] == branch
    losses = record["losses"]
    assert losses.keys() == {"released", "compat", "accelerate"}
    for variant in ("compat", "accelerate"):
        assert losses[variant] == pytest.approx(losses["released"], abs=1e-5)
    # it went on from there, and began nothing anew
    assert record["losses_before"] != pytest.approx(losses["released"], abs=1e-3)


def test_no_clone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume_released.main(["--released", str(tmp_path)]) == 1
    assert "not a clone of the released code" in capsys.readouterr().err
