"""The one way in which pictures are read, for training and for ``image=``: upright, on white, 8 bits, RGB.

Shape legend: H rows, W columns, C channels.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from madformer.data.metadata import without_metadata

__all__ = ["UnreadableImageError", "decode", "to_rgb"]

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow's reader of EPS runs Ghostscript on the file.
_REFUSED_FORMATS = {"EPS"}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_BRIGHT = 16.0  # no picture in [0, 1] has a highlight above it; in [0, 255] its brightest pixel would still be black


class UnreadableImageError(ValueError):
    """A sample that cannot be decoded; the message is one line with the file and the reason."""


def decode(data: bytes) -> Image.Image:
    """The first picture of a file, as :func:`to_rgb` gives it.

    Every format is read that Pillow reads by itself, so not EPS. The decoder does not see the metadata, so that damage
    to them does none to the picture.

    Raises:
        UnreadableImageError: whatever it is that the bytes make the decoder raise; so does a picture over
            ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    try:
        data, orientation = without_metadata(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Between one and two times the limit Pillow only warns, and would decode hundreds of megabytes.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            formats = [name for name in Image.ID if name not in _REFUSED_FORMATS]
            with Image.open(io.BytesIO(data), formats=formats) as image:
                return _upright(to_rgb(image), orientation)
    except Exception as error:
        # decoders raise errors of any type, KeyError and MemoryError among them
        raise UnreadableImageError(_reason(error)) from error


def to_rgb(image: Image.Image | np.ndarray[Any, Any]) -> Image.Image:
    """A picture as the model sees it: turned as its EXIF says, transparency on white, mode RGB.

    Grey of more than 8 bits has a black and a white, which are

    - 0 and ``2**bits - 1``, where the file says how many bits there are (PNG, PGM, JPEG 2000, TIFF of up to 16 bits);
    - 0 and 1, for fractions whose brightest is below 16 (what is above 1 is a highlight) and whose darkest falls short
      of 0 by less than an eighth of it (a filter's overshoot);
    - the least and the greatest value, for others of which some are negative;
    - 0 and ``2**k - 1`` for the rest, with the smallest ``k`` from 8 on that holds the brightest.

    Args:
        image: of any mode. Of an animation, the frame that it stands at. Or an array, ``(H, W)`` or ``(H, W, C)`` with
            1 to 4 channels (grey, grey and alpha, RGB, RGBA): of bytes or bool, of 16 bits with white at 65535, or of
            other numbers with the rules above.

    Raises:
        ValueError: an array of another shape or type; fractions that are not finite.
        Exception: what Pillow's decoders raise, where the image was opened and not loaded yet.
    """
    if isinstance(image, np.ndarray):
        return to_rgb(_from_array(image))
    _correct_transparent_colour(image)
    image.load()
    return _upright(_on_white(image), _orientation(image))


def _reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"  # Pillow adds the address of a buffer
    lines = str(error).splitlines() or [""]
    if isinstance(error, (OSError, ValueError, SyntaxError)) and lines[0]:
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        # damaged metadata say nothing about the pixels
        return None


def _upright(image: Image.Image, orientation: Any) -> Image.Image:
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _correct_transparent_colour(image: Image.Image) -> None:
    """Bring a PNG's transparent colour to the 8 bits that its pixels are decoded to, which Pillow does not do."""
    tiles = getattr(image, "tile", None)
    if image.format != "PNG" or not tiles or "transparency" not in image.info:
        return
    clear = image.info["transparency"]
    if tiles[0].args in ("L;2", "L;4"):
        image.info["transparency"] = clear * 255 // (3 if tiles[0].args == "L;2" else 15)
    elif tiles[0].args == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _grey(image).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Mode L of a picture of more than 8 bits a pixel; the transparent value becomes white."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    (bits,) = tags.get(_BITS_PER_SAMPLE, (32,))[:1]
    if image.mode == "I" and bits == 32 and tags.get(_SAMPLE_FORMAT) == (1,):
        values = values.view(np.uint32)
    grey = _to_bytes(values, _white(image, bits))
    if tags.get(_PHOTOMETRIC) == 0:
        # Pillow inverts pictures whose zero is white up to 8 bits only
        grey = 255 - grey
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def _white(image: Image.Image, tiff_bits: int) -> float | None:
    """The value of white where the file's format says it."""
    if image.mode == "F" or image.format == "FITS":
        return None
    if image.mode == "I":
        return 65535.0 if image.format in ("PNG", "PPM") else None
    return 2.0**tiff_bits - 1 if image.format == "TIFF" else 65535.0


def _to_bytes(values: np.ndarray[Any, Any], white: float | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Numbers to 0 .. 255, as :func:`to_rgb` says; ``white`` where it is known."""
    fractions = values.dtype.kind == "f"
    if not values.size:
        return values.astype(np.uint8)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("its pixels are not all finite numbers")
    black = 0.0
    if white is None:
        if fractions and high < _BRIGHT and low >= -high / 8:
            white = 1.0
        elif low < 0:
            black, white = low, high
        else:
            white = 2.0 ** max(8, int(np.ceil(high)).bit_length()) - 1
    # fp64 only where a difference of large numbers would be lost; a picture may have 89 million pixels
    scaled: Any = values.astype(np.float64 if values.dtype.itemsize > 4 else np.float32)
    scaled -= black
    scaled *= 255 / (white - black) if white > black else 0
    np.clip(scaled, 0, 255, out=scaled)
    grey: np.ndarray[Any, np.dtype[np.uint8]] = np.rint(scaled, out=scaled).astype(np.uint8)
    return grey


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    modes = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
    values_HWC = array[..., None] if array.ndim == 2 else array
    if values_HWC.ndim != 3 or values_HWC.shape[2] not in modes or not values_HWC.size:
        raise ValueError(f"an array of a picture must be (H, W) or (H, W, C) with 1 to 4 channels, got {array.shape}")
    if array.dtype.kind not in "buif":
        raise ValueError(f"an array of a picture must hold real numbers, got {array.dtype}")
    if array.dtype == bool:
        values_HWC = values_HWC * np.uint8(255)
    elif array.dtype != np.uint8:
        values_HWC = _to_bytes(values_HWC, 65535.0 if array.dtype == np.uint16 else None)
    mode = modes[values_HWC.shape[2]]
    height, width = values_HWC.shape[:2]
    return Image.frombytes(mode, (width, height), np.ascontiguousarray(values_HWC).tobytes())
