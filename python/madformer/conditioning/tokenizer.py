"""Texts to token ids: any tokenizer of ``transformers``, or bytes, which need no download.

Shape legend: B texts, P tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from madformer.config import TextConfig
from madformer.files.atomic import write_json
from madformer.objects import read_object

BYTES = "bytes"
CONFIG_NAME = "tokenizer_config.json"


class Tokenizer(Protocol):
    """What a model with text reads its prompts with."""

    vocab_size: int
    pad_token_id: int

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """Token ids ``(B, length)``, int64: short texts padded, long ones cut."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what :func:`load_tokenizer` reads."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as they are, then padding."""

    vocab_size = 257
    pad_token_id = 256

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        ids = torch.full((len(texts), length), self.pad_token_id)
        for row, text in zip(ids, texts, strict=True):
            data = text.encode()[:length]
            row[: len(data)] = torch.tensor(list(data), dtype=torch.int64)
        return ids

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ByteTokenizer:
        """Nothing is read: every folder has the same."""
        return cls()

    def save_pretrained(self, folder: str | Path) -> None:
        write_json(Path(folder) / CONFIG_NAME, {"tokenizer_class": type(self).__name__})


class PretrainedTokenizer:
    """One of ``transformers``, padded on its own side; one without a padding token pads with its last one."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self.vocab_size, self.pad_token_id = len(tokenizer), tokenizer.pad_token_id

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        return self.tokenizer(list(texts), **options)["input_ids"]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """As :func:`load_tokenizer`."""
        return load_tokenizer(folder)

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """``bytes``, a folder that a tokenizer was saved to, or a hub id of one of ``transformers``.

    Raises:
        ValueError: there is none of that name, or ``transformers`` is not installed.
    """
    if name == BYTES:
        return ByteTokenizer()
    file = Path(name) / CONFIG_NAME
    try:
        if file.is_file() and read_object(file).get("tokenizer_class") == ByteTokenizer.__name__:
            return ByteTokenizer()
        from transformers import AutoTokenizer

        return PretrainedTokenizer(AutoTokenizer.from_pretrained(name))
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"no tokenizer at {name}: {str(error).splitlines()[0]}") from error


def as_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself, or around one of ``transformers`` what makes it one."""
    is_foreign = type(tokenizer).__module__.partition(".")[0] == "transformers"
    return PretrainedTokenizer(tokenizer) if is_foreign else tokenizer


def check_tokenizer(tokenizer: Tokenizer, text: TextConfig) -> None:
    """Whether a model of these tokens can read what the tokenizer writes; raises ``ValueError``."""
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, and the model text.vocab_size={text.vocab_size}"
        )
