"""What decides every bit of an image, written down beside the images so that a resumed run makes the same ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from madformer.bulk.prompts import Prompts
from madformer.model.persistence import fingerprint
from madformer.seeds import check_seed

if TYPE_CHECKING:
    from madformer.pipeline import MADFormerPipeline

Format = Literal["png", "wds"]


@dataclass(frozen=True)
class Settings:
    """What the images of a folder have in common.

    The device and the kernels' backend are not part of it: they change an image by rounding at most.

    Attributes:
        format: ``"png"`` for a file an image, ``"wds"`` for tar shards.
        latents: latents in place of pictures.
        shard_size: images of a shard; None without shards.
        batch_size: images drawn at once; the last batch may be smaller.
        seed: of the first image; image ``i`` is drawn from ``seed + i``.
        scheduler: its class and configuration.
        latent_shape: channels, rows and columns.
        model, vae: what :func:`fingerprint` says of them. vae_tile: see :func:`madformer.vae.set_tile`. None for
            latents.
        prompts: what the images are of. refresh_every: see :meth:`madformer.engine.sampler.Sampler.plan`.
    """

    format: Format
    latents: bool
    shard_size: int | None
    batch_size: int
    seed: int
    steps: int
    precision: str
    scheduler: Mapping[str, Any]
    latent_shape: tuple[int, ...]
    model: str
    vae: str | None
    vae_tile: int | None
    prompts: Prompts = field(default_factory=Prompts)
    refresh_every: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "shard_size", "refresh_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        check_seed(self.seed)
        if (self.shard_size is not None) != (self.format == "wds"):
            raise ValueError(f"shard_size={self.shard_size} does not go with format={self.format!r}")

    @classmethod
    def of(
        cls,
        pipeline: MADFormerPipeline,
        *,
        steps: int,
        precision: str,
        seed: int = 0,
        batch_size: int = 16,
        latents: bool = False,
        shard_size: int | None = None,
        prompts: Prompts | None = None,
        refresh_every: int = 1,
    ) -> Settings:
        """Those of a pipeline; with a ``shard_size`` it will write shards.

        Call it on the model as loaded: once a precision is applied, the weights are others.
        """
        from madformer.vae import tile_of

        vae, config = None if latents else pipeline.vae, pipeline.transformer.config
        return cls(
            format="png" if shard_size is None else "wds",
            latents=latents,
            shard_size=shard_size,
            batch_size=batch_size,
            seed=seed,
            steps=steps,
            precision=precision,
            scheduler=_scheduler_settings(pipeline.scheduler),
            latent_shape=config.latent_shape,
            model=fingerprint(pipeline.transformer, config.changes()),
            vae=None if vae is None else fingerprint(vae, vae.config),
            vae_tile=None if vae is None else tile_of(vae),
            prompts=prompts or Prompts(),
            refresh_every=refresh_every,
        )

    def to_dict(self) -> dict[str, Any]:
        values = {own.name: getattr(self, own.name) for own in fields(self)}
        return {**values, "prompts": self.prompts.to_dict()}

    def difference(self, stored: Mapping[str, Any]) -> str | None:
        """The first field in which ``stored`` is not these settings, as ``name=its value, not ours``; or None."""
        own, other = _flat(self.to_dict()), _flat(stored)
        for name in [*own, *(name for name in other if name not in own)]:
            if name not in own or name not in other or own[name] != other[name]:
                return f"{name}={other.get(name, 'absent')!r}, not {own.get(name, 'absent')!r}"
        return None


def _scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """The configuration as JSON that every parser takes: infinities as strings, nothing private."""
    config = json.loads(scheduler.to_json_string())
    values = {name: value for name, value in config.items() if not name.startswith("_")}
    finite = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in sorted(values.items())
    }
    return {"class": type(scheduler).__name__, **finite}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            value = {str(index): entry for index, entry in enumerate(value)}
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
