"""A captioned data set that is neither faces, emoji nor photographs: clip art of the public domain, in categories.

Debian's package ``openclipart-png`` has it: PNG files of the Open Clip Art Library 0.18, in folders that say what they
are of. Of any other folder of pictures, with subfolders for categories, a data set is made in the same way.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps

from madformer.data.pixels import decode
from madformer.data.rendered import RenderedSample, RenderedSource, check_side, png_of, write_rendered
from madformer.data.sources import FolderSource, RawSample
from madformer.files.atomic import write_json
from madformer.files.text import first_line, printable

__all__ = ["DEFAULT_SOURCE", "ClipartSource", "caption_of", "fitted", "key_of", "write_clipart_shards"]

DEFAULT_SOURCE = Path("/usr/share/openclipart/png")
"""Where Debian's package ``openclipart-png`` has it."""
_INK = 16  # levels that a pixel differs from white by, in one channel at least, to be seen
_LEAST = 0.01  # of a picture's pixels that have to
_ALIKE = 2.0  # levels, root mean square over 16 x 16 pixels, below which two pictures are the same
_DUPLICATE, _EMPTY, _UNREADABLE = "duplicates", "nearly_empty", "unreadable"
_CUT = 24  # characters of "title_author_" that the library's file names have before a number
# who drew the pictures, as file names have them behind the titles
_AUTHORS = (
    "aj ashton", "alejandro tejada", "andreas nilsson", "andremarcel", "anthony liekens", "anton yu", "ara j",
    "architetto francesco rollandin", "arjen meijer", "aubanel monnier", "benji park", "brice boyer",
    "cedric bosdonnat", "celso", "charles mccolm", "christoph brill", "costea bogdan", "dan gerhards", "dave pena",
    "dennis bo", "didier fabert", "dirk struve", "enrique meza c", "fco andrade", "francesco rollandin",
    "frederic moser", "frouke", "fudriot omic ch", "gabrielle nowicki", "ganson", "gerald g", "glenn rolla",
    "guillaume boitel", "guziec", "israel c", "jakob chaosinfarkt", "james kilfiger", "jarno vasamaa", "jasper v",
    "jean victor balin", "joel montes de oca", "jon phillips", "jonadab", "jonathan dietrich", "juliane krug",
    "kevin yager", "kilian valkhof", "leif lodahl", "linda kim", "lumen design studios", "marcelo caiafa",
    "marcelo staudt", "mateya", "matt todd", "matthew gates", "mauro olivo", "michael breuer", "michael tunnicliffe",
    "mike honeychurch", "mimooh", "mo", "nathan eady", "nicolas clement", "nicu buculei", "nurbl", "olivier boyer",
    "patricia fidi", "peterm", "petri lummemaki", "richard torkar", "rollandin francesco", "roman bertle", "romus",
    "rory mccann", "ruud steltenpool", "saurabh", "sergio luiz araujo", "seth yastrov", "shandy brown",
    "snuatautisticido", "stefan bazelkov", "stepan klima", "stuart moore", "susan park", "tanguy jacq", "tess brady",
    "toh yen cheng", "uliphant", "wolfram es", "yogesh kanitkar", "yves guillou", "zazou",
)  # fmt: skip

logger = logging.getLogger(__name__)


def caption_of(path: str) -> str:
    """What a picture's path in its folder says of it: ``food/fruit/lemon_benji_park_01.png`` is "lemon, fruit".

    Numbers that count pictures of one name and the names of those who drew them are left out, also where a long file
    name cut them off; ``bw`` is "black and white". The folder is the innermost one.
    """
    *folders, name = path.split("/")
    stem = name.rpartition(".")[0] or name
    title, number = re.fullmatch(r"(.+?)(_\d\dr?|_)?", stem.lower(), re.DOTALL).groups()  # type: ignore[union-attr]
    words = re.findall(r"[^\W_]+", title)
    if number and len(words) > 1 and len(words[-1]) == 1 and len(title) < _CUT / 2:
        words.append(number[1:])  # of playing cards: spades 10
    words = _without_author(words, cut=len(title) > _CUT - 4)
    if words and (counted := re.fullmatch(r"([^\W\d_]{3,})\d+", words[-1])):
        words[-1] = counted[1]
    words = ["black and white" if word == "bw" else word for word in words if word]
    folder = " ".join(re.findall(r"[^\W_]+", folders[-1].lower())) if folders else ""
    return ", ".join(part for part in (" ".join(words), folder) if part) or printable(stem)


def _without_author(words: list[str], *, cut: bool) -> list[str]:
    """A title's words without the name of an author at their end, or the beginning of one where the end was cut off."""
    for first in range(1, len(words)):
        rest = " ".join(words[first:])
        if rest in _AUTHORS or (cut and any(name.startswith(rest) for name in _AUTHORS)):
            return words[:first]
    return words


def key_of(path: str) -> str:
    """Of a picture's path in its folder: a name without dots and slashes, which no other path has."""
    readable = re.sub("[^a-z0-9]+", "-", path.rpartition(".")[0].lower()).strip("-")
    return f"{readable[:60]}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def fitted(image: Image.Image, size: int) -> Image.Image:
    """What is to be seen of a picture on white, in the middle of a square of ``size`` pixels a side.

    It is resampled by Lanczos's filter, and a thirty-second of the side is left white on each. A picture in which
    nothing is to be seen becomes a white one.
    """
    margin = size // 32
    ink = ImageChops.invert(image).point(lambda level: 255 * (level >= _INK))
    inner = ImageOps.pad(image.crop(ink.getbbox()), (size - 2 * margin,) * 2, Image.Resampling.LANCZOS, color="white")
    return ImageOps.expand(inner, margin, "white")


def write_clipart_shards(
    folder: str | Path,
    *,
    size: int = 128,
    source: str | Path = DEFAULT_SOURCE,
    max_per_shard: int = 10_000,
    limit: int | None = None,
) -> dict[str, Any]:
    """Write clip art to ``folder/clipart-NNNNNN.tar`` and describe it in ``folder/dataset.json``, as emoji are.

    Members of a sample: ``png`` (RGB, size x size), ``txt`` (caption), ``cls`` (index into ``class_names``, the
    first-level folders that hold pictures; -1 of a picture beside them) and ``json`` (caption, label, label_name,
    file). The same files give the same bytes. Pictures that cannot be told from an earlier one at 16 x 16 pixels, that
    are all but white, or that cannot be read (those above Pillow's limit of pixels are not), are left out and counted.

    Args:
        size: side in pixels. source: folder of pictures. limit: stop after that many.

    Returns:
        What ``dataset.json`` holds.

    Raises:
        FileNotFoundError: no such folder, which names the Debian package, or no picture in it.
        ValueError: ``size`` or ``limit`` is no such number, or not one picture was kept.
    """
    files, left_out = _opened(source), Counter[str]()
    made = write_rendered(
        _samples(files, check_side(size), left_out), folder, "clipart", files.class_names, size=size,
        max_per_shard=max_per_shard, limit=limit,
    )  # fmt: skip
    description = made | {
        "num_left_out": left_out.total(),
        "left_out": {why: left_out[why] for why in (_DUPLICATE, _EMPTY, _UNREADABLE)},
        "made_by": "madformer data clipart",
        "rendering": f"what is not white, on a white square, LANCZOS to {size - 2 * (size // 32)} of {size} px",
    }
    write_json(Path(folder) / "dataset.json", description)
    return description


class ClipartSource(RenderedSource):
    """The samples that :func:`write_clipart_shards` writes, for evaluation without files of one's own.

    All are made when it is opened, since which of them are the same is known only then.

    Raises:
        As :func:`write_clipart_shards`.
    """

    def __init__(self, size: int = 128, source: str | Path = DEFAULT_SOURCE) -> None:
        files = _opened(source)
        super().__init__("clip art", list(_samples(files, check_side(size), Counter())), files.class_names)


def _opened(source: str | Path) -> FolderSource:
    if not Path(source).is_dir():
        raise FileNotFoundError(
            f"no clip art at {printable(source)}: install Debian's openclipart-png or pass --source FOLDER"
        )
    return FolderSource(Path(source))


def _samples(files: FolderSource, size: int, left_out: Counter[str]) -> Iterator[RenderedSample]:
    """Those that are kept, in the order of their paths' parts; the others are counted in ``left_out`` by why."""
    kept, root = _Kept(), files.root.resolve()
    for index in range(len(files)):
        path = files.path(index)
        if path.is_symlink() and path.resolve().is_relative_to(root):
            left_out[_DUPLICATE] += 1  # listed in another category, too
            continue
        try:
            raw = files.read(index)
            image = fitted(decode(raw.data), size)
        except (ValueError, OSError) as error:
            logger.warning("skipping an unreadable image: %s: %s", files.name(index), first_line(error))
            left_out[_UNREADABLE] += 1
            continue
        if (np.asarray(image).min(2) < 256 - _INK).mean() < _LEAST:
            left_out[_EMPTY] += 1
        elif not kept.add(image):
            left_out[_DUPLICATE] += 1
        else:
            yield _sample(raw, image)


class _Kept:
    """Pictures that no other one is to be like."""

    def __init__(self) -> None:
        self._by_mean: defaultdict[int, list[np.ndarray[Any, Any]]] = defaultdict(list)

    def add(self, image: Image.Image) -> bool:
        """Whether it is like none before it, and then is kept."""
        small = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32)
        # means are no farther apart than pictures are
        place = int(small.mean() / _ALIKE)
        near = [other for nearby in (place - 1, place, place + 1) for other in self._by_mean[nearby]]
        if near and (np.square(np.stack(near) - small).mean((1, 2, 3)) < _ALIKE**2).any():
            return False
        self._by_mean[place].append(small)
        return True


def _sample(raw: RawSample, image: Image.Image) -> RenderedSample:
    return RenderedSample(key_of(raw.key), png_of(image), caption_of(raw.key), raw.label, {"file": raw.key})
