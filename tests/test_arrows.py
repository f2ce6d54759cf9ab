"""Who may know whom: the rooms of the one package that ``python/madformer``, ``kernels`` and ``engine`` make."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"madformer": "python/madformer", "madformer.kernels": "kernels", "madformer.engine": "engine"}

FOUNDATION = "arguments objects files lazy machine seeds"
LONGEST = 450
"""Lines of a file."""
# a room, and those that it may import from; `madformer` is the package's own `__init__`
RULES = {
    "kernels": "",
    "arguments": "",
    "objects": "",
    "files": "",
    "lazy": "",
    "machine": "",
    "seeds": "arguments",
    "config": "objects config_parts",
    "config_parts": "objects",
    "conditioning": f"{FOUNDATION} config",
    "vae": f"{FOUNDATION} config",
    "model": f"{FOUNDATION} config kernels",
    "cluster": "kernels",
    "engine": f"{FOUNDATION} config kernels model conditioning",
    "compat": f"{FOUNDATION} config kernels model engine conditioning",
    "data": f"{FOUNDATION} config conditioning vae",
    "sheets": "",
    "streaming": "",
    "pipeline": f"{FOUNDATION} config kernels model engine conditioning vae data sheets streaming",
    "training": f"{FOUNDATION} config kernels model engine conditioning vae data sheets pipeline",
    "bulk": f"{FOUNDATION} config kernels model engine conditioning vae data sheets pipeline cluster madformer",
    "evaluation": f"{FOUNDATION} config kernels model engine conditioning vae data pipeline bulk madformer",
    "sweeps": f"{FOUNDATION} config model engine conditioning vae data pipeline bulk training evaluation measuring "
    "cluster madformer",
    "advice": f"{FOUNDATION} config kernels model data evaluation sweeps",
    "serving": f"{FOUNDATION} config kernels model engine conditioning vae data pipeline bulk cluster madformer",
    "measuring": f"{FOUNDATION} config kernels model engine conditioning vae pipeline",
    "madformer": "kernels config model engine pipeline compat conditioning lazy",
}
# the command line is the outermost room: it may know all of them, and nobody knows it
OUTERMOST = "cli"


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


MODULES = modules()
MAY_IMPORT_A_SECOND_COPY = re.compile(r"\b(?:from|import)\b.*(?<![.\w])(?:kernels|engine|python)\b|\\\n")
"""A line of a file that may, or that goes on in the next: most files need not be parsed."""


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(module: str) -> str:
    """``pipeline_files`` and its like belong to the room that they are named by."""
    first = module.split(".")[1] if "." in module else module
    return "pipeline" if first.startswith("pipeline_") else first


def imports(module: str, *, for_types: bool = True) -> Iterator[tuple[str, int]]:
    """What a module imports from the package, wherever in it, with the lines.

    Args:
        for_types: also what it imports for annotations alone.
    """
    nodes = [
        node
        for node in parsed(MODULES[module]).body
        if for_types or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    for node in ast.walk(ast.Module(nodes, [])):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{MODULES[module]}:{node.lineno} is relative"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "madformer" and name != "madformer._C":
                while name not in MODULES:
                    name = name.rpartition(".")[0]
                yield name, node.lineno


def test_every_room_has_a_rule() -> None:
    assert {room(module) for module in MODULES} == {*RULES, OUTERMOST}
    assert all(OUTERMOST not in rule.split() for rule in RULES.values())


def test_rooms_know_only_those_below_them() -> None:
    wrong = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {imported}"
        for module in MODULES
        if room(module) != OUTERMOST
        for imported, line in imports(module)
        if room(imported) not in (room(module), *RULES[room(module)].split())
    ]
    assert not wrong


def test_the_rules_have_no_circle() -> None:
    graphlib.TopologicalSorter({name: rule.split() for name, rule in RULES.items()}).prepare()


def test_nothing_imports_a_second_copy() -> None:
    """The root lies on the path of tests and benchmarks, and there ``kernels`` and ``engine`` can be found."""
    folders = ("python", "engine", "kernels", "benchmarks", "examples", "tests", "docs")
    for path in [path for folder in folders for path in (ROOT / folder).rglob("*.py")]:
        if not MAY_IMPORT_A_SECOND_COPY.search(text := path.read_text(encoding="utf-8")):
            continue
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                folder = name.partition(".")[0]
                assert folder not in ("kernels", "engine", "python"), f"{path}:{node.lineno}: say madformer.{name}"


def test_the_root_is_the_last_place_to_look_at() -> None:
    """But for what has no ``kernels`` of its own: the root's must not hide Hugging Face's."""
    (place,) = (place for place, entry in enumerate(sys.path) if Path(entry).resolve() == ROOT)
    behind = [Path(entry) for entry in sys.path[place + 1 :]]
    assert not [entry for entry in behind if entry.name == "site-packages" or (entry / "kernels").exists()]


def test_modules_have_no_circle() -> None:
    graph = {module: {name for name, _ in imports(module, for_types=False) if name != module} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", ["madformer.files.atomic", "madformer.machine", "madformer.cli.main"])
def test_what_needs_no_torch_does_not_import_it(module: str) -> None:
    """Also not through what it imports at the top, but for a function's own imports."""
    seen, waiting = set(), [module]
    while waiting:
        if (name := waiting.pop()) in seen:
            continue
        seen.add(name)
        top = [node for node in parsed(MODULES[name]).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {f"{node.module}" for node in top if isinstance(node, ast.ImportFrom)}
        assert not {part.split(".")[0] for part in names} & {"torch", "diffusers", "triton"}, name
        waiting += [part for part in names if part in MODULES]


def test_no_file_is_longer_than_it_can_be_read_at_once() -> None:
    folders = ("python", "engine", "kernels", "benchmarks", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path.name: count for path, count in lines.items() if count > LONGEST} == {}
