"""Takes the metadata out of picture files, so that a decoder meets none that are damaged or made to harm it.

Of metadata, only the orientation has a bearing on the picture. It is read here, by rules that no bytes can break.
Colour profiles are not applied, texts, previews and the like not looked at.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator

__all__ = ["without_metadata"]

UPRIGHT = 1
_ORIENTATION = 0x0112
_EXIF_NAME, _XMP_NAME = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_MAX_TEXT = 1 << 20  # bytes of a compressed text that are looked at
# What says how to decode; JPEG in TIFF, T.4 and LERC included.
_TIFF_PIXEL_TAGS = {
    *(254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 297, 317, 320, 322, 323, 324, 325),
    *(332, 338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 32995, 32996, 50674),
}
# as libjpeg knows it by: version 1.1, no density, no preview
_JFIF = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"


def without_metadata(data: bytes) -> tuple[bytes, int]:
    """A file with the same pixels but without metadata, where the format is one that has them, and the orientation.

    Returns:
        The bytes, and 1 to 8 as EXIF counts; 1 where the file says nothing, nothing sensible, or where the decoder
        sees to it (TIFF, AVIF). A file that is damaged otherwise is left for the decoder to refuse.
    """
    strip = next((strip for magic, strip in _FORMATS if magic.match(data)), None)
    try:
        return strip(data) if strip else (data, UPRIGHT)
    except (struct.error, IndexError, ValueError):
        return data, UPRIGHT


def _strip_png(data: bytes) -> tuple[bytes, int]:
    kept, exif, xmp = [data[:8]], b"", b""
    name, at = b"", 8
    while name != b"IEND" and at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        stop = at + 12 + length
        if stop > len(data):
            break
        body = data[at + 8 : stop - 4] if name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") else b""
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[at:stop])
        elif name == b"eXIf":
            exif = body
        elif body.startswith(b"Raw profile type exif\0"):
            exif = exif or _raw_profile(body.partition(b"\0")[2], compressed=name == b"zTXt")
        elif body.startswith(b"XML:com.adobe.xmp\0"):
            xmp = body
        at = stop
    if name != b"IEND":
        kept.append(data[at:])
    return b"".join(kept), _orientation(exif, xmp)


def _raw_profile(text: bytes, compressed: bool) -> bytes:
    """EXIF as ImageMagick writes it into PNG: a name, a length and hexadecimal digits."""
    try:
        if compressed:
            text = zlib.decompressobj().decompress(text[1:], _MAX_TEXT)
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except (ValueError, zlib.error):
        return b""


def _strip_jpeg(data: bytes) -> tuple[bytes, int]:
    kept, exif, xmp = [data[:2]], b"", b""
    at = 2
    while True:
        # as libjpeg does, skip what is no marker
        at = data.index(b"\xff", at)
        while data[at] == 0xFF:
            at += 1
        marker, at = data[at], at + 1
        if marker == 0 or marker == 1 or 0xD0 <= marker <= 0xD7:
            continue
        if marker in (0xD8, 0xD9, 0xDA):
            break
        (length,) = struct.unpack_from(">H", data, at)
        segment, at = data[at + 2 : at + length], at + max(length, 2)
        if marker == 0xE0:
            if segment.startswith(b"JFIF\0") and len(segment) >= 14:
                kept.append(_JFIF)
        elif marker == 0xE1:
            exif = exif or (segment if segment.startswith(_EXIF_NAME) else b"")
            xmp = xmp or (segment if segment.startswith(_XMP_NAME) else b"")
        elif (marker == 0xEE and segment.startswith(b"Adobe") and len(segment) >= 12) or not (
            0xE0 <= marker <= 0xEF or marker == 0xFE
        ):
            kept.append(struct.pack(">BBH", 0xFF, marker, length) + segment)
    kept.append(bytes([0xFF, marker]) + data[at:])
    return b"".join(kept), _orientation(exif, xmp)


def _strip_webp(data: bytes) -> tuple[bytes, int]:
    kept: list[bytes] = []
    exif = xmp = b""
    at, end = 12, min(len(data), 8 + struct.unpack_from("<I", data, 4)[0])
    while at + 8 <= end:
        name, length = struct.unpack_from("<4sI", data, at)
        body = data[at + 8 : at + 8 + length]
        stop = at + 8 + length + length % 2
        if name == b"VP8X":
            # bits that announce profile, EXIF and XMP
            kept.append(data[at : at + 8] + bytes([body[0] & ~0b101100]) + data[at + 9 : stop])
        elif name == b"EXIF":
            exif = exif or body
        elif name == b"XMP ":
            xmp = xmp or body
        elif name in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            kept.append(data[at:stop])
        at = stop
    picture = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(picture)) + picture, _orientation(exif, xmp)


def _strip_gif(data: bytes) -> tuple[bytes, int]:
    """Leave out what stands before the first image, but for the block that says what is transparent."""
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    kept = [data[:at]]
    while data[at] == 0x21:
        start, at = at, at + 2
        while data[at]:
            at += 1 + data[at]
        at += 1
        if data[start + 1] == 0xF9:
            kept.append(data[start:at])
    return b"".join(kept) + data[at:], UPRIGHT


def _strip_tiff(data: bytes) -> tuple[bytes, int]:
    order, big = _tiff_layout(data)
    count, offset = ("Q", "Q") if big else ("H", "I")
    entries: dict[int, bytes] = {}
    for tag, raw, value in _tiff_entries(data):
        if tag in _TIFF_PIXEL_TAGS or (tag == _ORIENTATION and 1 <= value <= 8):
            # the first counts, for Pillow and for libtiff
            entries.setdefault(tag, raw)
    # at the end, as an only page; what it points to has not moved
    start = len(data) + len(data) % 2
    directory = struct.pack(order + count, len(entries)) + b"".join(entries[tag] for tag in sorted(entries))
    head = struct.pack(order + offset, start)
    body = data[8 + len(head) :] if big else data[8:]
    return (data[:8] if big else data[:4]) + head + body + bytes(len(data) % 2) + directory + bytes(len(head)), UPRIGHT


def _tiff_layout(data: bytes) -> tuple[str, bool]:
    """Byte order as :mod:`struct` has it, and whether it is BigTIFF."""
    order = ">" if data[:2] == b"MM" else "<"
    return order, 43 in data[2:4]


def _tiff_entries(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Number, bytes and, of a single integer, the value of the first directory's tags; -1 for other values.

    Ends where the file ends, however many it says there are.
    """
    order, big = _tiff_layout(data)
    first, count, entry = (8, "Q", "HHQ8s") if big else (4, "H", "HHI4s")
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, first)
    if at + struct.calcsize(count) > len(data):
        return
    (number,) = struct.unpack_from(order + count, data, at)
    at, size = at + struct.calcsize(order + count), struct.calcsize(order + entry)
    for start in range(at, min(at + number * size, len(data) - size + 1), size):
        tag, kind, length, field = struct.unpack_from(order + entry, data, start)
        form = {1: "B", 3: "H", 4: "I"}.get(kind)
        value = struct.unpack_from(order + form, field)[0] if form and length == 1 else -1
        yield tag, data[start : start + size], value


def _strip_avif(data: bytes) -> tuple[bytes, int]:
    """Call the items of EXIF and XMP by another name; their places, and so the pixels', stay."""
    for start, stop, name in _boxes(data, 0, len(data)):
        if name == b"meta":
            items = rb"(infe(?:\x02.{7}|\x03.{9}))(?:Exif|mime)"
            meta = re.sub(items, rb"\1skip", data[start:stop], flags=re.DOTALL)
            return data[:start] + meta + data[stop:], UPRIGHT
    return data, UPRIGHT


def _strip_jpeg2000(data: bytes) -> tuple[bytes, int]:
    """Call the box of the resolution, the one with no bearing on the pixels that Pillow reads, by another name."""
    for start, stop, name in _boxes(data, 0, len(data)):
        if name == b"jp2h":
            for inner, _, kind in _boxes(data, start + 8, stop):
                if kind == b"res ":
                    data = data[: inner + 4] + b"free" + data[inner + 8 :]
            break
    return data, UPRIGHT


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    """Where the boxes of ISO's base media format begin and end, and their types."""
    while at + 8 <= end:
        size, name = struct.unpack_from(">I4s", data, at)
        if size < 8 or at + size > end:
            return
        yield at, at + size, name
        at += size


def _orientation(exif: bytes, xmp: bytes) -> int:
    """What EXIF says, or XMP where EXIF says nothing."""
    exif = exif.removeprefix(_EXIF_NAME)
    entries = _tiff_entries(exif) if _TIFF.match(exif) and len(exif) >= 16 else ()
    if values := [value for tag, _, value in entries if tag == _ORIENTATION]:
        return values[0] if 1 <= values[0] <= 8 else UPRIGHT
    said = _XMP_ORIENTATION.search(xmp)
    return int(said[1]) if said else UPRIGHT


_TIFF = re.compile(rb"II(?:\*\0|\0\*|\+\0)|MM(?:\0\*|\*\0|\0\+)")
_FORMATS: tuple[tuple[re.Pattern[bytes], Callable[[bytes], tuple[bytes, int]]], ...] = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), _strip_png),
    (re.compile(rb"\xff\xd8"), _strip_jpeg),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), _strip_webp),
    (re.compile(rb"GIF8[79]a"), _strip_gif),
    (_TIFF, _strip_tiff),
    (re.compile(rb"....ftyp", re.DOTALL), _strip_avif),
    (re.compile(rb"\0\0\0\x0cjP  "), _strip_jpeg2000),
)
