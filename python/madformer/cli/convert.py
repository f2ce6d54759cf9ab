"""``madformer convert``: a released training checkpoint into a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from madformer.cli.request import Request


@dataclass(frozen=True, kw_only=True)
class Convert(Request):
    """Turn a released training checkpoint (ckpts.pt), FFHQ's or ImageNet's, into a folder for `madformer sample`. The
    released code's quirks become fields of its configuration. Nothing in the checkpoint is run.

    example: madformer convert --checkpoint ckpts.pt --model-config madformer.json --out ffhq
    """

    checkpoint: Path  # the released file
    out: Path  # folder to write
    # the JSON file that --model_config_path named in training; a model with text needs it, others are taken to have the
    # released one's values, with the sizes that the weights tell
    model_config: Path | None = None
    weights: Literal["ema", "model"] = "ema"  # ema is the moving average; the released script samples with model
    vae: str | None = None  # autoencoder to put beside it, a folder or hub id, so that sampling need not be told one
    # likewise, of a model with text: bytes, a folder or hub id (the released scripts take NousResearch/Llama-3.2-1B)
    tokenizer: str | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the stored weights; bf16 is half as large, and rounds them

    def run(self) -> None:
        import torch
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        from madformer.compat.released import from_released
        from madformer.conditioning.tokenizer import load_tokenizer
        from madformer.files.atomic import check_writable
        from madformer.pipeline import MADFormerPipeline
        from madformer.vae import load_vae

        check_writable(self.out)
        model = from_released(self.checkpoint, model_config=self.model_config, weights=self.weights)
        if self.tokenizer and model.config.text is None:
            raise ValueError(f"--tokenizer {self.tokenizer} has no place: {self.checkpoint} is of a model without text")
        vae = load_vae(self.vae) if self.vae else None
        tokenizer = load_tokenizer(self.tokenizer) if self.tokenizer else None
        # the scheduler of the released sampling scripts
        scheduler = DPMSolverMultistepScheduler.from_config(DDIMScheduler().config)
        dtype = torch.bfloat16 if self.dtype == "bf16" else torch.float32
        MADFormerPipeline(model.to(dtype), vae, scheduler, tokenizer).save_pretrained(self.out)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{self.out}: {parameters:.1f} M parameters ({self.weights}), quirk fields set as in the released code")
