"""What the engine's modes cost in quality: each beside ``exact`` on a sweep's own draws.

    python -m benchmarks.experiments.modes emoji-blocks "4 blocks" --runs runs/emoji32 [--out RECORD.json]

Every training of one of a sweep's models draws the sweep's pictures again in each mode of ``benchmarks.precision``
(precisions, and the diffusion layers in every second and every third step alone), from the same seeds. A row is a mode,
a training, a number of steps and a draw: the sweep's metrics against its reference, how far the pictures are from those
of ``exact``, and the seconds of an image. The modes take turns, batch by batch.

The last line on stdout is the metrics as JSON: by mode and number of steps the mean of KID less that of ``exact``. Exit
status 1: no sweep of the name, no model of the label, or one that ``--runs`` does not hold.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments import FIGURE, SWEEPS
from benchmarks.experiments.limits import Pictures
from benchmarks.precision import EXACT, MODES, compare, draw, load
from benchmarks.record import CannotCompare, environment, finish
from madformer.bulk import Prompts
from madformer.engine.options import SamplingOptions
from madformer.evaluation import (
    Extractor,
    FeatureSet,
    ImageSet,
    Statistics,
    evaluate,
    extract,
    load_extractor,
    open_reference,
)
from madformer.sweeps import Sweep
from madformer.sweeps.checking import what_to_draw
from madformer.sweeps.config import Model
from madformer.sweeps.folder import SweepFolder
from madformer.vae import to_uint8

Row = dict[str, Any]


def trainings(folder: SweepFolder, label: str) -> list[Model]:
    """The models of this label, which must all be in the folder.

    Raises:
        CannotCompare: there is none, or one is not trained.
    """
    found = [model for model in folder.sweep.all_models if model.label == label]
    if not found:
        labels = ", ".join(dict.fromkeys(model.label for model in folder.sweep.all_models))
        raise CannotCompare(f"no model is called {label!r}: there are {labels}")
    for model in found:
        if not folder.is_there(model):
            raise CannotCompare(f"{folder.path} does not hold training {model.seed} of {label!r}")
    return found


def rows_of(
    folder: SweepFolder,
    model: Model,
    reference: ImageSet | Statistics,
    target: FeatureSet | Statistics,
    extractor: Extractor,
    device: torch.device,
) -> Iterator[Row]:
    """Of one training: a row for each mode, number of steps and draw; ``target`` is what there is of the reference."""
    sample, judging = folder.sweep.sample, folder.sweep.evaluate
    pipelines = {name: load(folder.model(model), precision, device) for name, (precision, _) in MODES.items()}
    exact = pipelines[EXACT]
    prompts = Prompts.of(exact.reader, *what_to_draw(exact.transformer.config, folder.sweep, reference))
    for steps, seed in itertools.product(sample.steps, sample.seeds):
        # the seeds that the sweep's draw of this number has
        first = seed * judging.num_images
        drawn = draw(pipelines, prompts, judging.num_images, SamplingOptions(steps), sample.batch_size, first)
        for name, images in drawn.items():
            pictures = to_uint8(images.pictures).numpy()
            found = evaluate(Pictures(name, pictures), target, extractor, metrics=list(judging.metrics))
            scores = {metric: score.estimate.value for metric, score in found.scores.items()}
            errors = {} if name == EXACT else compare(images, drawn[EXACT], extractor)
            yield {
                "mode": name, "training_seed": model.seed, "steps": steps, "sampling_seed": seed,
                "seconds_per_image": sum(images.seconds) / judging.num_images, **scores, **errors,
            }  # fmt: skip


def less_exact(rows: Sequence[Mapping[str, Any]], mode: str, steps: int, figure: str) -> list[float]:
    """A mode's figure less that of ``exact`` from the same seeds: the mean over draws of each training."""
    values: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row["steps"] == steps:
            values.setdefault((row["mode"], row["training_seed"]), []).append(row[figure])
    seeds = sorted(seed for name, seed in values if name == mode)
    return [statistics.fmean(values[mode, seed]) - statistics.fmean(values[EXACT, seed]) for seed in seeds]


def measure(options: argparse.Namespace) -> Row:
    file = SWEEPS / f"{options.sweep}.toml"
    if not file.is_file():
        raise CannotCompare(f"no sweep is called {options.sweep!r}: {SWEEPS} has none")
    sweep = Sweep.of(tomllib.loads(file.read_text()))
    if sweep.tune or sweep.sample.guidance != (1.0,):
        raise CannotCompare(f"{file.name} has guidance, and modes are compared without")
    folder, device, judging = SweepFolder(options.runs, sweep), torch.device("cpu"), sweep.evaluate
    models = trainings(folder, options.label)
    extractor = load_extractor(judging.extractor, judging.weights)
    reference = open_reference(judging.reference, judging.num_reference, holdout=judging.holdout)
    target = reference if isinstance(reference, Statistics) else extract(reference, extractor)
    rows = [row for model in models for row in rows_of(folder, model, reference, target, extractor, device)]
    metrics = {
        f"{mode}_{steps}_steps": statistics.fmean(less_exact(rows, mode, steps, FIGURE))
        for mode in MODES
        if mode != EXACT
        for steps in sweep.sample.steps
    }
    about = environment("modes", device, ("diffusers",))
    told = {"sweep": file.name, "label": options.label, "num_images": judging.num_images}
    return about | told | {"rows": rows, "metrics": metrics}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sweep", help="name of a file of benchmarks/experiments, without its ending")
    parser.add_argument("label", help="of the model")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the sweep")
    parser.add_argument("--out", type=Path, help="where to write the record")
    options = parser.parse_args(arguments)
    return finish("modes", lambda: measure(options), options.out, errors=(CannotCompare, ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
