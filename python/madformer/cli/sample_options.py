"""The options of ``madformer sample``, and what can be wrong with them."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from madformer.engine.schedulers import SHORT_NAMES, scheduler_class
from madformer.machine import this_process
from madformer.seeds import check_seed

PRECISIONS = ("auto", "exact", "default", "fp8")
BACKENDS = ("auto", "triton", "reference")
FORMATS = ("png", "wds")
SHARD_SIZE = 1000
MAX_BATCH = 65_536


def add_options(parser: argparse.ArgumentParser) -> None:
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
    add("--scheduler", type=_scheduler, metavar="NAME", help=f"replace the model's own: {', '.join(SHORT_NAMES)}")
    add("--lora", metavar="FOLDER", help="adapters for the model, a folder or hub id")
    add("--lora-strength", type=float, metavar="X", help="how much of what they change (default 1)")
    add("--vae", help="autoencoder, a folder or hub id, in place of the model's own")
    add("--vae-tile", type=int, metavar="PIXELS", help="decode larger pictures in tiles (default 1024; 0 never)")
    add("--precision", choices=PRECISIONS, default="auto", help="exact is fp32, default bf16; auto takes the faster")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--backend", choices=BACKENDS, default="auto", help="of the kernels; auto takes the best one here")
    group = parser.add_argument_group("what to draw", "With several prompts or classes the images take them in turn.")
    add = group.add_argument
    add("texts", nargs="*", metavar="PROMPT", help="for a model with text; one or more")
    add("--prompt", action="append", metavar="TEXT", help="the same as an option, which may be repeated")
    add("--prompts", type=Path, metavar="FILE", help="one prompt a line, in UTF-8; - reads standard input")
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


def _scheduler(text: str) -> str:
    try:
        return scheduler_class(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high)):
        raise argparse.ArgumentTypeError(f"{text!r} must be two numbers with a comma between them")
    return low, high


def check(args: argparse.Namespace) -> None:
    """Everything that can be wrong with the arguments, before minutes of work."""
    at_least_one = ("num_images", "steps", "batch_size", "shard_size", "refresh_every")
    for name, low in (*((name, 1) for name in at_least_one), ("ray", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {low}")
    if args.batch_size > MAX_BATCH:
        raise ValueError(
            f"--batch-size {args.batch_size} must be at most {MAX_BATCH}: images are drawn a batch at once"
        )
    if not (math.isfinite(args.guidance) and args.guidance >= 0):
        raise ValueError(f"--guidance {args.guidance} must be a finite number from 0")
    check_seed(args.seed, args.num_images)
    if args.lora_strength is not None and not math.isfinite(args.lora_strength):
        raise ValueError(f"--lora-strength {args.lora_strength} must be finite")
    told = [option for option in (args.texts, args.prompt, args.prompts) if option]
    several = this_process()[1] > 1
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
        "PROMPT, --prompt and --prompts are ways to say what to draw: give one": len(told) > 1,
        "--lora-strength is for --lora": args.lora_strength is not None and args.lora is None,
        "--negative-prompt is for --guidance": args.negative_prompt is not None and args.guidance <= 1,
        "--guidance-interval is for --guidance": args.guidance_interval and args.guidance <= 1,
        "several processes share a folder: give --out": several and not args.out,
        "several processes have no pictures in common: leave out --grid": several and args.grid,
        "several processes would remove each other's images: leave out --overwrite": several and args.overwrite,
    }
    for message, refused in refusals.items():
        if refused:
            raise ValueError(message)
    from madformer.files.atomic import check_writable

    for folder in filter(None, (args.out, args.grid and args.grid.parent)):
        check_writable(folder)
    if args.grid and args.grid.is_dir():
        raise ValueError(f"--grid {args.grid} is a folder; it names a file")


def texts_of(args: argparse.Namespace) -> list[str]:
    """The prompts; of a file's lines those that are not blank, without the blanks around them.

    Raises:
        OSError: the file cannot be read. ValueError: it holds none, or what is given is no text.
    """
    from madformer.files.text import decode_text, read_text

    texts = args.texts or args.prompt or []
    if args.prompts:
        standard = str(args.prompts) == "-"
        text = decode_text(sys.stdin.buffer.read(), "standard input") if standard else read_text(args.prompts)
        if "\0" in text:
            raise ValueError(f"--prompts {args.prompts} holds zero bytes: text in UTF-16 needs a byte-order mark")
        # not `splitlines`, which takes a form feed and others for ends, too
        texts = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
        if not texts:
            raise ValueError(f"--prompts {args.prompts} holds no prompt")
    for text in (*texts, *filter(None, (args.negative_prompt, *(args.classes or ())))):
        if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{text!r} is not in the encoding of this terminal, UTF-8 as a rule")
    return texts
