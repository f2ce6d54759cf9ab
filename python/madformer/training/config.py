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
from madformer.objects import check_types, from_object, read_object
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
    "parallel", "shard_group", "precision", "compile", "activation_checkpointing", "backend", "attention_backend",
    "device", "num_threads", "log_every", "save_every", "keep_checkpoints", "sample_every", "sample_images",
    "sample_steps", "sample_guidance", "tensorboard", "wandb", "profile_steps",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingConfig:
    """One run. The defaults are the paper's.

    Attributes:
        init_from: folder or hub id of a model or pipeline whose weights the run begins with; the model is its.
        lora_rank: of adapters (LoRA) that are trained on top of those weights, which stay as they are; 0 for none.
            lora_alpha: an update is multiplied by ``lora_alpha / lora_rank``; 0 for the rank. lora_targets: layers of
            the towers that have one, commas between them, of :data:`madformer.model.lora.TARGETS`.
        data: shards of images or of latents, a folder of images, or ``hf:NAME``; see
            :func:`madformer.data.open_dataset` and ``madformer data latents``.
        data_order: ``uniform``, or ``shards`` for disks that seek slowly; see
            :class:`madformer.training.data.BatchStream`.
        vae: folder or hub id of an ``AutoencoderKL``.
        image_size: pixels along the shorter side; the model's grid says how long the other is.
        flip: mirror every second image, by chance.
        cache_latents: encode the data set once, before the first step, and keep it in memory.
        tokenizer: of a model with text: ``bytes``, or a folder or hub id of one of ``transformers``. caption: what the
            text is: a sample's caption, or its label as a number. caption_dropout, label_dropout: how often a sample
            goes without, which is what guidance leads away from.
        max_bad_fraction: of unreadable images that a run puts up with.
        batch_size: images in an optimiser step, over all processes; split into ``accumulation_steps`` micro-batches a
            process.
        schedule: of the learning rate. ``wsd``: linear warm-up over the share ``warmup`` of the steps, constant, then
            from the share ``decay_start`` on a decay to ``0.5 ** decay_exponent``. ``cosine``: the same warm-up, then
            half a cosine to the share ``min_learning_rate``. ``constant``: the warm-up, and no decay.
        ema_decays: one average of the weights each, commas between them; samples are drawn from the first.
        image_loss_weight, hidden_loss_weight, clean_loss_weight, text_loss_weight: of the noisy blocks', the
            condition's, the clean tower's and the next token's loss.
        min_snr_gamma: cap of the signal-to-noise ratio that weights a block's image loss (arXiv:2303.09556); 0 for
            none.
        beta_schedule: of the noise. zero_terminal_snr: rescaled so that nothing is left of the image at the last
            timestep (arXiv:2305.08891).
        explosion: a step changes nothing whose gradient's norm is not finite, or more than so many times its running
            mean (0 for never). max_skipped_steps: after more than so many of them in a row the run stops.
        parallel: ``ddp`` keeps the whole model on every process; ``fsdp`` shards it over all, ``hsdp`` over groups of
            ``shard_group`` processes (0 for those of a machine) that are copies of one another. ``auto`` is ``ddp``
            where torchrun started several processes, else ``none``.
        precision: dtype of the autocast region, and of the layers' weights where they are sharded; the weights that are
            kept, the gradients' reduction and the optimiser stay fp32. ``auto`` is bf16 where the device multiplies
            bf16 matrices in hardware: on a processor that does not, a product takes 65 times as long as in fp32.
        compile: pass every layer through ``torch.compile``.
        activation_checkpointing: ``full`` keeps a layer's input alone and runs it again backward; ``selective`` keeps
            matrix products and attention too, and runs the rest again.
        backend, attention_backend: of the kernels, see :meth:`madformer.model.MADFormer.set_backend`; an empty
            ``attention_backend`` is the same as ``backend``.
        num_threads: of torch on a CPU; 0 leaves torch's choice.
        keep_checkpoints: how many of the newest to keep.
        sample_every: draw a grid of ``sample_images`` every so many steps; 0 for never. A model with text or classes is
            asked for those of images in the data, under ``sample_guidance``.
        tensorboard: write event files, where the package is installed. wandb: name of a project to log to as well.
        profile_steps: write a trace of so many steps, from the fourth of a session on; 0 for none.
    """

    model: MADFormerConfig = field(default_factory=MADFormerConfig)
    init_from: str = ""
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_targets: str = "qkv,proj,gate_proj,up_proj,down_proj"
    data: str = ""
    data_order: Literal["uniform", "shards"] = "uniform"
    vae: str = "stabilityai/sd-vae-ft-mse"
    image_size: int = 1024
    flip: bool = False
    cache_latents: bool = False
    tokenizer: str = "bytes"
    caption: Literal["caption", "label"] = "caption"
    caption_dropout: float = 0.1
    label_dropout: float = 0.1
    max_bad_fraction: float = 0.05
    num_workers: int = 4

    steps: int = 210_000
    batch_size: int = 64
    accumulation_steps: int = 1
    learning_rate: float = 3e-4
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup: float = 0.01
    decay_start: float = 0.85
    decay_exponent: float = 6.0
    min_learning_rate: float = 0.0
    max_grad_norm: float = 1.0
    ema_decays: tuple[float, ...] = (0.9999,)

    image_loss_weight: float = 1.0
    hidden_loss_weight: float = 0.1
    clean_loss_weight: float = 0.0
    text_loss_weight: float = 0.0
    min_snr_gamma: float = 0.0
    beta_schedule: Literal["linear", "cosine"] = "linear"
    zero_terminal_snr: bool = False
    explosion: float = 100.0
    max_skipped_steps: int = 10

    parallel: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    shard_group: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    backend: str = "auto"
    attention_backend: str = ""
    device: str = "auto"
    num_threads: int = 0
    seed: int = 0

    log_every: int = 10
    save_every: int = 10_000
    keep_checkpoints: int = 3
    sample_every: int = 10_000
    sample_images: int = 16
    sample_steps: int = 25
    sample_guidance: float = 1.0
    tensorboard: bool = True
    wandb: str = ""
    profile_steps: int = 0

    def __post_init__(self) -> None:
        check_types(self, infinite=("max_grad_norm",), most=MOST)
        for names, low in ((AT_LEAST_ONE, 1), (NOT_NEGATIVE, 0)):
            for name in names:
                if not getattr(self, name) >= low:
                    raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")
        check_seed(self.seed)
        if not self.learning_rate > 0 or not self.max_grad_norm > 0:
            raise ValueError(
                f"learning_rate={self.learning_rate} and max_grad_norm={self.max_grad_norm} must be positive"
            )
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of accumulation_steps={self.accumulation_steps}"
            )
        if not 0 <= self.warmup <= self.decay_start <= 1:
            raise ValueError(f"warmup={self.warmup} and decay_start={self.decay_start} must rise within [0, 1]")
        for name in ("caption_dropout", "label_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be within [0, 1]")
        if self.lora_rank and not self.init_from:
            raise ValueError(f"lora_rank={self.lora_rank} needs init_from, the model that the adapters are for")
        if self.lora_rank and self.parallel in ("fsdp", "hsdp"):
            raise ValueError(f"lora_rank={self.lora_rank} is for parallel='ddp' or 'none', not {self.parallel!r}")
        if self.text_loss_weight and self.model.text is None:
            raise ValueError(f"text_loss_weight={self.text_loss_weight} needs a model with text")
        if self.zero_terminal_snr and self.model.prediction_type == "epsilon":
            raise ValueError("zero_terminal_snr=True needs another prediction_type: epsilon says nothing at the end")
        if not self.ema_decays or not all(0 <= decay < 1 for decay in self.ema_decays):
            raise ValueError(f"ema_decays={self.ema_decays} must be one or more numbers in [0, 1)")

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        rows, columns = self.model.token_grid
        shorter = min(rows, columns)
        return self.image_size * rows // shorter, self.image_size * columns // shorter

    def noise_options(self) -> dict[str, Any]:
        """What diffusers' schedulers are told of the noise, in training and in sampling alike."""
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
        emoji64(),
        model=model_presets.tiny(),
        data="",
        image_size=32,
        steps=2_000,
        save_every=500,
        sample_every=500,
    )


PRESETS: dict[str, Callable[[], TrainingConfig]] = {
    preset.__name__: preset for preset in (ffhq1024, imagenet256, emoji64, tiny)
}
