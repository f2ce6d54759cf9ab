"""What images are conditioned on.

Shape legend: B images, P tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from madformer.config import MADFormerConfig


@dataclass(frozen=True)
class Prompt:
    """Of a batch, or without the batch dimension of one image.

    Attributes:
        text: token ids ``(B, P)``, for a model with text. negative_text: what guidance leads away from: the empty text,
            or another.
        label: classes ``(B,)``, for a model with such, negative for one left out; guidance leads away from that.
    """

    text: Tensor | None = None
    negative_text: Tensor | None = None
    label: Tensor | None = None

    def clone(self) -> Prompt:
        """The same in memory of its own."""
        return Prompt(*(None if ids is None else ids.clone() for ids in (self.text, self.negative_text, self.label)))

    def check(self, config: MADFormerConfig, batch: tuple[int, ...], *, guided: bool) -> None:
        """Whether it is what a model asks for.

        Args:
            batch: ``(B,)``, or ``()`` for one image.

        Raises:
            ValueError: something too much or missing, of another shape or out of range.
        """
        texts = {"text": self.text, "negative_text": self.negative_text if guided else None}
        if self.negative_text is not None and not guided:
            raise ValueError("negative_text has no place in sampling without guidance")
        if config.text is not None:
            shape = (*batch, config.text.length)
            for name in texts if guided else ("text",):
                _check(name, texts[name], shape, 0, config.text.vocab_size - 1)
        elif any(text is not None for text in texts.values()):
            raise ValueError("text has no place in a model without text")
        if config.num_classes:
            _check("label", self.label, batch, -1 if config.null_class else 0, config.num_classes - 1)
        elif self.label is not None:
            raise ValueError("label has no place in a model without classes")


def check_guidable(config: MADFormerConfig) -> None:
    """Raises ``ValueError`` for a model that has no condition to leave out."""
    if not config.can_be_guided:
        raise ValueError("guidance needs a model with text or classes, and this one has neither to leave out")


def _check(name: str, ids: Tensor | None, shape: tuple[int, ...], low: int, high: int) -> None:
    if ids is None or tuple(ids.shape) != shape:
        given = "none" if ids is None else f"the shape {tuple(ids.shape)}"
        raise ValueError(f"{name} must be ids of the shape {shape}, got {given}")
    if not low <= int(ids.min()) <= int(ids.max()) <= high:
        raise ValueError(f"{name} must hold ids from {low} to {high}, got {int(ids.min())} to {int(ids.max())}")
