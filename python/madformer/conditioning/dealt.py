"""What the images of a run are of: a few prompts and classes, dealt to any number of images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from madformer.conditioning.reader import PromptReader


@dataclass(frozen=True)
class Prompts:
    """Image ``i`` takes entry ``i mod n`` of a list of ``n``.

    Attributes:
        texts: for a model with text. negative_text: what guidance leads away from; None for the empty text.
        labels: for a model with classes.
        token_ids: 16 hexadecimal digits of SHA-256 over what the tokenizer made of the texts.
    """

    texts: tuple[str, ...] = ()
    negative_text: str | None = None
    labels: tuple[int, ...] = ()
    token_ids: str | None = None

    @classmethod
    def of(
        cls,
        reader: PromptReader,
        texts: Sequence[str] = (),
        classes: Sequence[int | str] = (),
        *,
        negative_text: str | None = None,
        guided: bool = False,
    ) -> Self:
        """Have a pipeline's reader read them once.

        Raises:
            ValueError: what :meth:`~madformer.conditioning.reader.PromptReader.read` refuses.
        """
        some_class = classes[0] if classes else None
        encoded, _ = reader.read(list(texts) or None, negative_text, some_class, guided=guided)
        ids = [x.numpy().tobytes() for x in (encoded.text, encoded.negative_text) if x is not None]
        return cls(
            tuple(texts),
            negative_text,
            tuple(reader.class_number(entry) for entry in classes),
            hashlib.sha256(b"".join(ids)).hexdigest()[:16] if ids else None,
        )

    @property
    def num_different(self) -> int:
        """After how many images the same prompt and class come again."""
        return math.lcm(len(self.texts) or 1, len(self.labels) or 1)

    def entry(self, image: int) -> dict[str, Any]:
        """Prompt and class of an image, by what the pipeline calls them; empty for a model without."""
        lists = {"prompt": self.texts, "labels": self.labels}
        return {name: entries[image % len(entries)] for name, entries in lists.items() if entries}

    def options(self, images: Sequence[int]) -> dict[str, Any]:
        """What the pipeline is called with for these images."""
        entries = [self.entry(image) for image in images]
        options: dict[str, Any] = {name: [entry[name] for entry in entries] for name in entries[0]}
        options["num_images"] = 1 if options else len(images)
        return options | {"negative_prompt": self.negative_text}
