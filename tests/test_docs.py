"""Every public name has an entry in the documentation, and a docstring; links are checked by `make docs`."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from madformer.kernels import dispatch

ROOT = Path(__file__).parents[1]
FOLDERS = {"madformer": ROOT / "python" / "madformer", "madformer.kernels": ROOT / "kernels"}
FOLDERS["madformer.engine"] = ROOT / "engine"
Name = tuple[str, str]


def modules() -> dict[str, Path]:
    """Files by the names of the modules that they are."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


@functools.cache
def body_of(module: str) -> list[ast.stmt]:
    """Its statements, with those under ``if`` (``TYPE_CHECKING``)."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return [s for outer in tree.body for s in (outer.body if isinstance(outer, ast.If) else [outer])]


def exports(module: str) -> list[str]:
    for statement in body_of(module):
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return ast.literal_eval(statement.value)
    return []


def home_of(module: str, name: str) -> Name:
    """The module that defines a name, however often it is imported on the way, and its name there."""
    for statement in body_of(module):
        for alias in statement.names if isinstance(statement, ast.ImportFrom) else ():
            if (alias.asname or alias.name) == name:
                assert isinstance(statement, ast.ImportFrom)
                return home_of(statement.module or "", alias.name) if statement.module in MODULES else (module, name)
    return module, name


def docstring_of(module: str, name: str) -> str | None:
    body = body_of(module)
    for statement, following in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)) and statement.name == name:
            if "overload" not in map(ast.unparse, statement.decorator_list):
                return ast.get_docstring(statement)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            if ast.unparse(target) == name and isinstance(following, ast.Expr):
                return str(ast.literal_eval(following.value))
    return None


@functools.cache
def public() -> dict[Name, str]:
    """Paths of the public names, by their homes."""
    return {home_of(module, name): f"{module}.{name}" for module in MODULES for name in exports(module)}


def documented() -> set[Name]:
    """What the directives of the API's pages show."""
    shown: set[Name] = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, name = path.rpartition(".")
            shown |= {home_of(path, name) for name in exports(path)} if path in MODULES else {home_of(module, name)}
    return shown


def test_every_public_name_has_an_entry() -> None:
    assert not (missing := sorted(public()[home] for home in public().keys() - documented())), missing


def test_every_public_name_has_a_docstring() -> None:
    assert not (bare := [path for home, path in public().items() if not docstring_of(*home)]), bare
    assert not (bare := [home for home in documented() if not docstring_of(*home)]), bare


def test_every_op_has_an_entry() -> None:
    ops = {op for status in dispatch.report() for op in status.ops}
    assert len(ops) > 8
    assert ops - {name for module, name in documented() if module.startswith("madformer.kernels.")} == set()


def code_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem
)
def test_what_a_page_imports_is_there(page: Path) -> None:
    for code in code_of(page):
        for statement in ast.parse(code).body:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                exec(ast.unparse(statement), {})


def test_the_readmes_engine_runs() -> None:
    """As it stands there, but for the number of steps."""
    from diffusers import DDIMScheduler

    from tests.helpers.engine_cases import FLAT, draw_noise, make_model

    (code,) = (code for code in code_of(ROOT / "README.md") if "InFlightBatcher" in code)
    names = {"model": make_model(FLAT), "scheduler": DDIMScheduler(), "noise": draw_noise(FLAT, 16)}
    exec(code.replace("steps=25", "steps=1"), names)
    assert names["latents"].shape == names["noise"][0].shape


def test_the_answers_name_files_and_functions_that_are_there() -> None:
    text = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    spans = re.findall(r"`([^`\n]+)`", text)
    files = [span for span in spans if re.match("(python|engine|kernels|tests|benchmarks|csrc)/", span)]
    assert len(files) > 20
    assert not [path for path in files if not (ROOT / path).exists()]

    sources = "\n".join(path.read_text(encoding="utf-8") for path in MODULES.values())
    defined = set(re.findall(r"^\s*(?:def|class) (\w+)", sources, re.MULTILINE))
    fields = set(re.findall(r"^ +(?:self\.)?(\w+)(?:: [^=]+)?(?: = |$)", sources, re.MULTILINE))
    theirs = {"SchedulerMixin", "set_timesteps", "scale_model_input", "init_noise_sigma", "__len__"}
    names = [span for span in spans if re.fullmatch(r"\w+(\.\w+)*(\(.*\))?", span) and re.search("[A-Z_]", span)]
    assert len(names) > 20
    assert not {name.partition("(")[0].rpartition(".")[2] for name in names} - defined - fields - theirs
