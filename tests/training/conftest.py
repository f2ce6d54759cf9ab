"""A configuration and a run that tests of training share: they read them, and write elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from madformer.training.config import TrainingConfig
from madformer.training.trainer import Trainer
from training_run import make_config


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    return make_config(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def unbroken(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run to its end."""
    folder = tmp_path_factory.mktemp("unbroken")
    Trainer(config, folder).run()
    return folder
