"""Train the small autoencoder of the emoji model: 64 x 64 pixels to 4 x 16 x 16 latents and back.

    madformer data emoji --out data/emoji64
    python examples/emoji/train_vae.py --data data/emoji64 --out runs/emoji-vae

The output folder is an ``AutoencoderKL`` for ``from_pretrained``, beside a picture of reconstructions, the
loss and what ``--resume`` needs.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from madformer.data import open_dataset
from madformer.files.atomic import atomic_path
from madformer.seeds import seed_all
from madformer.vae import load_vae

LEVELS = 3
SIZE = 64
STATE = "training.pt"
WARMUP = 50  # steps


class ContiguousGroupNorm(nn.GroupNorm):
    """The bfloat16 channels-last kernel is slow on CPUs: with two copies 28 images/s a core, without 20."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW.contiguous()).contiguous(memory_format=torch.channels_last)


def make_vae(channels: tuple[int, ...]) -> AutoencoderKL:
    """Three levels, so a latent stands for 4 x 4 pixels."""
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = ContiguousGroupNorm
    return vae.to(memory_format=torch.channels_last)


def load_images(source: str) -> Tensor:
    """The whole data set as uint8 ``(N, 3, 64, 64)``, a quarter of what float32 would take."""
    dataset = open_dataset(source, SIZE)
    rows = (dataset[index]["image"] for index in tqdm(range(len(dataset)), desc="loading"))
    return torch.stack([((row + 1) * 127.5).round().byte() for row in rows])


def to_float(pixels: Tensor) -> Tensor:
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbours, which a blurred reconstruction gets wrong first."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(output), gradients(target), strict=True))
    return F.l1_loss(output, target) + F.mse_loss(output, target) + 0.5 * edges


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of images in [-1, 1]."""
    return 10 * math.log10(4 / F.mse_loss(output.clamp(-1, 1), target).item())


class Training:
    """The model, its running average and the optimizer; what a resumed run needs of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.vae = make_vae(tuple(args.channels))
        if args.decoder_of:
            self.vae.load_state_dict(load_vae(args.decoder_of).state_dict())
            for part in (self.vae.encoder, self.vae.quant_conv):
                part.requires_grad_(False)
        self.average = copy.deepcopy(self.vae).requires_grad_(False)
        weights = [p for p in self.vae.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
        self.step = 0
        self.seconds = 0.0

    @property
    def progress(self) -> float:
        """From 0 to 1, by steps where their number is given, else by time."""
        if self.args.steps is not None:
            return self.step / self.args.steps
        return self.seconds / (60 * self.args.minutes)

    def update(self, batch: Tensor) -> tuple[float, float]:
        """One optimizer step; returns the loss and the PSNR in dB."""
        rate = min((self.step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * min(self.progress, 1)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * rate
        with torch.autocast("cpu", torch.bfloat16):
            posterior = self.vae.encode(batch).latent_dist
            output = self.vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(output.float(), batch)
        loss = loss + self.args.kl_weight * posterior.kl().float().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # A short memory at first, or the average would be the initial weights for hundreds of steps.
        memory = min(0.995, (1 + self.step) / (10 + self.step))
        weights = [p.detach() for p in self.vae.parameters()]
        torch._foreach_lerp_(list(self.average.parameters()), weights, 1 - memory)
        self.step += 1
        return loss.item(), psnr(output.detach().float(), batch)

    def save(self, path: Path) -> None:
        state = {name: getattr(self, name).state_dict() for name in ("vae", "average", "optimizer")}
        state |= {"step": self.step, "seconds": self.seconds, "random": torch.get_rng_state()}
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        for name in ("vae", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["random"])


@torch.inference_mode()
def evaluate(vae: AutoencoderKL, pixels: Tensor, picture: Path) -> tuple[float, float]:
    """PSNR in dB and the latents' standard deviation; paints originals above their reconstructions."""
    every = max(len(pixels) // 64, 1)
    squares, latents, shown = 0.0, [], []
    for batch in map(to_float, pixels.split(128)):
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(batch).latent_dist.mean
            output = vae.decode(mean).sample.float().clamp(-1, 1)
        squares += (output - batch).square().sum().item()
        latents.append(mean.float())
        shown.append(torch.stack([batch, output], dim=1))
    pairs = torch.cat(shown)[::every][:64]
    pairs = F.pad(pairs, (0,) * 9 + (-len(pairs) % 16,), value=1.0)
    grid = pairs.unflatten(0, (-1, 16)).permute(0, 2, 4, 1, 5, 3).flatten(3, 4).flatten(0, 2).flatten(1, 2)
    grid = grid.reshape(-1, 16 * SIZE, 3)
    with atomic_path(picture) as path:
        Image.fromarray(((grid + 1) * 127.5).round().byte().numpy()).save(path, "PNG")
    return 10 * math.log10(4 * pixels.numel() / squares), torch.cat(latents).std().item()


def save_vae(vae: AutoencoderKL, folder: Path) -> None:
    """``save_pretrained``, each file whole or not at all, the configuration last."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        vae.save_pretrained(temporary)
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.suffix == ".json"):
            with atomic_path(folder / file.name) as path:
                file.replace(path)


def train(training: Training, pixels: Tensor, out: Path) -> Iterator[tuple[int, float, float, float]]:
    """Train to the end, saving at intervals; yields step, seconds, loss and PSNR of every step."""
    begun = time.perf_counter() - training.seconds
    while training.progress < 1:
        batch = to_float(pixels[torch.randint(len(pixels), (training.args.batch_size,))])
        loss, quality = training.update(batch)
        training.seconds = time.perf_counter() - begun
        yield training.step, training.seconds, loss, quality
        if training.step % training.args.save_every == 0:
            training.save(out / STATE)
            evaluate(training.average, pixels[:: max(len(pixels) // 512, 1)], out / "reconstructions.png")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/emoji64", help="shards or folder of images")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-vae"))
    parser.add_argument("--decoder-of", help="go on with this autoencoder's decoder alone: its latents stay the same")
    parser.add_argument("--channels", type=int, nargs=LEVELS, default=(16, 32, 96))
    parser.add_argument("--minutes", type=float, default=15, help="training time (default 15)")
    parser.add_argument("--steps", type=int, help="train for a number of steps instead")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its peak; falls as a cosine")
    parser.add_argument("--kl-weight", type=float, default=1e-6)
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints (default 250)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help=f"go on from {STATE} in the output folder")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    seed_all(args.seed)
    pixels = load_images(args.data)
    training = Training(args)
    if args.resume:
        training.load(args.out / STATE)
    args.out.mkdir(parents=True, exist_ok=True)
    with (
        open(args.out / "loss.csv", "a" if args.resume else "w", buffering=1, newline="") as file,
        tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar,
    ):
        log = csv.writer(file)
        if not args.resume:
            log.writerow(("step", "seconds", "loss", "psnr"))
        for step, seconds, loss, quality in train(training, pixels, args.out):
            bar.update(100 * min(training.progress, 1) - bar.n)
            if step % 25 == 0:
                log.writerow((step, round(seconds, 1), round(loss, 4), round(quality, 2)))
                speed = step * args.batch_size / seconds
                bar.set_postfix(step=step, loss=f"{loss:.3f}", psnr=f"{quality:.1f}", images=f"{speed:.0f}/s")
    training.save(args.out / STATE)
    quality, deviation = evaluate(training.average, pixels, args.out / "reconstructions.png")
    # a decoder alone keeps the latents, and so their scale
    scale = load_vae(args.decoder_of).config.scaling_factor if args.decoder_of else 1 / deviation
    training.average.register_to_config(scaling_factor=scale)
    save_vae(training.average, args.out)
    print(f"{training.step} steps: PSNR {quality:.2f} dB over {len(pixels)} images, latent std {deviation:.3f}")


if __name__ == "__main__":
    main()
