"""One server for all that does not change it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from madformer import MADFormerPipeline
from madformer.bulk import Settings
from tests.helpers.serving_cases import DEFAULTS, SETTINGS, Running, make_pipeline, serving


@pytest.fixture(scope="session")
def pipeline() -> MADFormerPipeline:
    return make_pipeline()


@pytest.fixture(scope="session")
def server(pipeline: MADFormerPipeline) -> Iterator[Running]:
    recorded = Settings.of(pipeline, DEFAULTS, precision="exact", batch_size=SETTINGS.slots)
    with serving(pipeline, recorded=recorded) as running:
        yield running
