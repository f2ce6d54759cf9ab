"""Whether a metric sees a model learn: the rank correlation of its figures with the steps of one training run.

    python -m benchmarks.metric_over_training --data data/emoji64 [--checkpoints 25 50 100 200 300 450 600 800]
        [--num-images 256] [--steps 8] [--out RECORD.json]

A model of the size of ``assets/emoji64`` is trained on one core, and at each of the steps named its averaged weights
draw pictures for captions of the emoji, from the same seeds, which are held against 1,000 emoji. Of checkpoints whose
quality rises, a metric that sees it has Spearman's correlation -1 with steps where less is better, 1 where more is.
The model sees the reference while it is trained, which takes nothing from the order of early checkpoints.

The last line on stdout is the metrics as JSON. Exit status 1: the data are missing, or the run was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import scipy.stats
import torch

from benchmarks import ROOT
from benchmarks.record import CannotCompare, environment, finish, train_whole
from madformer.bulk import Prompts, Settings
from madformer.engine.options import SamplingOptions
from madformer.evaluation import DrawnImages, StoredImages, evaluate, extract, load_extractor, open_reference
from madformer.pipeline import MADFormerPipeline
from madformer.training.config import emoji64
from madformer.training.trainer import Trainer

SEED = 10_000


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    extractor, reference = load_extractor(args.extractor), open_reference("emoji:64", args.num_reference)
    assert isinstance(reference, StoredImages)
    texts = [reference.caption(index * len(reference) // args.num_images) for index in range(args.num_images)]
    target, rows = extract(reference, extractor), list[dict[str, Any]]()

    def judge(pipeline: MADFormerPipeline) -> dict[str, Any]:
        pipeline.set_progress_bar_config(disable=True)
        prompts = Prompts.of(pipeline.reader, texts)
        settings = Settings.of(pipeline, SamplingOptions(args.steps), precision="exact", prompts=prompts, seed=SEED)
        images = DrawnImages(pipeline, settings, args.num_images)
        return {
            name: score.to_dict() for name, score in evaluate(images, target, extractor, metrics=METRICS).scores.items()
        }

    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(
            emoji64(), data=str(args.data), vae=str(ROOT / "assets" / "emoji64" / "vae"), batch_size=16, num_threads=1,
            steps=max(args.checkpoints), decay_start=1.0, ema_decays=(0.95,), save_every=10**6, sample_every=0,
            tensorboard=False, device="cpu", precision="fp32",
        )  # fmt: skip
        trainer = Trainer(config, Path(folder) / "run")
        step = trainer._train_step

        def watched(*batches: Any) -> Any:
            record = step(*batches)
            if trainer.step in args.checkpoints:
                # what is drawn is to change nothing of what is trained
                with torch.random.fork_rng(devices=[]):
                    rows.append({"step": trainer.step, "scores": judge(trainer.pipeline())})
                values = {name: round(score["value"], 4) for name, score in rows[-1]["scores"].items()}
                print(f"step {trainer.step}: {values}", file=sys.stderr, flush=True)
            return record

        trainer._train_step = watched  # type: ignore[method-assign]
        train_whole(trainer)
    steps = [row["step"] for row in rows]
    values = {name: [row["scores"][name]["value"] for row in rows] for name in rows[0]["scores"]}
    # of figures that are all the same there is none
    correlations = {
        name: float(scipy.stats.spearmanr(steps, of).statistic) if len(set(of)) > 1 else None
        for name, of in values.items()
    }
    return environment("metric_over_training", torch.device("cpu")) | {
        "num_images": args.num_images,
        "num_reference": args.num_reference,
        "steps": args.steps,
        "extractor": args.extractor,
        "rows": rows,
        "metrics": correlations,
    }


METRICS = ("kid", "fd", "prdc", "following")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[25, 50, 100, 200, 300, 450, 600, 800])
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--num-reference", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--extractor", default="efficientnet-lite0")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    return finish("metric_over_training", lambda: measure(args), args.out, errors=(CannotCompare, ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
