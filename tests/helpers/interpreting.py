"""Triton's interpreter with one search for what it patches in place of one a launch."""

from __future__ import annotations

import inspect
import types
from typing import Any

SEARCH = """\
def _patch_builtin(pkg, builder, scope: _LangPatchScope):
    for name, member in inspect.getmembers(pkg):
        if tl.core.is_builtin(member):
            _patch_attr(pkg, name, member, builder, scope)
"""
"""How Triton 3.6 to 3.8 patch a part of `triton.language`, at every launch and every call of a jitted function."""


def remember_builtins(interpreter: types.ModuleType) -> bool:
    """Make `triton.runtime.interpreter` remember the names of builtins, which took a third of a launch to find.

    Whether a member still is the builtin, and what takes its place, is found out anew each time, as Triton does.

    Args:
        interpreter: `triton.runtime.interpreter`. It has to be at rest: no kernel is running.

    Returns:
        Whether it does so now; a Triton that patches in another way is left alone.
    """
    if inspect.getsource(interpreter._patch_builtin) != SEARCH:
        return False
    core = interpreter.tl.core
    names: dict[Any, list[str]] = {}

    def patch_builtin(pkg: Any, builder: Any, scope: Any) -> None:
        if pkg not in names:
            names[pkg] = [name for name, member in inspect.getmembers(pkg) if core.is_builtin(member)]
        for name in names[pkg]:
            member = getattr(pkg, name)
            if core.is_builtin(member):
                interpreter._patch_attr(pkg, name, member, builder, scope)

    for pkg in (interpreter.tl, core, interpreter.tl.math, core.tensor, core.tensor_descriptor_base):
        patch_builtin(pkg, interpreter.interpreter_builder, scope := interpreter._LangPatchScope())
        scope.restore()
    interpreter._patch_builtin = patch_builtin
    return True
