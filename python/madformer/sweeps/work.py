"""What a worker does: encode data, train a model, look for its best guidance, sample and judge a cell."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from madformer.bulk import Prompts, Settings
from madformer.engine.options import SamplingOptions
from madformer.engine.precision import PRECISIONS, apply
from madformer.engine.schedulers import converted
from madformer.evaluation import (
    DrawnImages,
    Evaluation,
    Extractor,
    FeatureSet,
    ImageSet,
    Statistics,
    evaluate,
    extract,
    load_extractor,
    open_reference,
)
from madformer.evaluation.images import OnePart
from madformer.evaluation.scoring import check_metrics
from madformer.files.atomic import write_json
from madformer.machine import precision_of
from madformer.objects import read_object
from madformer.pipeline import MADFormerPipeline
from madformer.sweeps.checking import Outlines, what_to_draw
from madformer.sweeps.config import HIGHER, LOWER, OWN, Cell, Model, Sweep, is_lower_better
from madformer.sweeps.costs import PeakMemory, WatchedImages, evaluations_of, flops_per_image
from madformer.sweeps.folder import SweepFolder
from madformer.sweeps.tuning import golden_section
from madformer.training.config import TrainingConfig
from madformer.training.costs import costs_of
from madformer.training.initial import initial_config

logger = logging.getLogger("madformer.evaluation")
SHOWN = 8
"""Pictures of a cell that its report shows."""
TUNING_SEED = 2**40
"""Of the first image that guidance is tuned on: no draw that is evaluated has it."""


@dataclass(frozen=True)
class Setup:
    """What makes a worker, in its own process.

    Attributes:
        path: the sweep's folder. values: the sweep's. devices: worker ``k`` computes on number ``k``, and they begin
            again behind the last. threads: of a worker on a CPU. cache: where features of the reference are kept.
    """

    path: Path
    values: dict[str, Any]
    devices: tuple[str, ...]
    threads: int
    cache: Path | None
    progress: bool

    def __call__(self, number: int) -> Worker:
        device = self.devices[number % len(self.devices)]
        if device.startswith("cuda"):
            # kernels are launched on the current device
            torch.cuda.set_device(torch.device(device).index or 0)
        torch.set_num_threads(self.threads)
        return Worker(SweepFolder(self.path, Sweep.of(self.values)), device, self.cache, progress=self.progress)


class Worker:
    """Does jobs on one device; what several of them need is loaded once."""

    def __init__(self, folder: SweepFolder, device: str, cache: Path | None, *, progress: bool) -> None:
        self.folder, self.sweep, self.device = folder, folder.sweep, device
        self.cache, self.progress = cache, progress
        self.models = {model.id: model for model in self.sweep.all_models}
        self.cells = {cell.id: cell for cell in self.sweep.cells}
        self.precision = precision_of(self.sweep.sample.precision, device)
        self._loaded: tuple[Any, MADFormerPipeline, Settings] | None = None

    def __call__(self, kind: str, name: str) -> None:
        work = {
            "check": self.check, "look": self.look, "reference": self.find, "encode": self.encode,
            "train": self.train, "tune": self.tune, "cell": self.measure,
        }  # fmt: skip
        work[kind](name)

    # data and training

    def encode(self, name: str) -> None:
        """Encode the data of the models whose :func:`encoding_of` is ``name``, once for all of them."""
        from madformer.data.encoding import write_latents
        from madformer.data.images import ImageDataset
        from madformer.data.latents import LatentDescription
        from madformer.training.fitting import open_data
        from madformer.vae import load_vae

        config = next(m.config for m in self.models.values() if m.config and encoding_of(m.config) == name)
        config = with_size(config)
        images = open_data(config)
        assert isinstance(images, ImageDataset)
        vae = load_vae(config.vae, self.device)
        # what a run would have encoded itself, to the bit
        description = LatentDescription.of(
            images, vae, source=config.data, vae_name=config.vae, dtype="float32", flips=config.flip
        )
        folder = self.folder.path / "latents" / name
        write_latents(images, vae.float(), folder, description, progress=self.progress)

    def train(self, name: str) -> None:
        """Train a model to its last step; a run that was stopped goes on from its newest checkpoint."""
        from madformer.training.trainer import Trainer

        model = self.models[name]
        config, folder = model.config, self.folder.training(model)
        assert config is not None
        config = dataclasses.replace(config, device=self.device, num_threads=0)
        if (encoded := encoding_of(config)) is not None:
            latents = str(self.folder.path / "latents" / encoded)
            # what is held out of the images is not among the latents
            config = dataclasses.replace(config, data=latents, cache_latents=False, holdout=0.0)
        trainer = Trainer(config, folder, resume=True, given=model.given)
        trainer.run()
        if trainer.stopped_by:
            # whoever listened to it before the run did is to hear of it
            signal.raise_signal(trainer.stopped_by)
            raise KeyboardInterrupt
        finished = Path(self.folder.model(model))
        for left_over in folder.glob(f".{finished.name}-*"):
            shutil.rmtree(left_over)
        temporary = Path(tempfile.mkdtemp(prefix=f".{finished.name}-", dir=folder))
        try:
            # the run's own model/ is there after its first checkpoint, and renewed file by file: this one is whole
            trainer.pipeline().save_pretrained(temporary)
            os.chmod(temporary, 0o755)
            temporary.rename(finished)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    # what pictures are held against

    @cached_property
    def extractor(self) -> Extractor:
        judging = self.sweep.evaluate
        return load_extractor(judging.extractor, judging.weights, self.device)

    @cached_property
    def reference(self) -> ImageSet | Statistics:
        judging = self.sweep.evaluate
        reference = open_reference(judging.reference, judging.num_reference, holdout=judging.holdout)
        if isinstance(reference, Statistics) and judging.num_reference is not None:
            raise ValueError(f"evaluate.num_reference is of images, and {judging.reference} holds statistics alone")
        return reference

    @cached_property
    def reference_features(self) -> FeatureSet | Statistics:
        """What :meth:`find` found; no worker looks anew."""
        if isinstance(self.reference, Statistics):
            return self.reference
        return FeatureSet.read(self.folder.path / "reference")

    def check(self, name: str) -> None:
        """Whether the reference has what is asked of it, by what is known without looking at its pictures."""
        check_metrics([*self.sweep.evaluate.metrics, *self._tuned_metric], self.extractor, self.reference)
        if isinstance(self.reference, Statistics):
            self.reference.check(self.extractor)
        outlines = Outlines(self.folder)
        for model in dict.fromkeys(cell.model.id for cell in self.folder.missing()):
            if (outline := outlines.of(self.models[model])) is not None:
                what_to_draw(outline.config, self.sweep, self.reference)

    def look(self, share: str) -> None:
        """Have features of a share of the reference, such as ``0 of 2``, in the cache."""
        if not isinstance(self.reference, Statistics):
            first, every = map(int, share.split(" of "))
            for part in itertools.islice(self.reference.parts(), first, None, every):
                extract(OnePart(self.reference.name, part), self.extractor, cache=self.cache, progress=False)

    def find(self, name: str) -> None:
        """Have the features of the whole reference in the folder, for all workers."""
        if not isinstance(self.reference, Statistics):
            found = extract(self.reference, self.extractor, cache=self.cache, progress=self.progress)
            found.write(self.folder.path / "reference")

    @property
    def _tuned_metric(self) -> list[str]:
        return [(LOWER | HIGHER)[self.sweep.tune.metric]] if self.sweep.tune else []

    # sampling

    def pipeline(self, cell: Cell) -> tuple[MADFormerPipeline, Settings]:
        """The cell's model, ready to be drawn from, and settings of which its own are to be changed."""
        key = (cell.model.id, cell.scheduler, cell.diffusion_layers)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            self._loaded = (key, *self._load(cell))
        return self._loaded[1:]

    def _load(self, cell: Cell) -> tuple[MADFormerPipeline, Settings]:
        sample = self.sweep.sample
        parts: dict[str, Any] = {} if sample.vae is None else {"vae": sample.vae}
        pipeline = MADFormerPipeline.from_pretrained(
            self.folder.model(cell.model),
            **parts,
            dtype=torch.float32,
            vae_dtype=PRECISIONS[self.precision].dtype,
            device=self.device,
        )
        if cell.diffusion_layers is not None:
            pipeline.transformer.set_split(cell.diffusion_layers)
        if cell.scheduler != OWN:
            pipeline.scheduler = converted(pipeline.scheduler, cell.scheduler)
        texts, classes = what_to_draw(pipeline.transformer.config, self.sweep, self.reference)
        prompts = Prompts.of(pipeline.reader, texts, classes)
        settings = Settings.of(
            pipeline, SamplingOptions(), precision=self.precision, batch_size=sample.batch_size, prompts=prompts
        )
        pipeline.transformer = apply(pipeline.transformer, self.precision)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline, settings

    def draw(self, cell: Cell, guidance: float, seed: int, num_images: int, shown: int = 0) -> WatchedImages:
        """Pictures of a cell, which are drawn as they are asked for."""
        pipeline, settings = self.pipeline(cell)
        sampling = self._sampling(cell, guidance)
        prompts = settings.prompts
        if sampling.guided and prompts.texts:
            # what guidance leads away from is part of what the tokenizer is asked
            prompts = Prompts.of(pipeline.reader, prompts.texts, prompts.labels, guided=True)
        own = dataclasses.replace(settings, sampling=sampling, seed=seed, prompts=prompts)
        return WatchedImages(DrawnImages(pipeline, own, num_images, cell.model.label), shown)

    def _sampling(self, cell: Cell, guidance: float) -> SamplingOptions:
        interval: Any = self.sweep.sample.guidance_interval if guidance > 1 else None
        return SamplingOptions(cell.steps, guidance, interval, cell.refresh_every)

    def judge(self, images: WatchedImages, metrics: Sequence[str]) -> Evaluation:
        # what it warns of is in the row, and the same in most
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            # the seconds of its row are those of drawing
            features = extract(images, self.extractor, alone=True)
            return evaluate(features, self.reference_features, self.extractor, metrics=metrics)
        finally:
            logger.setLevel(level)

    def tune(self, name: str) -> None:
        """Look for the best guidance; what was looked at before a kill is not looked at again."""
        tuning = self.sweep.tune
        assert tuning is not None
        cell = next(cell for cell in self.sweep.cells if cell.tuning_id == name)
        file = self.folder.path / "tuning" / f"{name}.json"
        found: dict[str, Any] = read_object(file) if file.exists() else {"looked_at": {}}
        sign = 1 if is_lower_better(tuning.metric) else -1

        def value(guidance: float) -> float:
            known: dict[str, float] = found["looked_at"]
            if str(guidance) not in known:
                count = tuning.num_images or self.sweep.evaluate.num_images
                judged = self.judge(self.draw(cell, guidance, TUNING_SEED, count), self._tuned_metric)
                known[str(guidance)] = judged.scores[tuning.metric].value
                write_json(file, found)
            return sign * known[str(guidance)]

        found["guidance"], best = golden_section(value, tuning.low, tuning.high, tuning.evaluations)
        write_json(file, found | {"value": sign * best})

    def guidance(self, cell: Cell) -> float:
        """A cell's own scale, or the one that was found."""
        if cell.guidance is not None:
            return cell.guidance
        return float(read_object(self.folder.path / "tuning" / f"{cell.tuning_id}.json")["guidance"])

    def measure(self, name: str) -> None:
        """Draw a cell's pictures, judge them, and write its row."""
        cell, judging = self.cells[name], self.sweep.evaluate
        guidance = self.guidance(cell)
        memory = PeakMemory(torch.device(self.device))
        images = self.draw(cell, guidance, cell.seed * judging.num_images, judging.num_images, SHOWN)
        found = self.judge(images, judging.metrics)
        model = images.drawn_images.pipeline.transformer
        scheduler, sampling = images.drawn_images.pipeline.scheduler, images.drawn_images.settings.sampling
        count = evaluations_of(model, scheduler, sampling)
        row = {
            "cell": cell.id,
            "model": cell.model.label,
            "model_id": cell.model.id,
            "training_seed": cell.model.seed,
            "values": dict(cell.model.values),
            "scheduler": cell.scheduler,
            "steps": cell.steps,
            "guidance": guidance,
            "guidance_tuned": cell.guidance is None,
            "refresh_every": cell.refresh_every,
            "diffusion_layers": model.config.diffusion_layers,
            "sampling_seed": cell.seed,
            "weights": f"{images.drawn['model']} {images.drawn['vae']}",
            "scores": {name: score.to_dict() for name, score in found.scores.items()},
            "costs": {
                "nfe_steps": count.steps,
                "nfe_layers": count.layers,
                "flops_per_image": flops_per_image(model, count, guided=sampling.guided),
                "seconds_per_image": images.seconds_per_image,
                "peak_memory_bytes": memory.read(),
                "parameters": sum(weight.numel() for weight in model.parameters()),
                "training_flops": _training_flops(cell.model, self.folder.training(cell.model)),
            },
            "warnings": list(found.warnings),
            "shown": [_caption(images.drawn_images.settings.prompts, index) for index in images.kept],
        }
        self.folder.write(cell, row, list(images.kept.values()))


def _caption(prompts: Prompts, index: int) -> str:
    entry = prompts.entry(index)
    return str(entry.get("prompt", f"class {entry['labels']}" if "labels" in entry else ""))


def _training_flops(model: Model, folder: Path) -> int | None:
    """Of all its steps; the run's own configuration is what the data made of the model's."""
    if model.config is None:
        return None
    config = TrainingConfig.of_run(folder)
    return costs_of(config).flops * config.batch_size * config.steps


def encoding_of(config: TrainingConfig) -> str | None:
    """What a run's data are encoded under; None where they are latents already.

    Raises:
        ValueError, OSError: the model that the run begins with is missing or damaged.
    """
    from madformer.data.latents import holds_latents

    if not config.data or holds_latents(config.data):
        return None
    how = [config.data, config.vae, with_size(config).image_shape, config.flip, config.holdout]
    return hashlib.sha256(json.dumps(how).encode()).hexdigest()[:12]


def with_size(config: TrainingConfig) -> TrainingConfig:
    """With the model that a run begins with, which says what size of pictures it takes."""
    return dataclasses.replace(config, model=initial_config(config.init_from)) if config.init_from else config
