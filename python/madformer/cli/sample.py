"""``madformer sample``: draw images from a model folder."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from madformer.pipeline import MADFormerPipeline

# What the released scripts decode with; the one download that sampling may make.
RELEASED_VAE = "stabilityai/sd-vae-ft-mse"
SCHEDULERS = {
    "dpmpp": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
DTYPES = ("auto", "fp32", "bf16")
BACKENDS = ("auto", "triton", "reference")

EXAMPLES = """examples:
  madformer sample --model assets/emoji64 --num-images 16 --grid samples/grid.png
  madformer sample --model runs/emoji64/model --num-images 100 --seed 7 --out samples/
  madformer sample --model CONVERTED --vae VAE_FOLDER --scheduler dpmpp --steps 25 --out samples/
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "sample",
        help="draw images from a model",
        description="Draw images. Image i is the one that seed + i gives, whatever the batch it is drawn in.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder (or hub id) that save_pretrained or convert wrote")
    parser.add_argument("--num-images", type=int, default=1, help="how many (default 1)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps of every block (default 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image (default 0)")
    parser.add_argument("--batch-size", type=int, default=16, help="images at once (default 16)")
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="replace the model's own")
    parser.add_argument("--out", type=Path, help="folder for one PNG an image, named by its seed")
    parser.add_argument("--grid", type=Path, help="file for one PNG with all images")
    parser.add_argument("--latents", action="store_true", help="write latents (.safetensors) to --out: needs no VAE")
    parser.add_argument("--vae", help="autoencoder, a folder or hub id, in place of the model's own")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto takes bf16 where it is faster")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="of the kernels; auto takes the best one here"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end and no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    _check(args)
    import torch

    pipeline = _load(args)
    device = pipeline.transformer.device
    pipeline.set_progress_bar_config(disable=args.json, desc="sampling", unit="step")
    if not args.json:
        print(f"{args.model}: {_describe(pipeline)}", file=sys.stderr)
    images: list[Any] = []
    started = time.perf_counter()
    for first in range(0, args.num_images, args.batch_size):
        count = min(args.batch_size, args.num_images - first)
        drawn = pipeline(
            count, args.steps, seed=args.seed + first, output_type="latent" if args.latents else "pil"
        ).images
        if args.out:
            for offset, image in enumerate(drawn):
                _save(image, args.out, args.seed + first + offset)
        if args.grid:
            images += drawn
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    if args.grid:
        _save_grid(images, args.grid)
    _report(args, pipeline, seconds)


def _check(args: argparse.Namespace) -> None:
    """Everything that can be wrong with the arguments, before minutes of work."""
    for name, low in (("num_images", 1), ("steps", 1), ("batch_size", 1)):
        if getattr(args, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {low}")
    if not (args.out or args.grid):
        raise ValueError("nothing to write: give --out FOLDER, --grid FILE, or both")
    if args.latents and not args.out:
        raise ValueError("--latents writes to a folder: give --out")
    if args.latents and args.grid:
        raise ValueError("--latents gives no pictures: leave out --grid")
    from madformer.model.persistence import check_writable

    for folder in filter(None, (args.out, args.grid and args.grid.parent)):
        check_writable(folder)
    if args.grid and args.grid.is_dir():
        raise ValueError(f"--grid {args.grid} is a folder; it names a file")


def _load(args: argparse.Namespace) -> MADFormerPipeline:
    import diffusers
    import torch

    from madformer.pipeline import MADFormerPipeline
    from madformer.vae import load_vae

    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error
    dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    pipeline = MADFormerPipeline.from_pretrained(args.model, vae=args.vae, dtype=dtype, device=device)
    pipeline.transformer.set_backend(args.backend)
    if pipeline.vae is None and not args.latents:
        try:
            pipeline.vae = load_vae(RELEASED_VAE, device, pipeline.transformer.dtype)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{args.model} holds no autoencoder and {RELEASED_VAE} cannot be fetched: give --vae FOLDER, "
                "or --latents to write latents"
            ) from error
    if args.scheduler:
        config = pipeline.scheduler.config
        # DDIM's own default clamps to [-1, 1], which latents are not bounded by
        options = {"clip_sample": config.get("clip_sample", False)} if args.scheduler == "ddim" else {}
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[args.scheduler]).from_config(config, **options)
    return pipeline


def _describe(pipeline: MADFormerPipeline) -> str:
    """One line: what was loaded and what will run it."""
    from madformer.kernels import dispatch

    model = pipeline.transformer
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    layers = dispatch.resolve("cached_attention", model.backend, model.device, model.dtype)
    update = dispatch.resolve("denoise_step", "auto", model.device)
    return (
        f"{parameters:.1f} M parameters, {str(model.dtype).removeprefix('torch.')} on {model.device}, "
        f"{type(pipeline.scheduler).__name__}; layers: {layers}, denoise_step: {update}"
    )


def _save(image: Any, folder: Path, seed: int) -> None:
    from safetensors.torch import save_file

    from madformer.model.persistence import atomic_path

    if hasattr(image, "save"):
        with atomic_path(folder / f"{seed:08d}.png") as path:
            image.save(path, "PNG")
    else:
        with atomic_path(folder / f"{seed:08d}.safetensors") as path:
            save_file({"latents": image.contiguous().cpu()}, path)


def _save_grid(images: list[Image.Image], file: Path) -> None:
    from PIL import Image

    from madformer.model.persistence import atomic_path

    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    with atomic_path(file) as path:
        grid.save(path, "PNG")


def _report(args: argparse.Namespace, pipeline: MADFormerPipeline, seconds: float) -> None:
    written = [str(path) for path in (args.out, args.grid) if path]
    if args.json:
        model = pipeline.transformer
        record = {
            "model": args.model,
            "num_images": args.num_images,
            "num_inference_steps": args.steps,
            "batch_size": args.batch_size,
            "seed": args.seed,
            "scheduler": type(pipeline.scheduler).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "seconds": round(seconds, 3),
            "seconds_per_image": round(seconds / args.num_images, 4),
            "written": written,
        }
        print(json.dumps(record))
    else:
        print(
            f"{args.num_images} images in {seconds:.1f} s ({seconds / args.num_images:.2f} s an image): "
            + ", ".join(written)
        )
