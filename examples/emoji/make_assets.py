"""Turn a finished run into the small checkpoint of ``assets/``: bf16 weights, and the loss curve as a picture.

python examples/emoji/make_assets.py --run runs/emoji64 --vae runs/emoji-vae-decoder --out assets/emoji64
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import torch

from madformer.engine.schedulers import default_scheduler
from madformer.files.atomic import atomic_path
from madformer.pipeline import MADFormerPipeline

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WINDOW = 20  # records averaged into one point of the curve


def plot_losses(metrics: Path, picture: Path) -> None:
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
    for axis, part, title in zip(axes, ("image", "hidden"), ("image loss", "hidden loss"), strict=True):
        steps = torch.tensor([record["step"] for record in records])
        values = torch.tensor([record[part] for record in records])
        axis.plot(steps, values, color="0.8", linewidth=0.8)
        axis.plot(steps[WINDOW - 1 :], values.unfold(0, WINDOW, 1).mean(1), color="tab:blue")
        axis.set(title=title, xlabel="step", ylabel="mean squared error", ylim=(0, values[WINDOW:].max() * 1.1))
        axis.grid(alpha=0.3)
    with atomic_path(picture) as path:
        figure.savefig(path, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/emoji64"))
    parser.add_argument("--vae", type=Path, help="autoencoder with the same latents (default: the run's)")
    parser.add_argument("--out", type=Path, default=Path("assets/emoji64"))
    args = parser.parse_args()
    pipeline = MADFormerPipeline.from_pretrained(
        args.run / "model", **({"vae": args.vae} if args.vae else {}), dtype=torch.float32
    )
    pipeline.scheduler = default_scheduler(pipeline.transformer.config.prediction_type)
    pipeline.save_pretrained(args.out, dtype=torch.bfloat16)
    plot_losses(args.run / "metrics.jsonl", args.out / "loss.png")


if __name__ == "__main__":
    main()
