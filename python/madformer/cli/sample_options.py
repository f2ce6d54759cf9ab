"""The options of ``madformer sample``, and what can be wrong with them."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from madformer.cli.request import Precision, Request
from madformer.engine.options import SamplingOptions
from madformer.engine.schedulers import SHORT_NAMES, scheduler_class
from madformer.machine import this_process
from madformer.seeds import check_seed

SHARD_SIZE = 1000
MAX_BATCH = 65_536


@dataclass(frozen=True, kw_only=True)
class DrawingOptions(SamplingOptions, Request):
    """How a model is loaded, what it draws, and how."""

    model: str | None = None  # folder (or hub id) that save_pretrained or convert wrote
    num_images: int | None = None  # how many to draw; with several prompts or classes they take them in turn
    seed: int = 0  # seed of the first image, from 0 to 2^63 - 1; every next image has the next seed
    batch_size: int = 16  # images drawn at once: more is faster on a GPU, as long as its memory lasts
    diffusion_layers: int | None = None  # where to split an elastic model: fewer is faster; unless given, as trained
    height: int | None = None  # pixels of the images; unless given, as trained: others are extrapolated
    width: int | None = None  # pixels of the images, likewise
    scheduler: Annotated[
        str | None, arg(help=f"noise scheduler in place of the model's own, for fewer steps: {', '.join(SHORT_NAMES)}")
    ] = None
    lora: str | None = None  # adapters to merge into the model, a folder or hub id
    lora_strength: float | None = None  # share of what the adapters change, from 0 (nothing) to 1 (all, unless given)
    vae: str | None = None  # autoencoder in place of the model's own, a folder or hub id
    vae_tile: int | None = None  # decode larger pictures in tiles of so many pixels, for less memory; 1024, or 0: never
    precision: Precision = "auto"  # exact is fp32, default bf16, fp8 for GPUs that have it; auto takes what is faster
    device: str = "auto"  # where to compute: auto (a GPU where there is one), cpu, cuda, cuda:1 ...
    compile: bool = False  # on a processor, compile the denoising step first: minutes once, then it is kept and faster
    backend: Literal["auto", "triton", "reference"] = "auto"  # implementation of the kernels; auto takes the best here

    # what to draw, as an option, which may be repeated
    prompt: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = ()
    prompts: Path | None = None  # what to draw, from a file with one prompt a line, in UTF-8; - reads standard input
    # what to draw, for a model with classes: a name or a number; may be repeated
    classes: Annotated[UseAppendAction[tuple[str, ...]], arg(name="class", metavar="NAME")] = ()
    negative_prompt: str | None = None  # what guidance leads away from; unless given, the empty text
    tokenizer: str | None = None  # in place of the model's own: bytes, a folder or a hub id

    def __post_init__(self) -> None:
        """Nothing is refused before all options are known: :func:`check_drawing` does, by their names."""

    @property
    def sampling(self) -> SamplingOptions:
        """Raises ``ValueError`` where they are not to be had."""
        return SamplingOptions(**{one.name: getattr(self, one.name) for one in fields(SamplingOptions)})


@dataclass(frozen=True, kw_only=True)
class SampleOptions(DrawingOptions):
    model: str = field()  # folder (or hub id) that save_pretrained or convert wrote
    num_images: int = 1  # how many to draw; with several prompts or classes they take them in turn

    # what to draw, for a model with text; one or more
    texts: Annotated[tuple[str, ...], Positional, arg(metavar="PROMPT")] = ()

    out: Path | None = None  # folder for the images, named by their seeds; the same command goes on where it stopped
    overwrite: bool = False  # remove what an earlier run wrote to --out
    format: Literal["png", "wds"] = "png"  # a file an image, or WebDataset tar shards, for very many
    shard_size: int | None = None  # images of a shard of --format wds; unless given, 1000
    latents: bool = False  # write latents (.safetensors) to --out, which needs no VAE
    grid: Path | None = None  # file for one PNG with all images, a row of each prompt's
    json: bool = False  # print one JSON object at the end and no progress bar, for programs
    ray: int | None = None  # draw on so many actors of Ray Data; without a number on one for every GPU of the cluster


def check_drawing(request: DrawingOptions) -> None:
    """Everything that can be wrong with what is drawn, and how; ``num_images`` is given."""
    try:
        sampling = request.sampling
    except ValueError as error:
        name, _, rest = str(error).partition("=")
        raise ValueError(f"--{name.replace('_', '-')} {rest}") from None
    _check_least(request, num_images=1, batch_size=1)
    if request.batch_size > MAX_BATCH:
        raise ValueError(
            f"--batch-size {request.batch_size} must be at most {MAX_BATCH}: images are drawn a batch at once"
        )
    if request.scheduler is not None:
        scheduler_class(request.scheduler)
    check_seed(request.seed, request.num_images or 1)
    if request.lora_strength is not None and not math.isfinite(request.lora_strength):
        raise ValueError(f"--lora-strength {request.lora_strength} must be finite")
    told = [option for option in (getattr(request, "texts", ()), request.prompt, request.prompts) if option]
    _refuse(
        {
            "PROMPT, --prompt and --prompts are ways to say what to draw: give one": len(told) > 1,
            "--lora-strength is for --lora": request.lora_strength is not None and request.lora is None,
            "--negative-prompt is for --guidance": request.negative_prompt is not None and sampling.guidance <= 1,
            "--guidance-interval is for --guidance": sampling.guidance_interval and sampling.guidance <= 1,
        }
    )


def check(request: SampleOptions) -> None:
    """Everything that can be wrong with the arguments, before minutes of work."""
    _check_least(request, shard_size=1, ray=0)
    check_drawing(request)
    several = this_process()[1] > 1
    _refuse(
        {
            "nothing to write: give --out FOLDER, --grid FILE, or both": not (request.out or request.grid),
            "--latents writes to a folder: give --out": request.latents and not request.out,
            "--latents gives no pictures: leave out --grid": request.latents and request.grid,
            "--latents decodes nothing: leave out --vae-tile": request.latents and request.vae_tile is not None,
            "--format wds writes to a folder: give --out": request.format == "wds" and not request.out,
            "--format wds leaves no files for --grid to show": request.format == "wds" and request.grid,
            "--shard-size is for --format wds": request.shard_size is not None and request.format != "wds",
            "--overwrite is for --out": request.overwrite and not request.out,
            "--ray writes to a folder: give --out": request.ray is not None and not request.out,
            "--ray deals the work itself: run it without torchrun": request.ray is not None and several,
            "several processes share a folder: give --out": several and not request.out,
            "several processes have no pictures in common: leave out --grid": several and request.grid,
            "several processes would remove each other's images: leave out --overwrite": several and request.overwrite,
        }
    )
    from madformer.files.atomic import check_writable

    for folder in filter(None, (request.out, request.grid and request.grid.parent)):
        check_writable(folder)
    if request.grid and request.grid.is_dir():
        raise ValueError(f"--grid {request.grid} is a folder; it names a file")


def _check_least(request: DrawingOptions, **least: int) -> None:
    for name, low in least.items():
        value = getattr(request, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {low}")


def _refuse(refusals: dict[str, Any]) -> None:
    for message, refused in refusals.items():
        if refused:
            raise ValueError(message)


def texts_of(request: DrawingOptions) -> list[str]:
    """The prompts; of a file's lines those that are not blank, without the blanks around them.

    Raises:
        OSError: the file cannot be read. ValueError: it holds none, or what is given is no text.
    """
    from madformer.files.text import decode_text, read_text

    texts = [*(getattr(request, "texts", ()) or request.prompt)]
    if request.prompts:
        standard = str(request.prompts) == "-"
        text = decode_text(sys.stdin.buffer.read(), "standard input") if standard else read_text(request.prompts)
        if "\0" in text:
            raise ValueError(f"--prompts {request.prompts} holds zero bytes: text in UTF-16 needs a byte-order mark")
        # not `splitlines`, which takes a form feed and others for ends, too
        texts = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
        if not texts:
            raise ValueError(f"--prompts {request.prompts} holds no prompt")
    for text in (*texts, *filter(None, (request.negative_prompt, *request.classes))):
        if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{text!r} is not in the encoding of this terminal, UTF-8 as a rule")
    return texts
