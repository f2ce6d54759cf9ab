"""What the data say of a model's conditions, and what data and model cannot agree on: told before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from madformer.conditioning.tokenizer import load_tokenizer
from madformer.config import MADFormerConfig, TextConfig
from madformer.data import open_dataset
from madformer.data.fields import DataSummary
from madformer.data.images import ImageDataset
from madformer.data.latents import LatentDataset, holds_latents
from madformer.files.text import printable
from madformer.training.config import TrainingConfig

CAPTION_TOKENS = 48
"""Of the text that a model gets because its data have captions: the length that `emoji64` has."""
NUM_SIZES = 16
"""Pictures whose size is looked at."""


def open_data(config: TrainingConfig) -> ImageDataset | LatentDataset:
    """The data of a run.

    Raises:
        ValueError, OSError: there are none, or they are damaged.
    """
    if not config.data:
        raise ValueError("data='' names no pictures: give a folder, .tar shards or a data set of the hub")
    if holds_latents(config.data):
        if config.holdout:
            raise ValueError(
                f"holdout={config.holdout} is of images, and {config.data} holds latents: "
                "it is for madformer data latents"
            )
        return LatentDataset(config.data)
    return open_dataset(
        config.data,
        config.image_shape,
        on_error="skip",
        max_bad_fraction=config.max_bad_fraction,
        holdout=config.holdout,
    )


def fit(config: TrainingConfig, summary: DataSummary, given: Collection[str]) -> TrainingConfig:
    """The configuration for a model of the classes and captions that the data have.

    Args:
        given: names of fields, those of the model after ``model.``, that were chosen: these stay.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """
    model = config.model
    chosen = "caption" in given
    told = any(name.split(".")[:2] == ["model", "text"] for name in given)
    if model.text is None and (chosen or (summary.num_captioned and not told)):
        tokenizer = load_tokenizer(config.tokenizer)
        model = model.replace(text=TextConfig(tokenizer.vocab_size, CAPTION_TOKENS, tokenizer.pad_token_id))
    elif model.text is not None and not (chosen or told or summary.num_captioned) and config.caption == "caption":
        model = model.replace(text=None)
        config = dataclasses.replace(config, text_loss_weight=0.0)
    # a class that is the text need not be told twice
    if "model.num_classes" not in given and (model.num_classes or not _reads_labels(config, model)):
        model = _with_classes(model, summary.num_classes if _all_labelled(summary) else 0, given)
    return dataclasses.replace(config, model=model)


def _reads_labels(config: TrainingConfig, model: MADFormerConfig) -> bool:
    return model.text is not None and config.caption == "label"


def _all_labelled(summary: DataSummary) -> bool:
    return summary.num_labelled == summary.num_examined


def _with_classes(model: MADFormerConfig, num_classes: int, given: Collection[str]) -> MADFormerConfig:
    # a chosen field may rule out what tells the layers of classes; then the notice says that nobody is told
    if num_classes and not model.modulated and ("model.time_conditioning" in given or model.elastic_diffusion_layers):
        return model
    return model.replace(**telling_classes(model, num_classes))


def telling_classes(model: MADFormerConfig, num_classes: int) -> dict[str, Any]:
    """The fields that make a model one of so many classes: it takes AdaLN to tell the layers."""
    if not num_classes or model.modulated:
        return {"num_classes": num_classes}
    return {"num_classes": num_classes, "time_conditioning": "adaln" if model.unet is None else "unet+adaln"}


def check_fit(config: TrainingConfig, summary: DataSummary) -> list[str]:
    """What a user should know of data and model, a line each.

    Raises:
        ValueError: what they cannot agree on, with the option that mends it.
    """
    model, data = config.model, config.data
    _check_classes(model, summary, data)
    notices = []
    if _reads_labels(config, model):
        if not _all_labelled(summary):
            labelled = _count(summary, summary.num_labelled)
            raise ValueError(f"the text is a picture's class, and {labelled} of {data} have one: --caption caption")
    elif model.text is not None:
        if not summary.num_captioned and not (summary.names_as_captions and summary.num_labelled):
            remedy = "--caption label reads their classes" if _all_labelled(summary) else "take a model without text"
            raise ValueError(f"the model reads captions, and no picture of {data} has one: {remedy}")
        if summary.num_captioned < summary.num_examined:
            instead = "their class's name is read" if summary.names_as_captions else "they are trained on without"
            missing = _count(summary, summary.num_examined - summary.num_captioned)
            notices.append(f"{missing} of {data} have no caption: {instead}")
    if summary.num_captioned and (model.text is None or _reads_labels(config, model)):
        notices.append(f"{data} has captions, which the model does not read")
    if summary.num_labelled and not model.num_classes and not _reads_labels(config, model):
        remedy = f"--model.num-classes {summary.num_classes}" if _all_labelled(summary) else "not all pictures have one"
        notices.append(f"{data} has {summary.num_classes} classes, which the model is not told: {remedy}")
    if model.num_classes > summary.num_classes:
        notices.append(f"num_classes={model.num_classes} of the model, of which {data} has {summary.num_classes}")
    if summary.num_samples < config.batch_size:
        notices.append(
            f"{summary.num_samples} pictures of {data} are fewer than batch_size={config.batch_size}: a step sees some "
            f"more than once (--batch-size {summary.num_samples})"
        )
    if summary.problem:
        notices.append(f"a label or caption of {data} cannot be read: {summary.problem}")
    return notices


def _check_classes(model: MADFormerConfig, summary: DataSummary, data: str) -> None:
    classes = model.num_classes
    if not classes:
        return
    if not _all_labelled(summary):
        labelled = _count(summary, summary.num_labelled)
        raise ValueError(
            f"the model has num_classes={classes}, and {labelled} of {data} have a class: --model.num-classes 0"
        )
    named = len(summary.class_names)
    if summary.num_classes > classes or (named and named != classes):
        found = summary.num_classes
        names = _listed(summary.class_names, 3)
        raise ValueError(
            f"{data} has {found} classes{names}, and the model num_classes={classes}: --model.num-classes {found}"
        )


def _count(summary: DataSummary, number: int) -> str:
    looked_at = "" if summary.complete else " looked at"
    return f"{number} of {summary.num_examined} pictures{looked_at}"


def describe(config: TrainingConfig, summary: DataSummary) -> str:
    """What a run learns, in a line."""
    parts = [f"{summary.num_samples} pictures"]
    if config.model.num_classes:
        parts.append(f"{config.model.num_classes} classes{_listed(summary.class_names, 5)}")
    if config.model.text is not None:
        parts.append("the class in decimal for a text" if config.caption == "label" else "captions")
    return f"{printable(config.data)}: {', '.join(parts)}"


def _listed(names: Sequence[str], most: int) -> str:
    """In parentheses, in one line; nothing for none."""
    return f" ({', '.join(map(printable, names[:most]))}{', ...' if len(names) > most else ''})" if names else ""


def too_small(images: ImageDataset, shape: tuple[int, int]) -> list[str]:
    """A notice, where pictures of a data set would be enlarged; a few are looked at."""
    sizes = []
    for index in np.unique(np.linspace(0, len(images) - 1, NUM_SIZES).astype(int)).tolist():
        try:
            with Image.open(BytesIO(images.source.read(index).data)) as image:
                sizes.append((image.height, image.width))
        except Exception:  # the policy for damaged pictures is the data set's
            continue
    small = [size for size in sizes if size[0] < shape[0] or size[1] < shape[1]]
    if not small:
        return []
    (height, width), (rows, columns) = min(small), shape
    looked_at = f"{len(small)} of {len(sizes)} pictures looked at"
    return [
        f"{looked_at} are smaller than the model's {rows} x {columns} pixels, and enlarged (one: {height} x {width})"
    ]
