"""Libraries that need not be there: whether they are, and whether what is installed loads beside this PyTorch.

An installed wheel of another PyTorch or CUDA imports and computes nothing, or does not import at all; neither may keep
the engine from importing. Nothing is imported here before somebody asks.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

logger = logging.getLogger("madformer")

FLASH_ATTN_4 = "flash_attn.cute"


def missing(name: str) -> str | None:
    """Why ``flash_attn`` or ``xformers`` is not installed, in one line; None where it is. Imports nothing."""
    title = {"flash_attn": "flash-attn", "xformers": "xFormers"}[name]
    spec = _spec(name)
    if spec is None:
        return f"{title} is not installed"
    # A folder without a package in it is a package to Python: what an uninstallation leaves, or a part of another.
    if spec.origin is None and not is_flash_attn_4(name):
        return f"{title} is not installed: {', '.join(spec.submodule_search_locations or [])} holds no package"
    return None


def is_flash_attn_4(name: str = "flash_attn") -> bool:
    """Whether version 4 alone is there, which has ``flash_attn.cute`` and nothing of version 2."""
    spec = _spec(name)
    if name != "flash_attn" or spec is None or spec.origin is not None:
        return False
    return any(Path(folder, "cute", "__init__.py").is_file() for folder in spec.submodule_search_locations or [])


def _spec(name: str) -> ModuleSpec | None:
    with contextlib.suppress(ValueError):  # of a module that was put in by hand
        return importlib.util.find_spec(name)
    return None


@functools.cache
def refusal(name: str) -> str | None:
    """Why the library cannot run here, in one line; None where it can. Imports it, which takes seconds."""
    if (why := missing(name)) is not None:
        return why
    try:
        if name == "xformers":
            return _xformers_refusal()
        flash_attention()
    except Exception as error:
        return f"{name} is installed but does not load: {_one_line(error)}"
    return None


def flash_attention() -> Any:
    """``flash_attn_varlen_func`` of version 2, or of 4 where only that is installed."""
    module = importlib.import_module(FLASH_ATTN_4 if is_flash_attn_4() else "flash_attn")
    return module.flash_attn_varlen_func


def _xformers_refusal() -> str | None:
    # It prints several lines where its extension does not load.
    with contextlib.redirect_stderr(io.StringIO()):
        library = importlib.import_module("xformers._cpp_lib")
        error = getattr(library, "_cpp_library_load_exception", None)
        if error is None:
            importlib.import_module("xformers.ops")
            return None
    built = getattr(getattr(error, "build_info", None), "metadata", {}).get("version", {}).get("torch")
    return f"xFormers' extension does not load: it was built for PyTorch {built or 'of another version'}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def shield_diffusers() -> None:
    """Take xFormers from diffusers where it cannot be imported: diffusers imports it wherever it is installed, at its
    own import, and with it the autoencoders fail."""
    if _spec("xformers") is None:
        return
    try:
        importlib.import_module("xformers.ops")
    except Exception as error:
        logger.warning("xFormers is left out, it cannot be imported: %s", _one_line(error))
        known: Any = importlib.import_module("diffusers.utils.import_utils")
        known._xformers_available = False
