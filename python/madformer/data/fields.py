"""What the sources of images have in common: which names mean an image, a caption or a class, and what they hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["DataSummary", "caption_of", "label_of", "summarize"]

IMAGE_EXTENSIONS = (
    "png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "avif", "jfif", "jpe", "apng", "jp2", "j2k",
    "jpx", "pgm", "pbm", "pnm", "tga", "ico", "dib", "pcx", "qoi",
)  # fmt: skip
UNREAD_EXTENSIONS = (
    "heic", "heif", "jxl", "svg", "psd", "eps", "exr", "hdr", "raw", "dng", "cr2", "cr3", "nef", "arw", "raf", "orf",
    "rw2",
)  # fmt: skip
"""Pictures, too, and none that are read: they would have to be converted."""
CAPTION_FIELDS = ("caption", "text", "prompt")
LABEL_FIELDS = ("label", "labels", "class", "cls")
NO_LABEL = -1
"""The label of a sample without one."""
MAX_LABEL = 2**31 - 1


@dataclass(frozen=True)
class DataSummary:
    """What a data set has to train on, known before a picture of it is decoded.

    Attributes:
        num_samples: of the whole. num_examined: those that the counts below are of; fewer where it would take long to
            look at all, and then spread evenly.
        num_labelled: with a class. num_captioned: with a caption of their own.
        num_classes: number of the names, or one more than the greatest label where that is more; 0 without labels.
        class_names: by label; empty if unknown.
        names_as_captions: whether a sample without a caption of its own gets its class's name for one.
        problem: the first label or caption that could not be read, in one line; empty if none.
    """

    num_samples: int
    num_examined: int
    num_labelled: int
    num_captioned: int
    num_classes: int
    class_names: tuple[str, ...] = ()
    names_as_captions: bool = False
    problem: str = ""

    @property
    def complete(self) -> bool:
        """Whether every sample was examined."""
        return self.num_examined == self.num_samples


def summarize(
    num_samples: int, annotations: Callable[[int], tuple[int, str]], class_names: Sequence[str], limit: int
) -> DataSummary:
    """Read label and caption of up to ``limit`` samples, spread evenly.

    Args:
        annotations: raises ``ValueError`` or ``OSError`` where they cannot be read.
    """
    indices = np.unique(np.linspace(0, num_samples - 1, min(num_samples, limit)).astype(np.int64)).tolist()
    labelled = captioned = 0
    greatest, problem = NO_LABEL, ""
    for index in indices:
        try:
            label, caption = annotations(index)
        except (ValueError, OSError) as error:
            problem = problem or str(error).splitlines()[0]
            continue
        labelled += label != NO_LABEL
        captioned += caption != ""
        greatest = max(greatest, label)
    return DataSummary(
        num_samples=num_samples,
        num_examined=len(indices),
        num_labelled=labelled,
        num_captioned=captioned,
        num_classes=max(len(class_names), greatest + 1) if labelled else 0,
        class_names=tuple(class_names),
        problem=problem,
    )


def first(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def caption_of(value: Any) -> str:
    """Some data sets have several captions for an image; the first is taken.

    Raises:
        ValueError: it is an object or another list, of which no text can be made; one line.
    """
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    if value is None:
        return ""
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"the caption {_short(value)} is no text")
    # JSON can hold halves of surrogate pairs, which no tokenizer takes
    return str(value).encode("utf-8", "replace").decode().strip().removeprefix("\ufeff")


def label_of(value: Any, class_names: Sequence[str] = ()) -> int:
    """The number of a class, given as one, by its digits, or by its name where names are known; -1 for nothing and -1.

    Raises:
        ValueError: it is none of them, or out of range; one line.
    """
    if value is None or value != value:
        # pandas writes a missing number as NaN
        return NO_LABEL
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace").removeprefix("\ufeff")
    if isinstance(value, str):
        value = value.strip()
        if not value:
            return NO_LABEL
        label = class_names.index(value) if value in class_names else _number(value, class_names)
    elif (isinstance(value, float) and math.isfinite(value) and value == int(value)) or isinstance(value, int):
        label = int(value)
    else:
        raise ValueError(f"the label {_short(value)} is not the number of one class")
    if not NO_LABEL <= label <= MAX_LABEL or (class_names and label >= len(class_names)):
        raise ValueError(f"the label {_short(label)} is not within 0 .. {(len(class_names) or MAX_LABEL + 1) - 1}")
    return label


def _number(text: str, class_names: Sequence[str]) -> int:
    try:
        return int(text)
    except ValueError as error:
        of = "none of the classes' names" if class_names else "no names are known: class_names in a dataset.json"
        raise ValueError(f"the label {_short(text)} is no number of a class, and {of}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
