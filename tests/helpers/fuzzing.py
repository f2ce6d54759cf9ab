"""Damages picture files in ways that follow from a number, and says what a reader made of them.

    python -m tests.helpers.fuzzing [--what pictures] [--first 0] [--count 240000] [--per-process 2000]

Case ``i`` is the same wherever the same Pillow wrote the files that are damaged. Even cases break any byte of a file,
chunk by chunk with the checksums mended or blindly: the reader may refuse it, in one line. Odd cases break the metadata
alone: the reader must find the pixels of the sound file, turned as far as the EXIF still says so. ``--what shards``
damages headers, members and indexes of tar shards, of images and of latents.

Cases run in processes that may use 4 GiB and 30 s each, so that a crash, a hang and a flood of memory are seen. The
last line on stdout is the metrics as JSON; exit status 1 where a case failed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from madformer.data.images import UnreadableImageError, decode_image
from madformer.data.pixels import decode
from tests.helpers.fuzz_seeds import png_chunk, sound_files
from tests.helpers.fuzz_shards import check_shard, make_shard, sound_shards

SHAPE = (8, 8)
ORIENTATION = 0x0112
# what a viewer does to the stored pixels, by orientation; independent of Pillow
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p[::-1].swapaxes(0, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: p[:, ::-1].swapaxes(0, 1),
}


def check_any_damage(data: bytes) -> str:
    """What became of the file: ``read``, or the reason why not. Raises ``AssertionError`` where a reader escaped."""
    try:
        image = decode_image(data, SHAPE)
    except UnreadableImageError as error:
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"not one line: {error!r}") from error
        return f"refused: {type(error.__cause__).__name__}"
    except BaseException as error:
        raise AssertionError(f"escaped: {type(error).__name__}: {error}") from error
    assert image.shape == (3, *SHAPE), image.shape
    assert -1 <= float(image.min()) <= float(image.max()) <= 1
    return "read"


def check_damaged_metadata(sound: bytes, damaged: bytes, orientation: int) -> str:
    """Raises ``AssertionError`` where the pixels are not the sound file's, turned."""
    expected = TURNS[orientation](np.asarray(decode(sound)))
    try:
        found = np.asarray(decode(damaged))
    except BaseException as error:
        raise AssertionError(f"sound pixels refused: {type(error).__name__}: {error}") from error
    assert np.array_equal(found, expected), f"other pixels, {found.shape} for {expected.shape}"
    return "equal"


Case = Callable[[int], tuple[str, str]]


def run_shard(number: int) -> tuple[str, str]:
    """Kind, and what became of case ``number`` of ``--what shards``."""
    kind, data, index = make_shard(number, (_flip, _extreme, _truncate, _repeat, _remove, _insert))
    try:
        return kind, check_shard(kind, data, index)
    except AssertionError as error:
        return kind, f"failed: {error}"


def run_picture(number: int) -> tuple[str, str]:
    """Format, and what became of case ``number``."""
    format_, data, sound, orientation = make_case(number)
    try:
        if sound is None:
            return format_, check_any_damage(data)
        return format_, check_damaged_metadata(sound, data, orientation)
    except AssertionError as error:
        return format_, f"failed: {error}"


def make_case(number: int) -> tuple[str, bytes, bytes | None, int]:
    """Format, the damaged file, and the sound one and the orientation to expect where it is the metadata's damage."""
    chance = random.Random(number)
    if number % 2:
        formats = sorted(METADATA)
        format_ = formats[number // 2 % len(formats)]
        sound = chance.choice(sound_files()[format_])
        orientation, exif = random_exif(chance)
        if format_ in ("TIFF", "AVIF", "GIF", "JPEG2000"):
            orientation = 1
        return format_, METADATA[format_](sound, exif, chance), sound, orientation
    formats = sorted(sound_files())
    format_ = formats[number // 2 % len(formats)]
    data = chance.choice(sound_files()[format_])
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        data = chance.choice((_flip, _flip, _extreme, _truncate, _splice, _repeat, _remove, _insert, _by_chunk))(
            data, chance
        )
    return format_, data, None, 1


def _flip(data: bytes, chance: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        if broken:
            broken[_place(broken, chance)] ^= 1 << chance.randrange(8)
    return bytes(broken)


def _place(data: bytes | bytearray, chance: random.Random) -> int:
    """Half of the damage is done where headers are."""
    return chance.randrange(len(data) if chance.random() < 0.5 else min(len(data), 64))


def _extreme(data: bytes, chance: random.Random) -> bytes:
    value = chance.choice((0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF))
    width = chance.choice([width for width in (1, 2, 4) if value < 256**width])
    at = _place(data, chance) if data else 0
    return data[:at] + value.to_bytes(width, chance.choice(("little", "big"))) + data[at + width :]


def _truncate(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _splice(data: bytes, chance: random.Random) -> bytes:
    other = chance.choice(sound_files()[chance.choice(sorted(sound_files()))])
    return data[: chance.randrange(len(data) + 1)] + other[chance.randrange(len(other)) :]


def _repeat(data: bytes, chance: random.Random) -> bytes:
    start, stop = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:stop] + data[start:stop] * chance.choice((1, 1, 2, 9)) + data[stop:]


def _remove(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    return data[:start] + data[start + chance.choice((1, 2, 4, 30)) :]


def _insert(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.randbytes(chance.choice((1, 2, 4, 30))) + data[at:]


def _by_chunk(data: bytes, chance: random.Random) -> bytes:
    """Break a chunk of PNG and mend its checksum, so that more than the checksum finds it; flip bits elsewhere."""
    chunks = _png_chunks(data)
    if not chunks:
        return _flip(data, chance)
    index = chance.randrange(len(chunks))
    name, body = chunks[index]
    body = chance.choice((_flip, _extreme, _truncate, _insert))(body, chance)
    chunks[index : index + 1] = [(name, body)] * chance.choice((1, 1, 1, 2))
    return data[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while data.startswith(b"\x89PNG\r\n\x1a\n") and at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        chunks.append((name, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def random_exif(chance: random.Random) -> tuple[int, bytes]:
    """An EXIF directory of any nonsense, which says an orientation as it should or not at all."""
    order = chance.choice("<>")
    entries, orientation = [], 1
    if chance.random() < 0.3:
        orientation = chance.randint(1, 8)
        entries.append(struct.pack(order + "HHIHH", ORIENTATION, 3, 1, orientation, 0))
    elif chance.random() < 0.5:
        kind, count, value = chance.choice(
            ((2, 1, b"6\0\0\0"), (3, 1, struct.pack(order + "HH", 9, 0)), (5, 1, b"6666"))
        )
        entries.append(struct.pack(order + "HHI", ORIENTATION, kind, count) + value)
    for _ in range(chance.randrange(12)):
        tag = chance.choice((0x010E, 0x011A, 0x0128, 0x8769, 0x8825, 0xA005, 0x014A, 0xB001, chance.randrange(1 << 16)))
        if tag != ORIENTATION:
            count = chance.choice((0, 1, 2, 9, 0xFFFF, 0xFFFFFFFF))
            entries.append(struct.pack(order + "HHI", tag, chance.randrange(20), count) + chance.randbytes(4))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    number = struct.pack(order + "H", len(entries) + chance.choice((0, 0, 1, 500)))
    return orientation, head + number + b"".join(entries) + chance.randbytes(chance.choice((0, 4, 40)))


def _png_metadata(data: bytes, exif: bytes, chance: random.Random) -> bytes:
    junk = chance.randbytes(chance.randrange(40))
    many = zlib.compress(bytes(1 << 21))
    extra = [
        png_chunk(b"eXIf", exif),
        *chance.choices(
            (
                png_chunk(b"tEXt", junk),
                png_chunk(b"tEXt", b"exif\0" + junk),
                png_chunk(b"zTXt", b"k\0\0" + junk),
                png_chunk(b"zTXt", b"k\0\7" + junk),
                png_chunk(b"zTXt", b"k\0\0" + many),
                png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  9\nzz" + junk)),
                png_chunk(b"iTXt", b"k\0\1\0\0\0" + many),
                png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + junk),
                png_chunk(b"iCCP", b"name\0\0" + many),
                png_chunk(b"iCCP", b"name\0\1" + junk),
                png_chunk(b"pHYs", junk),
                png_chunk(b"gAMA", junk[:3]),
                png_chunk(b"cHRM", junk),
                png_chunk(b"acTL", junk),
                png_chunk(b"fcTL", junk),
                png_chunk(b"sRGB", b""),
                png_chunk(b"\xff\xfe!?", junk),
                png_chunk(b"tIME", junk)[:-1] + b"?",  # a wrong checksum
            ),
            k=4,
        ),
    ]
    chance.shuffle(extra)
    chunks = [png_chunk(*chunk) for chunk in _png_chunks(data) if chunk[0] != b"eXIf"]
    for chunk in extra:
        # not between those of the pixels, nor behind the end
        first, last = (next(i for i, c in enumerate(chunks) if c[4:8] == name) for name in (b"IDAT", b"IEND"))
        chunks.insert(chance.choice((chance.randint(1, first), last)), chunk)
    return data[:8] + b"".join(chunks)


def _jpeg_metadata(data: bytes, exif: bytes, chance: random.Random) -> bytes:
    def segment(marker: int, body: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body

    junk = chance.randbytes(chance.randrange(200))
    extra = [
        segment(0xE1, b"Exif\0\0" + exif),
        *chance.choices(
            (
                segment(0xE1, junk),
                segment(0xE1, b"Exif\0\0" + junk[:4]),
                segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + junk),
                segment(0xE2, b"ICC_PROFILE\0" + junk),
                segment(0xE2, b"ICC_PROFILE\0\0\0"),
                segment(0xE2, b"MPF\0" + junk),
                segment(0xE2, b"MPF\0" + exif),
                segment(0xE2, b"FPXR\0" + junk),
                segment(0xED, b"Photoshop 3.0\0" + b"8BIM" + junk),
                segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\0\0\0\xff" + junk),
                segment(0xE0 + chance.choice((3, 5, 12, 15)), junk),
                segment(0xFE, junk),
                segment(0xE0, b"JFXX\0" + junk),
            ),
            k=4,
        ),
    ]
    return data[:2] + b"".join(extra) + data[2:]


def _webp_metadata(data: bytes, exif: bytes, chance: random.Random) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)

    image = Image.open(io.BytesIO(data))
    width, height = image.size
    announced = b"\x3c" if image.mode == "RGBA" else b"\x2c"
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    junk = chance.randbytes(chance.randrange(60))
    data = data.replace(b"EXIF", b"none")
    body = data[12:] if data[12:16] == b"VP8X" else chunk(b"VP8X", announced + bytes(3) + sizes) + data[12:]
    flags = bytes([body[8] | chance.choice((0, 0x08, 0x2C))])
    body = body[:8] + flags + body[9:] + chunk(b"EXIF", exif)
    body += b"".join(chance.choices([chunk(name, junk) for name in (b"XMP ", b"EXIF", b"ICCP", b"what")], k=2))
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _tiff_metadata(data: bytes, exif: bytes, chance: random.Random) -> bytes:
    """More tags, of any type and count, in the first directory of a classic TIFF."""
    order = ">" if data.startswith(b"MM") else "<"
    (at,) = struct.unpack_from(order + "I", data, 4)
    (number,) = struct.unpack_from(order + "H", data, at)
    entries = [data[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(number)]
    for _ in range(chance.randrange(1, 8)):
        tag = chance.choice((270, 282, 283, 296, 305, 306, 700, 33723, 34377, 34665, 34675, 34853, 40965, 330, 60000))
        count = chance.choice((0, 1, 2, 9, 0xFFFF, 0xFFFFFFFF))
        entries.append(struct.pack(order + "HHI", tag, chance.randrange(20), count) + chance.randbytes(4))
    if chance.random() < 0.3:
        entries.append(struct.pack(order + "HHI4s", ORIENTATION, chance.choice((2, 3, 5)), 2, chance.randbytes(4)))
    entries.sort(key=lambda entry: struct.unpack_from(order + "H", entry)[0])
    directory = struct.pack(order + "H", len(entries)) + b"".join(entries) + chance.choice((bytes(4), b"\xff" * 4))
    return data[:4] + struct.pack(order + "I", len(data)) + data[8:] + directory


def _gif_metadata(data: bytes, exif: bytes, chance: random.Random) -> bytes:
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)

    def extension(label: int, *blocks: bytes) -> bytes:
        return bytes([0x21, label]) + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"

    junk = chance.randbytes(chance.randrange(1, 255))
    extra = chance.choices(
        (
            extension(0xFE, junk, junk),
            extension(0xFE),
            extension(0xFF, b"NETSCAPE2.0", b"\1"),
            extension(0xFF, b"NETSCAPE2.0"),
            extension(0xFF, b"XMP DataXMP", junk),
            extension(0xFF, junk),
            extension(0xFF),
            extension(0x01, junk),
        ),
        k=3,
    )
    return data[:at] + b"".join(extra) + data[at:]


def _avif_metadata(data: bytes, exif: bytes, chance: random.Random) -> bytes:
    """Break the EXIF that the sound file has, in its place."""
    at = data.rindex(b"marked by the fuzz")
    start = max(data.rfind(b"II*\0", 0, at), data.rfind(b"MM\0*", 0, at))
    size = at + 18 - start
    return data[:start] + (exif + chance.randbytes(size))[:size] + data[start + size :]


METADATA: dict[str, Callable[[bytes, bytes, random.Random], bytes]] = {
    "PNG": _png_metadata,
    "JPEG": _jpeg_metadata,
    "WEBP": _webp_metadata,
    "TIFF": _tiff_metadata,
    "GIF": _gif_metadata,
    "AVIF": _avif_metadata,
}


MEMORY = 2 << 30
"""That a case may take, in bytes."""


def _run_cases(run: Case, numbers: range, report: Path, place: Any) -> None:
    """In a process of its own: what became of each case, as lines of JSON; ``place`` says which one is at work."""
    # above what the process has mapped already: a PyTorch with CUDA maps gigabytes that it never touches
    limit = MEMORY + int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff's own messages
    with report.open("w") as lines:
        for number in numbers:
            place.seek(0)
            place.write(struct.pack("<q", number))
            place.flush()
            signal.alarm(30)
            outcome = run(number)
            signal.alarm(0)
            lines.write(json.dumps((number, *outcome)) + "\n")
            lines.flush()


def fuzz(numbers: range, run: Case = run_picture) -> list[tuple[int, str, str]]:
    """Number, format and outcome of every case, crashes and hangs among them."""
    done: list[tuple[int, str, str]] = []
    sound_files()
    sound_shards()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        while numbers:
            with (Path(folder) / "place").open("w+b") as place:
                process = os.fork()
                if process == 0:
                    try:
                        _run_cases(run, numbers, report, place)
                    finally:
                        os._exit(0)
                _, status = os.waitpid(process, 0)
                done += [tuple(json.loads(line)) for line in report.read_text().splitlines()]
                if not os.WIFSIGNALED(status):
                    break
                place.seek(0)
                (last,) = struct.unpack("<q", place.read(8))
            name = signal.Signals(os.WTERMSIG(status)).name
            done.append((last, "?", f"failed: ended the process by {name}"))
            numbers = range(last + 1, numbers.stop)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("pictures", "shards"), default="pictures", help="(default pictures)")
    parser.add_argument("--first", type=int, default=0, help="the first case (default 0)")
    parser.add_argument("--count", type=int, default=240_000, help="cases (default 240,000)")
    parser.add_argument("--per-process", type=int, default=2000, help="cases of a process (default 2000)")
    args = parser.parse_args()
    began, outcomes, failures, errors = time.monotonic(), Counter(), [], Counter()
    for first in range(args.first, args.first + args.count, args.per_process):
        numbers = range(first, min(first + args.per_process, args.first + args.count))
        for number, format_, outcome in fuzz(numbers, run_picture if args.what == "pictures" else run_shard):
            kind, _, reason = outcome.partition(": ")
            outcomes[format_, kind] += 1
            errors[reason if kind == "refused" else ""] += 1
            if kind == "failed":
                failures.append((number, format_, reason))
                print(f"case {number} ({format_}): {reason}", flush=True)
    kinds = ("read", "refused", "equal", "failed")
    print(f"{'format':10}" + "".join(f"{kind:>9}" for kind in kinds))
    for format_ in sorted({name for name, _ in outcomes}):
        print(f"{format_:10}" + "".join(f"{outcomes[format_, kind]:9}" for kind in kinds))
    del errors[""]
    print(
        json.dumps(
            {
                "cases": outcomes.total(),
                "failed": failures[:20],
                "num_failed": len(failures),
                "refused_for": dict(errors.most_common()),
                "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
                "seconds": round(time.monotonic() - began),
                "pillow": Image.__version__,
            }
        )
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
