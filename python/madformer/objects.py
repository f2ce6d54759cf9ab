"""Configuration files: JSON objects, and dataclasses whose fields have the types that they are annotated with."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import types
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

LARGEST = 2**63 - 1

_NAMES = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a string", Path: "a path",
    types.NoneType: "null",
}  # fmt: skip
_PLURALS = {int: "whole numbers", float: "numbers", bool: "truth values", str: "strings"}


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError`` where something is not so."""
    if not condition:
        raise ValueError(message)


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object that a file holds; a byte-order mark before it is passed over.

    Raises:
        OSError: it cannot be read. ValueError: it is no UTF-8, no JSON (which has no NaN), no object, or has a key
            twice. Both name the file.
    """
    try:
        return parse_object(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The same of text; ``ValueError`` names nothing."""
    text = text.decode() if isinstance(text, bytes) else text
    try:
        values = json.loads(
            text.removeprefix("\ufeff"), object_pairs_hook=unique, parse_constant=_refuse_nan, parse_float=_finite
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"{json.dumps(values)[:40]} is no JSON object")
    return values


def from_object(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """A dataclass from what JSON makes of its fields: lists become tuples, objects the dataclasses that belong there.

    Args:
        prefix: of the fields' names in messages.

    Raises:
        ValueError: a field that the class does not have, or lacks; or what the class itself raises.
    """
    check_names(values, _hints(cls), prefix)
    own = dataclasses.fields(cls)  # type: ignore[arg-type]
    needed = [field.name for field in own if {field.default, field.default_factory} == {dataclasses.MISSING}]
    if missing := [prefix + name for name in needed if name not in values]:
        raise ValueError(f"configuration field {', '.join(missing)} is missing")
    return cls(**built_fields(cls, values, prefix))


def changed(instance: T, values: Mapping[str, Any], prefix: str = "") -> T:
    """A copy of a dataclass with some fields changed, or some of a dataclass in it; see :func:`from_object`."""
    return dataclasses.replace(instance, **built_fields(type(instance), values, prefix, instance))  # type: ignore[type-var]


def built_fields(cls: type, values: Mapping[str, Any], prefix: str = "", current: Any = None) -> dict[str, Any]:
    """Some fields of a dataclass, as :func:`from_object` and :func:`changed` have them."""
    check_names(values, hints := _hints(cls), prefix)
    return {
        name: _built(value, hints[name], f"{prefix}{name}.", getattr(current, name, None))
        for name, value in values.items()
    }


def check_names(names: Iterable[str], known: Collection[str], prefix: str = "") -> None:
    """Raise ``ValueError`` that names each unknown field, and the known one that is nearest to it."""
    unknown = [with_nearest(prefix + name, [prefix + field for field in known]) for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown configuration field {', '.join(sorted(unknown))}")


def with_nearest(name: str, known: Iterable[str]) -> str:
    """An unknown name, and the known one that is most like it."""
    (nearest,) = difflib.get_close_matches(name, list(known), n=1, cutoff=0)
    return f"{name} (the nearest known name is {nearest})"


def check_types(
    instance: Any,
    prefix: str = "",
    *,
    infinite: Collection[str] = (),
    most: Mapping[str, int] | None = None,
    only: Collection[str] | None = None,
) -> None:
    """Raise ``ValueError`` for the first field of a dataclass whose value is not of its annotated type, or too large.

    Args:
        prefix: of the fields' names in messages. infinite: names of those that may be infinite. most: the largest whole
            number of a field or of its entries; for others what 64 bits hold. only: names of those to look at.
    """
    for name, hint in _hints(type(instance)).items():
        value = getattr(instance, name)
        if (only is not None and name not in only) or (name in infinite and value == math.inf):
            continue
        if not _fits(value, hint):
            raise ValueError(f"{prefix}{name}={value!r} must be {_named(hint)}")
        limit = (most or {}).get(name, LARGEST)
        entries = value if isinstance(value, tuple) else (value,)
        if any(isinstance(entry, int) and abs(entry) > limit for entry in entries):
            raise ValueError(f"{prefix}{name}={value!r} must be at most {limit}")


_hints_of: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    """By field; resolving them takes longer than all the rest."""
    if cls not in _hints_of:
        hints = get_type_hints(cls)
        _hints_of[cls] = {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}
    return _hints_of[cls]


def _built(value: Any, hint: Any, prefix: str, current: Any = None) -> Any:
    kinds = (hint, *get_args(hint))
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and str not in kinds:
        # TOML has no null
        if value == "none" and types.NoneType in kinds:
            return None
        return Path(value) if Path in kinds else value
    nested = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    if nested is None or not isinstance(value, Mapping) or isinstance(value, nested):  # type: ignore[arg-type]
        return value
    return from_object(nested, value, prefix) if current is None else changed(current, value, prefix)  # type: ignore[arg-type]


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        # whole numbers have no limit in JSON
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, origin or hint)


def _named(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_named, arguments))
    if origin is tuple:
        return _PLURALS.get(arguments[0], "objects with fields, in a list")
    return _NAMES.get(hint, "an object with fields")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(name for index, (name, _) in enumerate(pairs) if name in dict(pairs[:index]))
        raise ValueError(f"the key {twice!r} appears twice")
    return values


def _refuse_nan(constant: str) -> float:
    # `json` writes infinity as it reads it
    if math.isnan(number := float(constant)):
        raise ValueError("NaN is no JSON")
    return number


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number
