"""A package's public names, imported when somebody asks for one (PEP 562): torch and diffusers take seconds."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any


def exporter(package: str, homes: Mapping[str, Collection[str]]) -> Callable[[str], Any]:
    """A package's ``__getattr__``.

    Args:
        package: its ``__name__``.
        homes: names by the module that defines them.
    """
    modules = {name: module for module, names in homes.items() for name in names}

    def export(name: str) -> Any:
        if name in modules:
            return getattr(importlib.import_module(modules[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return export
