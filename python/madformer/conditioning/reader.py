"""From texts and class names to what the engine conditions images on, of one call or dealt to the images of a run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from madformer.arguments import as_whole, shown
from madformer.conditioning.prompt import Prompt, check_guidable
from madformer.conditioning.tokenizer import Tokenizer
from madformer.config import MADFormerConfig

FEW_NAMES = 20


@dataclass(frozen=True)
class PromptReader:
    """Reads prompts for models of a configuration.

    Attributes:
        tokenizer: for those with text. class_names: by which classes may be asked for; empty for numbers alone.
    """

    config: MADFormerConfig
    tokenizer: Tokenizer | None = None
    class_names: Sequence[str] = ()

    def read(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        labels: int | str | list[int | str] | None = None,
        *,
        num_images: int = 1,
        guided: bool = False,
    ) -> tuple[Prompt, int]:
        """What the engine is told, and of how many images: ``num_images`` for each entry of the lists.

        Args:
            prompt: what each image is to be of, for a model with text. negative_prompt: what guidance leads away from;
                None for the empty text. labels: classes, by number or name, for a model with such; -1 for none of
                them, where the model knows that. One value stands for all images. A model of both takes one alone: the
                other is the empty text, or no class.
            guided: with guidance.

        Raises:
            ValueError: in one line, what is of another kind, missing or has no place in this model, lists of different
                lengths, or a class that there is not.
        """
        config = self.config
        for name, texts in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            _check_texts(name, texts)
        labels = _as_list(labels)
        if guided:
            check_guidable(config)
        elif negative_prompt is not None:
            raise ValueError("negative_prompt is what guidance leads away from, and guidance_scale=1 is none")
        if config.text is not None and negative_prompt is None:
            negative_prompt = ""
        if config.text is not None and labels is not None and prompt is None:
            prompt = ""
        if config.num_classes and config.null_class and prompt is not None and labels is None:
            labels = -1
        for what, given, kind, known in (
            ("prompt", prompt, "text", config.text is not None),
            ("negative prompt", negative_prompt, "text", config.text is not None),
            ("class", labels, "classes", config.num_classes > 0),
        ):
            if known and given is None:
                raise ValueError(f"a {what} is missing: the model was made for {kind}")
            if given is not None and not known:
                raise ValueError(f"a {what} has no place: the model was made without {kind}")
        lengths = {len(given) for given in (prompt, negative_prompt, labels) if isinstance(given, (list, tuple))}
        if len(lengths) > 1:
            raise ValueError(f"lists of prompts and classes must be of one length, got {sorted(lengths)}")
        count = max(lengths, default=1)

        def each(given: Any) -> list[Any]:
            entries = given if isinstance(given, (list, tuple)) else [given] * count
            return [entry for entry in entries for _ in range(num_images)]

        text = negative_text = label = None
        if config.text is not None:
            if self.tokenizer is None:
                raise ValueError("a prompt needs a tokenizer, and this pipeline has none")
            text = self.tokenizer.encode(each(prompt), config.text.length)
            if guided:
                negative_text = self.tokenizer.encode(each(negative_prompt), config.text.length)
        if config.num_classes:
            label = torch.tensor([self.class_number(entry) for entry in each(labels)])
        return Prompt(text, negative_text, label), count * num_images

    def class_number(self, label: int | str) -> int:
        """Of a class by its number or name; a name that is none may be a number.

        Raises:
            ValueError: there is none; the message lists the names where they are few. Or a name that several have, as
                ImageNet's crane is a bird and a machine.
        """
        names, count = self.class_names, self.config.num_classes
        low = -1 if self.config.null_class else 0
        if isinstance(label, str):
            if found := [number for number, name in enumerate(names) if name == label]:
                if len(found) > 1:
                    raise ValueError(f"class {label!r} is the name of {', '.join(map(str, found))}: give a number")
                return found[0]
            try:
                number = int(label)
            except ValueError:
                number = count
        elif (given := as_whole(label)) is None:
            raise ValueError(f"labels={shown(label)} must be a class's number or name, or a list of such")
        else:
            number = given
        if low <= number < count:
            return number
        listed = ", ".join(names) if 0 < len(names) <= FEW_NAMES else f"from 0 to {count - 1}"
        raise ValueError(f"no class {label!r}: there are {count}, {listed}")


def _check_texts(name: str, given: Any) -> None:
    entries = given if isinstance(given, (list, tuple)) else [given]
    if not entries:
        raise ValueError(f"{name}={given} must hold one text at least")
    if given is not None and not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{name}={shown(given)} must be a text or a list of texts")


def _as_list(labels: Any) -> Any:
    """Labels of an array, too; one alone stays so."""
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    labels = list(labels) if isinstance(labels, range) else labels
    if isinstance(labels, (list, tuple)) and not labels:
        raise ValueError(f"labels={labels} must hold one class at least")
    return labels


@dataclass(frozen=True)
class Prompts:
    """What the images of a run are of: image ``i`` takes entry ``i mod n`` of a list of ``n``.

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
