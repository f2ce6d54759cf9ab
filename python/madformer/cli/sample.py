"""``madformer sample``: draw images from a model folder, one or a million."""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from madformer.choices import device_of, precision_of
from madformer.seeds import check_seed

if TYPE_CHECKING:
    from PIL import Image

    from madformer.bulk import OutputFolder, Prompts
    from madformer.pipeline import MADFormerPipeline

# What the released scripts decode with; the one download that sampling may make.
RELEASED_VAE = "stabilityai/sd-vae-ft-mse"
SCHEDULERS = {
    "dpmpp": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
PRECISIONS = ("auto", "exact", "default", "fp8")
BACKENDS = ("auto", "triton", "reference")
FORMATS = ("png", "wds")
SHARD_SIZE = 1000

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
    add = parser.add_argument
    add("--model", required=True, help="folder (or hub id) that save_pretrained or convert wrote")
    add("--num-images", type=int, default=1, help="how many (default 1)")
    add("--steps", type=int, default=25, help="denoising steps of every block (default 25)")
    add("--seed", type=int, default=0, help="of the first image, from 0 to 2^63 - 1 (default 0)")
    add("--batch-size", type=int, default=16, help="images at once (default 16)")
    add("--refresh-every", type=int, default=1, metavar="K", help="run the diffusion layers in every K-th step alone")
    add("--diffusion-layers", type=int, metavar="D", help="split of an elastic model (default: its own)")
    add("--height", type=int, metavar="PIXELS", help="of the images (default: as trained; others are extrapolated)")
    add("--width", type=int, metavar="PIXELS", help="likewise")
    add("--scheduler", choices=SCHEDULERS, help="replace the model's own")
    add("--vae", help="autoencoder, a folder or hub id, in place of the model's own")
    add("--vae-tile", type=int, metavar="PIXELS", help="decode larger pictures in tiles (default 1024; 0 never)")
    add("--precision", choices=PRECISIONS, default="auto", help="exact is fp32, default bf16; auto takes the faster")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--backend", choices=BACKENDS, default="auto", help="of the kernels; auto takes the best one here")
    group = parser.add_argument_group("what to draw", "With several prompts or classes the images take them in turn.")
    add = group.add_argument
    add("--prompt", action="append", metavar="TEXT", help="for a model with text; may be repeated")
    add("--prompts", type=Path, metavar="FILE", help="one prompt a line, in place of --prompt")
    add("--class", action="append", dest="classes", metavar="NAME", help="name or number, for a model with classes")
    add("--guidance", type=float, default=1.0, metavar="SCALE", help="classifier-free guidance; none up to 1 (default)")
    add("--negative-prompt", metavar="TEXT", help="what guidance leads away from (default: the empty text)")
    add("--guidance-interval", type=_interval, metavar="LOW,HIGH", help="timesteps with guidance (default: all)")
    add("--tokenizer", help="bytes, a folder or a hub id, in place of the model's own")
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--out", type=Path, help="folder for the images, named by their seeds; goes on where it stopped")
    add("--overwrite", action="store_true", help="remove what an earlier run wrote to --out")
    add("--format", choices=FORMATS, default="png", help="a file an image, or WebDataset tar shards (default png)")
    add("--shard-size", type=int, help=f"images of a shard (default {SHARD_SIZE})")
    add("--latents", action="store_true", help="write latents (.safetensors) to --out: needs no VAE")
    add("--grid", type=Path, help="file for one PNG with all images")
    add("--json", action="store_true", help="print one JSON object at the end and no progress bar")
    add("--ray", type=int, nargs="?", const=0, metavar="N", help="on N actors of Ray Data (default: one a GPU)")
    parser.set_defaults(run=run)


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high)):
        raise argparse.ArgumentTypeError(f"{text!r} must be two numbers with a comma between them")
    return low, high


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which is to end a run as Ctrl-C does."""


def run(args: argparse.Namespace) -> None:
    _check(args)

    def terminate(number: int, frame: object) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        _sample(args)
    except KeyboardInterrupt as stop:
        if _process()[0] == 0:
            again = "the same command" + (" without --overwrite" if args.overwrite else "")
            resume = f"; {again} goes on from what is in {args.out}" if args.out else ", nothing was written"
            print(f"madformer sample: interrupted{resume}", file=sys.stderr)
        raise SystemExit(143 if isinstance(stop, _Terminated) else 130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _sample(args: argparse.Namespace) -> None:
    from madformer.bulk import OutputFolder, Prompts, Settings
    from madformer.engine.schedule import tabulate

    device = device_of(args.device, elsewhere=args.ray is not None)
    texts = _texts(args)
    if args.ray is not None:
        _make_absolute(args)
    pipeline = _load(args, "cpu" if args.ray is not None else device)
    tabulate(pipeline.scheduler, args.steps)  # to refuse a step count before anything is written
    prompts = Prompts.of(
        pipeline,
        texts,
        args.classes or (),
        negative_text=args.negative_prompt,
        guidance_scale=args.guidance,
        guidance_interval=args.guidance_interval,
    )
    precision = precision_of(args.precision, device)
    folder = None
    if args.out:
        shard_size = (args.shard_size or SHARD_SIZE) if args.format == "wds" else None
        settings = Settings.of(
            pipeline,
            steps=args.steps,
            precision=precision,
            seed=args.seed,
            batch_size=args.batch_size,
            latents=args.latents,
            shard_size=shard_size,
            prompts=prompts,
            refresh_every=args.refresh_every,
        )
        folder = OutputFolder(args.out, settings, args.num_images)
    if args.ray is None:
        _prepare(pipeline, args, precision)
    if not args.json and _process()[0] == 0:
        print(f"{args.model}: {_describe(pipeline, args, precision)}", file=sys.stderr)
    if folder is not None:
        _fill(folder, pipeline, args, device)
    else:
        _draw_grid(pipeline, prompts, args)


def _fill(folder: OutputFolder, pipeline: MADFormerPipeline, args: argparse.Namespace, device: str) -> None:
    """Draw what the folder lacks; of several processes the one that completes it reports."""
    from madformer import bulk
    from madformer.bulk import ray_data

    rank, world_size = _process()
    prompts = folder.settings.prompts
    with folder.opened(rank, world_size, overwrite=args.overwrite):
        had_all = len(folder.present()) == args.num_images
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
        from PIL import Image

        _save_grid([Image.open(folder.file(image)) for image in range(args.num_images)], prompts, args.grid)
    if completed or (had_all and rank == 0):
        _report(args, pipeline, prompts, folder.settings.precision, device, drawn, seconds)


def _draw_grid(pipeline: MADFormerPipeline, prompts: Prompts, args: argparse.Namespace) -> None:
    from tqdm import tqdm

    images: list[Image.Image] = []
    started = time.perf_counter()
    shown = args.num_images > args.batch_size and not args.json
    with tqdm(total=args.num_images, desc="sampling", unit="image", disable=not shown) as bar:
        for first in range(0, args.num_images, args.batch_size):
            batch = range(first, min(first + args.batch_size, args.num_images))
            options = prompts.options(batch) | {"refresh_every": args.refresh_every}
            images += pipeline(num_inference_steps=args.steps, seed=args.seed + first, **options).images
            bar.update(len(batch))
    seconds = time.perf_counter() - started
    _save_grid(images, prompts, args.grid)
    device = str(pipeline.transformer.device)
    _report(args, pipeline, prompts, precision_of(args.precision, device), device, args.num_images, seconds)


def _check(args: argparse.Namespace) -> None:
    """Everything that can be wrong with the arguments, before minutes of work."""
    at_least_one = ("num_images", "steps", "batch_size", "shard_size", "refresh_every")
    for name, low in (*((name, 1) for name in at_least_one), ("ray", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {low}")
    check_seed(args.seed, args.num_images)
    several = _process()[1] > 1
    refusals = {
        "nothing to write: give --out FOLDER, --grid FILE, or both": not (args.out or args.grid),
        "--latents writes to a folder: give --out": args.latents and not args.out,
        "--latents gives no pictures: leave out --grid": args.latents and args.grid,
        "--latents decodes nothing: leave out --vae-tile": args.latents and args.vae_tile is not None,
        "--format wds writes to a folder: give --out": args.format == "wds" and not args.out,
        "--format wds leaves no files for --grid to show": args.format == "wds" and args.grid,
        "--shard-size is for --format wds": args.shard_size is not None and args.format != "wds",
        "--overwrite is for --out": args.overwrite and not args.out,
        "--ray writes to a folder: give --out": args.ray is not None and not args.out,
        "--ray deals the work itself: run it without torchrun": args.ray is not None and several,
        "--prompt and --prompts are two ways to say what to draw: give one": args.prompt and args.prompts,
        "--negative-prompt is for --guidance": args.negative_prompt is not None and args.guidance <= 1,
        "--guidance-interval is for --guidance": args.guidance_interval and args.guidance <= 1,
        "several processes share a folder: give --out": several and not args.out,
        "several processes have no pictures in common: leave out --grid": several and args.grid,
        "several processes would remove each other's images: leave out --overwrite": several and args.overwrite,
    }
    for message, refused in refusals.items():
        if refused:
            raise ValueError(message)
    from madformer.model.persistence import check_writable

    for folder in filter(None, (args.out, args.grid and args.grid.parent)):
        check_writable(folder)
    if args.grid and args.grid.is_dir():
        raise ValueError(f"--grid {args.grid} is a folder; it names a file")


def _texts(args: argparse.Namespace) -> list[str]:
    """The prompts; empty lines of a file are none."""
    if not args.prompts:
        return args.prompt or []
    texts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"--prompts {args.prompts} holds no prompt")
    return texts


def _process() -> tuple[int, int]:
    """Which of how many processes this is, as torchrun says; they share nothing but the folder."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _load(args: argparse.Namespace, device: str) -> MADFormerPipeline:
    """The pipeline with the network as stored, in fp32, and the autoencoder as it will run."""
    import diffusers
    import torch

    from madformer.engine.precision import PRECISIONS
    from madformer.pipeline import MADFormerPipeline
    from madformer.vae import load_vae, set_tile

    if device.startswith("cuda"):
        # kernels are launched on the current device
        torch.cuda.set_device(torch.device(device).index or 0)
    vae_dtype = PRECISIONS[precision_of(args.precision, device)].dtype
    pipeline = MADFormerPipeline.from_pretrained(
        args.model,
        vae=args.vae,
        tokenizer=args.tokenizer,
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
        config = pipeline.scheduler.config
        # DDIM's own default clamps to [-1, 1], which latents are not bounded by
        options = {"clip_sample": config.get("clip_sample", False)} if args.scheduler == "ddim" else {}
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[args.scheduler]).from_config(config, **options)
    return pipeline


def _make_absolute(args: argparse.Namespace) -> None:
    """Folders by their whole paths: an actor works in another one."""
    args.out = args.out.absolute()
    for name in ("model", "vae", "tokenizer"):
        value = getattr(args, name)
        if value is not None and Path(value).is_dir():
            setattr(args, name, str(Path(value).absolute()))


def _prepare(pipeline: MADFormerPipeline, args: argparse.Namespace, precision: str) -> None:
    """Put the network into its precision, on its kernels."""
    from madformer.engine.precision import apply

    pipeline.transformer = apply(pipeline.transformer, precision)
    pipeline.transformer.set_backend(args.backend)
    alone = args.num_images <= args.batch_size and _process()[0] == 0
    pipeline.set_progress_bar_config(disable=args.json or not alone, desc="sampling", unit="step")


def _load_and_prepare(args: argparse.Namespace, device: str) -> MADFormerPipeline:
    """For an actor, which has no terminal."""
    pipeline = _load(args, device)
    _prepare(pipeline, args, precision_of(args.precision, device))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _describe(pipeline: MADFormerPipeline, args: argparse.Namespace, precision: str) -> str:
    """One line: what was loaded and what will run it."""
    from madformer.kernels import dispatch

    model = pipeline.transformer
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    what = f"{parameters:.1f} M parameters, {type(pipeline.scheduler).__name__}, precision {precision}"
    if args.ray is not None:
        return f"{what} on Ray's actors"
    layers = dispatch.resolve("cached_attention", model.backend, model.device, model.dtype)
    update = dispatch.resolve("denoise_step", "auto", model.device)
    return f"{what} on {model.device}; layers: {layers}, denoise_step: {update}"


def _save_grid(images: list[Image.Image], prompts: Prompts, file: Path) -> None:
    """A square; where several prompts have several images, a row of each prompt's."""
    from madformer.model.persistence import atomic_path
    from madformer.pipeline import image_grid

    rows = prompts.num_different if 1 < prompts.num_different < len(images) else None
    with atomic_path(file) as path:
        image_grid(images, rows).save(path, "PNG")


def _report(
    args: argparse.Namespace,
    pipeline: MADFormerPipeline,
    prompts: Prompts,
    precision: str,
    device: str,
    drawn: int,
    seconds: float,
) -> None:
    """What is there, and what this process did for it."""
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
            "precision": precision,
            "device": device,
            "world_size": _process()[1],
            "num_drawn": drawn,
            "seconds": round(seconds, 3),
            "seconds_per_image": each and round(each, 4),
            "written": written,
        }
        print(json.dumps(record))
    else:
        did = f"drew {drawn} in {seconds:.1f} s ({each:.2f} s an image)" if each else "all were there"
        process = "this process " if drawn and _process()[1] > 1 else ""
        print(f"{args.num_images} images in {', '.join(written)}: {process}{did}")
