"""``madformer train``: train from a preset. Every field of the configurations is an option."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from tyro.conf import Positional, Suppress, arg

from madformer.cli import config_file
from madformer.cli.request import Request, file_of, filled
from madformer.machine import this_process
from madformer.objects import changed, check_names
from madformer.training.config import PRESETS, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Train(Request):
    """Train a preset into a folder, which then holds metrics, checkpoints and model/ to sample from. The defaults shown
    are those of the preset that is named before --help, else the paper's.

    examples:
      madformer train tiny --data photos --out runs/photos --steps 200
      madformer train emoji64 --out runs/emoji64
      madformer train --resume --out runs/emoji64
      madformer train ffhq1024 --dry-run
      madformer train tiny --data photos --out runs/photos --print-config > run.toml
      madformer train --config run.toml
      torchrun --no-python --nproc-per-node 8 madformer train ffhq1024 --data LATENTS --parallel fsdp --out runs/ffhq
      madformer train emoji64 --out runs/ar-heavy --model.diffusion-layers 1 --steps 5000
      madformer train emoji64 --out runs/tall --model.num-blocks 6 --model.block-grid 3,2 --model.block-order random
    """

    preset: Annotated[str | None, Positional, arg(metavar="PRESET")] = None  # tiny, emoji64, ffhq1024 or imagenet256
    released_config: Path | None = None  # a baseline.conf, FFHQ's or ImageNet's, in place of a preset
    released_model_config: Path | None = None  # the JSON file that its MODEL_CONFIG_PATH stands for
    out: Path | None = None  # folder of the run
    resume: bool = False  # go on from the newest checkpoint in the folder; without a preset as its config.json says
    dry_run: bool = False  # print parameters, memory and operations, and stop
    # of the configuration's fields, by their names; those of the model in a dictionary within
    changes: Annotated[Any, Suppress] = None

    @classmethod
    def parse(cls, words: Sequence[str], prog: str) -> Self:
        file, values = file_of(words, prog)
        own = {name: values.pop(name) for name in cls.names() if name in values}
        try:
            check_names(values, [*cls.names(), *(field.name for field in dataclasses.fields(TrainingConfig))])
            default = cls.of(own)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        shown = next((PRESETS[word]() for word in (*words, default.preset) if word in PRESETS), TrainingConfig())
        form = cls.form(shown)
        told = filled(form, form(default, {}), words, prog, description=inspect.cleandoc(cls.__doc__ or ""))
        return dataclasses.replace(told.request, changes=_merged(values, told.changes))

    @classmethod
    def form(cls, shown: TrainingConfig | None = None) -> Any:
        parts = [("request", cls), ("changes", _options(shown or TrainingConfig()))]
        return dataclasses.make_dataclass("Train", [(name, Annotated[kind, arg(name="")]) for name, kind in parts])

    @classmethod
    def names(cls) -> list[str]:
        return [name for name in super().names() if name != "changes"]

    def described(self) -> dict[str, Any]:
        """All of the configuration, as the data has it if they are there: nothing is left to a preset."""
        config = _fitted(*self.config_and_given())
        out = {"out": str(self.out)} if self.out else {}
        return out | config_file.plain(config)

    def run(self) -> None:
        config, given = self.config_and_given()
        if self.dry_run:
            _describe(config)
            return
        if self.out is None:
            raise ValueError("give --out FOLDER, or --dry-run")
        logging.basicConfig(format="%(message)s")

        from madformer.training.parallel import leave
        from madformer.training.trainer import Trainer

        try:
            trainer = Trainer(config, self.out, resume=self.resume, given=given)
            trainer.run()
        finally:
            leave()
        if trainer.stopped_by:
            # as the shell has it for a process that a signal ended
            raise SystemExit(128 + trainer.stopped_by)

    def config_and_given(self) -> tuple[TrainingConfig, list[str] | None]:
        """The configuration, and what of it was chosen; None where all of it was: of a run, or without a preset."""
        from madformer.training.fitting import telling_classes

        config, changes = self._base(), dict(self.changes)
        model = changes.get("model", {})
        if "num_classes" in model:
            changes["model"] = telling_classes(config.model, model["num_classes"]) | model
        given = [name for name in changes if name != "model"] + [f"model.{name}" for name in model]
        return changed(config, changes), given if self.preset else None

    def _base(self) -> TrainingConfig:
        """What the options change."""
        from madformer.compat.released_config import read_released_config

        if self.resume and self.out is not None and self.preset is None and self.released_config is None:
            return TrainingConfig.of_run(self.out)
        if self.preset is None and self.released_config is None and self.config is not None:
            return TrainingConfig()
        if (self.preset is None) == (self.released_config is None):
            raise ValueError(f"give a preset ({', '.join(PRESETS)}), or --released-config FILE, or --config FILE")
        if self.preset is not None:
            if self.preset not in PRESETS:
                raise ValueError(f"unknown preset {self.preset!r}; there are {', '.join(PRESETS)}")
            return PRESETS[self.preset]()
        assert self.released_config is not None
        released = read_released_config(
            self.released_config, model_config=self.released_model_config, world_size=this_process()[1]
        )
        for key, reason in released.ignored.items():
            print(f"{self.released_config}: {key} is ignored: {reason}", file=sys.stderr)
        return TrainingConfig(model=released.model, **released.training)


def _options(config: Any) -> Any:
    """A type of dictionary with the fields of a configuration, all of which may be left out; it shows their values."""
    fields: dict[str, Any] = {}
    hints = typing.get_type_hints(type(config))
    for name in (field.name for field in dataclasses.fields(config)):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            fields[name] = _options(value)
        elif not any(map(dataclasses.is_dataclass, typing.get_args(hints[name]))):
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            fields[name] = Annotated[hints[name], arg(help_behavior_hint=f"(default: {shown or 'none'})")]
    options: Any = typing.TypedDict(type(config).__name__, fields, total=False)  # type: ignore[misc]
    # where its comments are found, the lines of help
    options.__module__, options.__qualname__, options.__doc__ = type(config).__module__, type(config).__qualname__, ""
    return options


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """What either says, the second where both do; in dictionaries within, too."""
    within = [name for name, value in second.items() if isinstance(value, Mapping)]
    inner = {name: _merged(first.get(name) or {}, second[name]) for name in within if second[name]}
    return {**first, **{name: value for name, value in second.items() if name not in within}, **inner}


def _fitted(config: TrainingConfig, given: Sequence[str] | None) -> TrainingConfig:
    """As a run has it, which looks at the data for what was not chosen."""
    from madformer.training.fitting import fit, open_data
    from madformer.training.initial import with_initial_model

    if config.init_from:
        return with_initial_model(config, given)
    if given is None or not config.data:
        return config
    try:
        return fit(config, open_data(config).summary(), given)
    except OSError as error:
        print(f"madformer train: classes and text are the preset's, not the data's: {error}", file=sys.stderr)
        return config


def _describe(config: TrainingConfig) -> None:
    """What a run would take, and nothing of it allocated."""
    from madformer.training.costs import costs_of

    processes = this_process()[1]
    costs = costs_of(config)
    print(f"parameters           {costs.parameters / 1e6:,.1f} M")
    print(f"operations           {costs.flops / 1e12:,.3g} TFLOP an image, forward and backward")
    print(
        f"                     {costs.flops * config.batch_size / 1e12:,.3g} TFLOP a step of {config.batch_size} images"
    )
    memory = costs.memory(config, processes)
    print(f"memory               {sum(memory.values()) / 1e9:,.2f} GB on each of {processes} devices, of which")
    for name, size in memory.items():
        print(f"  {name:<18} {size / 1e9:,.2f} GB")
    if config.activation_checkpointing != "none":
        print(f"  activations are those without checkpointing, which is {config.activation_checkpointing}")
