"""A few small sound files of every format that Pillow reads by itself, for :mod:`fuzzing`."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

WIDTH, HEIGHT = 11, 7


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@cache
def picture() -> Image.Image:
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 200, WIDTH * HEIGHT * 3).reshape(HEIGHT, WIDTH, 3)
    return Image.fromarray((ramp + random.integers(0, 55, ramp.shape)).astype(np.uint8))


def _saved(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # an image keeps what its last encoder was told
        frames = [frame.copy() for frame in options.pop("append_images", [])]
        more = {"append_images": frames} if frames else {}
        (image or picture()).copy().save(buffer, kind, **options, **more)
    return buffer.getvalue()


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x010E], exif[0x0112], exif[0x011A] = "marked by the fuzz", 1, 72.0
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    return exif


@cache
def sound_files() -> dict[str, list[bytes]]:
    """By format, as Pillow calls them."""
    made = _common() | _saved_by_pillow() | _by_hand()
    for kind, files in made.items():
        for data in files:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                assert str(image.format).upper() in (kind, "MPO"), (kind, image.format)
    return made


def _common() -> dict[str, list[bytes]]:
    image = picture()
    clear = image.copy()
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    fractions = Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    text = PngImagePlugin.PngInfo()
    text.add_text("seed", "1")
    text.add_text("prompt", "a red apple" * 9, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "<x/>")
    more: dict[str, Any] = {"save_all": True, "append_images": [image.rotate(180)]}
    return {
        "PNG": [
            _saved("PNG", exif=_exif(), pnginfo=text, icc_profile=profile),
            *(_saved("PNG", made) for made in (clear, deep, image.convert("1"), image.convert("LA"))),
            _saved("PNG", clear.quantize(9), bits=4),
            _saved("PNG", **more),
            _saved("PNG", image.convert("L"), transparency=3),
        ],
        "JPEG": [
            _saved("JPEG", exif=_exif(), icc_profile=profile, comment=b"a comment"),
            _saved("JPEG", progressive=True, quality=90, subsampling=0),
            _saved("JPEG", image.convert("L")),
            _saved("JPEG", image.convert("CMYK"), restart_marker_blocks=1),
            _saved("MPO", exif=_exif(), **more),
        ],
        "WEBP": [
            _saved("WEBP", exif=_exif(), icc_profile=profile, xmp=b"<x/>"),
            _saved("WEBP", clear),
            _saved("WEBP", clear, lossless=True),
            _saved("WEBP", **more),
        ],
        "BMP": [_saved("BMP", made) for made in (image, image.quantize(4), image.convert("1"), clear)],
        "GIF": [
            _saved("GIF", image.quantize(16), comment=b"a comment"),
            _saved("GIF", clear.quantize(16)),
            _saved("GIF", **more, loop=0, disposal=2),
        ],
        "TIFF": [
            _saved("TIFF", description="a picture", exif=_exif(), icc_profile=profile),
            *(_saved("TIFF", compression=how) for how in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
            *(_saved("TIFF", image.convert("1"), compression=how) for how in ("group3", "group4")),
            *(_saved("TIFF", image.convert(mode)) for mode in ("L", "P", "CMYK", "YCbCr", "LAB", "I")),
            *(_saved("TIFF", made) for made in (clear, deep, fractions)),
            _saved("TIFF", **more),
        ],
        "PPM": [
            *(_saved("PPM", made) for made in (image, image.convert("L"), image.convert("1"), deep, fractions, clear)),
            b"P2 # a comment\n3 2\n9\n0 1 2 3 4 9\n",
            b"P3 1 2 300 0 150 300 1 2 3\n",
            b"P1 3 1 0 1 1\n",
        ],
        "AVIF": [_saved("AVIF", exif=_exif(), speed=10), _saved("AVIF", clear, exif=_exif(), xmp=b"<x/>", speed=10)],
    }


def _saved_by_pillow() -> dict[str, list[bytes]]:
    image, square = picture(), picture().resize((16, 16))
    clear, icon = square.convert("RGBA"), _saved("PNG", square)
    return {
        "BLP": [_saved("BLP", square.quantize(256), blp_version=how) for how in ("BLP1", "BLP2")],
        "DDS": [
            *(_saved("DDS", clear, pixel_format=how) for how in ("DXT1", "DXT3", "DXT5", "BC3", None)),
            _saved("DDS", square.convert("LA")),
        ],
        "DIB": [_saved("DIB")],
        "ICNS": [b"icns" + struct.pack(">I4sI", 16 + len(icon), b"icp4", 8 + len(icon)) + icon],
        "ICO": [_saved("ICO", clear, sizes=[(16, 16)], bitmap_format=how) for how in ("png", "bmp")],
        "IM": [_saved("IM", image.convert(mode)) for mode in ("RGB", "L", "P", "I", "F")],
        "JPEG2000": [
            _saved("JPEG2000"),
            _saved("JPEG2000", clear, irreversible=True, tile_size=(8, 8)),
            _saved("JPEG2000", no_jp2=True),
        ],
        "MSP": [_saved("MSP", image.convert("1"))],
        "PCX": [_saved("PCX", image.convert(mode)) for mode in ("RGB", "L", "P", "1")],
        "SGI": [_saved("SGI", image.convert(mode)) for mode in ("RGB", "L", "RGBA")],
        "SPIDER": [_saved("SPIDER", image.convert("F"))],
        "TGA": [
            _saved("TGA", image.convert(mode), compression=how) for mode in ("RGB", "P") for how in (None, "tga_rle")
        ],
        "XBM": [_saved("XBM", image.convert("1"))],
        "QOI": [_saved("QOI"), _saved("QOI", clear)],
    }


def _by_hand() -> dict[str, list[bytes]]:
    """What Pillow reads but does not write."""
    rgb, grey = np.asarray(picture()), np.asarray(picture().convert("L"))
    pcx, ico = _saved("PCX"), _saved("ICO", picture().resize((16, 16)), sizes=[(16, 16)], bitmap_format="bmp")
    planes = rgb.transpose(2, 0, 1).tobytes()
    fits = {"SIMPLE": "T", "BITPIX": "8", "NAXIS": "2", "NAXIS1": str(WIDTH), "NAXIS2": str(HEIGHT)}
    cards = b"".join(f"{key:8}= {value:>20}".ljust(80).encode() for key, value in fits.items()) + b"END".ljust(80)
    dxt1 = b"\xff\xff\0\0\0\1\2\3"
    flic = struct.pack("<IHHHHHHI", 128 + 16, 0xAF11, 1, 4, 2, 8, 3, 70).ljust(128, b"\0")
    brun = struct.pack("<IH", 6 + 2 * 3, 15) + b"\1\4\7" * 2
    return {
        "CUR": [ico[:2] + b"\2" + ico[3:]],
        "DCX": [struct.pack("<IIII", 0x3ADE68B1, 16, 0, 0) + pcx],
        "FITS": [cards.ljust(2880) + grey.tobytes()],
        "FLI": [flic + struct.pack("<IHH8x", 16 + len(brun), 0xF1FA, 1) + brun],
        "FTEX": [struct.pack("<IIIIIIIII", 0x58455446, 0, 4, 4, 1, 1, 0, 32, 8) + dxt1],
        "GBR": [struct.pack(">IIIIIII", 29, 2, WIDTH, HEIGHT, 1, 0x47494D50, 10) + b"\0" + grey.tobytes()],
        "PIXAR": [
            (b"\x80\xe8\0\0".ljust(416, b"\0") + struct.pack("<HH", HEIGHT, WIDTH) + bytes(4) + b"\x0e\0\2\0").ljust(
                1024, b"\0"
            )
            + rgb.tobytes()
        ],
        "PSD": [
            b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, HEIGHT, WIDTH, 8, 3) + bytes(12) + b"\0\0" + planes,
            b"8BPS\0\1"
            + bytes(6)
            + struct.pack(">HIIHHI", 1, HEIGHT, WIDTH, 8, 1, 0)
            + struct.pack(">I4sHHI4s", 16, b"8BIM", 1005, 0, 4, b"abcd")
            + bytes(4)
            + b"\0\0"
            + grey.tobytes(),
        ],
        "SUN": [struct.pack(">IIIIIIII", 0x59A66A95, 4, 2, 24, 24, 1, 0, 0) + bytes(range(24))],
        "XPM": [
            b'/* XPM */\nstatic char *x[] = {\n"2 2 2 1",\n"a c #ff0000",\n"b c None",\n"ab",\n"ba"\n};\n',
        ],
        "XVTHUMB": [b"P7 332\n#END_OF_COMMENTS\n4 2 255\n" + bytes(range(8))],
    }
