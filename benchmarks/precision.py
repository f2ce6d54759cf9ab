"""What modes that are faster cost in quality, and what they take: each against ``exact``, on the same seeds.

    python -m benchmarks.precision [--model FOLDER] [--prompts FILE] [--num-images 64] [--out RECORD.json]

The modes are the precisions, and ``exact`` with the diffusion layers in every second and every third step alone
(``refresh_every``). Every mode draws the same images through the pipeline, its autoencoder in the mode's dtype. Two
figures of merit: PSNR of the decoded pictures (peak 1), which is what one sees, and of the latents (peak: the range of
the exact ones), which the autoencoder does not smooth. Modes take turns, batch by batch, so that what slows the machine
slows them alike. A mode that this device cannot run is in the record with the reason.

The last line on stdout is the metrics as JSON. Exit status 1: the model cannot be read, or a mode gives no numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks import ROOT
from benchmarks.record import CannotCompare, environment, finish, results_folder
from benchmarks.timing import Spread, seconds
from madformer.bulk import Prompts
from madformer.engine.options import SamplingOptions
from madformer.engine.precision import PRECISIONS, apply, refusal
from madformer.evaluation.extractors import Extractor
from madformer.evaluation.fidelity import Pictures, fidelity
from madformer.files.atomic import atomic_path, check_writable
from madformer.pipeline import MADFormerPipeline
from madformer.vae import to_uint8

EXACT = "exact"
MODES: dict[str, tuple[str, int]] = {
    **{precision: (precision, 1) for precision in PRECISIONS},
    **{f"every_{steps}": (EXACT, steps) for steps in (2, 3)},
}
"""Precision and ``refresh_every`` of each."""


@dataclass(frozen=True)
class Drawn(Pictures):
    """What a mode drew, and the seconds of every batch."""

    seconds: tuple[float, ...]


def load(model: str, precision: str, device: torch.device) -> MADFormerPipeline:
    """The stored weights in fp32, made into the mode's, and the autoencoder in its dtype."""
    dtype = PRECISIONS[precision].dtype
    pipeline = MADFormerPipeline.from_pretrained(model, dtype=torch.float32, vae_dtype=dtype, device=device)
    if pipeline.vae is None:
        raise CannotCompare(f"{model} holds no autoencoder: there are no pictures to compare")
    pipeline.transformer = apply(pipeline.transformer, precision)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipelines: Mapping[str, MADFormerPipeline],
    prompts: Prompts,
    num_images: int,
    sampling: SamplingOptions,
    batch_size: int,
    seed: int,
) -> dict[str, Drawn]:
    """``num_images`` in every mode, image ``i`` from ``seed + i``; each has drawn a batch before it is timed."""
    batches: dict[str, list[tuple[Tensor, Tensor, float]]] = {name: [] for name in pipelines}

    def batch(name: str, first: int) -> tuple[Tensor, Tensor, float]:
        drawn: list[Tensor] = []
        pipeline = pipelines[name]
        options = replace(sampling, refresh_every=MODES[name][1]).keywords()
        options |= prompts.options(range(first, min(first + batch_size, num_images)))
        options |= {"seed": seed + first, "output_type": "latent"}

        def run() -> None:
            latents = pipeline(**options).images
            drawn.extend((latents, pipeline.decode(latents, "pt")))

        taken = seconds(run, pipeline.transformer.device)
        return drawn[0].cpu(), drawn[1].cpu(), taken

    for name in pipelines:
        batch(name, 0)
    for first in range(0, num_images, batch_size):
        for name in pipelines:
            batches[name].append(batch(name, first))
            print(f"{name}: {first + len(batches[name][-1][0])} of {num_images} images", file=sys.stderr)
    return {
        name: Drawn(torch.cat(latents), torch.cat(pictures), taken)
        for name, (latents, pictures, taken) in ((name, zip(*rows, strict=True)) for name, rows in batches.items())
    }


def compare(actual: Drawn, exact: Drawn, extractor: Extractor | None = None) -> dict[str, float]:
    """How far a mode is from ``exact``, by the names of :class:`~madformer.evaluation.fidelity.Fidelity`.

    Raises:
        CannotCompare: it gave something that is not a number.
    """
    try:
        found = fidelity(actual, exact, extractor)
    except FloatingPointError as error:
        raise CannotCompare(str(error)) from error
    return {name: value for name, value in asdict(found).items() if value is not None}


def latent_peak(exact: Drawn) -> float:
    return (exact.latents.max() - exact.latents.min()).item()


def metrics(
    errors: Mapping[str, Mapping[str, float]], spreads: Mapping[str, Spread], batch_size: int
) -> dict[str, float]:
    values = {f"{mode}_{name}": value for mode, figures in errors.items() for name, value in figures.items()}
    return values | {f"{mode}_seconds_per_image": spread.median / batch_size for mode, spread in spreads.items()}


def print_table(record: Mapping[str, Any]) -> None:
    print(f"{'':<9}{'pictures':>12}{'worst one':>12}{'latents':>12}{'largest':>10}{'mean':>10}{'s/image':>10}")
    for mode in record["seconds"]:
        figures = record["errors"].get(mode)
        cells = f"{'reference':>56}"
        if figures:
            psnrs = ("picture_psnr_db", "worst_picture_psnr_db", "latent_psnr_db")
            cells = "".join(f"{figures[name]:>9.1f} dB" for name in psnrs)
            cells += f"{figures['largest_latent_difference']:>10.3f}{figures['mean_latent_difference']:>10.4f}"
        print(f"{mode:<9}{cells}{record['metrics'][f'{mode}_seconds_per_image']:>10.3f}")
    for mode, why in record["not_run"].items():
        print(f"{mode:<9}not run: {why}")


def save_pictures(drawn: Mapping[str, Drawn], file: Path, columns: int = 16) -> None:
    """The first images, one row a mode."""
    rows = [torch.cat(list(to_uint8(mode.pictures[:columns])), dim=1) for mode in drawn.values()]
    with atomic_path(file) as path:
        Image.fromarray(torch.cat(rows).numpy()).save(path, "PNG")


def run(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Draws, compares, prints the table; returns the record, for which ``out`` must have a place.

    Raises:
        CannotCompare, ValueError, OSError: there is nothing to report, in one line.
    """
    if not 1 <= options.batch_size <= options.num_images:
        raise ValueError(f"--batch-size {options.batch_size} must be in 1..{options.num_images}, --num-images")
    check_writable(out.parent)
    device = torch.device(options.device)
    refused = {mode: refusal(precision, device) for mode, (precision, _) in MODES.items()}
    pipelines = {mode: load(options.model, MODES[mode][0], device) for mode, why in refused.items() if why is None}
    texts = options.prompts.read_text(encoding="utf-8").splitlines() if options.prompts else ()
    sampling = SamplingOptions(options.steps, options.guidance)
    prompts = Prompts.of(pipelines[EXACT].reader, texts, guided=sampling.guidance > 1)
    drawn = draw(pipelines, prompts, options.num_images, sampling, options.batch_size, options.seed)
    if options.pictures:
        save_pictures(drawn, options.pictures)
    errors = {mode: compare(images, drawn[EXACT]) for mode, images in drawn.items() if mode != EXACT}
    # The last batch may be a smaller one.
    whole = options.num_images // options.batch_size
    spreads = {mode: Spread.of(images.seconds[:whole]) for mode, images in drawn.items()}
    model = Path(options.model).resolve()
    record = {
        **environment("precision", device, ("diffusers",)),
        "model": str(model.relative_to(ROOT)) if model.is_relative_to(ROOT) else model.name,
        "num_images": options.num_images,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "prompts": asdict(prompts) | {"guidance_scale": sampling.guidance},
        "scheduler": type(pipelines[EXACT].scheduler).__name__,
        "latent_peak": latent_peak(drawn[EXACT]),
        "errors": errors,
        "seconds": {mode: asdict(spread) for mode, spread in spreads.items()},
        "not_run": {mode: why for mode, why in refused.items() if why is not None},
        "metrics": metrics(errors, spreads, options.batch_size),
    }
    print_table(record)
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "assets" / "emoji64"), help="folder that save_pretrained wrote")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, for a model with text")
    parser.add_argument("--guidance", type=float, default=1.0, metavar="SCALE", help="default 1: none")
    parser.add_argument("--num-images", type=int, default=64, help="how many (default 64)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps of every block (default 25)")
    parser.add_argument("--batch-size", type=int, default=16, help="images at once (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image (default 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="RECORD.json", help="in place of benchmarks/results/<device>")
    parser.add_argument("--pictures", type=Path, metavar="FILE.png", help="the first 16 images, one row a mode")
    options = parser.parse_args(arguments)
    out = options.out or results_folder(torch.device(options.device)) / "precision.json"
    return finish("precision", lambda: run(options, out), out, errors=(CannotCompare, ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
