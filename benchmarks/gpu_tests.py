"""A plugin of pytest for a GPU visit: each result is sent as it is there, and what has passed is not run again."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.kernel_record import source_of
from benchmarks.visit import emit, known

SOURCE = source_of("all that computes and all tests")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    passed = {entry["test"] for entry in known() if entry["kind"] == "test" and _is_current(entry)}
    again = [item for item in items if item.nodeid in passed]
    if again:
        config.hook.pytest_deselected(items=again)
        items[:] = [item for item in items if item.nodeid not in passed]


def _is_current(entry: dict[str, Any]) -> bool:
    return entry["source"] == SOURCE and entry["outcome"] == "passed"


def pytest_runtest_logreport(report: Any) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # The process that collects them all reports.
        return
    if report.when == "call" or report.failed:
        why = str(report.longrepr)[-2000:] if report.failed else ""
        emit({"kind": "test", "test": report.nodeid, "outcome": report.outcome, "source": SOURCE, "why": why})


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    """Nothing left to run is no failure."""
    if exitstatus == 5:
        session.exitstatus = 0
