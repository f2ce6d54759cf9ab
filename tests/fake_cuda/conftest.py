from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import fake_gpu


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not fake_gpu.REFUSAL:
        return
    for item in items:
        if "fake_cuda" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=f"no GPU is pretended: {fake_gpu.REFUSAL}"))


@pytest.fixture
def mode() -> Iterator[FakeTensorMode]:
    with fake_gpu.pretended_gpu() as mode:
        yield mode
