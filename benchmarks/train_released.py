"""The released ``train.py`` itself, run with its own model, with our drop-in, and with its own model accelerated.

    python -m benchmarks.train_released --released PATH [--steps 20] [--out RECORD.json]

``PATH`` is your own clone of ``Junhaoo-Chen/MADFormer`` (branch ``main``); running it needs ``pip install transformers
einops``. Its argument parser, ``main``, DDP, EMA, schedule and optimiser are what runs, in fp32 on one CPU process,
three times from the same weights and seeds:

* ``released``: ``from models import MADFormer`` is the clone's;
* ``compat``: it is ``madformer.compat.madformer_ffhq``'s, and nothing else changes;
* ``accelerate``: it is the clone's again, after ``madformer.accelerate(model)``.

The losses of every step must agree to 1e-4. What cannot run on a CPU is replaced from outside: device names and NCCL in
its source, the pretrained VAE by a small random one, torchvision and the data set by stand-ins, FlexAttention's
BlockMask by the same mask as a tensor (``released.py``), and the sizes that its script leaves at 1.3 B parameters.
Times are of the whole loop, one run after the other; for speed see ``compare_released.py``.

The last line on stdout is the record as JSON. Exit status 1: something is missing, or the losses disagree.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import json
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

import madformer
from benchmarks.record import CannotCompare, environment, finish, git_commit
from benchmarks.released import LATENT_CHANNELS, SEED, Shape, dense_mask, load_released, positive
from madformer.compat import madformer_ffhq, madformer_imagenet
from madformer.files.atomic import check_writable
from madformer.measuring.timing import Spread

MAX_LOSS_DIFFERENCE = 1e-4
IMAGE_SIZE, VAE_DOWNSCALE = 256, 8
VARIANTS = ("released", "compat", "accelerate")

# batch, hidden, layers, diffusion layers, heads, intermediate, blocks, tokens of a block, U-Net, groups, sampling steps
SMALL = Shape(2, 256, 6, 3, 4, 768, 4, 64, (64, 128), 8, steps=0)
TINY = Shape(1, 64, 2, 1, 1, 64, 4, 64, (16, 32), 4, steps=0)

TEXT = {"vocab_size": 11, "pad_token_id": 10, "max_position_embeddings": 2, "rope_theta": 10_000.0}
"""What ImageNet's model configuration says beyond FFHQ's."""

Factory = Callable[..., nn.Module]


# Stand-ins for what a CPU or a machine without the data set does not have


class Pictures:
    """As many smooth random pictures as asked for, behind what ``train.py`` uses of a Hugging Face data set."""

    def __init__(self, count: int) -> None:
        self.count, self.transform = count, None

    def set_transform(self, transform: Callable[[dict[str, list[Any]]], dict[str, list[Any]]]) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        batch = {"webp": [image], "jpg": [image], "cls": [index % 10]}
        return {name: values[0] for name, values in (self.transform or dict)(batch).items()}


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def compose(steps: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    return lambda image: functools.reduce(lambda value, step: step(value), steps, image)


def normalize(mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> Callable[[Tensor], Tensor]:
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return lambda image: (image - shift) / scale


def stub_modules(num_images: int) -> dict[str, ModuleType]:
    """``datasets`` and ``torchvision`` as far as ``train.py`` imports them."""
    contents: dict[str, dict[str, Any]] = {
        "datasets": dict.fromkeys(("load_dataset", "load_from_disk"), lambda *_, **__: Pictures(num_images)),
        "torchvision": {},
        "torchvision.datasets": {"ImageFolder": None},
        "torchvision.transforms": {
            "Compose": compose,
            "Resize": lambda size, interpolation=None: lambda image: image.resize(size, interpolation),
            "Lambda": lambda function: function,
            "InterpolationMode": Image.Resampling,
            "ToTensor": lambda: to_tensor,
            "Normalize": normalize,
        },
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, content in contents.items():
        modules[name].__dict__.update(content)
    modules["torchvision"].__dict__.update(
        datasets=modules["torchvision.datasets"], transforms=modules["torchvision.transforms"]
    )
    return modules


def make_vae() -> AutoencoderKL:
    """Random weights: the released loop only encodes with it."""
    torch.manual_seed(SEED)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


# The released script


class Tokenizer:
    """A digit for a token, padded on the left."""

    eos_token = ""

    def __call__(self, texts: list[str], *, max_length: int = 0, **_: Any) -> dict[str, Any]:
        ids = [[int(digit) for digit in text] for text in texts]
        if not max_length:
            return {"input_ids": ids}
        return {"input_ids": torch.tensor([[10] * (max_length - len(row)) + row for row in ids])}


class OnCPU(ast.NodeTransformer):
    """Device names, NCCL, tensors and modules sent to ``local_rank``; and an option that the script has lost."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        # ImageNet's script reads it, and its parser does not know it
        return ast.Constant(1) if node.attr == "num_frames" else node

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant({"cuda": "cpu", "nccl": "gloo"}.get(node.value, node.value)) if node.value else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to" and _is_rank(*node.args):
            node.args = [ast.Constant("cpu")]
        for keyword in node.keywords:
            if (keyword.arg == "device" and _is_rank(keyword.value)) or keyword.arg == "map_location":
                keyword.value = ast.Constant("cpu")
            elif keyword.arg == "device_ids":
                keyword.value = ast.Constant(None)
        return node


def _is_rank(*nodes: ast.AST) -> bool:
    return len(nodes) == 1 and isinstance(nodes[0], ast.Name) and nodes[0].id == "local_rank"


def load_script(path: Path) -> Any:
    """The code of ``train.py`` as it can run on a CPU.

    Raises:
        CannotCompare: no such file.
    """
    source = next((f for f in (path / "src" / "train.py", path / "train.py") if f.is_file()), None)
    if source is None:
        raise CannotCompare(f"{path} holds neither src/train.py nor train.py: not a clone of the released code")
    tree = OnCPU().visit(ast.parse(source.read_text(), filename=str(source)))
    return compile(ast.fix_missing_locations(tree), str(source), "exec")


@dataclass
class Run:
    """What one run of the script leaves: the loss before each step, and the clock after it."""

    losses: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)

    def scaler(self) -> type[torch.amp.GradScaler]:
        """The script's own, which sees every loss, keeping notes."""
        run = self

        class Recorder(torch.amp.GradScaler):
            def scale(self, outputs: Any) -> Any:
                run.losses.append(outputs.item())
                return super().scale(outputs)

            def update(self, new_scale: Any = None) -> None:
                super().update(new_scale)
                run.clock.append(time.perf_counter())

        return Recorder

    def step_seconds(self) -> Spread:
        """Of all steps but the first."""
        return Spread.of(np.diff(self.clock).tolist())


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """The environment that ``torchrun`` gives, one rank; log handlers and device queries as a CPU run needs them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    handlers = list(logging.getLogger().handlers)
    nothing = mock.Mock(return_value=None)
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.multiple(torch.cuda, is_available=lambda: True, set_device=nothing, synchronize=nothing),
        # optimisers ask it where PyTorch is built with CUDA
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        contextlib.redirect_stdout(sys.stderr),
    ):
        try:
            yield
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for handler in set(logging.getLogger().handlers) - set(handlers):
                logging.getLogger().removeHandler(handler)
                handler.close()


def train(
    script: Any, factory: Factory, shape: Shape, steps: int, folder: Path, *options: str, taken: int | None = None
) -> Run:
    """Run the script with ``factory`` for its model class on data for so many steps.

    Args:
        options: of the script, besides those of ``shape``.
        taken: how many steps of these it takes, if not all.

    Raises:
        CannotCompare: it imports a package that is not installed, or takes another number of steps.
    """
    run, models, vae = Run(), ModuleType("models"), make_vae()
    models.MADFormer = factory  # type: ignore[attr-defined]
    arguments = script_arguments(shape, folder)
    with (
        one_process(),
        mock.patch.dict(sys.modules, {**stub_modules(steps * shape.batch), "models": models}),
        mock.patch.object(sys, "argv", ["train.py", *arguments, *options]),
        mock.patch.object(AutoencoderKL, "from_pretrained", return_value=vae),
        mock.patch("transformers.AutoTokenizer.from_pretrained", return_value=Tokenizer()),
        mock.patch.object(torch.amp, "GradScaler", run.scaler()),
    ):
        try:
            exec(script, {"__name__": "__main__"})
        except ModuleNotFoundError as error:
            raise CannotCompare(f"the released code imports {error.name}, which is not installed (pip)") from error
    if len(run.losses) != (taken or steps):
        raise CannotCompare(f"the released loop took {len(run.losses)} steps, not {taken or steps}")
    return run


def script_arguments(shape: Shape, folder: Path) -> list[str]:
    _, blocks, latents_per_block, _ = shape.latents
    values = {
        "results_dir": folder / "results",
        "model_config_path": folder / "model.json",
        "image_size": IMAGE_SIZE,
        "block_size": shape.block_size,
        "pre_downsample_block_size": latents_per_block,
        "ar_len": blocks,
        "spatial_len": blocks * shape.block_size,
        "diff_depth": shape.diffusion_layers,
        "global_batch_size": shape.batch,
        "per_gpu_batch_size": shape.batch,
        "epochs": 1,
        "num_workers": 0,
        "mixed_precision": "none",
        "log_every": 5,
    }
    return [f"--{name}={value}" for name, value in values.items()]


# Three runs


def is_imagenet(module: ModuleType) -> bool:
    """Whether a clone's ``models`` are the branch's that reads text."""
    return hasattr(module, "RotaryEmbedding")


def factories(module: ModuleType, shape: Shape, folder: Path) -> dict[str, Factory]:
    """What ``from models import MADFormer`` is in each run: the class, at ``shape``'s sizes and with equal weights."""
    sizes = {"hidden_size": shape.hidden_size, "depth": shape.num_layers, "num_heads": shape.num_heads}
    config, ours = shape.model_config(), madformer_ffhq
    if is_imagenet(module):
        config, ours = config | TEXT, madformer_imagenet
        # transformers 5 calls it by another name, and the released code by this one
        module.MADFormerConfig.rope_theta = TEXT["rope_theta"]
    (folder / "model.json").write_text(json.dumps(config))
    weights: dict[str, Tensor] = {}

    def released(**arguments: Any) -> nn.Module:
        model = module.MADFormer(**arguments, **sizes)
        model.flex_attnmask = dense_mask(model, torch.device("cpu"))
        return model

    def prepared(make: Factory) -> Factory:
        @torch.no_grad()
        def factory(**arguments: Any) -> nn.Module:
            torch.manual_seed(SEED)
            model = make(**arguments)
            if not weights:
                for parameter in model.parameters():
                    # No bias is zero and no norm one: every parameter matters.
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter), alpha=0.05)
                weights.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
            model.load_state_dict(weights)
            # Constructors draw differently many numbers.
            torch.manual_seed(SEED + 1)
            return model

        return factory

    makers: dict[str, Factory] = {
        "released": released,
        "compat": lambda **arguments: ours.MADFormer(**arguments, **sizes),
        "accelerate": lambda **arguments: madformer.accelerate(released(**arguments)),
    }
    return {name: prepared(make) for name, make in makers.items()}


def compare(runs: Mapping[str, Run], limit: float = MAX_LOSS_DIFFERENCE) -> dict[str, float]:
    """The largest difference of a step's loss from the released run's.

    Raises:
        CannotCompare: it is above the limit, or not a number.
    """
    expected = np.array(runs["released"].losses)
    differences = {
        name: float(np.abs(np.array(run.losses) - expected).max()) for name, run in runs.items() if name != "released"
    }
    failed = {name: d for name, d in differences.items() if not d <= limit}
    if failed:
        listed = ", ".join(f"{name} by {difference:.1e}" for name, difference in failed.items())
        raise CannotCompare(f"losses differ from the released ones by more than {limit:g}: {listed}")
    return differences


def table(runs: Mapping[str, Run], differences: Mapping[str, float]) -> str:
    rows = [f"{'train.py with':<16}{'first loss':>12}{'last loss':>12}{'difference':>12}{'median s':>10}{'speed':>8}"]
    reference = runs["released"].step_seconds().median
    for name, run in runs.items():
        difference = f"{differences[name]:.1e}" if name in differences else "-"
        median = run.step_seconds().median
        rows.append(
            f"  {name:<14}{run.losses[0]:>12.6f}{run.losses[-1]:>12.6f}{difference:>12}{median:>10.3f}"
            f"{reference / median:>7.2f}x"
        )
    return "\n".join(rows)


def prepare(options: argparse.Namespace) -> tuple[Shape, Any, ModuleType]:
    """The sizes that are asked for, and the released ``train.py`` and ``models``.

    Raises:
        CannotCompare, OSError: see the message.
    """
    if options.out is not None:
        check_writable(options.out.parent)
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = TINY if options.tiny else SMALL
    shape = replace(shape, batch=options.batch or shape.batch)
    return shape, load_script(options.released), load_released(options.released, "cpu")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train three times, compare, print the table; returns the record.

    Raises:
        CannotCompare, OSError: see the message.
    """
    shape, script, module = prepare(options)
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, factory in factories(module, shape, Path(folder)).items():
            print(f"train_released: {options.steps} steps, {name}", file=sys.stderr, flush=True)
            runs[name] = train(script, factory, shape, options.steps, Path(folder))
    differences = compare(runs)
    print(table(runs, differences), flush=True)
    seconds = {name: run.step_seconds() for name, run in runs.items()}
    return {
        **environment("train_released", torch.device("cpu"), ("diffusers", "transformers")),
        "released_commit": git_commit(options.released),
        "shape": asdict(shape),
        "steps": options.steps,
        "losses": {name: run.losses for name, run in runs.items()},
        "step_seconds": {name: asdict(spread) for name, spread in seconds.items()},
        "metrics": {
            "loop_max_loss_difference": max(differences.values()),
            **{f"loop_{name}_vs_released": seconds["released"].median / seconds[name].median for name in VARIANTS[1:]},
        },
    }


def parse(description: str | None, steps: int, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of a benchmark that runs the released script, ``steps`` at a time where nothing else is said."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--released", type=Path, required=True, metavar="PATH", help="clone of the released code")
    parser.add_argument("--steps", type=positive, default=steps, help=f"optimiser steps of a run ({steps})")
    parser.add_argument("--batch", type=positive, help="images of a step")
    parser.add_argument("--threads", type=positive, help="CPU threads (PyTorch's choice)")
    parser.add_argument("--tiny", action="store_true", help="a toy geometry, to try the script out")
    parser.add_argument("--out", type=Path, metavar="RECORD.json", help="also write the record there")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: two at least, as the first is not timed")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(__doc__, 20, arguments)
    return finish("train_released", lambda: run(options), options.out, shown=None)


if __name__ == "__main__":
    sys.exit(main())
