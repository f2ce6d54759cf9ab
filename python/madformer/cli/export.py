"""``madformer export``: a model out of a training run's checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from madformer.cli.request import Request


@dataclass(frozen=True, kw_only=True)
class Export(Request):
    """Write the weights of a checkpoint as a folder for `madformer sample`, or as a file for the released scripts (of a
    model that the released code computes alike).

    example: madformer export runs/emoji64 --step 2500 --out emoji-2500
    """

    folder: Annotated[Path, Positional, arg(metavar="RUN")]  # folder that madformer train wrote
    out: Path  # folder to write; with --format released a file
    step: int | None = None  # optimiser steps of the checkpoint to take, of those that the run kept; else the newest
    # decay of a moving average, such as 0.999, or raw for the weights themselves; else the run's first average
    weights: str | None = None
    format: Literal["native", "released"] = "native"  # released is for the released training and sampling scripts
    merged: bool = False  # of a LoRA run: write the whole model with the adapters in it, not the adapters alone

    def run(self) -> None:
        from madformer.compat.export import save_released
        from madformer.model.lora import adapter_weights
        from madformer.training.export import RAW, load_checkpoint, save_lora, save_pipeline
        from madformer.training.initial import merge

        model = load_checkpoint(self.folder, step=self.step, weights=self.weights)
        if getattr(model, "peft_config", None) and self.format == "native" and not self.merged:
            save_lora(self.out, model)
            print(f"{self.out}: {sum(weight.numel() for _, weight in adapter_weights(model)) / 1e6:.2f} M parameters")
            return
        merge(model)
        if self.format == "released":
            save_released(self.out, model, merge(load_checkpoint(self.folder, step=self.step, weights=RAW)))
        else:
            save_pipeline(self.out, self.folder, model)
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"{self.out}: {parameters:.1f} M parameters")
