"""What a command is asked for: a frozen dataclass whose fields are its options, which tyro fills from the command line.

A field's comment is its line of help. What is wrong with the words is told in one line, with exit status 2.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar

import tyro
from tyro.conf import DisallowNone, Positional, Suppress
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from madformer.cli import config_file
from madformer.machine import device_of, precision_of
from madformer.objects import built_fields, check_names, check_types, with_nearest

R = TypeVar("R", bound="Request")
_errors: Any = getattr(tyro, "_errors", None)
Precision = Literal["auto", "exact", "default", "fp8"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What every command is asked for."""

    config: Path | None = None  # read options from FILE.toml, .yaml or .json; options beside it change what it says
    print_config: bool = False  # print all options as a TOML file for --config, and do nothing else

    def run(self) -> None:
        """Do it.

        Raises:
            ValueError, OSError, ImportError, RuntimeError: what kept it from being done, in one line.
        """
        raise NotImplementedError

    @classmethod
    def parse(cls, words: Sequence[str], prog: str) -> Self:
        """Read words, over what the file of ``--config`` says.

        Raises:
            SystemExit: with status 2, a line has said what is wrong with the words; with 0, after ``--help``.
            ValueError, OSError: what is wrong with the file.
        """
        file, values = file_of(words, prog)
        try:
            check_names(values, cls.names())
            default = cls.of(values)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        return filled(cls, default, words, prog)

    @classmethod
    def form(cls) -> Any:
        """What tyro fills in."""
        return cls

    @classmethod
    def names(cls) -> list[str]:
        """Of the options that a file may hold."""
        return [field.name for field in dataclasses.fields(cls) if field not in dataclasses.fields(Request)]

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """What a file asks for; required options may be missing still."""
        required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
        request = cls(**dict.fromkeys(required, tyro.MISSING) | built_fields(cls, values))
        check_types(request, only=values)
        return request

    def described(self) -> dict[str, Any]:
        """What a file for ``--config`` holds that asks for the same."""
        return {name: value for name, value in config_file.plain(self).items() if name in self.names()}


def resolved(request: R, *, elsewhere: bool = False) -> R:
    """The same with the device, and the precision if it has one, that ``auto`` stands for here.

    Args:
        elsewhere: another machine will use the device.

    Raises:
        ValueError: PyTorch cannot use that device.
    """
    changes: dict[str, Any] = {"device": device_of(request.device, elsewhere=elsewhere)}  # type: ignore[attr-defined]
    if hasattr(request, "precision"):
        changes["precision"] = precision_of(request.precision, changes["device"])
    return dataclasses.replace(request, **changes)


def file_of(words: Sequence[str], prog: str) -> tuple[Path | None, dict[str, Any]]:
    """The file that ``--config`` names, and what it says."""
    with refusing(prog, options_of(Request)):
        request, _ = tyro.cli(Request, args=words, return_unknown_args=True, add_help=False, **OPTIONS)
    return request.config, config_file.read(request.config) if request.config else {}


def filled(form: Any, default: Any, words: Sequence[str], prog: str, description: str | None = None) -> Any:
    """A dataclass or such a dictionary, made of words over its defaults."""
    options = options_of(form)
    end = words.index("--") if "--" in words else len(words)
    for word in words[:end]:
        option, equals, value = word.replace("--no-", "--", 1).partition("=")
        if equals and options.get(option) is bool:
            refuse(prog, f"argument {option}: it takes no value, and {value!r} is one")
    # the negation of an option of a part is that part's for tyro
    words = [re.sub(r"^--no-((?:[a-z-]+\.)+)", r"--\1no-", word) for word in words[:end]] + list(words[end:])
    with refusing(prog, options):
        return tyro.cli(form, prog=prog, description=description, args=words, default=default, **OPTIONS)


def options_of(form: Any, prefix: str = "") -> dict[str, Any]:
    """The type of every option by its name, which begins with ``--``."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(form, include_extras=True).items():
        kind, *marks = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        name = next((mark.name for mark in marks if getattr(mark, "name", None) is not None), name)
        if typing.is_typeddict(kind) or dataclasses.is_dataclass(kind):
            found |= options_of(kind, f"{prefix}{name}." if name else prefix)
        elif Positional not in marks and Suppress not in marks:
            found[f"--{prefix}{name}".replace("_", "-")] = kind
    return found


@contextmanager
def refusing(prog: str, known: Iterable[str]) -> Iterator[None]:
    """Let tyro say in one line what it makes boxes of: where a later tyro has no such hook, in boxes again."""

    def hook(event: Any) -> None:
        if isinstance(event, _errors.InstantiationFailure) and event.argument is None:
            raise ValueError(event.message)
        if (message := _told(event, known)) is not None:
            refuse(prog, message)

    with _errors.on_parse_error(hook) if _errors else nullcontext():
        yield


def _told(event: Any, known: Iterable[str]) -> str | None:
    unknown = getattr(event, "tokens", None) or getattr(event, "unrecognized_tokens", None)
    if unknown and unknown[0].startswith("-"):
        return f"unknown option {with_nearest(unknown[0].partition('=')[0], known)}"
    if unknown:
        return f"unexpected argument {unknown[0]!r}"
    match event:
        case _errors.MissingArgs():
            return (
                f"the following arguments are required: {', '.join(_name(one.arg) for one in event.missing_arguments)}"
            )
        case _errors.InstantiationFailure():
            reason = event.message
        case _errors.InvalidChoice():
            reason = f"{event.value!r} must be one of {', '.join(event.choices)}"
        case _errors.BadValue():
            reason = "a value is missing"
        case _:
            return None
    return f"argument {_name(event.argument)}: {reason}"


def _name(argument: Any) -> str:
    return argument.lowered.metavar.strip("[]") if argument.is_positional() else argument.lowered.name_or_flags[-1]


def refuse(prog: str, message: str) -> NoReturn:
    """Say what is wrong with the words."""
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


REGISTRY = ConstructorRegistry()
OPTIONS: dict[str, Any] = {"config": (DisallowNone,), "registry": REGISTRY}
"""How tyro reads types: None is no word."""

_NOUNS = {int: "whole number", float: "number", bool: "truth value"}


@REGISTRY.primitive_rule
def _numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Numbers; several with commas, or an x, between them in one word, so that a prompt may follow."""
    alone = [hint for hint in typing.get_args(info.type) if hint is not types.NoneType]
    hint = alone[0] if len(alone) == 1 and info.type_origin is not tuple else info.type
    kind, *others = typing.get_args(hint) if typing.get_origin(hint) is tuple else (hint,)
    if kind not in _NOUNS or (kind is bool and not others):
        return None
    wanted, metavar = f"a {_NOUNS[kind]}", kind.__name__.upper()
    if others:
        many = ... in others
        wanted = f"{_NOUNS[kind]}s with commas" if many else f"two {_NOUNS[kind]}s with a comma"
        wanted, metavar = f"{wanted} between them", f"{metavar},..." if many else f"{metavar},{metavar}"

    def read(words: list[str]) -> Any:
        try:
            if not others:
                return kind(words[0])
            found = tuple(map(_truth if kind is bool else kind, re.split("[,x]", words[0])))
            if (len(found) != 1 + len(others) and ... not in others) or not all(map(math.isfinite, found)):
                raise ValueError
        except ValueError:
            raise ValueError(f"{words[0]!r} must be {wanted}") from None
        return found

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple if others else kind),
        str_from_instance=lambda value: [",".join(map(str, value)) if isinstance(value, tuple) else str(value)],
    )


def _truth(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise ValueError
    return word.lower() == "true"
