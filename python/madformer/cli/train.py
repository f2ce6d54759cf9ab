"""``madformer train``: every field of the configuration is an option."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madformer.choices import numbers
from madformer.config import MADFormerConfig
from madformer.machine import this_process

if TYPE_CHECKING:
    from madformer.training.config import TrainingConfig

EXAMPLES = """examples:
  madformer train tiny --data photos --out runs/photos --steps 200
  madformer train emoji64 --out runs/emoji64
  madformer train --resume --out runs/emoji64
  madformer train ffhq1024 --dry-run
  torchrun --no-python --nproc-per-node 8 madformer train ffhq1024 --data LATENTS --parallel fsdp --out runs/ffhq
  madformer train emoji64 --out runs/ar-heavy --model.diffusion-layers 1 --steps 5000
  madformer train emoji64 --out runs/tall --model.num-blocks 6 --model.block-grid 3,2 --model.block-order random
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model",
        description="Train a preset into a folder, which then holds metrics, checkpoints and model/ to sample from.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("preset", nargs="?", help="tiny, emoji64, ffhq1024 or imagenet256")
    parser.add_argument(
        "--released-config",
        type=Path,
        metavar="FILE",
        help="a baseline.conf, FFHQ's or ImageNet's, in place of a preset",
    )
    parser.add_argument(
        "--released-model-config", type=Path, metavar="FILE", help="the JSON file that its MODEL_CONFIG_PATH stands for"
    )
    parser.add_argument("--out", type=Path, help="folder of the run")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in the folder; without a preset as its config.json says",
    )
    parser.add_argument("--dry-run", action="store_true", help="print parameters, memory and operations, and stop")
    _add_fields(parser.add_argument_group("run (default: the preset's)"), _training_fields(), "")
    _add_fields(parser.add_argument_group("model (default: the preset's)"), _model_fields(), "model.")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from madformer.training.fitting import telling_classes

    given = {name: value for name, value in vars(args).items() if value is not None}
    config = _base(args)
    fields = {name.removeprefix("model."): value for name, value in given.items() if name.startswith("model.")}
    if "num_classes" in fields:
        fields = telling_classes(config.model, fields["num_classes"]) | fields
    model = config.model.replace(**fields)
    changes = {name: given[name] for name in _training_fields() if name in given}
    config = dataclasses.replace(config, model=model, **changes)
    if args.dry_run:
        _describe(config)
        return
    if args.out is None:
        raise ValueError("give --out FOLDER, or --dry-run")
    logging.basicConfig(format="%(message)s")

    from madformer.training.parallel import leave
    from madformer.training.trainer import Trainer

    try:
        # a released configuration says all of it, and so does that of a run
        trainer = Trainer(config, args.out, resume=args.resume, given=given if args.preset else None)
        trainer.run()
    finally:
        leave()
    if trainer.stopped_by:
        # as the shell has it for a process that a signal ended
        raise SystemExit(128 + trainer.stopped_by)


def _base(args: argparse.Namespace) -> TrainingConfig:
    """What the options change."""
    from madformer.compat.released_config import read_released_config
    from madformer.training.config import PRESETS, TrainingConfig

    if args.resume and args.out is not None and args.preset is None and args.released_config is None:
        return TrainingConfig.of_run(args.out)
    if (args.preset is None) == (args.released_config is None):
        raise ValueError(f"give a preset ({', '.join(PRESETS)}), or --released-config FILE")
    if args.preset is not None:
        if args.preset not in PRESETS:
            raise ValueError(f"unknown preset {args.preset!r}; there are {', '.join(PRESETS)}")
        return PRESETS[args.preset]()
    released = read_released_config(
        args.released_config,
        model_config=args.released_model_config,
        world_size=this_process()[1],
    )
    for key, reason in released.ignored.items():
        print(f"{args.released_config}: {key} is ignored: {reason}", file=sys.stderr)
    return TrainingConfig(model=released.model, **released.training)


def _describe(config: TrainingConfig) -> None:
    """What a run would take, and nothing of it allocated."""
    from madformer.training.costs import costs_of

    processes = this_process()[1]
    costs = costs_of(config)
    print(f"parameters           {costs.parameters / 1e6:,.1f} M")
    print(f"operations           {costs.flops / 1e12:,.3g} TFLOP an image, forward and backward")
    print(
        f"                     {costs.flops * config.batch_size / 1e12:,.3g} TFLOP a step of {config.batch_size} images"
    )
    memory = costs.memory(config, processes)
    print(f"memory               {sum(memory.values()) / 1e9:,.2f} GB on each of {processes} devices, of which")
    for name, size in memory.items():
        print(f"  {name:<18} {size / 1e9:,.2f} GB")
    if config.activation_checkpointing != "none":
        print(f"  activations are those without checkpointing, which is {config.activation_checkpointing}")


def _training_fields() -> dict[str, Any]:
    from madformer.training.config import TrainingConfig

    return _scalar_fields(TrainingConfig)


def _model_fields() -> dict[str, Any]:
    return _scalar_fields(MADFormerConfig)


def _scalar_fields(config: type) -> dict[str, Any]:
    """Name and type of every field that one word on a command line can set."""
    hints = typing.get_type_hints(config)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(config)
        if hints[field.name] in (int, float, str, bool, tuple[float, ...], tuple[int, ...])
        or typing.get_origin(hints[field.name]) is typing.Literal
    }


def _add_fields(group: Any, fields: dict[str, Any], prefix: str) -> None:
    for name, kind in fields.items():
        option = f"--{prefix}{name.replace('_', '-')}"
        if kind is bool:
            group.add_argument(option, dest=prefix + name, action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is typing.Literal:
            group.add_argument(option, dest=prefix + name, choices=typing.get_args(kind))
        elif kind in (tuple[float, ...], tuple[int, ...]):
            (number, _) = typing.get_args(kind)
            parse = functools.partial(numbers, number)
            group.add_argument(option, dest=prefix + name, type=parse, metavar=f"{number.__name__.upper()},...")
        else:
            group.add_argument(option, dest=prefix + name, type=kind, metavar=kind.__name__.upper())
