"""From noise to pictures, with diffusers' conventions.

Shape legend: B images, M blocks, L latents of a block, C channels, H rows, W columns.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

import diffusers
import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from madformer.arguments import choice, floats, function, interval, number, shown, truth_value, whole_number
from madformer.conditioning.reader import PromptReader
from madformer.conditioning.tokenizer import Tokenizer, as_tokenizer, check_tokenizer
from madformer.config import MADFormerConfig
from madformer.data.pixels import to_rgb
from madformer.engine.options import SamplingOptions
from madformer.engine.pool import PlanPool
from madformer.engine.progress import Change
from madformer.engine.sampler import Sampler
from madformer.engine.schedule import check_num_steps
from madformer.engine.schedulers import check_scheduler
from madformer.model import MADFormer
from madformer.model.blocks import check_blocks, from_blocks, order_around, to_blocks
from madformer.pipeline_callbacks import Callback, CallbackPipeline, RunState, StepEnd, effective, tensor_inputs
from madformer.pipeline_files import PersistentPipeline, names_of_classes
from madformer.pipeline_inputs import check_no_embeddings, generators_of, images_each, keywords_checked, noise_of
from madformer.pipeline_lora import LoraLoaderMixin
from madformer.pipeline_memory import OffloadingPipeline
from madformer.streaming import reports
from madformer.vae import USABLE, check_finite, check_vae, decode, downscale, encode, finite, to_uint8

logger = logging.getLogger("madformer.pipeline")
OutputType = Literal["pil", "np", "pt", "latent"]


@dataclass
class MADFormerPipelineOutput(BaseOutput):
    """``images``: a list of ``PIL.Image``, or an array or tensor with the batch first; also ``output[0]``."""

    images: Any


class MADFormerPipeline(PersistentPipeline, CallbackPipeline, OffloadingPipeline, LoraLoaderMixin):
    """Samples images.

    Args:
        transformer: the model. vae: turns latents into pixels, see :data:`madformer.vae.USABLE`; None for latents only.
        scheduler: of diffusers, see :data:`madformer.engine.schedulers.USABLE`.
        tokenizer: reads the prompts of a model with text. class_names: by which classes may be asked for.

    Raises:
        ValueError: a tokenizer, an autoencoder or class names that are not the model's, or a scheduler that cannot be
            used; also when one is assigned, or what it fitted was changed, in the next call.
    """

    _optional_components: ClassVar[list[str]] = ["vae", "tokenizer"]

    def __init__(
        self,
        transformer: MADFormer,
        vae: Any,
        scheduler: Any,
        tokenizer: Tokenizer | None = None,
        class_names: Sequence[str] | Mapping[Any, str] | None = None,
    ) -> None:
        super().__init__()
        class_names = names_of_classes(class_names)
        # the others are held against it
        self.transformer = transformer
        config = transformer.config
        if class_names is not None and len(class_names) != config.num_classes:
            raise ValueError(f"class_names has {len(class_names)} entries for num_classes={config.num_classes}")
        tokenizer = as_tokenizer(tokenizer)
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, tokenizer=tokenizer)
        self.register_to_config(class_names=class_names)
        self._plans = PlanPool()
        self._compiles = False

    @classmethod
    def _get_signature_types(cls) -> dict[str, Any]:
        # by which `from_pipe` decides what it hands on
        return {**super()._get_signature_types(), "vae": tuple(getattr(diffusers, name) for name in USABLE)}

    def __setattr__(self, name: str, value: Any) -> None:
        config = getattr(self.__dict__.get("transformer"), "config", None)
        if name == "transformer" and not isinstance(getattr(value, "config", None), MADFormerConfig):
            hint = ": give what it wraps" if isinstance(value, torch.nn.Module) else ""
            raise ValueError(f"the transformer must be a MADFormer, got {type(value).__name__}{hint}")
        if name == "tokenizer":
            value = as_tokenizer(value)
            if value is not None and config is not None and config.text is not None:
                check_tokenizer(value, config.text)
        elif name == "scheduler":
            check_scheduler(value, getattr(config, "prediction_type", None))
            if value.config.get("clip_sample"):
                logger.warning(
                    "%s clamps what it predicts to [-1, 1], and latents go beyond, so colours fade: "
                    "make it with clip_sample=False",
                    type(value).__name__,
                )
        elif name == "vae" and value is not None:
            check_vae(value, getattr(config, "latent_channels", None))
        super().__setattr__(name, value)

    @keywords_checked
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 25,
        *,
        num_images_per_prompt: int = 1,
        num_images: int | None = None,
        negative_prompt: str | list[str] | None = None,
        labels: int | str | list[int | str] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        refresh_every: int = 1,
        height: int | None = None,
        width: int | None = None,
        image: Image.Image | Tensor | None = None,
        blocks: Collection[int] | None = None,
        seed: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        on_block: Callable[[int, Tensor], object] | None = None,
    ) -> MADFormerPipelineOutput:
        """Draw images.

        An image depends on its own random numbers and prompt alone, never on the batch it is drawn in: bit for bit as
        far as the matrix library's results do not depend on the batch size, else to rounding.

        Args:
            prompt, negative_prompt, labels: see :meth:`~madformer.conditioning.reader.PromptReader.read`.
            num_inference_steps: denoising steps of every block.
            num_images_per_prompt: or per class, one prompt's after the other's; B where there is none. num_images: the
                same.
            guidance_scale: of classifier-free guidance; none up to 1. guidance_interval: lowest and highest timestep at
                which it applies.
            refresh_every: see :class:`~madformer.engine.options.SamplingOptions`.
            height, width: in pixels, other than those that the model was trained on: positions beyond are extrapolated.
            image: keep it but for ``blocks``, by their places row by row, which are drawn anew: from those before them,
                or from all others by a model of random block order. A picture of the size that is drawn, or latents
                (C, H, W), or (B, C, H, W) for one of each image, as ``output_type="latent"`` gives them.
            seed: image ``i`` of the batch is the one that ``seed + i`` draws alone; from 0 to 2^63 - 1.
            generator: one for each image, or one that all images draw from in turn: PyTorch's own, which
                ``torch.manual_seed`` sets, where neither it nor a seed is given.
            latents: standard normal noise ``(B, C, H, W)`` to start from, in place of the generators'.
            prompt_embeds, negative_prompt_embeds: have no place, since the model reads token ids.
            output_type: ``"pil"``; ``"np"`` (B, H, W, 3) or ``"pt"`` (B, 3, H, W) in [0, 1]; or ``"latent"``
                (B, C, H, W), unscaled.
            return_dict: else a tuple of the images alone.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, {"latents": ..., "block": ...})``
                with steps counted over all blocks that are drawn, up to ``pipeline.num_timesteps``. ``latents``
                (B, C, H, W) are the images': clean blocks, the one at hand, whose place ``block`` is, and noise in
                those to come. What it returns for them is gone on with, as is ``pipeline._guidance_scale`` where
                guidance is above 1; ``pipeline._interrupt = True`` ends the call with the images as they are.
            callback_on_step_end_tensor_inputs: what it is given, of ``pipeline._callback_tensor_inputs``.
            on_block: called as ``on_block(block, latents)`` when a block was drawn, with its place and its latents
                (B, L, C); on a GPU from a stream beside the blocks that follow.

        Raises:
            ValueError: a count, a step number or a size that makes no sense, or a prompt that does not go with the
                model.
        """
        self._check_output_type(output_type)
        truth_value("return_dict", return_dict)
        self._check_parts()
        check_no_embeddings(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds)
        each = images_each(num_images_per_prompt, num_images)
        inputs = tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        function("on_block", on_block)
        scale = effective(number("guidance_scale", guidance_scale, 0))
        guided_at = interval("guidance_interval", guidance_interval)
        num_steps = check_num_steps(self.scheduler, num_inference_steps)
        options = SamplingOptions(num_steps, scale, guided_at, refresh_every)
        request, count = self.reader.read(prompt, negative_prompt, labels, num_images=each, guided=options.guided)
        generators = generators_of(count, seed, generator)
        grid = self.grid_of(height, width)
        config = self.transformer.config.at_grid(*grid)
        if (image is None) != (blocks is None):
            raise ValueError("image and blocks go together: what to keep, and which of its blocks to draw anew")
        if blocks is not None:
            check_blocks(blocks, config)
        given = None if image is None else self.blocks_of(image, count, config)
        order = order_around(blocks or (), config)
        noise = noise_of(latents, generators, config)
        drawn = [place for place in order if blocks is None or place in blocks]
        sampler = self._sampler(grid if (height or width) else None)
        with (
            contextlib.ExitStack() as stack,
            self._onloaded(),
            self._plans.plan(sampler, count, options) as plan,
            self.progress_bar(total=len(drawn) * len(plan.timesteps)) as bar,
        ):
            state = RunState(guidance_scale, len(drawn) * len(plan.timesteps))
            on_step = None
            if callback_on_step_end is not None:
                on_step = StepEnd(self, state, callback_on_step_end, inputs, config, plan.timesteps, drawn, request)

            def on_progress(steps: int) -> Change:
                bar.update(steps)
                return Change(stop=state.interrupt)

            stack.enter_context(self._running(state))
            drawn_BMLC = plan.run(
                noise,
                prompt=request,
                given=given,
                blocks=blocks,
                order=order,
                generator=generators,
                callback=on_step,
                on_block=on_block,
                progress=on_progress,
            )
        images = self._finish(from_blocks(drawn_BMLC, config), output_type)
        return MADFormerPipelineOutput(images) if return_dict else (images,)  # type: ignore[return-value]

    def _sampler(self, grid: tuple[int, int] | None = None) -> Sampler:
        """Made anew by every call: it holds the scheduler as it is now."""
        return Sampler(self.transformer, self.scheduler, grid=grid, compile_step=self._compiles)

    def warmup(
        self,
        num_images: int = 1,
        options: SamplingOptions | None = None,
        *,
        compile_step: bool = False,
        measure_shares: bool = True,
    ) -> Self:
        """Make ready what the first call of so many images would; see :meth:`madformer.engine.plan.Plan.warmup`.

        Args:
            options: steps, guidance and so on of the calls to come.
            compile_step: on a processor, make a denoising step of these calls one compiled program
                (:mod:`madformer.engine.compiled`), which takes minutes where none is kept; and use those that are kept,
                in this call and all that follow.

        Raises:
            ValueError: a count or options that make no sense for the model or its scheduler.
        """
        self._check_parts()
        truth_value("compile_step", compile_step)
        options = SamplingOptions() if options is None else options
        SamplingOptions.check(options)
        options = replace(options, guidance=effective(options.guidance))
        self._compiles = compile_step
        with self._onloaded(), self._plans.plan(self._sampler(), num_images, options) as plan:
            plan.warmup(measure_shares=measure_shares)
        return self

    @keywords_checked
    def stream(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 25,
        *,
        output_type: OutputType = "pil",
        **options: Any,
    ) -> Iterator[MADFormerPipelineOutput]:
        """Draw images, and give them after every block that is drawn, with latents of 0 in place of those to come.

        Takes what a call takes, less ``on_block`` and ``return_dict``, and raises what it raises. The last output is
        the call's, bit for bit. Whoever leaves the iterator early ends the sampling with the block at hand.
        """
        model = self.transformer
        on_gpu = model.device.type == "cuda"

        def draw(report: Callable[[Tensor], None]) -> None:
            def tell(latents_BCHW: Tensor) -> None:
                if on_gpu:
                    torch.cuda.current_stream(model.device).synchronize()
                report(latents_BCHW)

            if on_gpu:
                torch.cuda.set_device(model.device)  # each thread has its own
            config = model.config.at_grid(*self.grid_of(options.get("height"), options.get("width")))
            image, drawn = options.get("image"), options.get("blocks") or ()
            done: dict[int, Tensor] = {}

            def on_block(block: int, latents_BLC: Tensor) -> None:
                if image is not None and not done:
                    kept = self.blocks_of(image, len(latents_BLC), config).to(latents_BLC)
                    done.update((place, kept[:, place]) for place in range(config.num_blocks) if place not in drawn)
                done[block] = latents_BLC
                if len(done) < config.num_blocks:
                    shown = [done.get(place, torch.zeros_like(latents_BLC)) for place in range(config.num_blocks)]
                    tell(from_blocks(torch.stack(shown, dim=1), config))

            tell(self(prompt, num_inference_steps, output_type="latent", on_block=on_block, **options).images)

        self._check_output_type(output_type)
        # on a GPU beside the blocks that follow, not after them
        stream = torch.cuda.Stream(model.device) if on_gpu else None
        for latents in reports(draw):
            with torch.cuda.stream(stream):
                images = self._finish(latents, output_type)
            yield MADFormerPipelineOutput(images)

    @property
    def reader(self) -> PromptReader:
        """What makes the engine's prompts of texts and class names."""
        return PromptReader(self.transformer.config, self.tokenizer, self.config.class_names or [])

    def grid_of(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of blocks in an image of so many pixels; the model's own for None.

        Raises:
            ValueError: a size that is no whole number, or not made of whole blocks.
        """
        config, grid = self.transformer.config, []
        if height is None and width is None:
            return config.grid
        if self.vae is None:
            raise ValueError(f"height={height}, width={width} are pixels, which need an autoencoder")
        for name, pixels, latents, blocks in zip(
            ("height", "width"), (height, width), config.block_latents, config.grid, strict=True
        ):
            side = latents * downscale(self.vae)
            pixels = None if pixels is None else whole_number(name, pixels, 1)
            if pixels is not None and pixels % side:
                raise ValueError(f"{name}={pixels} must be a multiple of a block's {side} pixels")
            grid.append(blocks if pixels is None else pixels // side)
        return grid[0], grid[1]

    def blocks_of(self, image: Image.Image | Tensor, count: int, config: MADFormerConfig) -> Tensor:
        """Latents ``(B, M, L, C)`` of a picture, the mean of what the autoencoder takes them for, or as given."""
        if isinstance(image, Image.Image):
            if self.vae is None:
                raise ValueError("a picture to go on from needs an autoencoder, and this pipeline has none")
            height, width = (side * downscale(self.vae) for side in config.latent_shape[1:])
            # as training data is read: turned upright, on white where it is transparent, 8 bits of its whole range
            image = to_rgb(image)
            if image.size != (width, height):
                given = f"{image.width} x {image.height}"
                raise ValueError(f"image must be of {width} x {height} pixels, width by height, got {given}")
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            image = encode(self.vae, pixels[None] / 127.5 - 1)[0]
        shape = config.latent_shape
        if not isinstance(image, Tensor):
            raise ValueError(f"image={shown(image)} must be a PIL.Image, or a torch.Tensor of latents")
        if image.shape not in (shape, (1, *shape), (count, *shape)):
            raise ValueError(f"image must have the shape {shape}, one or {count} of it, got {tuple(image.shape)}")
        image = floats("image", image, image.shape)
        return to_blocks(image.expand(count, *shape), config)

    def _check_output_type(self, output_type: str) -> None:
        choice("output_type", output_type, get_args(OutputType))
        if output_type != "latent" and self.vae is None:
            raise ValueError(f"output_type={output_type!r} needs an autoencoder, and this pipeline has none")

    def _check_parts(self) -> None:
        """Whether they still go together: each may have been replaced or configured anew since it was assigned."""
        config = self.transformer.config
        check_scheduler(self.scheduler, config.prediction_type)
        if self.vae is not None:
            check_vae(self.vae, config.latent_channels)
        if self.tokenizer is not None and config.text is not None:
            check_tokenizer(self.tokenizer, config.text)

    def _finish(self, latents_BCHW: Tensor, output_type: OutputType) -> Any:
        return latents_BCHW if output_type == "latent" else self.decode(latents_BCHW, output_type)

    def decode(self, latents_BCHW: Tensor, output_type: OutputType = "pil") -> Any:
        """Scaled latents to pictures."""
        pixels = decode(self.vae, latents_BCHW)
        check_finite(finite(pixels), self.vae)
        if output_type == "pil":
            return [Image.fromarray(image) for image in to_uint8(pixels).cpu().numpy()]
        return pixels.cpu() if output_type == "pt" else pixels.permute(0, 2, 3, 1).cpu().numpy()


# where DiffusionPipeline.from_pretrained looks for the class that a folder's index names
diffusers.MADFormerPipeline = MADFormerPipeline
