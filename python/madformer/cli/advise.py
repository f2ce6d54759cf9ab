"""``madformer advise``: how many blocks, and where to split the layers, by what the latents say."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from madformer.cli.request import Request

if TYPE_CHECKING:
    from madformer.advice import Advice
    from madformer.config import MADFormerConfig
    from madformer.evaluation import Estimate


@dataclass(frozen=True, kw_only=True)
class Advise(Request):
    """Propose a number of blocks and a split of the layers for latents and a budget of evaluations, and say from what:
    how well earlier blocks predict later ones, the spectrum, and what a sweep has measured.

    How the statistics become a ranking is a hypothesis: docs/advice.md.

    examples:
      madformer advise --data data/latents --budget 60
      madformer advise --data data/latents --budget 60 --sweep sweeps/emoji64 --json
    """

    data: str  # latents: a folder that madformer data latents wrote
    budget: float  # evaluations that an image may take (NFE), without guidance
    # what the budget counts: layers that an image's tokens pass through, or denoising steps of a block
    unit: Literal["layers", "steps"] = "layers"
    model: str | None = None  # folder or hub id of a model for such latents, whose layers are to be split
    preset: str | None = None  # in its place the layers of emoji64, unless given, tiny, imagenet256 or ffhq1024
    num_blocks: tuple[int, ...] = ()  # numbers of blocks to look at; unless given, 1, 4, 16 and 64 where tokens allow
    diffusion_layers: tuple[int, ...] = ()  # splits to look at; unless given, all, or eight of more
    sweep: Path | None = None  # what was measured of the same data: a folder of madformer sweep, or its table.parquet
    metric: str | None = None  # what quality is in it, such as kid; unless given, the first that was measured
    same_data: bool = False  # the sweep is of the same data, though its reference has another name
    num_images: int = 1000  # that statistics are of, evenly from all over the latents
    seed: int = 0  # of folds and resamplings
    json: bool = False  # print one JSON object

    def run(self) -> None:
        for refused, message in (
            (self.model is not None and self.preset is not None, "--model and --preset both name layers: give one"),
            (self.metric is not None and self.sweep is None, "--metric is of --sweep"),
            (self.same_data and self.sweep is None, "--same-data is of --sweep"),
        ):
            if refused:
                raise ValueError(message)
        if not (math.isfinite(self.budget) and self.budget >= 1):
            raise ValueError(f"--budget {self.budget:g} must be at least 1 evaluation")
        from madformer.advice import advise

        found = advise(
            self.data, self.budget, model=_model(self), preset=self.preset, unit=self.unit, num_blocks=self.num_blocks,
            diffusion_layers=self.diffusion_layers, sweep=self.sweep, metric=self.metric, same_data=self.same_data,
            num_images=self.num_images, seed=self.seed,
        )  # fmt: skip
        print(json.dumps(found.to_dict(), allow_nan=False) if self.json else _told(found))


def _model(request: Advise) -> MADFormerConfig | None:
    from madformer.model.pretrained import config_of

    return None if request.model is None else config_of(request.model)


def _told(advice: Advice) -> str:
    lines = [f"{advice.num_images} images of {advice.source}, {advice.num_layers} layers to split"]
    lines.append(f"spectrum: power falls as frequency ** -a, a = {_shown(advice.slope, '.2f')}")
    for one in advice.blocks:
        each = " ".join(f"{share:.2f}" for share in one.r2[1:])
        of = f"; of block 2 and on {each}" if each else ""
        rows, columns = one.grid
        lines.append(
            f"M={one.num_blocks} ({rows} x {columns}): earlier blocks explain {_shown(one.explained, '.3f')} "
            f"of the variance{of}"
        )
    known = f"  {advice.figure}, measured" if advice.figure is not None else ""
    lines += ["", f"{'':<14}{'steps':>6}  {'score':<26}{'first in':>8}{known}"]
    for place in advice.ranking:
        measured = ""
        if advice.figure is not None:
            found = place.measured
            measured = f"  {_shown(found.estimate, '.4g')} in {found.steps} steps" if found else "  nothing within it"
        score = _shown(place.score, ".3f") if place.steps else "out of budget"
        lines.append(f"{place.candidate!s:<14}{place.steps:>6}  {score:<26}{place.first:>8.0%}{measured}")
    if advice.agreement is not None:
        lines.append(f"rank correlation of score and measurement: {_shown(advice.agreement, '.2f')}")
    steps = next(place.steps for place in advice.ranking if place.candidate == advice.proposal)
    lines += ["", f"proposal: {advice.proposal}, {steps} steps of a block", f"because: {advice.because}"]
    return "\n".join(lines)


def _shown(estimate: Estimate, how: str) -> str:
    if not math.isfinite(estimate.low):
        return f"{estimate.value:{how}}"
    return f"{estimate.value:{how}} [{estimate.low:{how}}, {estimate.high:{how}}]"
