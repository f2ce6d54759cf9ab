"""``madformer bench``: how fast a model samples here, what the time goes to, and what this machine's limits are."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madformer.machine import device_of, precision_of

if TYPE_CHECKING:
    from madformer.pipeline import MADFormerPipeline

PRECISIONS = ("auto", "exact", "default", "fp8")
PACKAGES = ("diffusers", "triton")

DESCRIPTION = """Latency and throughput of sampling, pictures included where the model has an autoencoder.

Each row is a batch size and a step count: seconds of a batch (the latency), images a second, and where the time goes:
autoregressive passes, the Transformer's and the U-Net's part of the denoising steps, the autoencoder, and the host.
Beside it stand two floors: the operations of the batch over the rate of a large matrix product measured here, and the
bytes of the weights over the rate of a large copy; how much of the first is reached; and what the engine takes beyond
the network's passes called directly. madformer.benchmark.sampling says how each is measured."""

EXAMPLES = """examples:
  madformer bench --model assets/emoji64
  madformer bench --preset ffhq1024 --batch-sizes 1,4,16,64 --steps 25 --plot bench.png --out bench.json
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure latency and throughput of sampling",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="folder (or hub id) that save_pretrained or convert wrote")
    add("--preset", help="in its place: a configuration with random weights, latents only: ffhq1024, emoji64, ...")
    add("--batch-sizes", type=_numbers, default=[1, 2, 4, 8, 16], metavar="1,2,4", help="default 1,2,4,8,16")
    add("--steps", type=_numbers, default=[10, 25], metavar="10,25", help="denoising steps of a block, default 10,25")
    add("--precision", choices=PRECISIONS, default="auto", help="exact is fp32, default bf16; auto takes the faster")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--repeats", type=int, default=5, help="timed rounds of every row (default 5)")
    add("--budget", type=float, default=600, metavar="SECONDS", help="begin no row after that (default 600)")
    add("--plot", type=Path, metavar="FILE.png", help="draw the curve and the shares")
    add("--out", type=Path, metavar="RECORD.json", help="write everything that was measured")
    add("--json", action="store_true", help="print the whole record as one JSON object and no table")
    parser.set_defaults(run=run)


def _numbers(text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers from 1 on, with commas between them")
    return numbers


def run(args: argparse.Namespace) -> None:
    _check(args)
    from madformer.benchmark import report
    from madformer.benchmark.sampling import Roof, sweep
    from madformer.engine.sampler import Sampler
    from madformer.files.atomic import write_json

    device = device_of(args.device)
    precision = precision_of(args.precision, device)
    pipeline = _load(args, precision, device)
    model = pipeline.transformer
    sampler = Sampler(model, pipeline.scheduler)
    for steps in args.steps:
        sampler.plan(1, steps)  # to refuse a step count before minutes of work
    roof = Roof.measure(model.device, model.dtype)
    record = _head(args, pipeline, precision, roof)
    show = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    show(_title(record))
    show(f"matrix products {roof.matmul_flops / 1e12:.3g} TFLOP/s, copies {roof.copy_bytes / 1e9:.3g} GB/s\n")
    show(report.heading())
    result = sweep(
        sampler,
        args.batch_sizes,
        args.steps,
        roof,
        vae=pipeline.vae,
        repeats=args.repeats,
        budget=args.budget,
        on_row=lambda row: show(report.line(row)),
    )
    if not result.rows:
        raise ValueError(f"nothing was measured: {'; '.join(result.stopped + result.not_measured)}")
    for text in report.ending(result):
        show(text)
    record |= {
        "rows": [row.to_dict() for row in result.rows],
        "stopped": result.stopped,
        "not_measured": result.not_measured,
        "metrics": report.metrics(result.rows, roof),
    }
    if args.plot:
        report.plot(result.rows, _title(record), args.plot)
    if args.out:
        write_json(args.out, record)
    print(json.dumps(record if args.json else record["metrics"]))


def _check(args: argparse.Namespace) -> None:
    """Everything that can be wrong with the arguments, before minutes of work."""
    if (args.model is None) == (args.preset is None):
        raise ValueError("give either --model FOLDER or --preset NAME")
    for name, value, low in (("repeats", args.repeats, 1), ("budget", args.budget, 0)):
        if not value >= low:
            raise ValueError(f"--{name} {value} must be at least {low}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install matplotlib")
    from madformer.files.atomic import check_writable

    for path in filter(None, (args.plot, args.out)):
        check_writable(path.parent)
        if path.is_dir():
            raise ValueError(f"{path} is a folder; --plot and --out name files")


def _load(args: argparse.Namespace, precision: str, device: str) -> MADFormerPipeline:
    """The stored model, or a preset's with random weights and without an autoencoder, in this precision."""
    import torch

    from madformer.config import preset
    from madformer.engine.precision import PRECISIONS, apply
    from madformer.engine.schedulers import default_scheduler
    from madformer.model import MADFormer
    from madformer.pipeline import MADFormerPipeline

    if args.model is not None:
        dtype = PRECISIONS[precision].dtype
        pipeline = MADFormerPipeline.from_pretrained(args.model, dtype=torch.float32, vae_dtype=dtype, device=device)
    else:
        torch.manual_seed(0)
        config = preset(args.preset)
        with torch.device(device):
            model = MADFormer(config).to(device)
        pipeline = MADFormerPipeline(model, None, default_scheduler(config.prediction_type))
    pipeline.transformer = apply(pipeline.transformer, precision)
    return pipeline


def _head(args: argparse.Namespace, pipeline: MADFormerPipeline, precision: str, roof: Any) -> dict[str, Any]:
    from dataclasses import asdict

    from madformer.benchmark.bare import Work
    from madformer.machine import environment

    model = pipeline.transformer
    return {
        **environment("bench", model.device, PACKAGES),
        "model": args.model or f"preset {args.preset}, random weights",
        "config": model.config.to_dict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "autoencoder": pipeline.vae is not None,
        "scheduler": type(pipeline.scheduler).__name__,
        "precision": precision,
        "repeats": args.repeats,
        "roof": asdict(roof),
        "work_per_image": asdict(Work.of(model)),
    }


def _title(record: dict[str, Any]) -> str:
    threads = f", {record['threads']} threads" if record["driver"] is None else ""
    pictures = "pictures" if record["autoencoder"] else "latents"
    return (
        f"{record['model']}: {record['parameters'] / 1e6:.1f} M parameters, precision {record['precision']}, "
        f"{record['device']}{threads}, to {pictures}"
    )
