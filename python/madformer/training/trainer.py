"""One training run on one device: exact resume, moving average, checkpoints that appear whole or not at all.

Noise, timesteps and the order of the data depend on the seed and the step alone, so a resumed run draws what the
unbroken one would have drawn.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DDPMScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from madformer.data import open_dataset
from madformer.model import MADFormer
from madformer.model.persistence import atomic_path
from madformer.pipeline import MADFormerPipeline, default_scheduler
from madformer.training.config import TrainingConfig
from madformer.training.data import LatentBatches, cache_latents
from madformer.training.losses import training_losses
from madformer.training.optimization import ExponentialMovingAverage, wsd
from madformer.vae import load_vae


class Trainer:
    """Trains ``config.model`` into ``folder``.

    The folder holds ``config.json``, ``metrics.jsonl``, ``checkpoints/`` (to resume from) and ``model/``: a pipeline
    with the averaged weights, ready to sample from, renewed with every checkpoint.

    Args:
        resume: go on from the newest checkpoint in the folder, if there is one. Without it a folder that already
            holds a run is refused.

    Raises:
        ValueError, OSError: see the message.
    """

    def __init__(self, config: TrainingConfig, folder: str | Path, *, resume: bool = False) -> None:
        self.config, self.folder = config, Path(folder)
        if self.checkpoints() and not resume:
            raise ValueError(f"{folder} already holds a run; resume it, or choose another folder")
        with atomic_path(self.folder / "config.json") as path:
            path.write_text(config.to_json())
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        )
        torch.manual_seed(config.seed)
        self.vae = load_vae(config.vae, self.device)
        self.images = open_dataset(config.data, config.image_size, on_error="skip")
        self._check_latents()
        self.model = MADFormer(config.model).to(self.device).train()
        self.model.set_backend(config.backend, config.attention_backend or None)
        for unet in (self.model.downsampler, self.model.upsampler):
            unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = ExponentialMovingAverage(self.model, config.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        # compiled in place of the forward alone, so that state and parameters keep their names
        if config.compile:
            self.model.compile()
        self.noise_schedule = DDPMScheduler(prediction_type=config.model.prediction_type)
        self.step = 0
        self._stop = False
        if resume and self.checkpoints():
            self._load(self.checkpoints()[-1])

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Resume a run with the configuration that its folder holds."""
        values = json.loads((Path(folder) / "config.json").read_text())
        return cls(TrainingConfig.from_dict(values), folder, resume=True)

    def _check_latents(self) -> None:
        model, downscale = self.config.model, 2 ** (len(self.vae.config.block_out_channels) - 1)
        channels, side = self.vae.config.latent_channels, self.config.image_size // downscale
        if (channels, side) != (model.latent_channels, model.latent_side):
            raise ValueError(
                f"images of image_size={self.config.image_size} become {channels} x {side} x {side} latents in this "
                f"VAE; the model takes latent_channels={model.latent_channels} of side {model.latent_side} "
                "(num_blocks, block_size, unet)"
            )

    def checkpoints(self) -> list[Path]:
        """Checkpoints of this run, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step-*.pt"))

    def run(self) -> None:
        """Train to the last step. SIGTERM and SIGINT save a checkpoint and end the run in good order."""
        config = self.config
        data = cache_latents(self.vae, self.images) if config.cache_latents else self.images
        micro_batch = config.batch_size // config.accumulation_steps
        batches = LatentBatches(
            data,
            self.vae,
            batch_size=micro_batch,
            num_blocks=config.model.num_blocks,
            seed=config.seed,
            first_batch=self.step * config.accumulation_steps,
            num_workers=config.num_workers,
        )
        # For emoji64's 16 to 112 tokens PyTorch's fused CPU attention is far slower backward. At 1,152 it is not.
        attention = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()
        handlers = {s: signal.signal(s, self._request_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            with (
                attention,
                open(self.folder / "metrics.jsonl", "a", buffering=1) as metrics,
                tqdm(total=config.steps, initial=self.step, unit="step") as bar,
            ):
                started, first = time.perf_counter(), self.step
                while self.step < config.steps and not self._stop:
                    record = self._train_step(batches)
                    bar.update()
                    if self.step % config.log_every == 0 or self.step == config.steps:
                        seconds = time.perf_counter() - started
                        record["images_per_second"] = (self.step - first) * config.batch_size / seconds
                        started, first = time.perf_counter(), self.step
                        metrics.write(json.dumps(record) + "\n")
                        bar.set_postfix({k: f"{v:.4g}" for k, v in record.items() if k != "step"})
                    if self.step % config.save_every == 0 or self.step == config.steps or self._stop:
                        self.save()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _request_stop(self, *_: Any) -> None:
        self._stop = True

    def _train_step(self, batches: LatentBatches) -> dict[str, float]:
        config = self.config
        factor = wsd(
            self.step,
            config.steps,
            warmup=config.warmup,
            decay_start=config.decay_start,
            decay_exponent=config.decay_exponent,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        generator = torch.Generator().manual_seed((config.seed << 40) + self.step)
        totals: dict[str, torch.Tensor] = {}
        for _ in range(config.accumulation_steps):
            clean = batches.next(generator).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                losses = training_losses(
                    self.model,
                    clean,
                    self.noise_schedule,
                    hidden_weight=config.hidden_loss_weight,
                    clean_weight=config.clean_loss_weight,
                    generator=generator,
                )
            (losses.total / config.accumulation_steps).backward()
            for name, value in losses.parts().items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value / config.accumulation_steps
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        record = {name: float(value) for name, value in totals.items()}
        if not torch.isfinite(norm) or not torch.isfinite(totals["loss"]):
            newest = self.checkpoints()[-1] if self.checkpoints() else "none"
            raise ValueError(
                f"loss {record['loss']} and gradient norm {float(norm)} at step {self.step}: the run has diverged; "
                f"last good checkpoint: {newest}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, self.step)
        self.step += 1
        return {"step": self.step, **record, "grad_norm": float(norm), "lr": config.learning_rate * factor}

    def save(self) -> None:
        """Write a checkpoint and renew ``model/``; keep the newest few."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        with atomic_path(self.folder / "checkpoints" / f"step-{self.step:08d}.pt") as path:
            torch.save(state, path)
        self.pipeline().save_pretrained(self.folder / "model")
        for old in self.checkpoints()[: -self.config.keep_checkpoints]:
            old.unlink()

    def pipeline(self) -> MADFormerPipeline:
        """The averaged weights, ready to sample."""
        scheduler = default_scheduler(self.config.model.prediction_type)
        return MADFormerPipeline(transformer=self.ema.model, vae=self.vae, scheduler=scheduler)

    def _load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} is damaged or truncated; remove it to resume from the one before") from error
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
