"""What decides every bit of an image, written down beside the images so that a resumed run makes the same ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import madformer
from madformer.arguments import whole_number
from madformer.conditioning.reader import Prompts
from madformer.engine.options import SamplingOptions
from madformer.files.weights import fingerprint
from madformer.seeds import check_seed
from madformer.vae import downscale, tile_of

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
        prompts: what the images are of. sampling: how they are drawn.
        recorded: what pictures say of themselves besides the above: ``size`` (rows and columns of pixels, None for
            latents), ``class_names`` of the prompts' labels, ``diffusion_layers`` of an elastic model, ``lora`` that
            was merged into ``model``. Empty for a folder that was begun before pictures said anything; those added to
            it say nothing, too.
    """

    format: Format
    latents: bool
    shard_size: int | None
    batch_size: int
    seed: int
    precision: str
    scheduler: Mapping[str, Any]
    latent_shape: tuple[int, ...]
    model: str
    vae: str | None
    vae_tile: int | None
    sampling: SamplingOptions
    prompts: Prompts = field(default_factory=Prompts)
    recorded: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_size"):
            if not (name == "shard_size" and self.shard_size is None):
                whole_number(name, getattr(self, name), 1)
        check_seed(self.seed)
        if (self.shard_size is not None) != (self.format == "wds"):
            raise ValueError(f"shard_size={self.shard_size} does not go with format={self.format!r}")

    @classmethod
    def of(
        cls,
        pipeline: MADFormerPipeline,
        sampling: SamplingOptions,
        *,
        precision: str,
        seed: int = 0,
        batch_size: int = 16,
        latents: bool = False,
        shard_size: int | None = None,
        prompts: Prompts | None = None,
        lora: Mapping[str, Any] | None = None,
    ) -> Settings:
        """Those of a pipeline; with a ``shard_size`` it will write shards.

        Args:
            lora: what :meth:`~madformer.pipeline_lora.LoraLoaderMixin.merge_lora` said of adapters.

        Call it on the model as loaded: once a precision is applied, the weights are others.
        """
        vae, config = None if latents else pipeline.vae, pipeline.transformer.config
        return cls(
            format="png" if shard_size is None else "wds",
            latents=latents,
            shard_size=shard_size,
            batch_size=batch_size,
            seed=seed,
            precision=precision,
            scheduler=_scheduler_settings(pipeline.scheduler),
            latent_shape=config.latent_shape,
            model=fingerprint(pipeline.transformer, config.changes()),
            vae=None if vae is None else fingerprint(vae, vae.config),
            vae_tile=None if vae is None else tile_of(vae),
            sampling=sampling,
            prompts=prompts or Prompts(),
            recorded=_recorded(pipeline, prompts or Prompts(), latents) | ({"lora": dict(lora)} if lora else {}),
        )

    def record(self, images: range) -> dict[str, Any]:
        """How an image was drawn, or a sheet of several, in JSON's types."""
        prompts, sampling, several = self.prompts, self.sampling, len(images) > 1
        names = self.recorded.get("class_names", ())
        lists = {"prompt": prompts.texts, "labels": prompts.labels, "class": names}
        entries = {name: list(values[: len(images)]) for name, values in lists.items() if values}
        if not several:
            entries = {name: values[images[0] % len(values)] for name, values in lists.items() if values}
        height, width = self.recorded.get("size") or (None, None)
        tiled = self.vae_tile and height and max(height, width) > self.vae_tile
        optional = {
            "negative_prompt": prompts.negative_text,
            "guidance_interval": sampling.guidance_interval and list(sampling.guidance_interval),
            "refresh_every": sampling.refresh_every if sampling.refresh_every > 1 else None,
            "diffusion_layers": self.recorded.get("diffusion_layers"),
            "lora": self.recorded.get("lora"),
            "height": height,
            "width": width,
            "vae_tile": self.vae_tile if tiled else None,
            "vae": self.vae,
        }
        return {
            "version": madformer.__version__,
            "seed": self.seed + images[0],
            **({"num_images": len(images)} if several else {}),
            **entries,
            "guidance_scale": sampling.guidance,
            "steps": sampling.steps,
            "scheduler": self.scheduler["class"],
            "precision": self.precision,
            "batch_size": self.batch_size,
            "model": self.model,
            **{name: value for name, value in optional.items() if value is not None},
        }

    def options(self, images: range) -> dict[str, Any]:
        """What the pipeline is called with for these images."""
        return self.sampling.keywords() | self.prompts.options(images) | {"seed": self.seed + images[0]}

    def to_dict(self) -> dict[str, Any]:
        """As a folder's manifest has them: options of sampling by their own names, guidance with the prompts."""
        values = {own.name: getattr(self, own.name) for own in fields(self)}
        if not self.recorded:
            del values["recorded"]
        sampling, prompts = asdict(values.pop("sampling")), asdict(self.prompts)
        guidance = {"guidance_scale": sampling.pop("guidance"), "guidance_interval": sampling.pop("guidance_interval")}
        if self.prompts == Prompts() and guidance == {"guidance_scale": 1.0, "guidance_interval": None}:
            return {**values, **sampling, "prompts": {}}
        return {**values, **sampling, "prompts": {**prompts, **guidance}}


def _recorded(pipeline: MADFormerPipeline, prompts: Prompts, latents: bool) -> dict[str, Any]:
    config, names = pipeline.transformer.config, pipeline.config.class_names
    values: dict[str, Any] = {"size": None}
    if not (latents or pipeline.vae is None):
        values["size"] = [side * downscale(pipeline.vae) for side in config.latent_shape[1:]]
    if names and prompts.labels:
        values["class_names"] = [names[label] if label >= 0 else "" for label in prompts.labels]
    if config.elastic_diffusion_layers:
        values["diffusion_layers"] = config.diffusion_layers
    return values


def _scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """The configuration as JSON that every parser takes: infinities as strings, nothing private."""
    config = json.loads(scheduler.to_json_string())
    values = {name: value for name, value in config.items() if not name.startswith("_")}
    finite = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in sorted(values.items())
    }
    return {"class": type(scheduler).__name__, **finite}
