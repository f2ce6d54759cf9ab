"""What the FFHQ-1024 model's U-Net does in a denoising step of a block: operations and bytes by kind of layer.

Counted from the layers' shapes, on PyTorch's device of tensors without memory; nothing is timed. For each kind it says
how many calls there are, how much arithmetic, the bytes of weights and of maps that must move, and the time that the
two need at least on an H200: at the rates of its matrix units and of a copy, and, for products, of the share of its
multiprocessors that their tiles can fill.

    python -m benchmarks.unet_work [--batch 1] [--out benchmarks/results/static/unet_work.json]
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from benchmarks.record import environment, finish
from benchmarks.static_model import MACHINES
from madformer.config import ffhq1024
from madformer.model.unet import ResnetBlock, UNetDownsampler, UNetUpsampler

BYTES = 2  # bfloat16
TILE = 128
"""Rows and columns of a tile of a matrix product, of which one multiprocessor makes one."""


@dataclasses.dataclass
class Work:
    """Of all calls of one kind; ``tiles`` are of a call."""

    calls: int = 0
    flops: int = 0
    weight_bytes: int = 0
    map_bytes: int = 0
    tiles: int = 0

    def add(self, flops: int, weight_bytes: int, map_bytes: int, tiles: int) -> None:
        self.calls += 1
        self.flops += flops
        self.weight_bytes += weight_bytes
        self.map_bytes += map_bytes
        self.tiles = tiles


def count(batch: int) -> dict[str, Work]:
    """The work of both halves by kind of layer."""
    works: dict[str, Work] = collections.defaultdict(Work)
    config = ffhq1024()
    assert config.unet is not None
    with torch.device("meta"):
        down, up = UNetDownsampler(config).bfloat16(), UNetUpsampler(config).bfloat16()
        side = round(config.block_size**0.5) * config.downscale
        x = torch.empty(batch, config.latent_channels, side, side, dtype=torch.bfloat16)
        temb = torch.empty(batch, config.time_widths[0], dtype=torch.bfloat16)

    def convolution(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, channels, *_ = module.weight.shape
        kernel, pixels = module.kernel_size[0], output.shape[0] * output.shape[2] * output.shape[3]
        name = f"{kernel}x{kernel} {channels} -> {module.out_channels}, {output.shape[2]}x{output.shape[3]}"
        tiles = -(-pixels // TILE) * -(-module.out_channels // TILE)
        works[f"convolution {name}"].add(
            2 * pixels * module.weight.numel(),
            module.weight.numel() * BYTES,
            (inputs[0].numel() + output.numel()) * BYTES,
            tiles,
        )

    def attention(module: Attention, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        samples, channels, height, width = inputs[0].shape
        tokens = height * width
        weights = 4 * channels * channels
        works[f"attention {tokens} tokens, {channels} channels"].add(
            2 * samples * tokens * (weights + 2 * tokens * channels),
            weights * BYTES,
            2 * inputs[0].numel() * BYTES,
            samples * -(-tokens // TILE) * -(-channels // TILE),
        )

    def resnet(module: ResnetBlock, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for channels in (module.in_channels, module.out_channels):
            values = output.numel() // module.out_channels * channels
            works[f"GroupNorm and SiLU {channels}, {output.shape[2]}x{output.shape[3]}"].add(
                0, 0, 2 * values * BYTES, 0
            )
        works[f"residual addition {module.out_channels}, {output.shape[2]}x{output.shape[3]}"].add(
            0, 0, 3 * output.numel() * BYTES, 0
        )
        if module in up_resnets:
            values = output.numel() // module.out_channels * module.in_channels
            works[f"concatenation to {module.in_channels}, {output.shape[2]}x{output.shape[3]}"].add(
                0, 0, 2 * values * BYTES, 0
            )

    up_resnets = {module for module in up.modules() if isinstance(module, ResnetBlock)}
    hooks: list[tuple[type[nn.Module], Any]] = [
        (nn.Conv2d, convolution), (Attention, attention), (ResnetBlock, resnet),
    ]  # fmt: skip
    for half in (down, up):
        for module in half.modules():
            for kind, hook in hooks:
                if isinstance(module, kind):
                    module.register_forward_hook(hook)
            if isinstance(module, ResnetBlock):
                module.backend = "reference"
    tokens, skips = down(x, temb)
    up(torch.empty_like(tokens), temb, skips)
    return dict(works)


def microseconds(work: Work) -> tuple[float, float]:
    """At least, by arithmetic on the multiprocessors that tiles fill, and by bytes."""
    machine = MACHINES[90]
    filled = min(1.0, work.tiles / machine.sms) if work.tiles else 1.0
    by_flops = work.flops / (machine.sms * machine.ghz * 1e9 * machine.matrix_flops * filled) * 1e6
    return by_flops, (work.weight_bytes + work.map_bytes) / machine.copy_tb_per_s / 1e6


def measure(batch: int) -> dict[str, Any]:
    works = count(batch)
    titles = (("calls", 6), ("GFLOP", 8), ("weights MB", 11), ("maps MB", 9), ("tiles", 7), ("us flops", 10))
    print(f"{'kind':<44}" + "".join(f"{title:>{width}}" for title, width in titles) + f"{'us bytes':>10}")
    rows, totals = [], collections.Counter[str]()
    for name, work in sorted(works.items()):
        by_flops, by_bytes = microseconds(work)
        rows.append({"kind": name, **dataclasses.asdict(work), "us_flops": by_flops, "us_bytes": by_bytes})
        totals.update(calls=work.calls, flops=work.flops, weight_bytes=work.weight_bytes, map_bytes=work.map_bytes)
        print(
            f"{name:<44}{work.calls:>6}{work.flops / 1e9:>8.2f}{work.weight_bytes / 1e6:>11.1f}"
            f"{work.map_bytes / 1e6:>9.1f}{work.tiles:>7}{by_flops:>10.1f}{by_bytes:>10.1f}"
        )
    bound = sum(max(row["us_flops"], row["us_bytes"]) for row in rows)
    print(f"all: {totals['calls']} calls, {totals['flops'] / 1e9:.0f} GFLOP, at least {bound:.0f} us")
    head = environment("unet_work", torch.device("cpu"))
    return {**head, "batch": batch, "rows": rows, "metrics": {**totals, "bound_us": bound}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="blocks that share the step")
    parser.add_argument("--out", type=Path, help="where to write the record")
    arguments = parser.parse_args()
    return finish("unet_work", lambda: measure(arguments.batch), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
