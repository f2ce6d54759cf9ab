"""What of a sweep its models or schedulers refuse, as far as configurations say: told before anything is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from madformer.conditioning.prompt import check_guidable
from madformer.config import MADFormerConfig
from madformer.data.fields import DataSummary
from madformer.engine.precision import refusal
from madformer.engine.schedule import Schedule
from madformer.engine.schedulers import check_scheduler, converted, default_scheduler
from madformer.evaluation import StoredImages
from madformer.files.hub import CONFIG_NAME, resolve_folder
from madformer.machine import precision_of
from madformer.model import MADFormer
from madformer.model.pretrained import config_of
from madformer.objects import read_object
from madformer.pipeline import MADFormerPipeline
from madformer.pipeline_files import MODEL_INDEX
from madformer.sweeps.config import OWN, Cell, Model, Sweep
from madformer.sweeps.folder import SweepFolder
from madformer.training.config import TrainingConfig
from madformer.training.fitting import fit, open_data
from madformer.training.initial import check_initial, initial_config
from madformer.vae import num_channels

__all__ = ["Outlines", "check_cells", "what_to_draw"]


@dataclass(frozen=True)
class Outline:
    """What is known of a model without its weights.

    Attributes:
        scheduler: the one that it is saved with. has_vae: whether it has an autoencoder of its own.
        fitted: False where its text and classes are still for the data to say.
    """

    config: MADFormerConfig
    scheduler: Any
    has_vae: bool
    fitted: bool = True


class Outlines:
    """Of the models of a sweep, each made once.

    Args:
        folder: where models may lie that were trained already.
        elsewhere: nothing is fetched, and what is not here may be there by the time that it is needed.
    """

    def __init__(self, folder: SweepFolder, *, elsewhere: bool = False) -> None:
        self.folder, self.elsewhere = folder, elsewhere
        self._made: dict[str, Outline | None] = {}
        self._summaries: dict[Any, DataSummary] = {}

    def of(self, model: Model) -> Outline | None:
        """Of a model that is there, or is to be trained; None for one that is only elsewhere.

        Raises:
            ValueError, OSError: it, or what it is trained on, is missing or damaged; one line.
        """
        if model.id not in self._made:
            self._made[model.id] = self._there(model) if self.folder.is_there(model) else self._to_train(model)
        return self._made[model.id]

    def _there(self, model: Model) -> Outline | None:
        name = self.folder.model(model)
        if self.elsewhere and not Path(name).is_dir():
            return None
        folder = resolve_folder(name)
        config, index = config_of(folder), folder / MODEL_INDEX
        with torch.device("meta"):
            transformer = MADFormer(config)
        pipeline = MADFormerPipeline.from_pretrained(folder, transformer=transformer, vae=None)
        parts = read_object(index) if index.is_file() else {}
        return Outline(config, pipeline.scheduler, bool((parts.get("vae") or [None])[0]))

    def _to_train(self, model: Model) -> Outline:
        config, fitted = model.config, True
        assert config is not None
        try:
            if config.init_from:
                check_initial(config, model.given)
                config = dataclasses.replace(config, model=initial_config(config.init_from))
            else:
                config = fit(config, self._summary(config), model.given)
        except (ValueError, OSError, ImportError):
            if not self.elsewhere:
                raise
            fitted = False
        scheduler = default_scheduler(config.model.prediction_type, **config.noise_options())
        return Outline(config.model, scheduler, True, fitted)

    def _summary(self, config: TrainingConfig) -> DataSummary:
        key = config.data, config.holdout
        if key not in self._summaries:
            self._summaries[key] = open_data(config).summary()
        return self._summaries[key]


def check_cells(folder: SweepFolder, cells: Iterable[Cell], device: str, *, elsewhere: bool = False) -> None:
    """Whether all cells can be sampled.

    Args:
        cells: those that are to be done. device: where they will be. folder, elsewhere: see :class:`Outlines`.

    Raises:
        ValueError: a model, a field, its value and why it is refused, in one line.
        ValueError, OSError: as :meth:`Outlines.of`.
    """
    sample, outlines = folder.sweep.sample, Outlines(folder, elsewhere=elsewhere)
    if (why := refusal(precision_of(sample.precision, device), device)) is not None:
        raise ValueError(f"sample.precision={sample.precision!r} cannot be had on {device}: {why}")
    told = set[Any]()
    for cell in cells:
        if (outline := outlines.of(cell.model)) is None:
            continue
        key = (cell.model.id, cell.scheduler, cell.diffusion_layers, cell.steps, cell.guidance)
        if cell.model.id not in told:
            _check_model(folder.sweep, cell.model, outline, elsewhere=elsewhere)
        if key not in told:
            _check_cell(cell, outline)
        told |= {cell.model.id, key}


def _check_model(sweep: Sweep, model: Model, outline: Outline, *, elsewhere: bool) -> None:
    """What all cells of a model have in common."""
    sample = sweep.sample
    if sample.prompts and outline.fitted and outline.config.text is None:
        raise _refused(model, "sample.prompts have no place: it was made without text")
    if sample.vae is None and not outline.has_vae:
        raise _refused(model, "sample.vae is missing: it has no autoencoder, and its latents are no pictures")
    if sample.vae is not None and (Path(sample.vae).is_dir() or not elsewhere):
        values = SimpleNamespace(**read_object(resolve_folder(sample.vae) / CONFIG_NAME))
        channels, own = num_channels(SimpleNamespace(config=values)), outline.config.latent_channels
        if channels not in (None, own):
            raise _refused(model, f"sample.vae={sample.vae!r} has {channels} latent channels, and it draws {own}")


def _check_cell(cell: Cell, outline: Outline) -> None:
    """How one is sampled."""

    config, scheduler = outline.config, outline.scheduler

    @contextmanager
    def naming(field: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise _refused(cell.model, f"{field}: {error}") from error

    if cell.diffusion_layers is not None:
        with naming(f"sample.diffusion_layers={cell.diffusion_layers}"):
            config.check_split(cell.diffusion_layers)
    if cell.scheduler != OWN:
        with naming(f"sample.scheduler={cell.scheduler!r}"):
            scheduler = converted(scheduler, cell.scheduler)
            check_scheduler(scheduler, config.prediction_type)
    with naming(f"sample.steps={cell.steps} with sample.scheduler={cell.scheduler!r}"):
        Schedule.of(scheduler, cell.steps, torch.device("cpu"))
    if outline.fitted and cell.guidance != 1:
        with naming("tune" if cell.guidance is None else f"sample.guidance={cell.guidance:g}"):
            check_guidable(config)


def _refused(model: Model, what: str) -> ValueError:
    return ValueError(f"model {model.label}: {what}")


def what_to_draw(config: MADFormerConfig, sweep: Sweep, reference: object) -> tuple[Sequence[str], Sequence[int]]:
    """Texts and classes for a model: of the reference those of images evenly from all over it.

    Raises:
        ValueError: it has none, and no ``sample.prompts`` are given.
    """
    told, count = sweep.sample.prompts, sweep.evaluate.num_images
    if config.text is None and not config.num_classes:
        return (), ()
    if told:
        return told, ()
    if isinstance(reference, StoredImages):
        count = min(count, len(reference))
        places = [index * len(reference) // count for index in range(count)]
        if config.text is not None and any(texts := list(map(reference.caption, places))):
            return texts, ()
        if config.text is None and min(classes := list(map(reference.label, places))) >= 0:
            return (), classes
    what = "captions" if config.text is not None else "labels"
    raise ValueError(f"{sweep.evaluate.reference} has no {what} to draw for: give sample.prompts")
