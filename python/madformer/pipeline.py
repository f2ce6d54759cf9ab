"""From noise to pictures, with diffusers' conventions.

Shape legend: B images, M blocks, L latents of a block, C channels, H rows, W columns.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import Tensor

from madformer.engine.sampler import Plan, Progress, Sampler
from madformer.model import MADFormer
from madformer.model.blocks import from_blocks
from madformer.model.persistence import atomic_path, resolve_folder
from madformer.vae import decode, load_vae, to_uint8

MODEL_INDEX = "model_index.json"
OutputType = Literal["pil", "np", "pt", "latent"]


@dataclass
class MADFormerPipelineOutput:
    """``images``: a list of ``PIL.Image``, or an array or tensor with the batch first."""

    images: Any


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 on a GPU and on processors that multiply bf16 matrices in hardware, else fp32."""
    if torch.device(device).type == "cuda" or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


def default_scheduler(prediction_type: str) -> diffusers.DPMSolverMultistepScheduler:
    """DPM-Solver++(2M) from the last training timestep on, over the linear schedule that training uses.

    Not ``DDIMScheduler()``: that clamps the predicted latents to [-1, 1], and latents have a standard deviation of 1,
    so colours fade.
    """
    return diffusers.DPMSolverMultistepScheduler(prediction_type=prediction_type, timestep_spacing="trailing")


def image_grid(images: list[Image.Image]) -> Image.Image:
    """Pictures of one size in a square, row by row."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid


class MADFormerPipeline(DiffusionPipeline):
    """Samples images.

    Args:
        transformer: the model. vae: turns latents into pixels; None for latents only. scheduler: any diffusers
            scheduler.
    """

    def __init__(self, transformer: MADFormer, vae: AutoencoderKL | None, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self._plans: dict[tuple[Any, ...], Plan] = {}

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        vae: str | Path | AutoencoderKL | None = None,
        dtype: torch.dtype | None = None,
        vae_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
    ) -> Self:
        """Load what :meth:`save_pretrained` wrote, from a local folder or a repository on the hub.

        Args:
            name: folder or hub id; a bare model folder (``config.json``) is accepted too.
            vae: a folder or hub id to use in place of the one in the folder, which may have none.
            dtype: of the network; None asks :func:`default_dtype`. vae_dtype: of the autoencoder; None for the same.

        Raises:
            FileNotFoundError, ValueError: in one line, what is missing, damaged or does not fit.
        """
        folder, dtype = resolve_folder(name, revision), dtype or default_dtype(device)
        if not (folder / MODEL_INDEX).is_file():
            transformer = MADFormer.from_pretrained(folder, dtype=dtype, device=device)
            scheduler = default_scheduler(transformer.config.prediction_type)
        else:
            transformer = MADFormer.from_pretrained(folder, subfolder="transformer", dtype=dtype, device=device)
            scheduler = _load_scheduler(folder)
        if vae is None and (folder / "vae").is_dir():
            vae = folder / "vae"
        autoencoder = load_vae(vae, device, vae_dtype or dtype) if isinstance(vae, (str, Path)) else vae
        return cls(transformer, autoencoder, scheduler)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write ``transformer/``, ``vae/``, ``scheduler/`` and ``model_index.json``.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        self.transformer.save_pretrained(folder / "transformer", dtype=dtype)
        if self.vae is not None:
            vae = self.vae if dtype is None else copy.deepcopy(self.vae).to(dtype)
            vae.save_pretrained(folder / "vae")
        self.scheduler.save_pretrained(folder / "scheduler")
        index = {
            "_class_name": type(self).__name__,
            "_diffusers_version": diffusers.__version__,
            "transformer": ["madformer", "MADFormer"],
            "vae": [None, None] if self.vae is None else ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", type(self.scheduler).__name__],
        }
        with atomic_path(folder / MODEL_INDEX) as path:
            path.write_text(json.dumps(index, indent=2) + "\n")

    @torch.no_grad()
    def __call__(
        self,
        num_images: int = 1,
        num_inference_steps: int = 25,
        *,
        seed: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], Any] | None = None,
    ) -> MADFormerPipelineOutput:
        """Draw images.

        An image depends on its own random numbers alone, never on the batch it is drawn in: bit for bit as far as
        the matrix library's results do not depend on the batch size, else to rounding.

        Args:
            num_images: B.
            num_inference_steps: denoising steps of every block.
            seed: image ``i`` of the batch is the one that ``seed + i`` draws alone. 0 where neither is given.
            generator: one for each image, or one that all images draw from in turn.
            output_type: ``"pil"``; ``"np"`` (B, H, W, 3) or ``"pt"`` (B, 3, H, W) in [0, 1]; or ``"latent"``
                (B, C, H, W), unscaled.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, {"latents": ..., "block": ...})``
                with steps counted over all blocks; ``latents`` (B, L, C) are the current block's.

        Raises:
            ValueError: a count or a step number that makes no sense.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} must be 'pil', 'np', 'pt' or 'latent'")
        if output_type != "latent" and self.vae is None:
            raise ValueError(f"output_type={output_type!r} needs an autoencoder, and this pipeline has none")
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1")
        generators = _generators(num_images, seed, generator)
        plan = self.plan(num_images, num_inference_steps)
        config, steps = self.transformer.config, len(plan.timesteps)
        shape = (config.num_blocks, config.latents_per_block, config.latent_channels)
        noise = torch.stack([torch.randn(shape, generator=g, device=g.device).cpu() for g in generators])

        with self.progress_bar(total=config.num_blocks * steps) as bar:

            def on_step(progress: Progress) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    tensors = {"latents": progress.latents_BLC, "block": progress.block}
                    step = progress.block * steps + progress.step
                    callback_on_step_end(self, step, plan.timesteps[progress.step], tensors)

            # a GPU makes all steps of a block in one launch, unless somebody wants to look in between
            by_step = callback_on_step_end is not None or plan.cache.on_host
            latents = plan.run(
                noise,
                generator=generators,
                callback=on_step if by_step else None,
                on_block=None if by_step else lambda _: bar.update(steps),
            )
        latents = from_blocks(latents)
        images = latents if output_type == "latent" else self.decode(latents, output_type)
        return MADFormerPipelineOutput(images)

    def plan(self, batch: int, num_inference_steps: int) -> Plan:
        """The engine's plan for this batch size and step count; kept and reused."""
        scheduler = self.scheduler.config
        model = self.transformer
        how = (model.dtype, model.device, model.backend, model.attention_backend)
        key = (batch, num_inference_steps, id(model), *how, str(scheduler))
        if key not in self._plans:
            # one plan at a time: each holds a cache of its own
            self._plans = {key: Sampler(model, self.scheduler).plan(batch, num_inference_steps)}
        return self._plans[key]

    def decode(self, latents_BCHW: Tensor, output_type: OutputType = "pil") -> Any:
        """Scaled latents to pictures."""
        pixels = decode(self.vae, latents_BCHW)
        if output_type == "pil":
            return [Image.fromarray(image) for image in to_uint8(pixels).cpu().numpy()]
        return pixels.cpu() if output_type == "pt" else pixels.permute(0, 2, 3, 1).cpu().numpy()


def _generators(
    count: int, seed: int | None, generator: torch.Generator | list[torch.Generator] | None
) -> list[torch.Generator]:
    if generator is None:
        return [torch.Generator().manual_seed((seed or 0) + index) for index in range(count)]
    if seed is not None:
        raise ValueError("give seed or generator, not both")
    generators = [generator] * count if isinstance(generator, torch.Generator) else generator
    if len(generators) != count:
        raise ValueError(f"generator has {len(generators)} entries for num_images={count}")
    return generators


def _load_scheduler(folder: Path) -> Any:
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        values = json.loads(path.read_text())
        scheduler = getattr(diffusers, values["_class_name"])
        return scheduler.from_config(values)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} holds no diffusers scheduler: {error}") from error
