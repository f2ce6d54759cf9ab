"""A package's public names, imported when somebody asks for one (PEP 562): torch and diffusers take seconds."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any


def exporter(package: str) -> Callable[[str], Any]:
    """A package's ``__getattr__``: a name comes from where the package imports it under ``TYPE_CHECKING``.

    Args:
        package: its ``__name__``. Its source says where names come from, so that it says so once.
    """

    @functools.cache
    def homes() -> dict[str, str]:
        statements = ast.walk(ast.parse(inspect.getsource(sys.modules[package])))
        imports = [(node.module, node.names) for node in statements if isinstance(node, ast.ImportFrom)]
        return {alias.name: module for module, aliases in imports if module is not None for alias in aliases}

    def export(name: str) -> Any:
        if name.startswith("_") or name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes()[name]), name)

    return export
