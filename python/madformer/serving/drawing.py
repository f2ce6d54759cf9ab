"""What one request asks for, read and checked before anything is queued, whichever API it came by.

Shape legend: M blocks, L latents of a block, C channels.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import secrets
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from PIL import Image
from torch import Tensor

from madformer.arguments import interval
from madformer.bulk.settings import Settings
from madformer.conditioning.prompt import Prompt
from madformer.conditioning.reader import Prompts
from madformer.config import MADFormerConfig
from madformer.data.pixels import to_rgb
from madformer.engine.options import SamplingOptions
from madformer.engine.schedule import TABULATED, tabulate
from madformer.engine.schedulers import FLOW_SCHEDULERS, SHORT_NAMES, check_scheduler, converted
from madformer.model.blocks import block_order, check_blocks, order_around
from madformer.pipeline_callbacks import effective
from madformer.pipeline_inputs import noise_of
from madformer.seeds import check_seed, generator_of
from madformer.serving.errors import ServingError
from madformer.serving.settings import ServerSettings
from madformer.vae import downscale

if TYPE_CHECKING:
    from madformer.pipeline import MADFormerPipeline

FORMATS = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
"""Of pictures, and their media types."""
UPLOADS = ("PNG", "JPEG", "WEBP")
DRAWN_SEEDS = 1 << 32
"""Where no seed is given it is below this, which JavaScript's numbers hold exactly."""


@dataclass(frozen=True)
class Kind:
    """What images must have in common to share a step."""

    diffusion_layers: int
    guided: bool


def kinds_of(config: MADFormerConfig) -> list[Kind]:
    """All that a model can draw."""
    splits = sorted({config.diffusion_layers, *config.elastic_diffusion_layers})
    return [Kind(split, guided) for split in splits for guided in (False, True) if config.can_be_guided or not guided]


@dataclass(frozen=True)
class Drawing:
    """What is drawn: ``count`` images of one prompt, the first from ``seed``.

    Attributes:
        scheduler: None for the model's own. given: latents ``(M, L, C)`` of a picture to keep but for ``blocks``.
        order: of all blocks, None for the model's own.
        priority: lower goes first. deadline: seconds from the request on.
        output_format: of ``FORMATS``. quality: of formats that lose something, 1 to 100.
        previews: which blocks' pictures are asked for, by their numbers among those that are drawn.
        recorded: what its pictures say of themselves; None for nothing.
    """

    kind: Kind
    prompts: Prompt
    seed: int
    count: int
    options: SamplingOptions
    scheduler: Any = None
    given: Tensor | None = None
    blocks: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    priority: int = 0
    deadline: float | None = None
    output_format: str = "png"
    quality: int = 90
    previews: frozenset[int] = frozenset()
    drawn: tuple[int, ...] = field(default=())
    recorded: Settings | None = None

    def prompt(self, index: int) -> Prompt:
        return Prompt(*(None if ids is None else ids[index] for ids in vars(self.prompts).values()))

    def record(self, index: int) -> dict[str, Any] | None:
        """What an image's file says of itself."""
        return None if self.recorded is None else self.recorded.record(range(index, index + 1))

    def noise(self, index: int, config: MADFormerConfig) -> Tensor:
        """``(M, L, C)``: that which the pipeline draws from this seed."""
        return noise_of(None, [generator_of(self.seed + index)], config)[0]


@dataclass(frozen=True)
class Asked:
    """A request as it came, in plain types; None for what is left to the server."""

    prompt: str | None = None
    label: int | str | None = None
    negative_prompt: str | None = None
    num_images: int = 1
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: Sequence[float] | None = None
    seed: int | None = None
    scheduler: str | None = None
    priority: int = 0
    deadline: float | None = None
    blocks: Sequence[int] | None = None
    image: Image.Image | None = None
    diffusion_layers: int | None = None
    refresh_every: int = 1
    output_format: str = "png"
    quality: int = 90
    previews: frozenset[int] | None = frozenset()  # None for all blocks


class Reader:
    """Makes drawings of requests.

    Args:
        defaults: steps, guidance and its interval where a request has none.
        recorded: what pictures have in common, which they say; None where they say nothing.
    """

    def __init__(
        self,
        pipeline: MADFormerPipeline,
        settings: ServerSettings,
        defaults: SamplingOptions,
        recorded: Settings | None = None,
    ) -> None:
        self.recorded = recorded
        self.pipeline, self.settings, self.defaults = pipeline, settings, defaults
        self.config: MADFormerConfig = pipeline.transformer.config
        self.clip = _clip(pipeline.scheduler)
        self.schedulers = [name for name, cls in SHORT_NAMES.items() if self._fits(name, cls)]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        rows, columns = (side * downscale(self.pipeline.vae) for side in self.config.latent_shape[1:])
        return columns, rows

    def read(self, asked: Asked) -> Drawing:
        """Check everything that can be wrong with a request.

        Raises:
            ServingError: 400 with what is wrong, in one line.
        """
        self._check_limits(asked)
        try:
            return self._read(asked)
        except ValueError as error:
            raise ServingError.refused(str(error)) from error

    def _check_limits(self, asked: Asked) -> None:
        settings, steps = self.settings, asked.steps
        for name, text in (("prompt", asked.prompt), ("negative_prompt", asked.negative_prompt)):
            if text is not None and len(text) > settings.max_prompt:
                _refuse(name, f"{name} has {len(text)} characters, and may have {settings.max_prompt}")
        if not 1 <= asked.num_images <= settings.max_images:
            _refuse("num_images", f"num_images={asked.num_images} must be from 1 to {settings.max_images}")
        if steps is not None and not 1 <= steps <= settings.max_steps:
            _refuse("steps", f"steps={steps} must be from 1 to {settings.max_steps}")
        if asked.output_format not in FORMATS:
            _refuse("output_format", f"output_format must be one of {', '.join(FORMATS)}")

    def _read(self, asked: Asked) -> Drawing:
        config, defaults = self.config, self.defaults
        scale = effective(defaults.guidance if asked.guidance_scale is None else asked.guidance_scale)
        if not config.can_be_guided:
            if asked.guidance_scale is not None and scale != 1:
                _refuse("guidance_scale", "guidance needs a model with text or classes, and this one has neither")
            scale = 1.0
        if asked.refresh_every != 1:
            _refuse("refresh_every", f"refresh_every={asked.refresh_every} has no place where images share their steps")
        if asked.guidance_interval is not None and scale == 1:
            _refuse("guidance_interval", "guidance_interval is for a guidance_scale above 1")
        within = defaults.guidance_interval if asked.guidance_interval is None else asked.guidance_interval
        options = SamplingOptions(
            defaults.steps if asked.steps is None else asked.steps,
            scale,
            interval("guidance_interval", within) if within is not None and scale != 1 else None,
        )
        split = config.diffusion_layers if asked.diffusion_layers is None else asked.diffusion_layers
        config.check_split(split)
        prompts, _ = self.pipeline.reader.read(
            asked.prompt, asked.negative_prompt, asked.label, num_images=asked.num_images, guided=options.guided
        )
        seed = secrets.randbelow(DRAWN_SEEDS) if asked.seed is None else check_seed(asked.seed, asked.num_images)
        scheduler = None if asked.scheduler is None else self._scheduler(asked.scheduler)
        self._check_steps(scheduler, options.steps)
        given, order = self._given(asked)
        drawn = [place for place in order or block_order(config) if asked.blocks is None or place in asked.blocks]
        return Drawing(
            Kind(split, options.guided),
            prompts,
            seed,
            asked.num_images,
            options,
            scheduler,
            given,
            None if asked.blocks is None else tuple(asked.blocks),
            order,
            asked.priority,
            asked.deadline,
            asked.output_format,
            asked.quality,
            frozenset(range(len(drawn))) if asked.previews is None else asked.previews,
            tuple(drawn),
            None if given is not None else self._recorded(asked, options, split, seed, scheduler),
        )

    def _recorded(
        self, asked: Asked, options: SamplingOptions, split: int, seed: int, scheduler: Any
    ) -> Settings | None:
        if self.recorded is None:
            return None
        texts = () if asked.prompt is None else (asked.prompt,)
        labels = () if asked.label is None else (self.pipeline.reader.class_number(asked.label),)
        said = dict(self.recorded.recorded)
        if names := self.pipeline.config.class_names:
            said["class_names"] = [names[label] if label >= 0 else "" for label in labels]
        if self.config.elastic_diffusion_layers:
            said["diffusion_layers"] = split
        own = self.recorded.scheduler if scheduler is None else {"class": type(scheduler).__name__}
        prompts = Prompts(texts, asked.negative_prompt, labels)
        return dataclasses.replace(
            self.recorded, sampling=options, prompts=prompts, seed=seed, scheduler=own, recorded=said
        )

    def _scheduler(self, name: str) -> Any:
        scheduler = converted(self.pipeline.scheduler, name)
        check_scheduler(scheduler, self.config.prediction_type)
        return scheduler

    def _check_steps(self, scheduler: Any, steps: int) -> None:
        table = tabulate(self.pipeline.scheduler if scheduler is None else scheduler, steps)
        if table is None or table.clip != self.clip:
            listed = ", ".join(self.schedulers)
            _refuse("scheduler", f"this scheduler has no place where images share their steps: there are {listed}")
        elif table.num_steps > self.settings.max_steps:
            most = self.settings.max_steps
            _refuse("steps", f"this scheduler takes {table.num_steps} steps for steps={steps}, and may take {most}")

    def _fits(self, name: str, cls: str) -> bool:
        if cls not in TABULATED or (cls in FLOW_SCHEDULERS and self.config.prediction_type != "flow"):
            return False
        try:
            self._check_steps(self._scheduler(name), 2)
        except (ServingError, ValueError):
            return False
        return True

    def _given(self, asked: Asked) -> tuple[Tensor | None, tuple[int, ...] | None]:
        """Latents of the picture that is changed, and the order in which its blocks are passed."""
        if (asked.image is None) != (asked.blocks is None):
            _refuse("blocks", "image and blocks go together: what to keep, and which of its blocks to draw anew")
        if asked.image is None or asked.blocks is None:
            return None, None
        check_blocks(asked.blocks, self.config)
        if not self.config.has_clean_stream:
            _refuse("blocks", f"this model (context={self.config.context!r}) cannot go on from what it did not draw")
        with torch.inference_mode():
            latents = self.pipeline.blocks_of(asked.image, 1, self.config)[0].float().cpu()
        return latents.clone(), tuple(order_around(asked.blocks, self.config))

    def places_of(self, mask: Image.Image) -> list[int]:
        """Blocks in which a mask is transparent anywhere.

        Raises:
            ServingError: a mask of another size, without transparency, or with none that is transparent.
        """
        if mask.size != self.size:
            _refuse("mask", "mask must be of {} x {} pixels, got {} x {}".format(*self.size, *mask.size))
        if "A" not in mask.getbands():
            _refuse("mask", "mask must have an alpha channel: what is transparent is drawn anew")
        rows, columns = self.config.grid
        alpha = torch.frombuffer(bytearray(mask.getchannel("A").tobytes()), dtype=torch.uint8)
        blocks = alpha.view(rows, self.size[1] // rows, columns, self.size[0] // columns)
        open_RC = (blocks == 0).any(3).any(1).flatten()
        if not (places := open_RC.nonzero().flatten().tolist()):
            _refuse("mask", "mask is transparent nowhere, so there is nothing to draw")
        return places


def decode_upload(data: bytes, max_pixels: int, name: str = "image", *, keep_alpha: bool = False) -> Image.Image:
    """A picture that a client sent, whose size is looked at before a pixel is decoded.

    Raises:
        ServingError: no PNG, JPEG or WebP, damaged, or of more pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=UPLOADS) as image:
                if image.width * image.height > max_pixels:
                    pixels = f"{image.width} x {image.height}"
                    _refuse(name, f"{name} has {pixels} pixels, and may have {max_pixels}", "image_too_large")
                return image.convert("RGBA") if keep_alpha and _has_alpha(image) else to_rgb(image)
    except ServingError:
        raise
    except Image.DecompressionBombError:
        _refuse(name, f"{name} has far more than the {max_pixels} pixels that it may have", "image_too_large")
    except Exception as error:
        # decoders raise errors of any type
        raise ServingError.refused(f"{name} is no PNG, JPEG or WebP that can be read", name, "invalid_image") from error


def decode_base64(text: str, max_pixels: int) -> Image.Image:
    """The same of base64, with or without ``data:...;base64,`` before it."""
    _, comma, tail = text.partition(";base64,") if text.startswith("data:") else ("", "", "")
    try:
        data = base64.b64decode(tail if comma else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ServingError.refused("image is no base64", "image", "invalid_base64") from error
    return decode_upload(data, max_pixels)


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def _clip(scheduler: Any) -> float | None:
    table = tabulate(scheduler, 1)
    if table is None:
        name = type(scheduler).__name__
        raise ValueError(f"a server's scheduler must be one that can be tabulated, and {name} cannot: take dpmpp")
    return table.clip


def _refuse(param: str, message: str, code: str = "invalid_value") -> NoReturn:
    raise ServingError.refused(message, param, code)
