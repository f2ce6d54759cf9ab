"""One server for all that does not change it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from madformer import MADFormerPipeline
from tests.helpers.serving_cases import Running, make_pipeline, serving


@pytest.fixture(scope="session")
def pipeline() -> MADFormerPipeline:
    return make_pipeline()


@pytest.fixture(scope="session")
def server(pipeline: MADFormerPipeline) -> Iterator[Running]:
    with serving(pipeline) as running:
        yield running
