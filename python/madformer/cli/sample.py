"""``madformer sample``: draw images from a model folder, one or a million."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madformer.cli.process import exit_status
from madformer.cli.sample_options import SHARD_SIZE, add_options, check, texts_of
from madformer.machine import device_of, precision_of, this_process

if TYPE_CHECKING:
    from PIL import Image

    from madformer.bulk import OutputFolder, Settings
    from madformer.pipeline import MADFormerPipeline

# What the released scripts decode with; the one download that sampling may make.
RELEASED_VAE = "stabilityai/sd-vae-ft-mse"
EXAMPLES = """examples:
  madformer sample --model assets/emoji64 --prompt "red apple" --guidance 3 --num-images 16 --grid samples/grid.png
  madformer sample --model runs/emoji64/model --num-images 100 --seed 7 --out samples/
  madformer sample --model CONVERTED --vae VAE_FOLDER --scheduler dpmpp --steps 25 --out samples/
  madformer sample --model TEXT_MODEL --prompt "red heart" --prompt "a cat" --guidance 3 --num-images 8 --grid grid.png
  madformer sample --model CLASS_MODEL --class "Food & Drink" --guidance 2 --num-images 8 --out samples/

many images (killed or stopped, the same command goes on; a larger --num-images adds to them):
  madformer sample --model CONVERTED --num-images 50000 --batch-size 32 --format wds --out samples/
  torchrun --no-python --nproc-per-node 8 madformer sample --model CONVERTED --num-images 50000 --out samples/
  madformer sample --ray --model CONVERTED --num-images 50000 --out samples/
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "sample",
        help="draw images from a model",
        description="Draw images. Image i is the one that seed + i gives, whatever the batch it is drawn in.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    check(args)
    try:
        _sample(args)
    except KeyboardInterrupt as stop:
        if this_process()[0] == 0:
            again = "the same command" + (" without --overwrite" if args.overwrite else "")
            resume = f"; {again} goes on from what is in {args.out}" if args.out else ", nothing was written"
            print(f"madformer sample: interrupted{resume}", file=sys.stderr)
        raise SystemExit(exit_status(stop)) from None


def _sample(args: argparse.Namespace) -> None:
    from madformer.bulk import OutputFolder, Prompts, Settings
    from madformer.engine.schedule import tabulate
    from madformer.sheets import check_grid

    device = device_of(args.device, elsewhere=args.ray is not None)
    texts = texts_of(args)
    if args.ray is not None:
        _make_absolute(args)
    pipeline, lora = _load(args, "cpu" if args.ray is not None else device)
    tabulate(pipeline.scheduler, args.steps)  # to refuse a step count before anything is written
    prompts = Prompts.of(
        pipeline,
        texts,
        args.classes or (),
        negative_text=args.negative_prompt,
        guidance_scale=args.guidance,
        guidance_interval=args.guidance_interval,
    )
    settings = Settings.of(
        pipeline,
        steps=args.steps,
        precision=precision_of(args.precision, device),
        seed=args.seed,
        batch_size=args.batch_size,
        latents=args.latents,
        shard_size=(args.shard_size or SHARD_SIZE) if args.format == "wds" else None,
        prompts=prompts,
        refresh_every=args.refresh_every,
        lora=lora,
    )
    if args.grid:
        check_grid(args.num_images, _rows(settings, args), *settings.recorded["size"])
    if args.ray is None:
        _prepare(pipeline, args, settings.precision)
    if not args.json and this_process()[0] == 0:
        print(f"{args.model}: {_describe(pipeline, args, settings.precision)}", file=sys.stderr)
    if args.out:
        _fill(OutputFolder(args.out, settings, args.num_images), pipeline, args, device)
    else:
        _draw_grid(pipeline, settings, args)


def _fill(folder: OutputFolder, pipeline: MADFormerPipeline, args: argparse.Namespace, device: str) -> None:
    """Draw what the folder lacks; of several processes the one that completes it reports."""
    from madformer import bulk
    from madformer.bulk import ray_data

    rank, world_size = this_process()
    with folder.opened(rank, world_size, overwrite=args.overwrite):
        started = time.perf_counter()
        if args.ray is not None:
            load = functools.partial(_load_and_prepare, args, "cuda" if device.startswith("cuda") else device)
            workers, on_gpu = args.ray or None, device.startswith("cuda")
            drawn = ray_data.draw_missing(load, folder, workers=workers, on_gpu=on_gpu, progress=not args.json)
        else:
            # one batch has a bar over its steps
            progress = args.num_images > args.batch_size and not args.json and rank == 0
            drawn = bulk.draw_missing(pipeline, folder, rank=rank, world_size=world_size, progress=progress)
        seconds = time.perf_counter() - started
        completed = folder.finish()
        if args.grid:
            _save_grid(map(_read_picture, map(folder.file, range(args.num_images))), folder.settings, args)
    if completed or (folder.had_all and rank == 0):
        _report(args, pipeline, folder.settings, device, drawn, seconds)


def _draw_grid(pipeline: MADFormerPipeline, settings: Settings, args: argparse.Namespace) -> None:
    started = time.perf_counter()
    _save_grid(_pictures(pipeline, settings, args), settings, args)
    seconds = time.perf_counter() - started
    _report(args, pipeline, settings, str(pipeline.transformer.device), args.num_images, seconds)


def _pictures(pipeline: MADFormerPipeline, settings: Settings, args: argparse.Namespace) -> Iterator[Image.Image]:
    """Batch after batch, as they are asked for."""
    from tqdm import tqdm

    shown = args.num_images > args.batch_size and not args.json
    with tqdm(total=args.num_images, desc="sampling", unit="image", disable=not shown) as bar:
        for first in range(0, args.num_images, args.batch_size):
            batch = range(first, min(first + args.batch_size, args.num_images))
            options = settings.prompts.options(batch) | {"refresh_every": args.refresh_every}
            yield from pipeline(num_inference_steps=args.steps, seed=args.seed + first, **options).images
            bar.update(len(batch))


def _load(args: argparse.Namespace, device: str) -> tuple[MADFormerPipeline, dict[str, Any] | None]:
    """The pipeline with the network as stored, in fp32, and the autoencoder as it will run; what LoRA is in it."""
    import diffusers
    import torch

    from madformer.engine.precision import PRECISIONS
    from madformer.files.hub import resolve_folder
    from madformer.pipeline import MADFormerPipeline
    from madformer.vae import load_vae, set_tile

    if device.startswith("cuda"):
        # kernels are launched on the current device
        torch.cuda.set_device(torch.device(device).index or 0)
    vae_dtype = PRECISIONS[precision_of(args.precision, device)].dtype
    pipeline = MADFormerPipeline.from_pretrained(
        args.model,
        **{name: value for name in ("vae", "tokenizer") if (value := getattr(args, name)) is not None},
        dtype=torch.float32,
        vae_dtype=vae_dtype,
        device=device,
    )
    if args.diffusion_layers is not None:
        pipeline.transformer.set_split(args.diffusion_layers)
    if pipeline.vae is None and not args.latents:
        try:
            pipeline.vae = load_vae(RELEASED_VAE, device, vae_dtype)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{args.model} holds no autoencoder and {RELEASED_VAE} cannot be fetched: give --vae FOLDER, "
                "or --latents to write latents"
            ) from error
    if args.vae_tile is not None:
        set_tile(pipeline.vae, args.vae_tile)
    pipeline.transformer.set_grid(*pipeline.grid_of(args.height, args.width))
    if args.scheduler:
        config, cls = pipeline.scheduler.config, getattr(diffusers, args.scheduler)
        # some clamp to [-1, 1] unless told otherwise, which latents are not bounded by
        clamps = "clip_sample" in inspect.signature(cls.__init__).parameters
        options = {"clip_sample": config.get("clip_sample", False)} if clamps else {}
        pipeline.scheduler = cls.from_config(config, **options)
    lora = None
    if args.lora is not None:
        strength = 1.0 if args.lora_strength is None else args.lora_strength
        lora = pipeline.merge_lora(resolve_folder(args.lora), strength)
    return pipeline, lora


def _make_absolute(args: argparse.Namespace) -> None:
    """Folders by their whole paths: an actor works in another one."""
    args.out = args.out.absolute()
    for name in ("model", "lora", "vae", "tokenizer"):
        value = getattr(args, name)
        if value is not None and Path(value).is_dir():
            setattr(args, name, str(Path(value).absolute()))


def _prepare(pipeline: MADFormerPipeline, args: argparse.Namespace, precision: str) -> None:
    """Put the network into its precision, on its kernels."""
    from madformer.engine.precision import apply

    pipeline.transformer = apply(pipeline.transformer, precision)
    pipeline.transformer.set_backend(args.backend)
    alone = args.num_images <= args.batch_size and this_process()[0] == 0
    pipeline.set_progress_bar_config(disable=args.json or not alone, desc="sampling", unit="step")


def _load_and_prepare(args: argparse.Namespace, device: str) -> MADFormerPipeline:
    """For an actor, which has no terminal."""
    pipeline, _ = _load(args, device)
    _prepare(pipeline, args, precision_of(args.precision, device))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _describe(pipeline: MADFormerPipeline, args: argparse.Namespace, precision: str) -> str:
    """One line: what was loaded and what will run it."""
    from madformer.kernels import dispatch

    model = pipeline.transformer
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    last = args.seed + args.num_images - 1
    seeds = f"seed {last}" if last == args.seed else f"seeds {args.seed} to {last}"
    what = f"{parameters:.1f} M parameters, {type(pipeline.scheduler).__name__}, precision {precision}, {seeds}"
    if args.ray is not None:
        return f"{what} on Ray's actors"
    layers = dispatch.resolve("cached_attention", model.backend, model.device, model.dtype)
    update = dispatch.resolve("denoise_step", "auto", model.device)
    return f"{what} on {model.device}; layers: {layers}, denoise_step: {update}"


def _rows(settings: Settings, args: argparse.Namespace) -> int | None:
    """Of a grid: a square, or a row of each prompt's where several have several images."""
    different = settings.prompts.num_different
    return different if 1 < different < args.num_images else None


def _read_picture(file: Path) -> Image.Image:
    """In memory, its file closed again: there may be more of them than a process may open."""
    from PIL import Image

    with Image.open(file) as picture:
        return picture.copy()


def _save_grid(pictures: Iterable[Image.Image], settings: Settings, args: argparse.Namespace) -> None:
    from madformer.bulk.records import png_text
    from madformer.files.atomic import atomic_path, remove_leftovers_of
    from madformer.sheets import grid_shape, image_grid

    rows, columns = grid_shape(args.num_images, _rows(settings, args))
    record = {**settings.record(range(args.num_images)), "rows": rows, "columns": columns}
    grid = image_grid(pictures, _rows(settings, args), count=args.num_images)
    remove_leftovers_of(args.grid)
    with atomic_path(args.grid) as path:
        grid.save(path, "PNG", pnginfo=png_text(record))


def _report(
    args: argparse.Namespace,
    pipeline: MADFormerPipeline,
    settings: Settings,
    device: str,
    drawn: int,
    seconds: float,
) -> None:
    """What is there, and what this process did for it."""
    prompts = settings.prompts
    written = [str(path) for path in (args.out, args.grid) if path]
    each = seconds / drawn if drawn else None
    if args.json:
        record = {
            "model": args.model,
            "num_images": args.num_images,
            "num_inference_steps": args.steps,
            "batch_size": args.batch_size,
            "seed": args.seed,
            "prompts": prompts.texts,
            "negative_prompt": prompts.negative_text,
            "labels": prompts.labels,
            "guidance_scale": prompts.guidance_scale,
            "guidance_interval": prompts.guidance_interval,
            "refresh_every": args.refresh_every,
            "scheduler": type(pipeline.scheduler).__name__,
            "precision": settings.precision,
            "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
            "device": device,
            "world_size": this_process()[1],
            "num_drawn": drawn,
            "seconds": round(seconds, 3),
            "seconds_per_image": each and round(each, 4),
            "written": written,
        }
        print(json.dumps(record))
    else:
        did = f"drew {drawn} in {seconds:.1f} s ({each:.2f} s an image)" if each else "all were there"
        process = "this process " if drawn and this_process()[1] > 1 else ""
        print(f"{args.num_images} images in {', '.join(written)}: {process}{did}")
