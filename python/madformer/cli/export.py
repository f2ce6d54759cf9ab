"""``madformer export``: a model out of a training run's checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="take a model out of a training run",
        description="Write the weights of a checkpoint as a folder for `madformer sample`, or as a file for the "
        "released scripts (of a model that the released code computes alike).",
        epilog="example: madformer export runs/emoji64 --step 2500 --out emoji-2500",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or file for --format released")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--weights", help="decay of an average, or raw (default: the first average)")
    parser.add_argument("--format", choices=("native", "released"), default="native", help="default native")
    parser.add_argument("--merged", action="store_true", help="of a LoRA run: the model, not its adapters alone")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from madformer.compat.export import save_released
    from madformer.model.lora import adapter_weights
    from madformer.training.export import RAW, load_checkpoint, save_lora, save_pipeline
    from madformer.training.initial import merge

    model = load_checkpoint(args.folder, step=args.step, weights=args.weights)
    if getattr(model, "peft_config", None) and args.format == "native" and not args.merged:
        save_lora(args.out, model)
        print(f"{args.out}: {sum(weight.numel() for _, weight in adapter_weights(model)) / 1e6:.2f} M parameters")
        return
    merge(model)
    if args.format == "released":
        save_released(args.out, model, merge(load_checkpoint(args.folder, step=args.step, weights=RAW)))
    else:
        save_pipeline(args.out, args.folder, model)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{args.out}: {parameters:.1f} M parameters")
