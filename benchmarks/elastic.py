"""The split between autoregressive and diffusion layers, chosen in training or when sampling: quality against cost.

    python -m benchmarks.elastic --runs runs/elastic --steps 1200 [--splits 1 3 5] [--only NAME] [--evaluate]

Trains one model for each split (``fixed-1``, ...) and one that is ``elastic`` over all of them, which are told the
caption alone and differ in nothing else: data, noise and number of steps are the same. The data are encoded once, into
``latents/`` beside the runs. After a kill the same command goes on; a run that is at its end is not trained again.
``--only`` trains one of them, or with ``--evaluate`` looks at that one; ``--evaluate`` takes the runs as they are.

Of every model at every split it was trained for, with the averaged weights:

* ``image_loss``: of predicting the noise, on ``--samples`` of the data. They, their noise and their timesteps are the
  same for all; training has seen the images, but not with this noise.
* how well it follows the caption: ``--captions`` pictures under guidance, each for the caption of another image, are
  encoded and looked up among the posterior means of all images. ``precision_at_1``: the share whose nearest image has
  the caption; ``precision_at_10``: that has one with it among its ten nearest; ``median_rank`` of the image the caption
  is from, 1 being the nearest; ``own_distance`` from it (mean squared). Captions that agree as far as the model reads
  are the same. The row ``autoencoder`` is what the images themselves score, decoded and encoded: the best there is.
* the cost: seconds an image in a batch, through the engine, in rounds in which all take turns; and its operations, two
  for a multiply-add, without those of the text's one pass.

The last line on stdout is the metrics as JSON. Exit status 1: a run was stopped or is another, or nothing is trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import CannotCompare, environment, finish, results_folder
from benchmarks.timing import Spread, interleaved
from madformer import config as models
from madformer.conditioning.tokenizer import load_tokenizer
from madformer.data import open_dataset
from madformer.data.encoding import write_latents
from madformer.data.latents import LatentDataset, LatentDescription
from madformer.evaluation.following import Retrieval, retrieval
from madformer.files.atomic import atomic_path
from madformer.measuring.bare import Work
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from madformer.training.checkpoint import whole_checkpoints
from madformer.training.config import RUN_CONFIG, TrainingConfig, emoji64
from madformer.training.data import BatchStream, Conditioning, Draws, Share
from madformer.training.losses import Batch, LossWeights, training_losses
from madformer.training.noise import NoiseSchedule, noise_schedule
from madformer.training.trainer import Trainer
from madformer.vae import decode, encode, load_vae

ELASTIC, AUTOENCODER = "elastic", "autoencoder"


@dataclass(frozen=True)
class Row:
    """One model at one split. ``trained_steps`` may be fewer than were asked for, under ``--evaluate``."""

    model: str
    diffusion_layers: int
    trained_steps: int
    image_loss: float
    retrieval: Retrieval
    seconds_per_image: Spread
    flops_per_image: int

    @property
    def name(self) -> str:
        return row_name(self.model, self.diffusion_layers)


def row_name(model: str, split: int) -> str:
    """``fixed-1``, or ``elastic-1``."""
    return f"{model}-{split}" if model == ELASTIC else model


# Training


def run_config(name: str, options: argparse.Namespace) -> TrainingConfig:
    """Of one of the models: the preset's, with another split and the caption alone."""
    base, splits = emoji64(), sorted(options.splits)
    model = models.preset(options.preset).replace(
        text=base.model.text,
        num_classes=0,
        time_conditioning="unet",
        diffusion_layers=splits[len(splits) // 2] if name == ELASTIC else int(name.removeprefix("fixed-")),
        elastic_diffusion_layers=tuple(splits) if name == ELASTIC else (),
    )
    return dataclasses.replace(
        base,
        model=model,
        data=str(options.runs / "latents"),
        vae=options.vae,
        image_size=options.image_size,
        cache_latents=False,
        steps=options.steps,
        seed=options.seed,
        sample_every=0,
        tensorboard=False,
        device=options.device,
        num_threads=options.threads,
    )


def encoded(config: TrainingConfig, source: str) -> LatentDataset:
    """The data as latents, written where there are none."""
    vae = load_vae(config.vae, config.device)
    images = open_dataset(source, config.image_size, on_error="skip")
    description = LatentDescription.of(images, vae, source=source, vae_name=config.vae, dtype="float32", flips=False)
    write_latents(images, vae, config.data, description)
    return LatentDataset(config.data)


def check_same(config: TrainingConfig, folder: Path) -> None:
    """Raises :class:`CannotCompare` where a folder holds another run than is asked for.

    Places may have another name; that they hold the same data and autoencoder is checked with the latents.
    """
    if not (folder / RUN_CONFIG).is_file():
        return
    stored, free = TrainingConfig.of_run(folder), ("num_threads", "device", "data", "vae")
    names = [field.name for field in dataclasses.fields(config) if field.name not in free]
    # A run stores what "auto" came to on its machine.
    others = [
        f"{name}={getattr(stored, name)!r}"
        for name in names
        if getattr(config, name) not in ("auto", getattr(stored, name))
    ]
    if others:
        raise CannotCompare(f"{folder} holds another run, with {', '.join(others)}: take another --runs")


def train(config: TrainingConfig, folder: Path) -> None:
    """Train a run to its end, or go on with it.

    Raises:
        CannotCompare: it was stopped before.
    """
    trainer = Trainer(config, folder, resume=True)
    if trainer.step < config.steps:
        trainer.run()
    else:
        # a kill may have come between its last checkpoint and this
        trainer.pipeline().save_pretrained(folder / "model")
    if trainer.step < config.steps:
        raise CannotCompare(f"{folder} was stopped at step {trainer.step} of {config.steps}; the same command goes on")


# Quality


def fixed_batches(data: LatentDataset, config: TrainingConfig, options: argparse.Namespace) -> list[Batch]:
    """What the loss is measured on; drawn with another seed than training's."""
    share = Share(options.batch_size, options.batch_size)
    draws = Draws(options.seed + 1, conditioning=Conditioning(load_tokenizer(config.tokenizer)))
    stream = BatchStream(data, None, config.model, share, draws)
    batches = list(itertools.islice(stream, options.samples // options.batch_size))
    stream.close()
    for batch in () if config.model.num_classes else batches:
        batch.labels_B = None
    return batches


@torch.no_grad()
def image_loss(model: MADFormer, batches: Sequence[Batch], schedule: NoiseSchedule) -> float:
    """Of a model at its split, mean over batches of one size."""
    losses = []
    for batch in (batch.to(model.device) for batch in batches):
        losses.append(training_losses(model, batch, schedule, LossWeights(hidden=0.0)).image.item())
    return statistics.fmean(losses)


class Captions:
    """Those that pictures are drawn for, evenly from all over the data, and the images to find them among."""

    def __init__(self, data: LatentDataset, count: int, config: TrainingConfig) -> None:
        assert config.model.text is not None
        samples = [data.read(index) for index in range(len(data))]
        self.means_NCHW = torch.stack([sample["mean"] for sample in samples])
        texts = [sample["caption"] for sample in samples]
        self.texts_NP = load_tokenizer(config.tokenizer).encode(texts, config.model.text.length)
        self.own_K = torch.arange(count) * len(data) // count
        self.prompts = [texts[index] for index in self.own_K]

    def score(self, pipeline: MADFormerPipeline, latents_KCHW: Tensor) -> Retrieval:
        """Of latents for all prompts, as the pictures that they are decoded to."""
        pixels_KCHW = decode(pipeline.vae, latents_KCHW)
        drawn_KCHW = encode(pipeline.vae, pixels_KCHW * 2 - 1)[0]
        return retrieval(drawn_KCHW.cpu(), self.own_K, self.means_NCHW, self.texts_NP)


def draw(pipeline: MADFormerPipeline, prompts: Sequence[str], options: argparse.Namespace, seed: int) -> Tensor:
    """Latents ``(B, C, H, W)`` of a picture for every prompt, number ``i`` from ``seed + i``."""
    told: dict[str, Any] = {"prompt": list(prompts), "guidance_scale": options.guidance}
    return pipeline(num_inference_steps=options.sample_steps, seed=seed, output_type="latent", **told).images


# Evaluation


def load(folder: Path, split: int, device: str) -> MADFormerPipeline:
    """Averaged weights at a split. Every split is a pipeline of its own: they are to be timed in turns."""
    pipeline = MADFormerPipeline.from_pretrained(folder / "model", device=device)
    pipeline.transformer.set_split(split)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def evaluate(
    runs: Mapping[str, Path], data: LatentDataset, config: TrainingConfig, options: argparse.Namespace
) -> tuple[list[Row], Retrieval]:
    """A row for every model and split, and what the autoencoder makes of the images themselves."""
    places = {
        row_name(name, split): (name, split)
        for name in runs
        for split in (sorted(options.splits) if name == ELASTIC else [int(name.removeprefix("fixed-"))])
    }
    pipelines = {row: load(runs[name], split, options.device) for row, (name, split) in places.items()}
    schedule = noise_schedule(config.model.prediction_type, **config.noise_options())
    batches, captions = fixed_batches(data, config, options), Captions(data, options.captions, config)
    groups = [slice(first, first + options.batch_size) for first in range(0, options.captions, options.batch_size)]
    losses, retrievals = {}, {}
    for row, pipeline in pipelines.items():
        losses[row] = image_loss(pipeline.transformer, batches, schedule)
        latents = [draw(pipeline, captions.prompts[group], options, options.seed + group.start) for group in groups]
        retrievals[row] = captions.score(pipeline, torch.cat(latents))
        print(f"{row}: image loss {losses[row]:.4f}, {retrievals[row].values()}", file=sys.stderr)
    batch = captions.prompts[: options.batch_size]
    spreads = interleaved(
        {row: partial(draw, pipeline, batch, options, 0) for row, pipeline in pipelines.items()},
        options.repeats,
        torch.device(options.device),
    )
    passes = 1 if options.guidance == 1 else 2
    rows = [
        Row(
            model=name,
            diffusion_layers=split,
            trained_steps=trained_steps(runs[name]),
            image_loss=losses[row],
            retrieval=retrievals[row],
            seconds_per_image=Spread.of([taken / len(batch) for taken in spreads[row].samples]),
            flops_per_image=passes * Work.of(pipelines[row].transformer).flops(options.sample_steps),
        )
        for row, (name, split) in places.items()
    ]
    own = captions.means_NCHW[captions.own_K]
    return rows, captions.score(next(iter(pipelines.values())), own)


def trained_steps(folder: Path) -> int:
    return int(whole_checkpoints(folder / "checkpoints")[-1].name.removeprefix("step-"))


# The record


def metrics(rows: Sequence[Row], ceiling: Retrieval) -> dict[str, float]:
    values = {f"{AUTOENCODER}_{figure}": value for figure, value in ceiling.values().items()}
    for row in rows:
        values |= {f"{row.name}_{figure}": value for figure, value in row.retrieval.values().items()}
        values[f"{row.name}_image_loss"] = row.image_loss
        values[f"{row.name}_seconds_per_image"] = row.seconds_per_image.median
        values[f"{row.name}_gflop_per_image"] = row.flops_per_image / 1e9
    return values


def print_table(rows: Sequence[Row], ceiling: Retrieval) -> None:
    head = ("steps", "image loss", "at 1", "at 10", "median rank", "distance", "s/image", "GFLOP/image")
    print(f"{'':<12}" + "".join(f"{name:>12}" for name in head))

    def scores(found: Retrieval) -> str:
        at_1, at_10, rank, distance = found.values().values()
        return f"{at_1:>12.1%}{at_10:>12.1%}{rank:>12.1f}{distance:>12.4f}"

    for row in rows:
        cost = f"{row.seconds_per_image.median:>12.3f}{row.flops_per_image / 1e9:>12.2f}"
        print(f"{row.name:<12}{row.trained_steps:>12}{row.image_loss:>12.4f}{scores(row.retrieval)}{cost}")
    print(f"{AUTOENCODER:<12}{'':>24}{scores(ceiling)}")


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Quality against the seconds of an image: the fixed models' points, the elastic one's curve.

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "image_loss": "image loss",
        "precision_at_10": "caption among the ten nearest",
        "own_distance": "distance",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4.2), layout="constrained")
    for axis, (quality, label) in zip(axes, panels.items(), strict=True):
        for elastic, style, legend in ((False, "s", "fixed"), (True, "o-", "elastic")):
            rows = [row for row in record["rows"] if (row["model"] == ELASTIC) == elastic]
            cost = [row["seconds_per_image"]["median"] for row in rows]
            values = [_number({**row, **row["retrieval"]}[quality]) for row in rows]
            axis.plot(cost, values, style, label=legend)
            for row, x, y in zip(rows, cost, values, strict=True):
                axis.annotate(str(row["diffusion_layers"]), (x, y), xytext=(4, 4), textcoords="offset points")
        axis.set(xlabel="seconds an image", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, title="diffusion layers")
    figure.suptitle(f"{record['preset']}, {record['steps']} steps of training; {record['device']}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def _number(figure: Any) -> float:
    """Without its interval; older records have none."""
    return figure["value"] if isinstance(figure, Mapping) else figure


def run(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Train what is not trained, evaluate; returns the record.

    Raises:
        CannotCompare, ValueError, OSError: in one line.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    configs = {name: run_config(name, options) for name in names}
    runs = {name: options.runs / name for name in names}
    for name, config in configs.items():
        check_same(config, runs[name])
    config = configs[names[0]]
    data = encoded(config, options.data)
    if not 1 <= options.captions <= len(data):
        raise CannotCompare(f"--captions {options.captions} must be in 1..{len(data)}, the number of images")
    if not options.evaluate:
        for name in names:
            train(configs[name], runs[name])
        if options.only:
            return {"metrics": {f"{options.only}_trained_steps": options.steps}}
    runs = {name: folder for name, folder in runs.items() if (folder / "model" / "model_index.json").is_file()}
    if not runs:
        raise CannotCompare(f"{options.runs} holds none of {', '.join(names)}")
    rows, ceiling = evaluate(runs, data, config, options)
    print_table(rows, ceiling)
    settings = ("preset", "steps", "seed", "samples", "captions", "sample_steps", "guidance", "batch_size", "repeats")
    return {
        **environment("elastic", torch.device(options.device), ("diffusers",)),
        **{name: getattr(options, name) for name in settings},
        "num_images": len(data),
        "rows": [asdict(row) for row in rows],
        AUTOENCODER: asdict(ceiling),
        "metrics": metrics(rows, ceiling),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data", default="data/emoji64", help="images with captions (data/emoji64)")
    add("--vae", default="assets/emoji64/vae", help="folder or hub id of the autoencoder (assets/emoji64/vae)")
    add("--image-size", type=int, default=64, help="pixels along a side (64)")
    add("--preset", default="emoji64", help="of the model, which gets the caption in bytes (emoji64)")
    add("--runs", type=Path, required=True, help="folder of the runs and of the latents")
    add("--splits", type=int, nargs="+", default=[1, 3, 5], help="numbers of diffusion layers (1 3 5)")
    add("--steps", type=int, default=1200, help="of training (1200)")
    add("--only", metavar="NAME", help="one model: fixed-1, ..., or elastic")
    add("--evaluate", action="store_true", help="train nothing")
    add("--samples", type=int, default=512, help="that the loss is measured on (512)")
    add("--captions", type=int, default=128, help="that pictures are drawn for (128)")
    add("--sample-steps", type=int, default=25, help="denoising steps of a block (25)")
    add("--guidance", type=float, default=2.0, help="of classifier-free guidance (2)")
    add("--batch-size", type=int, default=16, help="images at once, in evaluation (16)")
    add("--repeats", type=int, default=5, help="rounds that are timed (5)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=0, help="of torch on a CPU; 0 leaves torch's choice")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, metavar="RECORD.json", help="in place of benchmarks/results/<device>")
    add("--plot", type=Path, metavar="FILE.png", help="draw quality against cost")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "repeats", "samples"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    if options.samples % options.batch_size:
        parser.error(f"--samples {options.samples} must be a multiple of --batch-size {options.batch_size}")
    if options.only and options.only not in model_names(options):
        parser.error(f"--only {options.only} must be one of {', '.join(model_names(options))}")
    return options


def model_names(options: argparse.Namespace) -> list[str]:
    return [*(f"fixed-{split}" for split in sorted(options.splits)), ELASTIC]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    names = [options.only] if options.only else model_names(options)
    out = options.out or results_folder(torch.device(options.device)) / "elastic.json"
    kept = None if options.only and not options.evaluate else out
    status = finish("elastic", lambda: run(options, names), kept, errors=(CannotCompare, ValueError, OSError))
    if status == 0 and kept is not None and options.plot:
        plot(json.loads(kept.read_text()), options.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
