"""What a training run is. Presets are functions that return one; the command line is derived from the fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from madformer import config as model_presets
from madformer.config import MADFormerConfig
from madformer.objects import check_types, from_object, read_object, require
from madformer.seeds import check_seed

RUN_CONFIG = "config.json"

AT_LEAST_ONE = (
    "image_size", "steps", "batch_size", "accumulation_steps", "log_every", "save_every", "keep_checkpoints",
    "sample_images", "sample_steps", "max_skipped_steps",
)  # fmt: skip
NOT_NEGATIVE = (
    "lora_rank", "lora_alpha",
    "num_workers", "weight_decay", "min_learning_rate", "image_loss_weight", "hidden_loss_weight",
    "clean_loss_weight", "text_loss_weight", "min_snr_gamma", "explosion", "sample_every", "profile_steps",
    "num_threads", "shard_group",
)  # fmt: skip
MOST = {
    "lora_rank": 2**16,
    "image_size": 2**16,
    "batch_size": 2**24,
    "accumulation_steps": 2**24,
    "sample_images": 65_536,
    # of the noise schedule
    "sample_steps": 1000,
    # processes and threads
    "num_workers": 1024,
    "num_threads": 4096,
}
# A run that is resumed may have other values here. The rest says what it learns from, in which order, and how.
MAY_CHANGE = (
    "steps", "accumulation_steps", "cache_latents", "num_workers", "max_bad_fraction", "explosion", "max_skipped_steps",
    "parallel", "shard_group", "precision", "compile", "compile_mode", "activation_checkpointing", "backend",
    "attention_backend", "device", "num_threads", "log_every", "save_every", "keep_checkpoints", "sample_every",
    "sample_images", "sample_steps", "sample_guidance", "tensorboard", "wandb", "profile_steps",
)  # fmt: skip

# Of the noise: what says nothing to another prediction_type than "flow", and what says nothing to that.
_OF_FLOW = {"flow_sampling": "uniform", "flow_logit_mean": 0.0, "flow_logit_std": 1.0, "flow_shift": 1.0}
_OF_VARIANCE_PRESERVING = {"beta_schedule": "linear", "zero_terminal_snr": False}


@dataclass(frozen=True)
class TrainingConfig:
    """One run. The defaults are the paper's; a field's comment is its line of help on the command line."""

    model: MADFormerConfig = field(default_factory=MADFormerConfig)  # what is trained
    init_from: str = ""  # begin with the weights of this model or pipeline, a folder or hub id; the model is its, too
    lora_rank: int = 0  # train adapters (LoRA) of this rank on top of those weights, which stay as they are; 0: none
    # multiply an adapter's update by lora_alpha / lora_rank; 0: take the rank, for a factor of 1
    lora_alpha: float = 0.0
    lora_targets: str = "qkv,proj,gate_proj,up_proj,down_proj"  # layers of the towers that have adapters, with commas
    # what to learn from: shards of images, latents that madformer data latents wrote, a folder of images, or hf:NAME
    data: str = ""
    holdout: float = 0.0  # share of the images that are never trained on, by the hash of their names; to evaluate with
    data_order: Literal["uniform", "shards"] = "uniform"  # shards reads in long runs, for disks that seek slowly
    vae: str = "stabilityai/sd-vae-ft-mse"  # the autoencoder (AutoencoderKL) of the latents, a folder or hub id
    image_size: int = 1024  # pixels along the shorter side; the model's grid says how long the other is
    flip: bool = False  # mirror every second image, by chance: twice the data, where left and right are alike
    cache_latents: bool = False  # encode the data set once, before the first step, into memory: for small data sets
    tokenizer: str = "bytes"  # of a model with text: bytes, or a folder or hub id of one of transformers
    caption: Literal["caption", "label"] = "caption"  # what the text is: the caption, or the label as a number
    caption_dropout: float = 0.1  # share of samples without their text, from 0 to 1; guidance leads away from these
    label_dropout: float = 0.1  # share of samples without their class, likewise
    max_bad_fraction: float = 0.05  # share of unreadable images that a run puts up with
    num_workers: int = 4  # processes that read and decode; more where the device waits for data, 0 for tiny data sets

    steps: int = 210_000  # optimiser steps; more or fewer move the schedule's warm-up and decay with them
    batch_size: int = 64  # images in an optimiser step, over all processes
    accumulation_steps: int = 1  # micro-batches of a step, one after the other: more where memory runs out
    learning_rate: float = 3e-4  # the highest of the schedule; more for small models and large batches
    weight_decay: float = 0.05  # AdamW's, times the learning rate
    beta1: float = 0.9  # AdamW's decay of the gradient's running mean
    beta2: float = 0.95  # AdamW's decay of the squared gradient's running mean; nearer to 1 for small batches
    # the learning rate after its warm-up: wsd is constant, then decays to 0.5 ** decay_exponent from decay_start on;
    # cosine falls in half a cosine to the share min_learning_rate; constant never decays
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup: float = 0.01  # share of the steps in which the learning rate rises from 0
    decay_start: float = 0.85  # share of the steps after which wsd decays
    decay_exponent: float = 6.0  # halvings of the learning rate at the end of wsd
    min_learning_rate: float = 0.0  # of cosine: the last learning rate, as a share of the highest
    max_grad_norm: float = 1.0  # gradients with a larger norm are scaled down to it; inf: never
    # decay of each moving average of the weights, with commas; samples are drawn from the first. Nearer to 1 averages
    # over more steps, for long runs
    ema_decays: tuple[float, ...] = (0.9999,)

    image_loss_weight: float = 1.0  # weight of the noisy blocks' loss, which makes the picture
    hidden_loss_weight: float = 0.1  # weight of the condition's loss, on what the autoregressive layers hand on
    clean_loss_weight: float = 0.0  # weight of the clean tower's loss
    text_loss_weight: float = 0.0  # weight of the next token's loss, of a model with text
    # cap of the signal-to-noise ratio that weights the image loss (arXiv:2303.09556); 0: none
    min_snr_gamma: float = 0.0
    beta_schedule: Literal["linear", "cosine"] = "linear"  # how fast the noise grows with the timestep
    # rescale the noise so that nothing is left of the image at the last timestep (arXiv:2305.08891); not with epsilon
    zero_terminal_snr: bool = False
    # of prediction_type flow: draw shares of noise as often as others, or most in the middle (arXiv:2403.03206)
    flow_sampling: Literal["uniform", "logit-normal"] = "uniform"
    flow_logit_mean: float = 0.0  # of logit-normal: above 0 for more noise
    flow_logit_std: float = 1.0  # of logit-normal: more for more of nearly clean and of nearly pure noise
    flow_shift: float = 1.0  # more than 1 moves timesteps towards the noise, in training and sampling: for large images
    # leave out a step whose gradient's norm is more than so many times its running mean, or not finite; 0: this alone
    explosion: float = 100.0
    max_skipped_steps: int = 10  # stop after so many steps left out in a row

    # ddp keeps the whole model on every process; fsdp shards it over all, for models that do not fit; hsdp shards over
    # groups of processes that are copies of one another; auto is ddp under torchrun, else none
    parallel: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    shard_group: int = 0  # processes in a group of hsdp; 0: those of a machine
    # dtype of the layers' products; kept weights, gradients' sums and the optimiser stay fp32. auto is bf16 where the
    # device multiplies it in hardware: a processor without takes 65 times as long as in fp32
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # pass every layer through torch.compile, on a processor the U-Net too: faster steps after a minute or more
    compile: bool = False
    # reduce-overhead: have PyTorch capture what it compiled as CUDA graphs, for steps that wait for Python (small
    # batches); neither with accumulated gradients nor with sharded weights, and of no effect on a CPU
    compile_mode: Literal["default", "reduce-overhead"] = "default"
    # what is kept of a layer for the way back: full keeps its input alone, selective matrix products and attention too,
    # and the rest is run again; less memory for more time
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    backend: str = "auto"  # implementation of the kernels, as madformer info lists them; auto takes the best here
    attention_backend: str = ""  # implementation of attention alone; unless given, as backend
    device: str = "auto"  # where to compute: auto (a GPU where there is one), cpu, cuda, cuda:1 ...
    num_threads: int = 0  # of torch on a CPU; 0 leaves torch's choice
    seed: int = 0  # of the weights, the order of the data, noise and timesteps

    log_every: int = 10  # steps between two lines of metrics.jsonl
    save_every: int = 10_000  # steps between two checkpoints, each of which renews model/
    keep_checkpoints: int = 3  # how many of the newest to keep
    sample_every: int = 10_000  # steps between two grids of samples; 0: never
    sample_images: int = 16  # images of a grid; their prompts or classes are those of images in the data
    sample_steps: int = 25  # denoising steps of every block of a sample
    sample_guidance: float = 1.0  # guidance scale of a sample; 1: none
    tensorboard: bool = True  # write event files, where the package is installed
    wandb: str = ""  # project of Weights & Biases to log to as well
    profile_steps: int = 0  # write a trace of so many steps, from the fourth of a session on; 0: none

    def __post_init__(self) -> None:
        check_types(self, infinite=("max_grad_norm",), most=MOST)
        for names, low in ((AT_LEAST_ONE, 1), (NOT_NEGATIVE, 0)):
            for name in names:
                require(getattr(self, name) >= low, f"{name}={getattr(self, name)} must be at least {low}")
        check_seed(self.seed)
        rate, norm = self.learning_rate, self.max_grad_norm
        require(rate > 0 and norm > 0, f"learning_rate={rate} and max_grad_norm={norm} must be positive")
        batch, parts = self.batch_size, self.accumulation_steps
        require(batch % parts == 0, f"batch_size={batch} must be a multiple of accumulation_steps={parts}")
        warmup, start = self.warmup, self.decay_start
        require(0 <= warmup <= start <= 1, f"warmup={warmup} and decay_start={start} must rise within [0, 1]")
        require(0 <= self.holdout < 1, f"holdout={self.holdout} must be at least 0, and below 1")
        for name in ("caption_dropout", "label_dropout"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} must be within [0, 1]")
        adapters, replicated = f"lora_rank={self.lora_rank}", self.parallel not in ("fsdp", "hsdp")
        why = f"is for parallel='ddp' or 'none', not {self.parallel!r}"
        require(not self.lora_rank or bool(self.init_from), f"{adapters} needs init_from, the model that they are for")
        require(not self.lora_rank or replicated, f"{adapters} {why}")
        weight = self.text_loss_weight
        require(not weight or self.model.text is not None, f"text_loss_weight={weight} needs a model with text")
        if self.compile_mode != "default":
            # captured gradients lie where the next capture writes its own, and weights where they were captured
            mode = f"compile_mode={self.compile_mode!r}"
            require(self.compile, f"{mode} needs compile=True")
            require(parts == 1, f"{mode} is for accumulation_steps=1, not {parts}")
            require(replicated, f"{mode} {why}")
        self._check_noise()
        decays = self.ema_decays
        fits = bool(decays) and all(0 <= decay < 1 for decay in decays)
        require(fits, f"ema_decays={decays} must be one or more numbers in [0, 1)")

    def _check_noise(self) -> None:
        """Whether the options of the noise are those of what is predicted."""
        flow = self.model.prediction_type == "flow"
        for name, default in _OF_FLOW.items() if not flow else _OF_VARIANCE_PRESERVING.items():
            value = getattr(self, name)
            why = f"prediction_type={self.model.prediction_type!r}: leave it out"
            require(value == default, f"{name}={value!r} says nothing to {why}")
        for name in ("flow_logit_std", "flow_shift"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        ends = not self.zero_terminal_snr or self.model.prediction_type != "epsilon"
        require(ends, "zero_terminal_snr=True needs another prediction_type: epsilon says nothing at the end")

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        rows, columns = self.model.token_grid
        shorter = min(rows, columns)
        return self.image_size * rows // shorter, self.image_size * columns // shorter

    def noise_options(self) -> dict[str, Any]:
        """What diffusers' schedulers are told of the noise, in training and in sampling alike."""
        if self.model.prediction_type == "flow":
            return {"shift": self.flow_shift}
        names = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
        return {"beta_schedule": names[self.beta_schedule], "rescale_betas_zero_snr": self.zero_terminal_snr}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def of_run(cls, folder: str | Path) -> TrainingConfig:
        """The configuration that a run's folder holds.

        Raises:
            FileNotFoundError: no run there. ValueError: of another version.
        """
        file = Path(folder) / RUN_CONFIG
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no run: no {RUN_CONFIG}")
        values = read_object(file)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{file} is of no run of this version: {error}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        """The inverse of :meth:`to_json`'s ``dataclasses.asdict``.

        Raises:
            ValueError: a field that this version does not have.
        """
        if "model" not in values:
            raise ValueError("configuration field model is missing")
        return from_object(cls, values)


def ffhq1024() -> TrainingConfig:
    """The paper's FFHQ-1024 run."""
    return TrainingConfig(image_loss_weight=5.0)


def imagenet256() -> TrainingConfig:
    """The paper's ImageNet-256 run: the class index in decimal is the text, and never left out."""
    return TrainingConfig(
        model=model_presets.imagenet256(),
        tokenizer="NousResearch/Llama-3.2-1B",
        caption="label",
        caption_dropout=0.0,
        image_size=256,
        steps=250_000,
        batch_size=256,
        image_loss_weight=5.0,
        text_loss_weight=1.0,
    )


def emoji64() -> TrainingConfig:
    """Emoji on a laptop's processor: the run that made the checkpoint in ``assets/``."""
    return TrainingConfig(
        model=model_presets.emoji64(),
        data="data/emoji64",
        vae="assets/emoji64/vae",
        image_size=64,
        cache_latents=True,
        caption_dropout=0.2,
        label_dropout=0.5,
        num_workers=0,
        steps=4_800,
        batch_size=32,
        learning_rate=1e-3,
        decay_start=0.65,
        ema_decays=(0.999,),
        save_every=250,
        sample_every=600,
        sample_guidance=2.0,
    )


def tiny() -> TrainingConfig:
    """The smallest model, for first steps: a few minutes on a laptop, of pictures of 32 x 32 pixels."""
    return dataclasses.replace(
        emoji64(), model=model_presets.tiny(), data="", image_size=32, steps=2_000, save_every=500, sample_every=500
    )


PRESETS: dict[str, Callable[[], TrainingConfig]] = {
    preset.__name__: preset for preset in (ffhq1024, imagenet256, emoji64, tiny)
}
