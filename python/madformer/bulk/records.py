"""What a picture says of itself: written into the file beside the pixels, and read back."""

from __future__ import annotations

import json
import struct
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo

import madformer

# of the text chunk of a PNG, and of the metadata of a safetensors file
KEYWORD = "madformer"
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_HEADER = 100_000_000  # the format's own limit


def png_text(record: Mapping[str, Any]) -> PngInfo:
    """As international text (UTF-8, any length), not compressed: readers limit what they unpack."""
    text = PngInfo()
    text.add_text("Software", f"madformer {madformer.__version__}")
    text.add_itxt(KEYWORD, _dump(record))
    return text


def safetensors_metadata(record: Mapping[str, Any]) -> dict[str, str]:
    return {KEYWORD: _dump(record)}


def read_record(path: Path) -> dict[str, Any]:
    """Of a picture or of latents that a run wrote; a member of a shard is named as if the shard were a folder.

    Raises:
        OSError: there is no such file. ValueError: it is damaged, was written by something else, or is no picture; one
            line.
    """
    with _opened(path) as stream:
        start = stream.read(len(_PNG))
        stream.seek(0)
        if start == _PNG:
            text = _png_record(stream, path)
        elif path.suffix == ".safetensors":
            text = _safetensors_record(stream, path)
        else:
            text = None
            _check_picture(stream, path)
    if text is None:
        raise ValueError(f"{path} holds no record of how it was drawn: madformer sample did not write it")
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError(f"not an object but {type(record).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its record of how it was drawn is damaged: {error}") from error
    return record


def _dump(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file, or a file in a tar."""
    if path.exists() or not path.parent.is_file():
        with path.open("rb") as file:
            yield file
        return
    try:
        with tarfile.open(path.parent) as tar:
            member = tar.extractfile(path.name)
            if member is None:
                raise KeyError
            yield member  # type: ignore[misc]
    except KeyError:
        raise FileNotFoundError(f"{path.parent} holds no {path.name}") from None
    except tarfile.TarError as error:
        raise ValueError(f"{path.parent} is no readable tar: {error}") from error


def _png_record(stream: BinaryIO, path: Path) -> str | None:
    """The record, of a file whose checksums are all right; nothing is unpacked, however large the picture is."""
    try:
        picture = PngImageFile(stream)
        text = picture.info.get(KEYWORD)
        picture.verify()
    except Exception as error:  # a decoder's errors are of any type
        raise ValueError(f"{path} is a damaged picture: {error}") from error
    return text if isinstance(text, str) else None


def _safetensors_record(stream: BinaryIO, path: Path) -> str | None:
    try:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(stream.read(length))
        size = (
            8 + length + max((header[name]["data_offsets"][1] for name in header if name != "__metadata__"), default=0)
        )
        if stream.seek(0, 2) != size:
            raise ValueError("it does not end where its tensors do")
        return header.get("__metadata__", {}).get(KEYWORD)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} is a damaged file of latents: {error}") from error


def _check_picture(stream: BinaryIO, path: Path) -> None:
    """Raise for what is none."""
    try:
        Image.open(stream).close()
    except (UnidentifiedImageError, EOFError):
        raise ValueError(f"{path} is no picture, nor latents, that can be read") from None
    except Image.DecompressionBombError:
        return
    except Exception as error:  # a decoder's errors are of any type
        raise ValueError(f"{path} is a damaged picture: {error}") from error
