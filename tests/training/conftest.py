"""A configuration and a run that tests of training share: they read them, and write elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from madformer.training import trainer
from madformer.training.config import TrainingConfig
from madformer.training.trainer import Trainer
from tests.helpers.training_run import make_config


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    return make_config(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def unbroken(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run to its end."""
    folder = tmp_path_factory.mktemp("unbroken")
    Trainer(config, folder).run()
    return folder


@pytest.fixture
def stopped(unbroken: Path, tmp_path: Path) -> Path:
    """A run that has come to step 4 of 6."""
    run = shutil.copytree(unbroken, tmp_path / "stopped")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    return run


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers do not measure the machine, which takes as long as a few steps; for ``unbroken`` they have."""
    monkeypatch.setattr(trainer, "matmul_rate", lambda device, dtype: 1.0)


@pytest.fixture
def no_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write ``model/`` alone: a checkpoint takes as long as so small a model's next five steps."""
    monkeypatch.setattr(Trainer, "save", lambda run: run._renew(run.pipeline(), run.folder / "model"))
