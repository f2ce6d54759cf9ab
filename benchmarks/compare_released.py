"""Our speed against the released implementation's, on the same machine, with the same weights and seeds.

    python benchmarks/compare_released.py --released PATH [--device cuda] [--out RECORD.json]

``PATH`` is your own clone of ``Junhaoo-Chen/MADFormer`` (branch ``main``); running it needs ``pip install transformers
einops``. Nothing is timed before both implementations agree on samples, outputs, losses and gradients in fp32.

What is timed, interleaved in one process:

* sampling: the released ``sample`` in fp32, in which its ``sample.py`` runs it; our engine in fp32, and with bf16
  weights. Our plan is made and used once outside the timed region; what a first call takes is reported by itself.
* a training step (forward, image loss + 0.1 hidden loss, backward) in fp32: the released model; our drop-in class,
  which computes all that the released one does; our native model with the released quirks, as our trainer runs it,
  which leaves out what no loss reads. ``training_vs_released_fp32`` is the native one.

Two things in the released code are changed from outside so that it can run here, neither to its disadvantage: the
device name in its ``sample``, and, where FlexAttention cannot train (CPU), its BlockMask, for the same mask as a
dense tensor, made once. Each side runs with the attention backend that is fastest for it.

The last line on stdout is the record as JSON. Exit status 1: something is missing, or the results disagree.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from madformer.compat.madformer_ffhq import MADFormer as CompatMADFormer
from madformer.engine.sampler import Plan, Sampler
from madformer.model.blocks import to_maps
from madformer.model.persistence import check_writable
from madformer.training.losses import training_losses
from record import environment, git_commit, write
from timing import Run, Spread, interleaved, seconds

MAX_RELATIVE_ERROR = 3e-3
HIDDEN_WEIGHT = 0.1
LATENT_CHANNELS = 4
SEED = 0
RELEASED_MODULES = ("models", "rope", "config")


class CannotCompare(Exception):
    """Why there is nothing to report, in one line."""


@dataclass(frozen=True)
class Shape:
    """Geometry of model and batch, and the sampling steps of a block."""

    batch: int
    hidden_size: int
    num_layers: int
    diffusion_layers: int
    num_heads: int
    intermediate_size: int
    num_blocks: int
    block_size: int
    unet_channels: tuple[int, ...]
    norm_groups: int
    steps: int

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """``(images, blocks, latents of a block, channels)``."""
        per_block = self.block_size * 4 ** (len(self.unet_channels) - 1)
        return self.batch, self.num_blocks, per_block, LATENT_CHANNELS

    def constructor_arguments(self) -> dict[str, Any]:
        """Of the released class, and so of our drop-in; ``model_config_path`` is the rest."""
        return {
            "latent_size": LATENT_CHANNELS,
            "block_size": self.block_size,
            "hidden_size": self.hidden_size,
            "depth": self.num_layers,
            "diff_depth": self.diffusion_layers,
            "num_heads": self.num_heads,
            "ar_len": self.num_blocks,
            "spatial_len": self.num_blocks * self.block_size,
        }

    def model_config(self) -> dict[str, Any]:
        """The JSON file that both constructors read."""
        levels = len(self.unet_channels)
        return {
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "unet_block_out_channels": list(self.unet_channels),
            "unet_num_layers_per_block": [2] * levels,
            "unet_resnet_groups": self.norm_groups,
            "unet_transformer_layers_per_block": [0] * (levels - 1) + [1],
            "unet_num_heads": 8,
            "unet_time_emb_dim": 128,
        }


# batch, hidden, layers, diffusion layers, heads, intermediate, blocks, tokens of a block, U-Net, groups, steps
SMALL = Shape(2, 512, 12, 6, 8, 1536, 9, 64, (128, 256), 8, steps=10)
FFHQ_1024 = Shape(1, 1152, 28, 14, 18, 4096, 16, 256, (512, 1024), 8, steps=20)
TINY = Shape(2, 128, 4, 2, 2, 64, 4, 4, (16, 32), 4, steps=3)


# The released code


def load_released(path: Path, device: str) -> ModuleType:
    """The released ``models`` module, imported from a clone without leaving its generic names behind.

    Args:
        path: the clone, or the folder ``src`` in it.
        device: what every ``'cuda'`` in the module becomes: its ``sample`` names that device and no other.

    Raises:
        CannotCompare: no such clone, or a package that it imports is not installed.
    """
    source = next((f for f in (path / "src" / "models.py", path / "models.py") if f.is_file()), None)
    if source is None:
        raise CannotCompare(f"{path} holds neither src/models.py nor models.py: not a clone of the released code")
    tree = ast.parse(source.read_text(), filename=str(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value == "cuda":
            node.value = device
    module = ModuleType("released_models")
    # torch.compile looks up the globals of functions that it inlines by the name of their module.
    sys.modules[module.__name__] = module
    hidden = {name: sys.modules.pop(name) for name in RELEASED_MODULES if name in sys.modules}
    sys.path.insert(0, str(source.parent))
    try:
        # It prints on import; stdout is for the table and the record.
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(tree, str(source), "exec"), module.__dict__)
    except ModuleNotFoundError as error:
        raise CannotCompare(f"the released code imports {error.name}, which is not installed (pip)") from error
    finally:
        sys.path.remove(str(source.parent))
        for name in RELEASED_MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
    return module


def dense_mask(released: Any, device: torch.device) -> Tensor:
    """The BlockMask as numbers to add. With a tensor for a mask, the released attention calls SDPA.

    Not as bool: SDPA would make these numbers of it in every layer anew.
    """
    allowed = released.build_attention_mask(released.ar_len, released.block_size, device)
    return torch.zeros(allowed.shape, device=device).masked_fill_(~allowed, -torch.inf)


# Two models, one batch


@dataclass(frozen=True)
class Models:
    """The released model and ours, with equal weights. ``native`` shares those of ``compat``."""

    released: Any
    compat: CompatMADFormer

    @property
    def native(self) -> Any:
        return self.compat.to_native()


def make_models(module: ModuleType, shape: Shape, device: torch.device) -> Models:
    """Initialised as released, except that no bias is zero and no norm one: every parameter matters."""
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        path.write_text(json.dumps(shape.model_config()))
        arguments = {**shape.constructor_arguments(), "model_config_path": str(path)}
        released = module.MADFormer(**arguments).to(device)
        compat = CompatMADFormer(**arguments).to(device)
    with torch.no_grad():
        for parameter in released.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    compat.load_state_dict(released.state_dict())
    # What the sampling plan and the trainer do to our U-Net, and what the released code does not do to its own.
    for unet in (compat.downsampler, compat.upsampler):
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Models(released.train(), compat.train())


@dataclass(frozen=True)
class Batch:
    """Latents ``(images, blocks, latents, channels)`` and what ``training_losses`` draws for them from ``SEED``."""

    clean: Tensor
    noise: Tensor
    noisy: Tensor
    timestep: Tensor

    @classmethod
    def draw(cls, shape: Shape, device: torch.device) -> Batch:
        clean = torch.randn(shape.latents, generator=torch.Generator().manual_seed(SEED + 1))
        generator, scheduler = torch.Generator().manual_seed(SEED), DDPMScheduler()
        noise = torch.randn(shape.latents, generator=generator)
        limit = scheduler.config.num_train_timesteps
        timestep = torch.randint(0, limit, shape.latents[:2], generator=generator)
        noisy = scheduler.add_noise(clean.flatten(0, 1), noise.flatten(0, 1), timestep.flatten())
        tensors = (clean, noise, noisy.unflatten(0, shape.latents[:2]), timestep)
        return cls(*(tensor.to(device) for tensor in tensors))


def released_step(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """Loss and outputs of a training step of the released class or of our drop-in; gradients are left behind."""
    model.zero_grad(set_to_none=True)
    outputs = model(batch.clean, batch.noisy, batch.timestep)
    image = F.mse_loss(outputs[0], to_maps(batch.noise))
    loss = image + HIDDEN_WEIGHT * F.mse_loss(outputs[1], to_maps(batch.clean))
    loss.backward()
    return (loss.detach(), *(output.detach() for output in outputs))


def native_step(model: nn.Module, batch: Batch) -> Tensor:
    """Loss of a training step as our trainer makes it: it also draws the noise and adds it."""
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(SEED)
    losses = training_losses(model, batch.clean, DDPMScheduler(), hidden_weight=HIDDEN_WEIGHT, generator=generator)
    losses.total.backward()
    return losses.total.detach()


def make_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler.from_config(DDIMScheduler().config)


def sample_released(model: Any, shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return model.sample(make_scheduler(), shape.steps, shape.latents, generator=generator, dtype=torch.float)


def sample_ours(plan: Plan, shape: Shape) -> Tensor:
    """Draws the noise as the released ``sample`` does."""
    generator = torch.Generator().manual_seed(SEED)
    images, _, latents, channels = shape.latents
    return plan.run(lambda _: torch.randn(images, 1, latents, channels, generator=generator)[:, 0])


# The gate


def relative_error(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Euclidean norm of all differences over that of all expected values, in fp64."""
    difference = norm = 0.0
    for a, e in zip(actual, expected, strict=True):
        difference += (a.double() - e.double()).square().sum().item()
        norm += e.double().square().sum().item()
    return (difference / norm) ** 0.5


def gradients(model: nn.Module) -> list[Tensor]:
    """Sorted by name, in which both models agree; zeros where a parameter was not used."""
    named = sorted(model.named_parameters())
    return [torch.zeros_like(p) if p.grad is None else p.grad for _, p in named]


def compare(models: Models, plan: Plan, batch: Batch, shape: Shape) -> dict[str, float]:
    """Relative errors of everything that is timed in fp32, by name."""
    expected = released_step(models.released, batch)
    actual = released_step(models.compat, batch)
    errors = {
        name: relative_error([a], [e])
        for name, a, e in zip(("loss", "prediction", "condition", "clean_tower"), actual, expected, strict=True)
    }
    errors["gradients"] = relative_error(gradients(models.compat), gradients(models.released))
    errors["native_loss"] = relative_error([native_step(models.native, batch)], [expected[0]])
    errors["native_gradients"] = relative_error(gradients(models.compat), gradients(models.released))
    for model in (models.released, models.compat):
        model.zero_grad(set_to_none=True)
    errors["samples"] = relative_error([sample_ours(plan, shape)], [sample_released(models.released, shape)])
    return errors


def check(errors: Mapping[str, float], limit: float = MAX_RELATIVE_ERROR) -> float:
    """The largest error.

    Raises:
        CannotCompare: it is above the limit, or not a number.
    """
    failed = {name: error for name, error in errors.items() if not error <= limit}
    if failed:
        listed = ", ".join(f"{name} {error:.1e}" for name, error in failed.items())
        raise CannotCompare(f"no speeds: relative error above {limit:g} in {listed}")
    return max(errors.values())


# Timing


@contextlib.contextmanager
def tf32(matmul: bool, convolution: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


Context = Callable[[], contextlib.AbstractContextManager[Any]]


def attention_backends(device: torch.device) -> dict[str, Context]:
    """Those of PyTorch's SDPA that could be the fastest in training."""
    backends: dict[str, Context] = {"fused": contextlib.nullcontext}
    if device.type == "cpu":
        # Not on a GPU, where it keeps all scores of all layers: 130 GB for a step at full size.
        backends["math"] = functools.partial(sdpa_kernel, SDPBackend.MATH)
    return backends


def released_backends(model: Any, device: torch.device) -> dict[str, Context]:
    """The same for the released model; where FlexAttention trains, its own BlockMask or the dense mask."""
    if device.type == "cpu":
        return attention_backends(device)

    @contextlib.contextmanager
    def masked(mask: Any) -> Iterator[None]:
        before, model.flex_attnmask = model.flex_attnmask, mask
        yield
        model.flex_attnmask = before

    dense = dense_mask(model, device)
    return {"flex": contextlib.nullcontext, "fused, dense mask": functools.partial(masked, dense)}


def under(context: Context, run: Run) -> Run:
    def wrapped() -> Any:
        with context():
            return run()

    return wrapped


def with_best_attention(run: Run, backends: Mapping[str, Context], device: torch.device) -> tuple[str, Run]:
    """The backend that is fastest in one run after a warm-up, and the run under it."""
    runs = {name: under(context, run) for name, context in backends.items()}
    if len(runs) == 1:
        return next(iter(runs.items()))
    trials = interleaved(runs, 1, device)
    best = min(trials, key=lambda name: trials[name].median)
    return best, runs[best]


def time_sampling(models: Models, plan: Plan, shape: Shape, repeats: int, device: torch.device) -> dict[str, Any]:
    """Sampling of all three by name, and what a first call and half precision cost: seconds and relative error."""
    half = copy.deepcopy(models.native).to(torch.bfloat16)
    half_plan = Sampler(half, make_scheduler()).plan(shape.batch, shape.steps)
    runs: dict[str, Run] = {
        "released fp32": lambda: sample_released(models.released, shape),
        "ours fp32": lambda: sample_ours(plan, shape),
        "ours bf16": lambda: sample_ours(half_plan, shape),
    }
    return {
        "spreads": interleaved(runs, repeats, device),
        "first_call_seconds": seconds(
            lambda: sample_ours(Sampler(models.native, make_scheduler()).plan(shape.batch, shape.steps), shape), device
        ),
        "bf16_relative_error": relative_error([runs["ours bf16"]()], [runs["ours fp32"]()]),
    }


def time_training(models: Models, batch: Batch, repeats: int, device: torch.device) -> dict[str, Any]:
    """Training steps of all three by name, and the attention backend of each."""
    ours = attention_backends(device)
    candidates: dict[str, tuple[Run, dict[str, Context]]] = {
        "released fp32": (
            lambda: released_step(models.released, batch),
            released_backends(models.released, device),
        ),
        "ours fp32, drop-in": (lambda: released_step(models.compat, batch), ours),
        "ours fp32, native": (lambda: native_step(models.native, batch), ours),
    }
    # As the released train.py sets it; a CPU does not care.
    with tf32(matmul=True, convolution=True):
        best = {name: with_best_attention(run, backends, device) for name, (run, backends) in candidates.items()}
        spreads = interleaved({name: run for name, (_, run) in best.items()}, repeats, device)
    return {"spreads": spreads, "attention": {name: backend for name, (backend, _) in best.items()}}


# The record


def metrics(sampling: Mapping[str, Spread], training: Mapping[str, Spread], error: float) -> dict[str, float]:
    def gain(spreads: Mapping[str, Spread], name: str) -> float:
        return spreads["released fp32"].median / spreads[name].median

    return {
        "sampling_vs_released_fp32": gain(sampling, "ours fp32"),
        "sampling_vs_released_bf16": gain(sampling, "ours bf16"),
        "training_vs_released_fp32": gain(training, "ours fp32, native"),
        "training_compat_vs_released_fp32": gain(training, "ours fp32, drop-in"),
        "max_relative_error": error,
    }


def table(title: str, spreads: Mapping[str, Spread], attention: Mapping[str, str] | None = None) -> str:
    rows = [f"{title:<22}{'median s':>10}{'quartiles':>20}{'speed':>8}"]
    for name, spread in spreads.items():
        quartiles = f"{spread.first_quartile:.3f} - {spread.third_quartile:.3f}"
        gain = f"{spreads['released fp32'].median / spread.median:.2f}x"
        backend = f"  {attention[name]} attention" if attention else ""
        rows.append(f"  {name:<20}{spread.median:>10.3f}{quartiles:>20}{gain:>8}{backend}")
    return "\n".join(rows)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Check, time, print the tables; returns the record.

    Raises:
        CannotCompare, OSError: see the message.
    """
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CannotCompare("--device cuda: this PyTorch sees no CUDA device")
    if options.out is not None:
        check_writable(options.out.parent)
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = TINY if options.tiny else FFHQ_1024 if device.type == "cuda" else SMALL
    shape = replace(shape, steps=options.steps or shape.steps)

    models = make_models(load_released(options.released, options.device), shape, device)
    if device.type == "cpu":
        models.released.flex_attnmask = dense_mask(models.released, device)
    batch = Batch.draw(shape, device)
    plan = Sampler(models.native, make_scheduler()).plan(shape.batch, shape.steps)
    with tf32(matmul=False, convolution=False):
        errors = compare(models, plan, batch, shape)
    max_error = check(errors)
    print(f"fp32: largest relative error {max_error:.1e} (limit {MAX_RELATIVE_ERROR:g})", flush=True)

    sampling = time_sampling(models, plan, shape, options.repeats, device)
    print(table(f"sampling, {shape.steps} steps", sampling["spreads"]))
    print(f"  our first call, plan and packed weights included, takes {sampling['first_call_seconds']:.3f} s;", end=" ")
    print(f"bf16 samples differ by {sampling['bf16_relative_error']:.1e}", flush=True)
    training = time_training(models, batch, options.repeats, device)
    print(table("training step", training["spreads"], training["attention"]), flush=True)
    return {
        **environment("compare_released", device, ("diffusers", "transformers")),
        "released_commit": git_commit(options.released),
        "shape": asdict(shape),
        "repeats": options.repeats,
        "relative_errors": errors,
        "sampling": serializable(sampling),
        "training": serializable(training),
        "metrics": metrics(sampling["spreads"], training["spreads"], max_error),
    }


def serializable(timed: Mapping[str, Any]) -> dict[str, Any]:
    return {**timed, "spreads": {name: asdict(spread) for name, spread in timed["spreads"].items()}}


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--released", type=Path, required=True, metavar="PATH", help="clone of the released code")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=positive, help="sampling steps of a block (10 on a CPU, 20 on a GPU)")
    parser.add_argument("--repeats", type=positive, default=3, help="timed rounds")
    parser.add_argument("--threads", type=positive, help="CPU threads (PyTorch's choice)")
    parser.add_argument("--tiny", action="store_true", help="a toy geometry, to try the script out")
    parser.add_argument("--out", type=Path, metavar="RECORD.json", help="also write the record there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        record = run(options)
        if options.out is not None:
            write(record, options.out)
    except (CannotCompare, OSError) as error:
        print(f"compare_released: {error}", file=sys.stderr)
        return 1
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
