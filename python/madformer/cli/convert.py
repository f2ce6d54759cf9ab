"""``madformer convert``: a released training checkpoint into a model folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn a released checkpoint into a model folder",
        description="Turn a released training checkpoint (ckpts.pt), FFHQ's or ImageNet's, into a folder for "
        "`madformer sample`. The released code's quirks become fields of its configuration. Nothing in the checkpoint "
        "is run.",
        epilog="example: madformer convert --checkpoint ckpts.pt --model-config madformer.json --out ffhq",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="the released file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--model-config", type=Path, help="the JSON file that --model_config_path named in training (default: the "
        "released one's values, with the sizes that the weights tell; a model with text needs it)"
    )  # fmt: skip
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which set (default ema)")
    parser.add_argument("--vae", help="autoencoder to put beside it, a folder or hub id")
    parser.add_argument(
        "--tokenizer", help="likewise, of a model with text: bytes, a folder or hub id (the released scripts take "
        "NousResearch/Llama-3.2-1B)"
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the stored weights")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import torch
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    from madformer.compat.released import from_released
    from madformer.files.atomic import check_writable
    from madformer.pipeline import MADFormerPipeline
    from madformer.tokenizer import load_tokenizer
    from madformer.vae import load_vae

    check_writable(args.out)
    model = from_released(args.checkpoint, model_config=args.model_config, weights=args.weights)
    if args.tokenizer and model.config.text is None:
        raise ValueError(f"--tokenizer {args.tokenizer} has no place: {args.checkpoint} is of a model without text")
    vae = load_vae(args.vae) if args.vae else None
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    # the scheduler of the released sampling scripts
    scheduler = DPMSolverMultistepScheduler.from_config(DDIMScheduler().config)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    MADFormerPipeline(model.to(dtype), vae, scheduler, tokenizer).save_pretrained(args.out)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.out}: {parameters:.1f} M parameters ({args.weights}), quirk fields set as in the released code")
