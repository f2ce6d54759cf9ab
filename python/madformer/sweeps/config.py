"""What a sweep is: models that are given or trained, how each is sampled, and what the pictures are held against.

A sweep is every combination of a model and of the settings of sampling. A combination is a cell: a row of the
table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_origin, get_type_hints

from madformer.engine.options import SamplingOptions
from madformer.engine.schedulers import scheduler_class
from madformer.evaluation import METRICS
from madformer.objects import changed, check_types, from_object, require, with_nearest
from madformer.seeds import check_seed
from madformer.training.config import PRESETS, TrainingConfig
from madformer.training.fitting import telling_classes

__all__ = ["Cell", "Judging", "Model", "Sampling", "Sweep", "Training", "Tuning"]

OWN = "own"
"""The scheduler that a model was saved with."""
LABEL = "label"
"""What a case is called; it is no field of a training run."""
LOWER = {"fd": "fd", "fd-infinity": "fd-infinity", "kid": "kid", "cmmd": "cmmd", "caption_rank": "following"}
HIGHER = {
    **dict.fromkeys(("precision", "recall", "density", "coverage"), "prdc"),
    "is": "is",
    **dict.fromkeys(("caption_at_1", "caption_at_10", "class_accuracy"), "following"),
}
"""Figures of which less, or more, is better, each with the metric that gives it."""
AXES = {
    "sample": ("steps", "guidance", "scheduler", "refresh_every", "diffusion_layers", "seeds"),
    "train": ("seeds", "grid", "cases"),
}
"""What a sweep that goes on may have more of: cells that are there stay."""


@dataclass(frozen=True)
class Training:
    """Models to train: every combination of a case and the grid, from every seed."""

    preset: str  # that all of them begin with: tiny, emoji64, ffhq1024 or imagenet256
    seeds: tuple[int, ...] = (0,)  # of the weights, the order of the data, noise and timesteps
    fields: Mapping[str, Any] = field(
        default_factory=dict
    )  # what is otherwise in all of them: fields of a training run
    grid: Mapping[str, Any] = field(default_factory=dict)  # lists of values of such fields: what models differ in
    # variants that no grid makes: tables of such fields, each with a label of its own
    cases: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check_types(self, "train.")
        require(self.preset in PRESETS, f"train.preset={self.preset!r} must be one of {', '.join(PRESETS)}")
        _check_axis("train.seeds", self.seeds)
        for name, values in _leaves(self.grid):
            require(isinstance(values, (list, tuple)), f"train.grid.{name}={values!r} must be a list of values")
            _check_axis(f"train.grid.{name}", values)
        for name, table in (("fields", self.fields), ("grid", self.grid), *(("cases", case) for case in self.cases)):
            require("seed" not in table, f"train.{name}.seed has no place: there are train.seeds")
        self._check_cases()

    def _check_cases(self) -> None:
        for case in self.cases:
            label = case.get(LABEL)
            require(isinstance(label, str) and bool(label), f"train.cases: a case has label={label!r}, no name")
        _check_axis("train.cases: label", [case[LABEL] for case in self.cases], empty=True)
        _check_axis("train.cases", [dict(_leaves(case)) | {LABEL: ""} for case in self.cases], empty=True)
        given = {name for name, _ in _leaves(self.grid)}
        for case in self.cases:
            twice = sorted(given & {name for name, _ in _leaves(case)})
            require(not twice, f"train.cases: {case[LABEL]} and train.grid both say what {', '.join(twice)} is")

    def models(self) -> Iterator[Model]:
        """Raises ``ValueError`` for fields that there are not, or a combination that is no model."""
        axes = list(_leaves(self.grid))
        base = _changed(PRESETS[self.preset](), self.fields, "train.fields.")
        for case, *chosen in itertools.product(self.cases or ({},), *(values for _, values in axes)):
            own = {name: value for name, value in _leaves(case) if name != LABEL}
            grid = {name: value for (name, _), value in zip(axes, chosen, strict=True)}
            values = own | grid
            # at once: what is a model may take both
            config = _changed(base, _nested(values), "train.cases." if own else "train.grid.")
            given = (*(name for name, _ in _leaves(self.fields, within=("model",))), *values)
            named = [case[LABEL]] if case else []
            told = ", ".join(named + [f"{name.removeprefix('model.')}={_shown(value)}" for name, value in grid.items()])
            for seed in self.seeds:
                seeded = dataclasses.replace(config, seed=seed)
                what = {"preset": self.preset, "fields": self.fields, "values": values, "seed": seed}
                yield Model(told or self.preset, None, seeded, given, values, seed, _digest(what))


@dataclass(frozen=True)
class Sampling:
    """How every model is sampled; each combination of the lists is a cell."""

    steps: tuple[int, ...] = (25,)  # denoising steps of a block
    guidance: tuple[float, ...] = (1.0,)  # scales of classifier-free guidance; 1 is none
    scheduler: tuple[str, ...] = (OWN,)  # noise schedulers, by the names of madformer sample; own: the model's
    refresh_every: tuple[int, ...] = (1,)  # run the diffusion layers in every so many steps alone
    diffusion_layers: tuple[int, ...] = ()  # where to split elastic models; unless given, as trained
    seeds: tuple[int, ...] = (0,)  # numbers of the draws: draw k has the images of the seeds from k x num_images on
    guidance_interval: tuple[float, ...] | None = None  # low,high: guide these timesteps alone
    # what to draw; unless given, the captions of the reference or, for models with classes alone, its labels
    prompts: tuple[str, ...] = ()
    batch_size: int = 16  # images drawn at once
    precision: Literal["auto", "exact", "default", "fp8"] = "auto"  # as madformer sample has it
    vae: str | None = None  # autoencoder in place of the models' own

    def __post_init__(self) -> None:
        check_types(self, "sample.")
        require(self.batch_size >= 1, f"sample.batch_size={self.batch_size} must be at least 1")
        for name in AXES["sample"]:
            if name != "diffusion_layers" or self.diffusion_layers:
                _check_axis(f"sample.{name}", getattr(self, name))
        for scale in self.guidance:
            require(scale >= 1, f"sample.guidance={scale} must be at least 1, which is none")
        for name in self.scheduler:
            if name != OWN:
                scheduler_class(name)
        for number in self.diffusion_layers:
            require(number >= 1, f"sample.diffusion_layers={number} must be at least 1")
        for steps, refresh in itertools.product(self.steps, self.refresh_every):
            SamplingOptions(steps, guidance_interval=self.guidance_interval, refresh_every=refresh)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Tuning:
    """Guidance that is looked for, by golden section, in place of given scales: once for all draws of a model."""

    low: float = 1.0  # the least scale
    high: float = 8.0  # the largest
    metric: str = "kid"  # what is to become best
    evaluations: int = 8  # how many scales to look at; each costs num_images
    num_images: int = 0  # of each; 0: as many as are evaluated

    def __post_init__(self) -> None:
        check_types(self, "tune.")
        require(1 <= self.low < self.high, f"tune.low={self.low} and tune.high={self.high} must rise from 1 on")
        known = (*LOWER, *HIGHER)
        require(self.metric in known, f"tune.metric={self.metric!r} must be one of {', '.join(known)}")
        require(self.evaluations >= 2, f"tune.evaluations={self.evaluations} must be at least 2")
        require(self.num_images >= 0, f"tune.num_images={self.num_images} must be at least 0")


@dataclass(frozen=True)
class Judging:
    """What pictures are held against, and by what."""

    reference: str  # images, or saved statistics, as madformer evaluate --reference takes them
    num_images: int = 1000  # of each cell
    metrics: tuple[str, ...] = ("kid",)  # names of madformer evaluate --metrics
    extractor: str = "efficientnet-lite0"  # network that compares
    weights: str | None = None  # its weights
    num_reference: int | None = None  # how many images of the reference, evenly from all over it; unless given, all
    holdout: float = 0.0  # compare with the part of the reference that runs with this holdout were not trained on

    def __post_init__(self) -> None:
        check_types(self, "evaluate.")
        _check_axis("evaluate.metrics", self.metrics)
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"evaluate.metrics: unknown metric {with_nearest(name, METRICS)}")
            require(name != "memorization", "evaluate.metrics: memorization takes a training set: madformer evaluate")
        for name in ("num_images", "num_reference"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"evaluate.{name}={value} must be at least 1")
        require(0 <= self.holdout < 1, f"evaluate.holdout={self.holdout} must be at least 0, and below 1")


@dataclass(frozen=True)
class Model:
    """One of the models of a sweep.

    Attributes:
        label: what it is called; the same for all training seeds.
        source: folder or hub id of one that is given. config, given: what is trained, and which fields of it were
            chosen; None and nothing for one that is given.
        values: of the grid, by the names of the fields. seed: of the training.
        id: 12 hexadecimal digits of all of it.
    """

    label: str
    source: str | None
    config: TrainingConfig | None
    given: tuple[str, ...]
    values: Mapping[str, Any]
    seed: int | None
    id: str


@dataclass(frozen=True)
class Cell:
    """A model and how it is sampled.

    Attributes:
        guidance: None where it is tuned. seed: number of the draw.
    """

    model: Model
    scheduler: str
    steps: int
    guidance: float | None
    refresh_every: int
    diffusion_layers: int | None
    seed: int

    @cached_property
    def id(self) -> str:
        """12 hexadecimal digits of all of it."""
        return _digest([self._kind, self.seed])

    @cached_property
    def tuning_id(self) -> str:
        """The same for all draws."""
        return _digest(self._kind)

    @property
    def _kind(self) -> list[Any]:
        return [
            self.model.id, self.scheduler, self.steps, self.guidance, self.refresh_every, self.diffusion_layers
        ]  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """All of it; :meth:`of` reads a file's values."""

    evaluate: Judging  # what pictures are held against
    models: tuple[str, ...] = ()  # folders or hub ids of models that are there
    train: Training | None = None  # models to train
    sample: Sampling = field(default_factory=Sampling)  # how every model is sampled
    tune: Tuning | None = None  # guidance that is looked for

    def __post_init__(self) -> None:
        check_types(self)
        require(bool(self.models or self.train), "nothing to sample: give models, or train")
        if self.models:
            _check_axis("models", self.models)
        given = self.tune is not None and self.sample.guidance != (1.0,)
        require(not given, "sample.guidance and tune are ways to choose guidance: give one")
        guided = self.tune is not None or any(scale > 1 for scale in self.sample.guidance)
        unused = self.sample.guidance_interval is not None and not guided
        require(not unused, "sample.guidance_interval is for sample.guidance, or tune")
        followed = "following" in self.evaluate.metrics and bool(self.sample.prompts)
        require(not followed, "evaluate.metrics: following takes the reference's captions: leave out sample.prompts")
        check_seed(max(self.sample.seeds) * self.evaluate.num_images, self.evaluate.num_images)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Sweep:
        """From what TOML, YAML or JSON makes of a file; a single value stands for a list of one.

        Raises:
            ValueError: an unknown field, which is named with the nearest known one, or one that makes no sense.
        """
        told = dict(_listed(cls, values))
        for name, kind in (("evaluate", Judging), ("train", Training), ("sample", Sampling), ("tune", Tuning)):
            if isinstance(told.get(name), Mapping):
                # an object of its own, so that a field's name in a message has the table's before it
                told[name] = from_object(kind, _listed(kind, told[name]), f"{name}.")
        sweep = from_object(cls, told)
        sweep.cells  # noqa: B018 - what is wrong with a model of the grid is told here
        return sweep

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types, the inverse of :meth:`of`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def lasting(self) -> dict[str, Any]:
        """What must not change in a folder: all but the axes."""
        values = self.to_dict()
        del values["models"]
        for table, names in AXES.items():
            values[table] = {name: value for name, value in (values[table] or {}).items() if name not in names}
        return values

    @cached_property
    def all_models(self) -> tuple[Model, ...]:
        """Those that are given, then those to train."""
        given = [Model(name, name, None, (), {}, None, _digest({"source": name})) for name in self.models]
        return (*given, *(self.train.models() if self.train else ()))

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """In the order of the table: a model's stand together."""
        sample = self.sample
        axes: Sequence[Sequence[Any]] = (
            self.all_models,
            sample.scheduler,
            sample.diffusion_layers or (None,),
            sample.refresh_every,
            sample.steps,
            (None,) if self.tune else sample.guidance,
            sample.seeds,
        )
        return tuple(
            Cell(model, scheduler, steps, scale if scale is None else float(scale), refresh, split, seed)
            for model, scheduler, split, refresh, steps, scale, seed in itertools.product(*axes)
        )


def _check_axis(name: str, values: Sequence[Any], *, empty: bool = False) -> None:
    require(empty or len(values) > 0, f"{name} is an empty list")
    for index, value in enumerate(values):
        require(value not in values[:index], f"{name} holds {value!r} twice")


def _listed(cls: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A single number or text, where a list belongs, as a list of one."""
    hints = get_type_hints(cls)
    return {
        name: [value] if get_origin(hints.get(name)) is tuple and isinstance(value, (int, float, str)) else value
        for name, value in values.items()
    }


def _leaves(
    values: Mapping[str, Any], prefix: str = "", within: Sequence[str] | None = None
) -> Iterator[tuple[str, Any]]:
    """By the names that lead there, with points between them; into the tables named ``within`` alone, if given."""
    for name, value in values.items():
        if isinstance(value, Mapping) and (within is None or name in within):
            yield from _leaves(value, f"{prefix}{name}.", within)
        else:
            yield f"{prefix}{name}", value


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`_leaves`."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        *tables, name = path.split(".")
        place = found
        for table in tables:
            place = place.setdefault(table, {})
        place[name] = value
    return found


def _changed(config: TrainingConfig, fields: Mapping[str, Any], prefix: str) -> TrainingConfig:
    told = dict(fields)
    model = told.get("model", {})
    if isinstance(model, Mapping) and "num_classes" in model:
        told["model"] = telling_classes(config.model, model["num_classes"]) | dict(model)
    return changed(config, told, prefix)


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _digest(what: Any) -> str:
    told = json.dumps(what, sort_keys=True, default=list, allow_nan=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def is_lower_better(figure: str) -> bool:
    """Whether a smaller number is a better one."""
    return figure in LOWER or figure == "memorization"


def worst(figure: str) -> float:
    """What any number is better than."""
    return math.inf if is_lower_better(figure) else -math.inf
