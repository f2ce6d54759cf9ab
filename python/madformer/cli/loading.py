"""A model as ``madformer sample`` and ``evaluate`` draw from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from madformer.cli.sample_options import DrawingOptions
from madformer.engine.schedulers import converted

if TYPE_CHECKING:
    from madformer.pipeline import MADFormerPipeline

# What the released scripts decode with; the one download that sampling may make.
RELEASED_VAE = "stabilityai/sd-vae-ft-mse"


def load(request: DrawingOptions, *, latents: bool = False) -> tuple[MADFormerPipeline, dict[str, Any] | None]:
    """The pipeline with the network as stored, in fp32, and the autoencoder as it will run; what LoRA is in it."""
    import torch

    from madformer.engine.precision import PRECISIONS
    from madformer.files.hub import resolve_folder
    from madformer.pipeline import MADFormerPipeline
    from madformer.vae import load_vae, set_tile

    assert request.model is not None
    device = request.device
    if device.startswith("cuda"):
        # kernels are launched on the current device
        torch.cuda.set_device(torch.device(device).index or 0)
    vae_dtype = PRECISIONS[request.precision].dtype
    pipeline = MADFormerPipeline.from_pretrained(
        request.model,
        **{name: value for name in ("vae", "tokenizer") if (value := getattr(request, name)) is not None},
        dtype=torch.float32,
        vae_dtype=vae_dtype,
        device=device,
    )
    if request.diffusion_layers is not None:
        pipeline.transformer.set_split(request.diffusion_layers)
    if pipeline.vae is None and not latents:
        try:
            pipeline.vae = load_vae(RELEASED_VAE, device, vae_dtype)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{request.model} holds no autoencoder and {RELEASED_VAE} cannot be fetched: give --vae FOLDER"
                + (", or --latents to write latents" if hasattr(request, "latents") else "")
            ) from error
    if request.vae_tile is not None:
        set_tile(pipeline.vae, request.vae_tile)
    pipeline.transformer.set_grid(*pipeline.grid_of(request.height, request.width))
    if request.scheduler:
        pipeline.scheduler = converted(pipeline.scheduler, request.scheduler)
    lora = None
    if request.lora is not None:
        strength = 1.0 if request.lora_strength is None else request.lora_strength
        lora = pipeline.merge_lora(resolve_folder(request.lora), strength)
    return pipeline, lora


def prepare(pipeline: MADFormerPipeline, request: DrawingOptions) -> None:
    """Put the network into its precision, on its kernels; no bar is shown."""
    from madformer.engine.precision import apply

    pipeline.transformer = apply(pipeline.transformer, request.precision)
    pipeline.transformer.set_backend(request.backend)
    pipeline.set_progress_bar_config(disable=True)
    if request.compile:
        images = min(request.batch_size, request.num_images or request.batch_size)
        # not the fastest number of shares: the same command is to draw the same bits
        pipeline.warmup(images, request.sampling, compile_step=True, measure_shares=False)
