"""Advice: statistics of latents, a hypothesis about what they mean, and beside it what was measured.

Shape legend: N images, C channels, H rows, W columns, M blocks, D numbers of a block, S resamplings, K candidates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from madformer.advice.measured import Measured, Measurement, read_measured, spearman
from madformer.advice.proposal import Candidate, Unit, expected_error, steps_within
from madformer.advice.statistics import predictability, resamplings, spectrum
from madformer.arguments import choice, number, whole_number
from madformer.config import MADFormerConfig
from madformer.config import preset as preset_of
from madformer.data.latents import LatentDataset, LatentDescription, holds_latents
from madformer.evaluation import Estimate
from madformer.evaluation.moments import Array
from madformer.files.text import printable
from madformer.model.blocks import in_order, to_blocks
from madformer.model.pretrained import config_of
from madformer.sweeps.costs import layers_once
from madformer.sweeps.folder import SweepFolder

__all__ = ["Advice", "BlockStatistics", "Ranked", "advise"]

RESAMPLINGS = 1000
FEWEST_FOR_CORRELATION = 3
_MOST_BLOCKS = 64
_LEAST_SIDE = 2  # tokens along a block's shorter side, of those that are looked at unasked
_METHOD = f"{RESAMPLINGS} resamplings of the images"


@dataclass(frozen=True)
class BlockStatistics:
    """An image in so many blocks.

    Attributes:
        num_blocks, grid: M, and how they lie. r2: share of each block's variance that the blocks before it explain, in
            the order in which they are made; 0 of the first. explained: of the whole image's variance.
    """

    num_blocks: int
    grid: tuple[int, int]
    r2: tuple[float, ...]
    explained: Estimate


@dataclass(frozen=True)
class Ranked:
    """A candidate in its place.

    Attributes:
        steps: of a block, that the budget pays for; 0 where it pays for none.
        score: of the hypothesis, higher being better: the expected error, negated; -inf without a step.
        first: share of the resamplings in which no candidate has a higher score.
        measured: what the sweep has of it; None where it has nothing within the budget.
    """

    candidate: Candidate
    steps: int
    score: Estimate
    first: float
    measured: Measurement | None


@dataclass(frozen=True)
class Advice:
    """What is proposed, from what, and how sure it is.

    Attributes:
        source: of the latents. num_images: that statistics are of. num_layers: N.
        budget, unit: as they were given. slope: of the spectrum. blocks: from the fewest blocks on.
        ranking: by the hypothesis, best first.
        proposal: the best candidate by measurement, where the sweep has two within the budget, else by the hypothesis.
        because: which of the two, and how sure it is, in a sentence.
        figure: what was measured; None without a sweep.
        agreement: Spearman's rank correlation of the hypothesis with what was measured, over the candidates that were;
            None for fewer than three. Its interval is over the resamplings of the images alone.
    """

    source: str
    num_images: int
    num_layers: int
    budget: float
    unit: Unit
    slope: Estimate
    blocks: tuple[BlockStatistics, ...]
    ranking: tuple[Ranked, ...]
    proposal: Candidate
    because: str
    figure: str | None
    agreement: Estimate | None
    _base: MADFormerConfig = dataclasses.field(repr=False)

    def rank(self, candidates: Sequence[Candidate | tuple[int, int]]) -> list[float]:
        """The hypothesis's score of each candidate, or pair of M and D, at the budget; higher is better.

        Raises:
            ValueError: one that is not possible, or of a block count that was not looked at.
        """
        given = [one if isinstance(one, Candidate) else Candidate(*one) for one in candidates]
        known = {one.num_blocks: np.array([one.explained.value]) for one in self.blocks}
        configs = {one: one.of(self._base) for one in given}
        scores_KS = _scores(configs, self.budget, self.unit, known, np.array([self.slope.value]))
        scores = dict(zip(configs, scores_KS[:, 0], strict=True))
        return [float(scores[one]) for one in given]

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types; None for what is not a finite number."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        del values["_base"]
        return cast(dict[str, Any], _plain(values))


def advise(
    data: str | Path | Tensor,
    budget: float,
    *,
    model: MADFormerConfig | None = None,
    preset: str | None = None,
    unit: Unit = "layers",
    num_blocks: Sequence[int] = (),
    diffusion_layers: Sequence[int] = (),
    sweep: str | Path | None = None,
    metric: str | None = None,
    same_data: bool = False,
    num_images: int = 1000,
    seed: int = 0,
) -> Advice:
    """Propose the number of blocks and the split for latents and a budget.

    Args:
        data: a folder that ``madformer data latents`` wrote, or latents ``(N, C, H, W)``.
        budget: evaluations (NFE) that an image may take, without guidance.
        model: one for these latents, whose layers are to be split; unless it or ``preset`` is given, the first of a
            sweep's folder.
        preset: in its place the name of a preset, laid out for these latents; ``"emoji64"`` without any of them.
        unit: what the budget counts: ``"layers"`` of the Transformer that an image's tokens pass through,
            autoregressive passes included (``nfe_layers`` of a sweep's table), or ``"steps"`` of a block
            (``nfe_steps``).
        num_blocks: block counts to look at, squares of what divides the tokens along both sides. Unless given 1, 4, 16
            and 64, where blocks have two tokens a side at least.
        diffusion_layers: splits to look at. Unless given all, or eight evenly spread ones of more.
        sweep: folder or table (``.parquet``) of a sweep of the same data.
        metric, same_data: see :func:`~madformer.advice.measured.read_measured`.
        num_images: that statistics are of, evenly from all over the data; fewer where there are fewer.
        seed: of the folds of the regression and of the resamplings.

    Raises:
        FileNotFoundError, ImportError: as :class:`~madformer.data.latents.LatentDataset` and
            :func:`~madformer.advice.measured.read_measured`.
        ValueError: too few latents, some that are not finite, another geometry, a budget below 1 or one that pays for
            no candidate's first step, a candidate that is not possible, or what is wrong with the sweep; one line.
    """
    number("budget", budget, 1)
    choice("unit", unit, ("layers", "steps"))
    if model is not None and preset is not None:
        raise ValueError("model= and preset= both name layers to split: give one")
    latents_NCHW, source, description = _latents(data, num_images)
    otherwise = model if preset is None else preset_of(preset)
    if otherwise is None and sweep is not None and Path(sweep).is_dir():
        model = _first_model(Path(sweep))
    base = _laid_out(model, preset or "emoji64", latents_NCHW.shape[1:], source)
    counts, splits = _block_counts(base, num_blocks), _splits(base, diffusion_layers)
    configs = {one: one.of(base) for one in (Candidate(count, split) for count in counts for split in splits)}
    _check_affordable(configs.values(), budget, unit)
    measured = None
    if sweep is not None:
        measured = read_measured(sweep, base, description, metric, otherwise=otherwise, same_data=same_data)
    try:
        found = _statistics(latents_NCHW, {one.num_blocks: config for one, config in configs.items()}, seed)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    best = {} if measured is None else measured.within(budget, unit)
    best = {one: found_of for one, found_of in best.items() if one in configs}
    scores_K = _scores(configs, budget, unit, *found.values)[:, 0]
    scores_KS = _scores(configs, budget, unit, found.explained, found.slope_S)
    first_K = (scores_KS == scores_KS.max(0)).mean(1)
    ranking = [
        Ranked(
            one, steps_within(config, budget, unit), _estimate(float(scores_K[k]), scores_KS[k]), float(first_K[k]),
            best.get(one),
        )
        for k, (one, config) in enumerate(configs.items())
    ]  # fmt: skip
    # of equal ones, the cheapest to have
    ranking.sort(key=lambda one: (-one.score.value, one.candidate))
    proposal, because = _proposal(ranking, best, measured)
    agreement = _agreement(list(configs), scores_K, scores_KS, best, measured)
    return Advice(
        source, len(latents_NCHW), base.num_layers, float(budget), unit, found.slope, found.blocks, tuple(ranking),
        proposal, because, None if measured is None else measured.figure, agreement, base,
    )  # fmt: skip


@dataclass(frozen=True)
class _Statistics:
    """Of latents, as they are and resampled: the slope ``(S,)``, and the explained share ``(S,)`` by block count."""

    slope: Estimate
    slope_S: Array
    blocks: tuple[BlockStatistics, ...]
    explained: dict[int, Array]

    @property
    def values(self) -> tuple[dict[int, Array], Array]:
        """The shares and the slope themselves, ``(1,)`` each."""
        shares = {one.num_blocks: np.array([one.explained.value]) for one in self.blocks}
        return shares, np.array([self.slope.value])


def _statistics(latents_NCHW: Array, by_count: Mapping[int, MADFormerConfig], seed: int) -> _Statistics:
    draws_SN = resamplings(len(latents_NCHW), RESAMPLINGS, seed)
    of_spectrum = spectrum(latents_NCHW)
    slope_S = of_spectrum.resampled(draws_SN)
    blocks, explained = list[BlockStatistics](), dict[int, Array]()
    for count, config in by_count.items():
        found = predictability(_in_blocks(latents_NCHW, config), seed=seed)
        explained[count] = found.resampled(draws_SN)
        r2 = tuple(float(share) for share in found.r2_M)
        blocks.append(BlockStatistics(count, config.grid, r2, _estimate(found.explained, explained[count])))
    return _Statistics(_estimate(of_spectrum.slope, slope_S), slope_S, tuple(blocks), explained)


def _latents(data: str | Path | Tensor, num_images: int) -> tuple[Array, str, LatentDescription | None]:
    """Posterior means ``(N, C, H, W)``, their name, and what is known of them."""
    whole_number("num_images", num_images, 1)
    if isinstance(data, Tensor):
        if data.ndim != 4:
            raise ValueError(f"latents must have the shape (images, channels, rows, columns), got {tuple(data.shape)}")
        return data.detach()[_spread(len(data), num_images)].float().cpu().numpy(), "latents", None
    name = printable(data)
    if not holds_latents(data) and Path(data).is_dir():
        raise FileNotFoundError(f"{name} holds no latents: `madformer data latents` makes them of pictures")
    dataset = LatentDataset(data)
    indices = _spread(len(dataset), num_images)
    return np.stack([dataset.read(index)["mean"].numpy() for index in indices]), name, dataset.description


def _spread(count: int, wanted: int) -> list[int]:
    """Indices of up to ``wanted`` images, evenly from all over ``count``, which may be in an order."""
    number_of = min(count, wanted)
    return [index * count // number_of for index in range(number_of)]


def _first_model(folder: Path) -> MADFormerConfig:
    first = SweepFolder.of(folder).sweep.all_models[0]
    return first.config.model if first.config is not None else config_of(str(first.source))


def _laid_out(model: MADFormerConfig | None, preset: str, shape: Sequence[int], source: str) -> MADFormerConfig:
    """The model, or else the preset for an image of latents of that shape."""
    if model is not None:
        model.check_latents(shape, source)
        return model
    base, (channels, *sides) = preset_of(preset), shape
    token = base.downscale
    if channels != base.latent_channels:
        raise ValueError(f"{source}: latents have {channels} channels, and {preset} takes {base.latent_channels}")
    if any(side % token for side in sides):
        raise ValueError(
            f"{source}: latents of {sides[0]} x {sides[1]} do not divide into {preset}'s tokens of {token} x {token}"
        )
    block = sides[0] // token, sides[1] // token
    return base.replace(num_blocks=1, block_grid=(1, 1), block_size=math.prod(block), block_shape=block)


def _block_counts(base: MADFormerConfig, given: Sequence[int]) -> list[int]:
    if given:
        for count in given:
            Candidate(whole_number("num_blocks", count, 1), 1).of(base)
        return sorted(set(given))
    sides = [1, 2, 4, 8]
    fits = [side for side in sides if not any(length % side for length in base.token_grid)]
    return [side**2 for side in fits if side == 1 or min(base.token_grid) // side >= _LEAST_SIDE]


def _splits(base: MADFormerConfig, given: Sequence[int]) -> list[int]:
    if given:
        for split in given:
            Candidate(1, whole_number("diffusion_layers", split, 1)).of(base)
        return sorted(set(given))
    layers, most = base.num_layers, 8
    return sorted({math.ceil(layers * part / most) for part in range(1, most + 1)})


def _check_affordable(configs: Collection[MADFormerConfig], budget: float, unit: Unit) -> None:
    if not any(steps_within(config, budget, unit) for config in configs):
        least = min(layers_once(config) + config.diffusion_layers for config in configs)
        raise ValueError(f"budget={budget:g} pays for no step: the cheapest candidate takes {least:g} layers for one")


def _in_blocks(latents_NCHW: Array, config: MADFormerConfig) -> Array:
    """``(N, M, D)``, in the order in which the model makes them."""
    blocks_NMLC = in_order(to_blocks(torch.from_numpy(latents_NCHW), config), config)
    return np.asarray(blocks_NMLC.flatten(2).numpy())


def _scores(
    configs: Mapping[Candidate, MADFormerConfig], budget: float, unit: Unit, explained: Mapping[int, Array],
    slope_S: Array,
) -> Array:  # fmt: skip
    """``(K, S)``."""
    rows = []
    for one, config in configs.items():
        if one.num_blocks not in explained:
            known = ", ".join(map(str, explained))
            raise ValueError(f"{one}: that number of blocks was not looked at; {known} were")
        steps = steps_within(config, budget, unit)
        rows.append(-expected_error(config, steps, explained[one.num_blocks], slope_S))
    return np.stack(rows)


def _proposal(
    ranking: Sequence[Ranked], best: Mapping[Candidate, Measurement], measured: Measured | None
) -> tuple[Candidate, str]:
    if measured is not None and len(best) > 1:
        first, second = list(best.values())[:2]
        apart = first.estimate.high < second.estimate.low or first.estimate.low > second.estimate.high
        sure = "their intervals lie apart" if apart else "their intervals overlap, so another may be as good"
        return first.candidate, (
            f"measured: {measured.figure} {first.estimate.value:.4g} is the best of {len(best)} candidates within the "
            f"budget in {measured.source}, before {second.estimate.value:.4g} of {second.candidate}; {sure}"
        )
    missing = "" if measured is None else f"{measured.source} has {len(best)} of the candidates within the budget; "
    return ranking[0].candidate, (
        f"{missing}by the hypothesis, which nothing here was measured for; it is first in {ranking[0].first:.0%} of "
        f"{_METHOD}, which says how sure the statistics are, not the hypothesis"
    )


def _agreement(
    candidates: Sequence[Candidate], scores_K: Array, scores_KS: Array, best: Mapping[Candidate, Measurement],
    measured: Measured | None,
) -> Estimate | None:  # fmt: skip
    places = [k for k, one in enumerate(candidates) if one in best]
    if measured is None or len(places) < FEWEST_FOR_CORRELATION:
        return None
    sign = -1 if measured.lower_is_better else 1
    quality_K = np.array([sign * best[candidates[k]].estimate.value for k in places])
    resampled_S = spearman(scores_KS[places].T, quality_K)
    return _estimate(float(spearman(scores_K[places], quality_K)), resampled_S)


def _estimate(value: float, resampled_S: Array) -> Estimate:
    """With the interval that 95 % of the resamplings lie in."""
    if not np.isfinite(resampled_S).all():
        return Estimate.bare(value, "no interval")
    low, high = np.percentile(resampled_S, (2.5, 97.5))
    return Estimate(value, float(low), float(high), _METHOD)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
