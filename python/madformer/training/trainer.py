"""One training run, on one device or many: exact resume, moving averages, checkpoints, and what it reports.

Noise, timesteps and the order of the data depend on the seed and the step alone, so a resumed run draws what the
unbroken one would have drawn, whatever number of processes it has now.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from madformer.conditioning.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from madformer.data.images import ImageDataset
from madformer.engine.options import SamplingOptions
from madformer.engine.schedulers import default_scheduler
from madformer.machine import default_dtype, environment, matmul_rate
from madformer.pipeline import MADFormerPipeline
from madformer.pipeline_files import MODEL_INDEX
from madformer.sheets import image_grid
from madformer.training.checkpoint import Checkpoints, RunState
from madformer.training.config import TrainingConfig
from madformer.training.costs import costs_of, loss_weights
from madformer.training.data import BatchStream, Conditioning, Draws, Share, cache_latents, draw_split
from madformer.training.fitting import check_fit, describe, fit, open_data, too_small
from madformer.training.folder import RunFolder
from madformer.training.initial import adapted, merge, with_initial_model
from madformer.training.losses import Batch, training_losses
from madformer.training.noise import FlowTimesteps, noise_schedule
from madformer.training.optimization import MovingAverages, StepGuard, learning_rate_factor
from madformer.training.parallel import accumulating, join, make_model, whole
from madformer.training.reporting import Reporter, check_sinks
from madformer.training.stopping import Ending
from madformer.vae import load_vae

logger = logging.getLogger("madformer.training")

PACKAGES = ("madformer", "diffusers", "triton", "numpy")


class Trainer:
    """Trains ``config.model`` into ``folder``.

    The folder holds ``config.json``, ``environment.json`` (versions, commit and device of the last session),
    ``metrics.jsonl``, ``samples/``, ``tensorboard/``, ``checkpoints/`` (to resume from) and ``model/``: a pipeline with
    the averaged weights, ready to sample from, renewed with every checkpoint.

    Nothing in the folder is made or changed before :meth:`run` has the data of its first step: whatever is refused
    leaves it as it was.

    Args:
        resume: go on from the newest checkpoint in the folder, if there is one. Without it a folder that already
            holds a run is refused.
        given: fields of the configuration that were chosen, those of the model after ``model.``: what the data say of
            the others decides, see :func:`madformer.training.fitting.fit`. None for a configuration that is as it is to
            be.

    Attributes:
        stopped_by: number of the signal that ended the last :meth:`run` before its last step, or 0.

    Raises:
        ValueError, OSError: see the message.
    """

    def __init__(
        self, config: TrainingConfig, folder: str | Path, *, resume: bool = False, given: Collection[str] | None = None
    ) -> None:
        self.folder = Path(folder)
        if config.init_from:
            config, given = with_initial_model(config, given), None
        self.world = join(config)
        self.device = self.world.device
        if config.precision == "auto":
            in_bf16 = default_dtype(self.device) == torch.bfloat16
            config = dataclasses.replace(config, precision="bf16" if in_bf16 else "fp32")
        self.run_folder = RunFolder(folder)
        with self.world.together():
            if self.world.is_first:
                self.run_folder.check_free(config.data, resume=resume)
            data = open_data(config)
            self.config = config = self._fitted(config, data, given)
            newest = self.run_folder.newest(config)
            self.run_folder.check_data(data)
            check_sinks(config)
            if config.num_threads:
                torch.set_num_threads(config.num_threads)
            try:
                self.vae = load_vae(config.vae, self.device)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{error}: --vae names an autoencoder, a folder or hub id") from error
            # of images to be cached, their geometry is checked before all of them are encoded
            data.check(config.model, self.vae, flip=config.flip and not config.cache_latents)
            cached = config.cache_latents and isinstance(data, ImageDataset)
            self.data = cache_latents(self.vae, data) if cached else data
            self.data.check(config.model, self.vae, flip=config.flip)
            self.conditioning = Conditioning(
                self._open_tokenizer(), config.caption, config.caption_dropout, config.label_dropout
            )
        self.checkpoints = Checkpoints(
            self.run_folder.checkpoints, config.keep_checkpoints, is_first=self.world.is_first
        )
        self.costs, self.weights = costs_of(config), loss_weights(config)
        self.model, self.wrapped = make_model(config, self.world, self.costs.unread)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.averages = MovingAverages(self.model, config.ema_decays)
        self.guard = StepGuard(self.optimizer, self.device, config.explosion)
        self.state = RunState(self.model, self.averages, self.optimizer, self.guard)
        self.noise_schedule = noise_schedule(config.model.prediction_type, **config.noise_options())
        if newest is not None:
            self.state.load(newest)
        self._saved, self._has_model = self.step, newest is not None
        self._ending, self.stopped_by = Ending(), 0

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Resume a run with the configuration that its folder holds."""
        return cls(TrainingConfig.of_run(folder), folder, resume=True)

    @property
    def step(self) -> int:
        return self.state.step

    def _fitted(self, config: TrainingConfig, data: Any, given: Collection[str] | None) -> TrainingConfig:
        """The configuration for these data; what a user should know of them is logged."""
        summary = data.summary()
        if given is not None:
            config = fit(config, summary, given)
        notices = check_fit(config, summary)
        if isinstance(data, ImageDataset):
            notices += too_small(data, config.image_shape)
        if self.world.is_first:
            logger.warning("%s", describe(config, summary))
            for notice in notices:
                logger.warning("%s", notice)
        return config

    def _open_tokenizer(self) -> Tokenizer | None:
        text = self.config.model.text
        if text is None:
            return None
        tokenizer = load_tokenizer(self.config.tokenizer)
        check_tokenizer(tokenizer, text)
        return tokenizer

    def run(self) -> None:
        """Train to the last step.

        SIGTERM, SIGINT and :meth:`stop` save a checkpoint and end the run in good order, and so does a loader that can
        give no more data: its error follows the checkpoint. A second signal ends the process at once. Nothing is
        written before the first step has its data.

        Raises:
            ValueError: too many steps in a row were skipped, or images unreadable.
            OSError: another process is training into the folder, what it should hold cannot be written, or a loader's
                process was killed. The last good checkpoint is there.
        """
        with contextlib.ExitStack() as held:
            try:
                self._run(held)
            finally:
                self.stopped_by = self._ending.signal if self.step < self.config.steps else 0
                self._ending = Ending()

    def _run(self, held: contextlib.ExitStack) -> None:
        config, ending = self.config, self._ending
        batches = self._batches()
        held.callback(batches.close)
        held.enter_context(ending.listening())
        fetched = self._fetch(batches) if self.step < config.steps else []
        if ending.agreed(self.world):
            ending.settle()
            return
        reporter = self._open_folder(held)
        record: dict[str, Tensor] = {}
        with self._profiler() as end_of_step:
            while self.step < config.steps and not ending.agreed(self.world):
                record = self._train_step(iter(fetched))
                last = self.step == config.steps
                if last or self.step % config.log_every == 0:
                    self._report(record, reporter)
                    record = {}
                if last or self.step % config.save_every == 0:
                    self._pausing(reporter, self.save)
                if config.sample_every and (last or self.step % config.sample_every == 0):
                    self._pausing(reporter, lambda: self._draw(reporter))
                end_of_step()
                if not last and not ending.asked:
                    fetched = self._fetch(batches)
        if record:
            self._report(record, reporter)
        if self.step != self._saved:
            self._pausing(reporter, self.save)
        with self.world.together():
            self.checkpoints.finish()
        ending.settle()

    def stop(self) -> None:
        """Ask a run, from any thread, to end after its step as it does on SIGTERM."""
        self._ending.asked = True

    def _batches(self) -> BatchStream:
        config, world = self.config, self.world
        micro_batch = config.batch_size // (config.accumulation_steps * world.size)
        share = Share(config.batch_size, micro_batch, world.rank, world.size)
        num_timesteps = self.noise_schedule.config.num_train_timesteps
        draws = Draws(
            config.seed, num_timesteps, config.flip, self.conditioning, config.data_order, FlowTimesteps.of(config)
        )
        return BatchStream(
            self.data, self.vae, config.model, share, draws, first_step=self.step, num_workers=config.num_workers
        )

    def _fetch(self, batches: BatchStream) -> list[Batch]:
        """The micro-batches of the next step; none where they cannot be had, which is then the run's failure."""
        try:
            return [next(batches) for _ in range(self.config.accumulation_steps)]
        except (ValueError, OSError) as error:
            self._ending.failure = error
            return []

    def _open_folder(self, held: contextlib.ExitStack) -> Reporter | None:
        """Hold the folder until the run ends, and say in it what the run is."""
        reporter = None
        with self.world.together():
            if self.world.is_first:
                described = environment("train", self.device, PACKAGES) | {"processes": self.world.size}
                held.enter_context(self.run_folder.opened(self.config, described, self.step))
                dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
                roof = matmul_rate(self.device, dtype)
                reporter = Reporter(self.config, self.folder, self.step, self.costs, roof, self.world.size)
                held.callback(reporter.close)
        held.callback(self.checkpoints.abandon)
        return reporter

    def _train_step(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimiser step; gives the losses of this process's samples, on the device."""
        config = self.config
        factor = learning_rate_factor(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        totals: dict[str, Tensor] = {}
        split = draw_split(config.model, config.seed, self.step)
        for index in range(config.accumulation_steps):
            if config.compile_mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()  # Nothing that the step before computed is read any more.
            batch = next(batches).to(self.device)
            if not config.model.num_classes:
                batch.labels_B = None
            with accumulating(self.wrapped, index == config.accumulation_steps - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    losses = training_losses(
                        self.wrapped, batch, self.noise_schedule, self.weights, diffusion_layers=split
                    )
                (losses.total / config.accumulation_steps).backward()
            for name, value in losses.parts().items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value / config.accumulation_steps
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm))
        self.guard.step(norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.averages.update(self.step)
        self.state.step += 1
        return totals | {"grad_norm": norm}

    def _report(self, record: dict[str, Tensor], reporter: Reporter | None) -> None:
        """The one place in a step that waits for the device."""
        values = self.world.mean(torch.stack(list(record.values())))
        skipped, in_a_row = int(self.guard.skipped), int(self.guard.in_a_row)
        with self.world.together():
            if reporter is not None:
                named = dict(zip(record, values.tolist(), strict=True))
                named |= {"lr": self.optimizer.param_groups[0]["lr"], "skipped_steps": skipped}
                named["unreadable_images"] = self.data.num_bad
                reporter.numbers(self.step, named, self.device)
        if in_a_row > self.config.max_skipped_steps:
            self.checkpoints.abandon()  # One that is still being written may be the last good one.
            newest = self.checkpoints.paths()
            raise ValueError(
                f"the gradients of the last {in_a_row} steps up to {self.step} are not finite, or explode: the run has "
                f"diverged; last good checkpoint: {newest[-1] if newest else 'none'}"
            )

    def save(self) -> None:
        """Write a checkpoint behind the next steps, and renew ``model/``. Nothing while steps are being skipped."""
        if int(self.guard.in_a_row):
            return
        with self.world.together():
            self.checkpoints.finish()
        self.checkpoints.save(self.state)
        self._saved = self.step
        pipeline = self.pipeline()
        with self.world.together():
            if self.world.is_first:
                self._renew(pipeline, self.folder / "model")

    def _renew(self, pipeline: MADFormerPipeline, folder: Path) -> None:
        if self._has_model and (folder / MODEL_INDEX).is_file():
            # all else is as it was, and is not put at risk by a disk that is full
            pipeline.transformer.save_pretrained(folder / "transformer")
        else:
            pipeline.save_pretrained(folder)
            self._has_model = True

    def pipeline(self, decay: float | None = None) -> MADFormerPipeline:
        """The averaged weights (the first decay's, unless named), ready to sample; every process must call this."""
        averages = self.averages.weights[decay or self.config.ema_decays[0]]
        weights = {name: whole(average) for name, average in averages.items()}
        with torch.device("meta"):
            model = adapted(self.config)
        model.load_state_dict(weights, assign=True)
        merge(model)
        model.rope.to_empty(device=self.device)
        model.eval().requires_grad_(False).set_backend(self.config.backend)
        scheduler = default_scheduler(self.config.model.prediction_type, **self.config.noise_options())
        names = self.data.class_names if len(self.data.class_names) == self.config.model.num_classes else None
        return MADFormerPipeline(model, self.vae, scheduler, self.conditioning.tokenizer, names or None)

    def _draw(self, reporter: Reporter | None) -> None:
        pipeline = self.pipeline()
        with self.world.together():
            if reporter is None:
                return
            pipeline.set_progress_bar_config(disable=True)
            pipeline.transformer.to(default_dtype(self.device))
            told = self._told()
            sampling = SamplingOptions(self.config.sample_steps, self.config.sample_guidance if told else 1.0)
            told["num_images"] = 1 if told else self.config.sample_images
            reporter.picture(self.step, image_grid(pipeline(**sampling.keywords(), **told, seed=0).images))

    def _told(self) -> dict[str, Any]:
        """What samples are asked for: the captions and labels of images from all over the data."""
        model, count = self.config.model, self.config.sample_images
        if model.text is None and not model.num_classes:
            return {}
        samples = [self.data.read(index * len(self.data) // count) for index in range(count)]
        told: dict[str, Any] = {}
        if model.text is not None:
            told["prompt"] = [self.conditioning.text_of(sample) for sample in samples]
        if model.num_classes:
            told["labels"] = [sample["label"] for sample in samples]
        return told

    def _pausing(self, reporter: Reporter | None, work: Callable[[], None]) -> None:
        started = time.perf_counter()
        work()
        if reporter is not None:
            reporter.pause(time.perf_counter() - started)

    @contextlib.contextmanager
    def _profiler(self) -> Iterator[Callable[[], None]]:
        """Traces the steps that the configuration asks for into ``traces/``; gives what to call after each."""
        steps = self.config.profile_steps if self.world.is_first else 0
        if not steps:
            yield lambda: None
            return
        folder = self.folder / "traces"
        with torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=2, warmup=1, active=steps, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder)),
        ) as profiler:
            yield profiler.step
