"""Text that people wrote with any editor: decoded, or refused in one line."""

from __future__ import annotations

import codecs
import json
import re
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["PackedStrings", "decode_json", "decode_text", "first_line", "printable", "read_text"]

MAX_BYTES = 16 << 20
"""Of a text that is read: captions, lists of prompts and the like have kilobytes."""
# UTF-32's little-endian mark begins with UTF-16's
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_text(path: str | Path) -> str:
    """A text file's content, as :func:`decode_text` gives it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no text, or of more than 16 MiB; names it, in one line.
    """
    with Path(path).open("rb") as file:
        return decode_text(file.read(MAX_BYTES + 1), str(path))


def decode_text(data: bytes, name: str = "") -> str:
    """UTF-8, or what a byte-order mark says that it is; without the mark.

    Args:
        name: of its file, for the message.

    Raises:
        ValueError: bytes that are no such text, or more than 16 MiB; one line.
    """
    where = f"{printable(name)}: " if name else ""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{where}more than {MAX_BYTES >> 20} MiB of text")
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        return data.removeprefix(mark).decode(encoding)
    except UnicodeDecodeError as error:
        found = data[len(mark) + error.start : len(mark) + error.start + 1].hex()
        line = data[len(mark) : len(mark) + error.start].decode(encoding, "ignore").count("\n") + 1
        raise ValueError(
            f"{where}not {encoding.upper()} text: byte 0x{found} at {len(mark) + error.start}, "
            f"line {line} (save it as UTF-8)"
        ) from error


def decode_json(data: bytes, name: str = "") -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, or nested too deeply; one line.
    """
    try:
        return json.loads(decode_text(data, name))
    except RecursionError as error:
        raise ValueError(f"{printable(name)}: JSON nested too deeply") from error


def first_line(error: Exception) -> str:
    """Of what an error says; its class's name where it says nothing."""
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__


_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def printable(name: str | Path) -> str:
    """A name that can be printed in a line and stored as UTF-8.

    Of a file's, other bytes are written as ``\\xff``, and characters that control a terminal likewise.
    """
    try:
        text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        text = str(name).encode("utf-8", "replace").decode()
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class PackedStrings:
    """A list of strings in one piece of memory: millions of names take their bytes, and processes share them."""

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._bytes, self._ends = bytearray(), array("q")
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        self._bytes += string.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]].decode("utf-8", "surrogateescape")
