"""One reader of pictures: modes, depths, transparency and orientation, against values worked out by hand."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from madformer.data.images import UnreadableImageError, to_rgb
from madformer.data.pixels import decode

ORIENTATION = 0x0112
RAMP = np.linspace(0, 1, 9).reshape(3, 3)
GREY = np.rint(RAMP * 255)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey_of(image: Image.Image) -> np.ndarray:
    """The one channel of a picture whose three are equal."""
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def png(depth: int, colour: int, rows: list[bytes], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file by the letter of the specification."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    bits = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] * depth
    header = struct.pack(">IIBBBBB", len(rows[0]) * 8 // bits, len(rows), depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(values: np.ndarray, order: str = "<", photometric: int = 1, bits: int | None = None) -> bytes:
    """An uncompressed grey TIFF by the letter of the specification, in the byte order of ``values``' own."""
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    bits = values.dtype.itemsize * 8 if bits is None else bits
    body = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    tags += [(278, height), (279, len(body)), (339, sample_format)]
    entries = b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(body))
    return head + body + struct.pack(order + "H", len(tags)) + entries + bytes(4)


class TestDeepGrey:
    @pytest.mark.parametrize(
        ("data", "white"),
        [
            (lambda v: png(16, 0, [row.astype(">u2").tobytes() for row in v]), 65535),
            (lambda v: b"P5 3 3 65535\n" + v.astype(">u2").tobytes(), 65535),
            (lambda v: tiff(v.astype(np.uint16)), 65535),
            (lambda v: tiff(v.astype(np.uint16), ">"), 65535),
            (lambda v: tiff((65535 - v).astype(np.uint16), photometric=0), 65535),
            (lambda v: tiff(v.astype(np.int16)), 32767),
            (lambda v: tiff(v.astype(np.int32)), 255),
            (lambda v: tiff(v.astype(np.int32), ">"), 4095),
            (lambda v: tiff(v.astype(np.int32)), 65535),
            (lambda v: tiff(v.astype(np.int32)), 2**31 - 1),
            (lambda v: tiff(v.astype(np.uint32)), 2**32 - 1),
            (lambda v: tiff(v.astype(np.float32)), 1),
            (lambda v: tiff(v.astype(np.float32), ">"), 255),
            (lambda v: tiff((1 - v).astype(np.float32), photometric=0), 1),
            (lambda v: tiff(v.astype(np.float32)), 65535),
            (lambda v: saved(Image.fromarray(v.astype(np.uint16)), "JPEG2000", irreversible=False), 65535),
            (lambda v: saved(Image.fromarray(v.astype(np.float32)), "TIFF", compression="tiff_lzw"), 1),
            (lambda v: saved(Image.fromarray(v.astype(np.int32)), "IM"), 65535),
            (lambda v: b"Pf 3 3 -1.0\n" + v[::-1].astype("<f4").tobytes(), 1),
        ],
    )
    def test_a_ramp_from_black_to_white(self, data: Any, white: int) -> None:
        values = RAMP * white if white == 1 else np.rint(RAMP * white)
        assert np.abs(grey_of(decode(data(values))) - GREY).max() <= 1

    def test_twelve_bits_have_their_white_at_4095(self) -> None:
        pairs = np.rint(np.linspace(0, 1, 8) * 4095).astype(int).reshape(-1, 2)
        packed = bytes(
            b for first, second in pairs for b in (first >> 4, (first & 15) << 4 | second >> 8, second & 255)
        )
        data = tiff(np.frombuffer(packed, np.uint8).reshape(1, 12), bits=12)
        # the writer above took the width for the number of bytes
        data = data.replace(struct.pack("<HHIHH", 256, 3, 1, 12, 0), struct.pack("<HHIHH", 256, 3, 1, 8, 0))
        assert np.abs(grey_of(decode(data))[0] - np.linspace(0, 255, 8)).max() <= 1

    def test_dark_pictures_of_16_bits_stay_dark(self) -> None:
        for data in (png(16, 0, [struct.pack(">HH", 0, 257)]), b"P5 2 1 65535\n" + struct.pack(">HH", 0, 257)):
            assert grey_of(decode(data)).tolist() == [[0, 1]]

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([-0.01, 0.0, 0.5, 1.02], [0, 0, 128, 255]),  # beyond white and black by a filter's overshoot
            ([0.0, 1.0, 8.0, 0.25], [0, 255, 255, 64]),  # highlights
            ([-1.0, 0.0, 0.5, 1.0], [0, 128, 191, 255]),
            ([-430.0, 0.0, 8848.0, 4209.0], [0, 12, 255, 128]),  # heights above the sea
            ([0.0, 511.5, 1023.0, 1023.0], [0, 128, 255, 255]),
            ([0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]),
            ([-3.0, -3.0, -3.0, -3.0], [0, 0, 0, 0]),
        ],
    )
    def test_fractions(self, values: list[float], expected: list[int]) -> None:
        pixels = np.array([values], np.float32)
        assert grey_of(decode(tiff(pixels)))[0].tolist() == expected
        assert grey_of(to_rgb(pixels))[0].tolist() == expected

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_not_finite_is_refused(self, value: float) -> None:
        with pytest.raises(UnreadableImageError, match="not all finite"):
            decode(tiff(np.array([[0, value]], np.float32)))

    def test_the_transparent_value_is_white(self) -> None:
        data = png(16, 0, [struct.pack(">HHH", 0, 30000, 30001)], (b"tRNS", struct.pack(">H", 30000)))
        assert grey_of(decode(data)).tolist() == [[0, 255, 117]]


class TestModes:
    def test_every_mode_of_one_picture(self) -> None:
        """Red, white, black and mid grey, as far as a mode has them."""
        colours = np.array([[[255, 0, 0], [255, 255, 255], [0, 0, 0], [128, 128, 128]]], np.uint8)
        picture = Image.fromarray(colours)
        ways = {"RGBa": lambda: picture.convert("RGBA").convert("RGBa"), "P": picture.quantize}
        for mode in ("RGB", "RGBA", "RGBa", "RGBX", "YCbCr", "HSV", "CMYK", "LAB", "P"):
            image = ways.get(mode, lambda mode=mode: picture.convert(mode))()
            assert image.mode == mode
            got = np.asarray(to_rgb(image))
            assert np.abs(got.astype(int) - colours).max() <= (8 if mode == "LAB" else 2), mode
        grey = picture.convert("L")
        for mode in ("L", "LA", "La", "1", "PA", "I", "F"):
            image = grey.convert("LA").convert("La") if mode == "La" else grey.convert(mode)
            expected = np.asarray(image.convert("L") if mode == "1" else grey)[0]
            assert np.abs(grey_of(to_rgb(image))[0] - expected).max() <= 1, mode

    @pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
    def test_half_transparent_black_is_grey(self, mode: str) -> None:
        image = Image.new("LA" if mode in ("LA", "La") else "RGBA", (2, 2))
        image.putalpha(128)
        assert np.abs(grey_of(to_rgb(image if image.mode == mode else image.convert(mode))) - 127).max() <= 1

    @pytest.mark.parametrize(
        ("depth", "colour", "row", "key", "expected"),
        [
            (1, 0, b"\x80", struct.pack(">H", 1), [255] + [0] * 7),
            (1, 0, b"\x80", struct.pack(">H", 0), [255] * 8),
            (2, 0, b"\x1b", struct.pack(">H", 1), [0, 255, 170, 255]),
            (4, 0, b"\x0f\x7f", struct.pack(">H", 7), [0, 255, 255, 255]),
            (8, 0, b"\x00\x07\x80", struct.pack(">H", 7), [0, 255, 128]),
            (8, 2, bytes([9, 9, 9, 7, 7, 7]), struct.pack(">HHH", 7, 7, 7), [9, 255]),
            (16, 2, struct.pack(">HHHHHH", *[2305] * 3, *[1794] * 3), struct.pack(">HHH", *[1794] * 3), [9, 255]),
        ],
    )
    def test_a_transparent_colour_of_png(
        self, depth: int, colour: int, row: bytes, key: bytes, expected: list[int]
    ) -> None:
        assert grey_of(decode(png(depth, colour, [row], (b"tRNS", key))))[0].tolist() == expected

    def test_a_palette_with_transparency(self) -> None:
        palette = (b"PLTE", bytes([200, 0, 0, 0, 0, 0]))
        data = png(8, 3, [bytes([0, 1])], palette, (b"tRNS", bytes([255, 0])))
        assert np.asarray(decode(data)).tolist() == [[[200, 0, 0], [255, 255, 255]]]

    @pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
    def test_cmyk(self, kind: str) -> None:
        """Pillow writes a JPEG inverted, with the marker of Adobe that says so."""
        ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
        pixels = np.asarray(decode(saved(ink, kind))).astype(int)
        assert np.abs(pixels - [255, 0, 0]).max() <= 3

    def test_the_first_frame_of_an_animation(self) -> None:
        frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
        for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
            options = {"lossless": True} if kind == "WEBP" else {}
            data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
            assert np.abs(np.asarray(decode(data)).astype(int) - [255, 0, 0]).max() <= 3, kind


class TestOrientation:
    # the pixels that a viewer shows in the first row of [[1, 2], [3, 4]]
    FIRST_ROWS = ([1, 2], [2, 1], [4, 3], [3, 4], [1, 3], [3, 1], [4, 2], [2, 4])

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_all_eight(self, kind: str, orientation: int) -> None:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        stored = Image.fromarray(np.array([[1, 2], [3, 4]], np.uint8) * 50)
        data = saved(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        expected = [50 * value for value in self.FIRST_ROWS[orientation - 1]]
        assert grey_of(decode(data))[0].tolist() == expected
        assert grey_of(to_rgb(Image.open(io.BytesIO(data))))[0].tolist() == expected

    @pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
    def test_lossy_formats(self, kind: str) -> None:
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        stored = np.zeros((16, 32), np.uint8)
        stored[:, 16:] = 255
        image = decode(saved(Image.fromarray(stored).convert("RGB"), kind, exif=exif))
        assert image.size == (16, 32)
        assert grey_of(image)[0].max() < 8
        assert grey_of(image)[-1].min() > 247


class TestArrays:
    @pytest.mark.parametrize(
        ("array", "expected"),
        [
            (np.array([[0, 7, 255]], np.uint8), [0, 7, 255]),
            (np.array([[False, True]]), [0, 255]),
            (np.array([[0, 257, 65535]], np.uint16), [0, 1, 255]),
            (np.array([[0, 7, 255]], np.int64), [0, 7, 255]),
            (np.array([[0, 0.5, 1]]), [0, 128, 255]),
            (np.array([[[0, 255], [0, 0], [100, 255]]], np.uint8), [0, 255, 100]),
        ],
    )
    def test_numbers(self, array: np.ndarray, expected: list[int]) -> None:
        assert grey_of(to_rgb(array))[0].tolist() == expected

    def test_colours(self) -> None:
        assert np.asarray(to_rgb(np.array([[[0, 0.5, 1.0]]]))).tolist() == [[[0, 128, 255]]]
        assert np.asarray(to_rgb(np.array([[[0, 9, 8, 0]]], np.uint8))).tolist() == [[[255, 255, 255]]]

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.zeros(3), r"\(H, W\) or \(H, W, C\)"),
            (np.zeros((2, 2, 5)), r"1 to 4 channels, got \(2, 2, 5\)"),
            (np.zeros((0, 2)), r"got \(0, 2\)"),
            (np.array([["x"]]), "real numbers, got <U1"),
        ],
    )
    def test_refused(self, array: np.ndarray, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            to_rgb(array)


def test_the_pixel_limit_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # 400 is between the warning and the error
    with pytest.raises(UnreadableImageError, match="exceeds limit of 300 pixels"):
        decode(saved(Image.new("RGB", (20, 20)), "PNG"))


def test_no_program_is_started_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would run Ghostscript on what says that it is EPS."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(UnreadableImageError, match="cannot identify image file"):
        decode(data)
