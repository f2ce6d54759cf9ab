"""``madformer sample``: draw images from a model folder, one or a million."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from madformer.cli.loading import load, prepare
from madformer.cli.process import exit_status
from madformer.cli.request import resolved
from madformer.cli.sample_options import SHARD_SIZE, SampleOptions, check, texts_of
from madformer.machine import this_process

if TYPE_CHECKING:
    from PIL import Image

    from madformer.bulk import OutputFolder, Settings
    from madformer.pipeline import MADFormerPipeline


@dataclass(frozen=True, kw_only=True)
class Sample(SampleOptions):
    """Draw images. Image i is the one that seed + i gives, whatever the batch it is drawn in.

    examples:
      madformer sample --model assets/emoji64 --prompt "red apple" --guidance 3 --num-images 16 --grid samples/grid.png
      madformer sample --model runs/emoji64/model --num-images 100 --seed 7 --out samples/
      madformer sample --model CONVERTED --vae VAE_FOLDER --scheduler dpmpp --steps 25 --out samples/
      madformer sample --model TEXT_MODEL "red heart" "a cat" --guidance 3 --num-images 8 --grid grid.png
      madformer sample --model CLASS_MODEL --class "Food & Drink" --guidance 2 --num-images 8 --out samples/

    many images (killed or stopped, the same command goes on; a larger --num-images adds to them):
      madformer sample --model CONVERTED --num-images 50000 --batch-size 32 --format wds --out samples/
      torchrun --no-python --nproc-per-node 8 madformer sample --model CONVERTED --num-images 50000 --out samples/
      madformer sample --ray --model CONVERTED --num-images 50000 --out samples/
    """

    @classmethod
    def parse(cls, words: Sequence[str], prog: str) -> Self:
        # without a number it is 0, one a GPU
        end = words.index("--") if "--" in words else len(words)
        bare = {
            i for i in range(end) if words[i] == "--ray" and not re.fullmatch(r"-?\d+", " ".join(words[i + 1 : i + 2]))
        }
        words = ["--ray=0" if i in bare else word for i, word in enumerate(words)]
        return super().parse(words, prog)

    def run(self) -> None:
        check(self)
        try:
            _sample(self)
        except KeyboardInterrupt as stop:
            if this_process()[0] == 0:
                again = "the same command" + (" without --overwrite" if self.overwrite else "")
                resume = f"; {again} goes on from what is in {self.out}" if self.out else ", nothing was written"
                print(f"madformer sample: interrupted{resume}", file=sys.stderr)
            raise SystemExit(exit_status(stop)) from None


def _sample(request: Sample) -> None:
    from madformer.bulk import OutputFolder, Prompts, Settings
    from madformer.engine.schedule import Schedule
    from madformer.sheets import check_grid

    request = resolved(request, elsewhere=request.ray is not None)
    texts = texts_of(request)
    if request.ray is not None:
        request = _with_whole_paths(request)
    pipeline, lora = load(
        request if request.ray is None else dataclasses.replace(request, device="cpu"), latents=request.latents
    )
    # to refuse a step count before anything is written
    Schedule.of(pipeline.scheduler, request.steps, pipeline.transformer.device)
    sampling = request.sampling
    prompts = Prompts.of(
        pipeline.reader, texts, request.classes, negative_text=request.negative_prompt, guided=sampling.guidance > 1
    )
    settings = Settings.of(
        pipeline,
        sampling,
        precision=request.precision,
        seed=request.seed,
        batch_size=request.batch_size,
        latents=request.latents,
        shard_size=(request.shard_size or SHARD_SIZE) if request.format == "wds" else None,
        prompts=prompts,
        lora=lora,
    )
    if request.grid:
        check_grid(request.num_images, _rows(settings, request), *settings.recorded["size"])
    if request.ray is None:
        _prepare(pipeline, request)
    if not request.json and this_process()[0] == 0:
        print(f"{request.model}: {_describe(pipeline, request)}", file=sys.stderr)
    if request.out:
        _fill(OutputFolder(request.out, settings, request.num_images), pipeline, request)
    else:
        started = time.perf_counter()
        _save_grid(_pictures(pipeline, settings, request), settings, request)
        seconds = time.perf_counter() - started
        _report(request, pipeline, settings, str(pipeline.transformer.device), request.num_images, seconds)


def _fill(folder: OutputFolder, pipeline: MADFormerPipeline, request: Sample) -> None:
    """Draw what the folder lacks; of several processes the one that completes it reports."""
    from madformer import bulk
    from madformer.bulk import ray_data

    rank, world_size = this_process()
    with folder.opened(rank, world_size, overwrite=request.overwrite):
        started = time.perf_counter()
        if request.ray is not None:
            workers, on_gpu = request.ray or None, request.device.startswith("cuda")
            # an actor has a GPU of its own
            theirs = dataclasses.replace(request, device="cuda" if on_gpu else request.device)
            load = functools.partial(_load_and_prepare, theirs)
            drawn = ray_data.draw_missing(load, folder, workers=workers, on_gpu=on_gpu, progress=not request.json)
        else:
            # one batch has a bar over its steps
            progress = request.num_images > request.batch_size and not request.json and rank == 0
            drawn = bulk.draw_missing(pipeline, folder, rank=rank, world_size=world_size, progress=progress)
        seconds = time.perf_counter() - started
        completed = folder.finish()
        if request.grid:
            _save_grid(map(_read_picture, map(folder.file, range(request.num_images))), folder.settings, request)
    if completed or (folder.had_all and rank == 0):
        _report(request, pipeline, folder.settings, request.device, drawn, seconds)


def _pictures(pipeline: MADFormerPipeline, settings: Settings, request: Sample) -> Iterator[Image.Image]:
    """Batch after batch, as they are asked for."""
    from tqdm import tqdm

    shown = request.num_images > request.batch_size and not request.json
    with tqdm(total=request.num_images, desc="sampling", unit="image", disable=not shown) as bar:
        for first in range(0, request.num_images, request.batch_size):
            batch = range(first, min(first + request.batch_size, request.num_images))
            yield from pipeline(**settings.options(batch)).images
            bar.update(len(batch))


def _with_whole_paths(request: Sample) -> Sample:
    """Folders by their whole paths: an actor works in another one."""
    assert request.out is not None
    given = {name: getattr(request, name) for name in ("model", "lora", "vae", "tokenizer")}
    folders = {name: Path(value) for name, value in given.items() if value is not None and Path(value).is_dir()}
    whole: dict[str, Any] = {name: str(folder.absolute()) for name, folder in folders.items()}
    return dataclasses.replace(request, out=request.out.absolute(), **whole)


def _prepare(pipeline: MADFormerPipeline, request: Sample) -> None:
    prepare(pipeline, request)
    alone = request.num_images <= request.batch_size and this_process()[0] == 0
    pipeline.set_progress_bar_config(disable=request.json or not alone, desc="sampling", unit="step")


def _load_and_prepare(request: Sample) -> MADFormerPipeline:
    """For an actor, which has no terminal."""
    pipeline, _ = load(request, latents=request.latents)
    prepare(pipeline, request)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _describe(pipeline: MADFormerPipeline, request: Sample) -> str:
    """One line: what was loaded and what will run it."""
    from madformer.kernels import dispatch

    model = pipeline.transformer
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    last = request.seed + request.num_images - 1
    seeds = f"seed {last}" if last == request.seed else f"seeds {request.seed} to {last}"
    what = f"{parameters:.1f} M parameters, {type(pipeline.scheduler).__name__}, precision {request.precision}, {seeds}"
    if request.ray is not None:
        return f"{what} on Ray's actors"
    layers = dispatch.resolve("cached_attention", model.backend, model.device, model.dtype)
    update = dispatch.resolve("denoise_step", "auto", model.device)
    return f"{what} on {model.device}; layers: {layers}, denoise_step: {update}"


def _rows(settings: Settings, request: Sample) -> int | None:
    """Of a grid: a square, or a row of each prompt's where several have several images."""
    different = settings.prompts.num_different
    return different if 1 < different < request.num_images else None


def _read_picture(file: Path) -> Image.Image:
    """In memory, its file closed again: there may be more of them than a process may open."""
    from PIL import Image

    with Image.open(file) as picture:
        return picture.copy()


def _save_grid(pictures: Iterable[Image.Image], settings: Settings, request: Sample) -> None:
    from madformer.bulk.records import png_text
    from madformer.files.atomic import atomic_path, remove_leftovers_of
    from madformer.sheets import grid_shape, image_grid

    assert request.grid is not None
    rows, columns = grid_shape(request.num_images, _rows(settings, request))
    record = {**settings.record(range(request.num_images)), "rows": rows, "columns": columns}
    grid = image_grid(pictures, _rows(settings, request), count=request.num_images)
    remove_leftovers_of(request.grid)
    with atomic_path(request.grid) as path:
        grid.save(path, "PNG", pnginfo=png_text(record))


def _report(
    request: Sample, pipeline: MADFormerPipeline, settings: Settings, device: str, drawn: int, seconds: float
) -> None:
    """What is there, and what this process did for it."""
    prompts, sampling = settings.prompts, settings.sampling
    written = [str(path) for path in (request.out, request.grid) if path]
    each = seconds / drawn if drawn else None
    if request.json:
        record = {
            "model": request.model,
            "num_images": request.num_images,
            "num_inference_steps": sampling.steps,
            "batch_size": request.batch_size,
            "seed": request.seed,
            "prompts": prompts.texts,
            "negative_prompt": prompts.negative_text,
            "labels": prompts.labels,
            "guidance_scale": sampling.guidance,
            "guidance_interval": sampling.guidance_interval,
            "refresh_every": sampling.refresh_every,
            "scheduler": type(pipeline.scheduler).__name__,
            "precision": settings.precision,
            "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
            "device": device,
            "world_size": this_process()[1],
            "num_drawn": drawn,
            "seconds": round(seconds, 3),
            "seconds_per_image": each and round(each, 4),
            "written": written,
        }
        print(json.dumps(record))
    else:
        did = f"drew {drawn} in {seconds:.1f} s ({each:.2f} s an image)" if each else "all were there"
        process = "this process " if drawn and this_process()[1] > 1 else ""
        print(f"{request.num_images} images in {', '.join(written)}: {process}{did}")
