"""``madformer bench``: how fast a model samples here, what the time goes to, and what this machine's limits are."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madformer.cli.request import Precision, Request, resolved

if TYPE_CHECKING:
    from madformer.pipeline import MADFormerPipeline

PACKAGES = ("diffusers", "triton")


@dataclass(frozen=True, kw_only=True)
class Bench(Request):
    """Latency and throughput of sampling, pictures included where the model has an autoencoder.

    Each row is a batch size and a step count: seconds of a batch (the latency), images a second, and where the time
    goes: autoregressive passes, the Transformer's and the U-Net's part of the denoising steps, the autoencoder, and the
    host. Beside it stand two floors: the operations of the batch over the rate of a large matrix product measured here,
    and the bytes of the weights over the rate of a large copy; how much of the first is reached; and what the engine
    takes beyond the network's passes called directly. madformer.measuring.sampling says how each is measured.

    examples:
      madformer bench --model assets/emoji64
      madformer bench --preset ffhq1024 --batch-sizes 1,4,16,64 --steps 25 --plot bench.png --out bench.json
    """

    model: str | None = None  # folder (or hub id) that save_pretrained or convert wrote
    preset: str | None = None  # in its place: a configuration with random weights, latents only: ffhq1024, emoji64, ...
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)  # images at once, a row each
    steps: tuple[int, ...] = (10, 25)  # denoising steps of a block, a row each
    precision: Precision = "auto"  # exact is fp32, default bf16, fp8 faster on GPUs that have it; auto takes the faster
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    repeats: int = 5  # timed rounds of every row, of which the median is shown; more on a machine that others use
    budget: float = 600  # begin no row after so many seconds
    plot: Path | None = None  # PNG to draw the curve and the shares of time into
    out: Path | None = None  # JSON file for everything that was measured
    json: bool = False  # print the whole record as one JSON object and no table

    def run(self) -> None:
        _check(self)
        from madformer.engine.options import SamplingOptions
        from madformer.engine.sampler import Sampler
        from madformer.files.atomic import write_json
        from madformer.measuring import report
        from madformer.measuring.sampling import Roof, sweep

        request = resolved(self)
        pipeline = _load(request)
        model = pipeline.transformer
        steps = sorted(set(request.steps))
        sampler = Sampler(model, pipeline.scheduler)
        for number in steps:
            sampler.plan(1, SamplingOptions(number))  # to refuse a step count before minutes of work
        roof = Roof.measure(model.device, model.dtype)
        record = _head(request, pipeline, roof)
        show = (lambda text: None) if request.json else (lambda text: print(text, flush=True))
        show(_title(record))
        show(f"matrix products {roof.matmul_flops / 1e12:.3g} TFLOP/s, copies {roof.copy_bytes / 1e9:.3g} GB/s\n")
        show(report.heading())
        result = sweep(
            sampler,
            sorted(set(request.batch_sizes)),
            steps,
            roof,
            vae=pipeline.vae,
            repeats=request.repeats,
            budget=request.budget,
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
        if request.plot:
            report.plot(result.rows, _title(record), request.plot)
        if request.out:
            write_json(request.out, record)
        print(json.dumps(record if request.json else record["metrics"]))


def _check(request: Bench) -> None:
    """Everything that can be wrong with the arguments, before minutes of work."""
    if (request.model is None) == (request.preset is None):
        raise ValueError("give either --model FOLDER or --preset NAME")
    for name, numbers in (("batch-sizes", request.batch_sizes), ("steps", request.steps)):
        if not numbers or min(numbers) < 1:
            raise ValueError(f"--{name} {','.join(map(str, numbers))} must be whole numbers from 1 on")
    for name, value, low in (("repeats", request.repeats, 1), ("budget", request.budget, 0)):
        if not value >= low:
            raise ValueError(f"--{name} {value} must be at least {low}")
    if request.plot and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install matplotlib")
    from madformer.files.atomic import check_writable

    for path in filter(None, (request.plot, request.out)):
        check_writable(path.parent)
        if path.is_dir():
            raise ValueError(f"{path} is a folder; --plot and --out name files")


def _load(request: Bench) -> MADFormerPipeline:
    """The stored model, or a preset's with random weights and without an autoencoder, in this precision."""
    import torch

    from madformer.config import preset
    from madformer.engine.precision import PRECISIONS, apply
    from madformer.engine.schedulers import default_scheduler
    from madformer.model import MADFormer
    from madformer.pipeline import MADFormerPipeline

    device = request.device
    if request.model is not None:
        dtype = PRECISIONS[request.precision].dtype
        pipeline = MADFormerPipeline.from_pretrained(request.model, dtype=torch.float32, vae_dtype=dtype, device=device)
    else:
        torch.manual_seed(0)
        config = preset(str(request.preset))
        with torch.device(device):
            model = MADFormer(config).to(device)
        pipeline = MADFormerPipeline(model, None, default_scheduler(config.prediction_type))
    pipeline.transformer = apply(pipeline.transformer, request.precision)
    return pipeline


def _head(request: Bench, pipeline: MADFormerPipeline, roof: Any) -> dict[str, Any]:
    from dataclasses import asdict

    from madformer.machine import environment
    from madformer.measuring.bare import Work

    model = pipeline.transformer
    return {
        **environment("bench", model.device, PACKAGES),
        "model": request.model or f"preset {request.preset}, random weights",
        "config": model.config.to_dict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "autoencoder": pipeline.vae is not None,
        "scheduler": type(pipeline.scheduler).__name__,
        "precision": request.precision,
        "repeats": request.repeats,
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
