"""Files of options: TOML, YAML or JSON in, TOML out. None is ``"none"`` there, and in YAML and JSON ``null``, too."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from madformer.objects import parse_object, unique


def read(path: Path, option: str = "--config ") -> dict[str, Any]:
    """What a file says.

    Args:
        option: that names it, for messages.

    Raises:
        OSError: it cannot be read. ValueError: it is of another kind, or holds something else; both name the file.
    """
    readers: dict[str, Callable[[str], Any]]
    readers = {".toml": tomllib.loads, ".yaml": _yaml, ".yml": _yaml, ".json": parse_object}
    if path.suffix not in readers:
        raise ValueError(f"{option}{path} must end in {', '.join(readers)}")
    try:
        values = readers[path.suffix](path.read_text(encoding="utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError("it holds no names with values")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    return values


def _yaml(text: str) -> Any:
    """YAML as 1.2 has it where 1.1 surprises: ``1e-3`` is a number, and no key appears twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
            self.flatten_mapping(node)
            pairs = [(str(self.construct_object(name)), self.construct_object(v, deep=True)) for name, v in node.value]
            return unique(pairs)

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def plain(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass, and of those in it, as TOML has them; texts and paths that are None are left out."""
    found: dict[str, Any] = {}
    hints = get_type_hints(type(instance))
    for name in (field.name for field in dataclasses.fields(instance)):
        value, kinds = getattr(instance, name), {hints[name], *get_args(hints[name])}
        if dataclasses.is_dataclass(value):
            found[name] = plain(value)
        elif value is not None:
            found[name] = str(value) if isinstance(value, Path) else value
        elif types.NoneType in kinds and not kinds & {str, Path}:
            found[name] = "none"
    return found


def toml(values: Mapping[str, Any], table: str = "") -> str:
    """A table, then those within it."""
    lines = [f"{name} = {_written(value)}" for name, value in values.items() if not isinstance(value, Mapping)]
    head = [f"\n[{table}]"] if table else []
    within = [toml(v, f"{table}.{name}" if table else name) for name, v in values.items() if isinstance(v, Mapping)]
    return "\n".join([*head, *lines, *within])


def _written(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
