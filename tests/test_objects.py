"""Configuration files: what is an object, and which values fit the types of a dataclass's fields."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from madformer.objects import check_types, from_object, parse_object, read_object


@dataclass(frozen=True)
class Inner:
    width: int = 1


@dataclass(frozen=True)
class Outer:
    KIND: ClassVar[str] = "outer"
    size: int
    rate: float = 0.5
    name: str = ""
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    pair: tuple[int, float] = (1, 1.0)
    many: tuple[int, ...] = ()
    inner: Inner | None = None
    anything: Any = None


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("{}", {}),
        ('{"a": [1, 2.5, null, true, "x"], "b": {"a": 1}}', {"a": [1, 2.5, None, True, "x"], "b": {"a": 1}}),
        ('\ufeff{"a": 1}', {"a": 1}),
        (b'\xef\xbb\xbf{"a": "\xc3\xa9"}', {"a": "é"}),
        ('{"clip": Infinity, "low": -Infinity}', {"clip": math.inf, "low": -math.inf}),
    ],
)
def test_an_object_is_read(text: str | bytes, values: dict[str, Any]) -> None:
    assert parse_object(text) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", r"\[1, 2\] is no JSON object"),
        ("3", "3 is no JSON object"),
        ("null", "null is no JSON object"),
        ('"{}"', "is no JSON object"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": 1e999}', "1e999 is no finite number"),
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' appears twice"),
        ('{"outer": {"a": 1, "a": 2}}', "the key 'a' appears twice"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": 1', "delimiter"),
        ("", "Expecting value"),
        (b"\xff\xfe{", "utf-8"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_what_is_no_object_is_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse_object(text)
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        read_object(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        read_object(tmp_path / "absent.json")
    (tmp_path / "a_folder").mkdir()
    with pytest.raises(OSError, match="a_folder"):
        read_object(tmp_path / "a_folder")


def test_lists_and_objects_become_what_the_fields_hold() -> None:
    values = {"size": 3, "pair": [4, 0.5], "many": [], "inner": {"width": 7}, "anything": {"b": 1}}
    built = from_object(Outer, values)
    assert built == Outer(3, pair=(4, 0.5), many=(), inner=Inner(7), anything={"b": 1})
    assert from_object(Outer, {"size": 3, "inner": Inner(2)}) == Outer(3, inner=Inner(2))
    assert from_object(Outer, {"size": 3, "inner": None}) == Outer(3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"size": 1, "weight": 2, "depth": 3},
            r"unknown configuration field run.depth \(the nearest known name is run.size\), run.weight",
        ),
        ({"size": 1, "KIND": "x"}, "unknown configuration field run.KIND"),
        ({"rate": 0.5}, "configuration field run.size is missing"),
        ({"size": 1, "inner": {"height": 1}}, "unknown configuration field run.inner.height"),
    ],
)
def test_fields_that_are_not_there(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_object(Outer, values, "run.")


@pytest.mark.parametrize(
    "values",
    [{"rate": 1}, {"flag": True}, {"kind": "b"}, {"pair": (1, 2)}, {"many": (1, 2, 3)}, {"inner": Inner()}],
    ids=str,
)
def test_values_of_their_type(values: dict[str, Any]) -> None:
    check_types(Outer(**{"size": 1} | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": True}, "size=True must be a whole number"),
        ({"size": 1.0}, "size=1.0 must be a whole number"),
        ({"size": "1"}, "size='1' must be a whole number"),
        ({"size": None}, "size=None must be a whole number"),
        ({"rate": True}, "rate=True must be a number"),
        ({"rate": math.nan}, "rate=nan must be a number"),
        ({"rate": math.inf}, "rate=inf must be a number"),
        ({"rate": 10**400}, "rate=10+ must be a number"),
        ({"name": 3}, "name=3 must be a string"),
        ({"flag": 1}, "flag=1 must be true or false"),
        ({"kind": "c"}, "kind='c' must be one of 'a', 'b'"),
        ({"kind": ["a"]}, r"kind=\['a'\] must be one of"),
        ({"pair": (1,)}, r"pair=\(1,\) must be whole numbers"),
        ({"many": [1]}, r"many=\[1\] must be whole numbers"),
        ({"many": (1, True)}, "many=.* must be whole numbers"),
        ({"inner": {"width": 1}}, "inner=.* must be an object with fields or null"),
        ({"inner": 3}, "inner=3 must be an object with fields or null"),
    ],
    ids=str,
)
def test_values_of_another_type_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^run.{message}"):
        check_types(Outer(**{"size": 1} | values), "run.")


def test_infinity_where_it_is_allowed() -> None:
    check_types(Outer(1, rate=math.inf), infinite=("rate",))
    with pytest.raises(ValueError, match="rate=-inf must be a number"):
        check_types(Outer(1, rate=-math.inf), infinite=("rate",))
