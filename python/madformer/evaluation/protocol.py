"""What a number depends on besides the model: stored with it, and compared before two of them stand side by side."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from madformer.evaluation.uncertainty import Estimate
from madformer.objects import check_names, with_nearest

__all__ = ["MEASURED", "PRESETS", "Preset", "Protocol", "Score", "check_comparable", "preset"]


@dataclass(frozen=True)
class Protocol:
    """Everything that decides a number, in JSON's types.

    Attributes:
        metric: its name. options: of its own, such as ``nearest_k=5``.
        extractor: its name. extractor_hash: of its weights and preprocessing. resizer, normalization: of its input.
        num_images: that the number is of. image_size: height and width. image_format: how a pixel is stored.
        images_hash: of the images' content, in their order.
        reference: its name. reference_hash: of its content. num_reference: its images; None where nobody noted them.
        preset: the name of the preset that all of it agrees with; None without one.
        weights: of the model and of its autoencoder. seed: of the first image, the next ones having the next.
        scheduler, steps, guidance, guidance_interval, refresh_every, precision: how the images were drawn. prompts: a
            hash of what they are of. All of these are None where nobody knows.
    """

    metric: str
    options: str
    extractor: str
    extractor_hash: str
    resizer: str
    normalization: str
    num_images: int
    image_size: tuple[int, int]
    image_format: str
    images_hash: str
    reference: str | None
    reference_hash: str | None
    num_reference: int | None
    preset: str | None = None
    weights: str | None = None
    seed: int | None = None
    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    refresh_every: int | None = None
    precision: str | None = None
    prompts: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """By the names of the fields."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Protocol:
        """What :meth:`to_dict` gave, also after a way through JSON.

        Raises:
            ValueError: unknown or missing names.
        """
        check_names(values, [field.name for field in dataclasses.fields(cls)])
        lists = ("image_size", "guidance_interval")
        known: dict[str, Any] = {
            name: tuple(value) if name in lists and value is not None else value for name, value in values.items()
        }
        try:
            return cls(**known)
        except TypeError as error:
            raise ValueError(f"no protocol: {str(error).partition('() ')[2] or error}") from error

    def line(self) -> str:
        """What is known of it, in one line."""
        return ", ".join(f"{name}={value}" for name, value in self.to_dict().items() if value is not None)


MEASURED = ("images_hash", "weights", "seed", "reference", "extractor", "preset")
"""Fields that may differ in a table: what is measured, and names, whose contents are compared in their place."""


@dataclass(frozen=True)
class Score:
    """A number with its uncertainty and its protocol."""

    estimate: Estimate
    protocol: Protocol

    @property
    def metric(self) -> str:
        """Its name."""
        return self.protocol.metric

    @property
    def value(self) -> float:
        """The number."""
        return self.estimate.value

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types; None for what is not a number."""
        estimate = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self.estimate).items()
        }
        return {"metric": self.metric, **estimate, "protocol": self.protocol.to_dict()}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Score:
        """What :meth:`to_dict` gave; raises ``ValueError`` for what is no score."""
        try:
            estimate = {field.name: values[field.name] for field in dataclasses.fields(Estimate)}
            found = {name: math.nan if values[name] is None else values[name] for name in ("value", "low", "high")}
            return cls(Estimate(**{**estimate, **found}), Protocol.of(values["protocol"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"no score: {error} is missing or of another type") from error


def check_comparable(scores: Iterable[Score], *, varying: Collection[str] = ()) -> None:
    """Refuse to have numbers of different protocols in one table; those of different metrics are not compared.

    Args:
        varying: fields of :class:`Protocol` that the table is over, such as ``steps`` and ``guidance``, besides
            :data:`MEASURED`.

    Raises:
        ValueError: two scores of a metric differ in another field, which is named; an unknown name in ``varying``.
    """
    names = [field.name for field in dataclasses.fields(Protocol)]
    check_names(varying, names)
    compared = [name for name in names if name not in (*MEASURED, *varying)]
    first: dict[str, Protocol] = {}
    for score in scores:
        ours, theirs = score.protocol, first.setdefault(score.metric, score.protocol)
        for name in compared:
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(
                    f"two numbers of different protocols are not to be compared: {name} of {score.metric} is "
                    f"{getattr(theirs, name)!r} and {getattr(ours, name)!r}"
                )


def how_drawn(drawn: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a protocol that say how images were drawn, from the settings of a sampling run."""
    if not drawn:
        return {}
    prompts = dict(drawn.get("prompts") or {})
    guidance, interval = prompts.pop("guidance_scale", 1.0), prompts.pop("guidance_interval", None)
    scheduler = drawn.get("scheduler") or {}
    told = json.dumps([prompts, drawn.get("recorded") or {}], sort_keys=True)
    return {
        "weights": f"{drawn.get('model')} {drawn.get('vae')}",
        "seed": drawn.get("seed"),
        # the class by itself says little: its spacing and its thresholds are part of it
        "scheduler": f"{scheduler.get('class')} {_digest(json.dumps(scheduler, sort_keys=True))}",
        "steps": drawn.get("steps"),
        "guidance": guidance,
        "guidance_interval": tuple(interval) if interval else None,
        "refresh_every": drawn.get("refresh_every"),
        "precision": drawn.get("precision"),
        "prompts": _digest(told) if any(prompts.values()) else None,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Preset:
    """A protocol that is known by a name; what is None is for the user to say.

    Attributes:
        metrics: names of :data:`madformer.evaluation.METRICS`. extractor: a name. num_images: of each set.
        steps, scheduler, guidance: of what is drawn on the way.
        reference: a source. captions: draw for the captions of the reference.
    """

    metrics: tuple[str, ...]
    extractor: str
    num_images: int
    steps: int | None = None
    scheduler: str | None = None
    guidance: float | None = None
    reference: str | None = None
    captions: bool = False

    def options(self) -> dict[str, Any]:
        """Those that it decides, by the names of the command line."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}


PRESETS = {
    "paper-ffhq-8k": Preset(("fd",), "inception", 8_000, steps=250, scheduler="ddim"),
    "paper-imagenet-50k": Preset(("fd",), "inception", 50_000, steps=100, scheduler="ddim"),
    "fid-50k": Preset(("fd",), "inception", 50_000),
    "emoji-3k": Preset(
        ("fd", "kid", "prdc"), "efficientnet-lite0", 3_000, steps=25, guidance=2.0, reference="emoji:64", captions=True
    ),
}
"""By name. The paper's are those of the released README: pytorch-fid's network, and DDIM."""


def preset(name: str) -> Preset:
    """Raises ``ValueError`` for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown protocol {with_nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
