"""Metrics of a set of images against a reference, each with interval and protocol.

Shape legend: N images, M images of the reference, D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from madformer.evaluation import following, frechet, inception_score, kernel, manifold, memorization
from madformer.evaluation.extractors import Extractor
from madformer.evaluation.features import FeatureSet, extract
from madformer.evaluation.fidelity import Pictures, paired_estimates
from madformer.evaluation.images import DrawnImages, ImageSet, is_statistics, open_images
from madformer.evaluation.moments import Moments, read_statistics, write_statistics
from madformer.evaluation.protocol import Protocol, Score, how_drawn
from madformer.evaluation.uncertainty import Estimate
from madformer.objects import with_nearest

__all__ = ["METRICS", "Evaluation", "Metric", "Statistics", "evaluate", "open_reference", "save_statistics"]

IMAGE_FORMAT = "RGB, 8 bits"


@dataclass(frozen=True)
class Statistics:
    """A reference of which mean and covariance alone are known.

    Attributes:
        name: of the file. hash: of the images' content where the file says it, else of the numbers.
        description: what the file says of itself; empty in pytorch-fid's.
    """

    moments: Moments
    name: str
    hash: str
    description: Mapping[str, Any] = field(default_factory=dict)

    def check(self, extractor: Extractor) -> None:
        """Raises ``ValueError`` where they are of another extractor."""
        made_by = self.description.get("extractor_hash", extractor.hash)
        if made_by != extractor.hash:
            raise ValueError(
                f"{self.name} is of another protocol: extractor={self.description.get('extractor')} {made_by}, "
                f"not {extractor.name} {extractor.hash}"
            )
        if self.moments.width != extractor.width:
            raise ValueError(
                f"{self.name} has {self.moments.width} features, and {extractor.name} makes {extractor.width}"
            )


@dataclass(frozen=True)
class Evaluation:
    """What was found out about a set of images.

    Attributes:
        scores: by the names of the figures. warnings: what to keep in mind, one line each.
        images, reference: the features that the scores are of; the reference is None where there was none.
        details: what a metric found besides its figures, in JSON's types.
    """

    scores: Mapping[str, Score]
    warnings: tuple[str, ...]
    images: FeatureSet
    reference: FeatureSet | Statistics | None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        rates = {
            name: side.images_per_second
            for name, side in (("images", self.images), ("reference", self.reference))
            if isinstance(side, FeatureSet)
        }
        return {
            "scores": {name: score.to_dict() for name, score in self.scores.items()},
            "images_per_second": rates,
            "warnings": list(self.warnings),
            "details": dict(self.details),
        }


@dataclass(frozen=True)
class _Sides:
    """What a metric may look at."""

    images: FeatureSet
    reference: FeatureSet | Statistics | None
    training: FeatureSet | None
    extractor: Extractor
    seed: int

    @cached_property
    def reference_moments(self) -> Moments:
        if isinstance(self.reference, Statistics):
            return self.reference.moments
        assert self.reference is not None
        return Moments.of(self.reference.features_ND)

    @property
    def pair(self) -> tuple[Any, Any]:
        assert isinstance(self.reference, FeatureSet)
        return self.images.features_ND, self.reference.features_ND


@dataclass(frozen=True)
class Metric:
    """A metric by name.

    Attributes:
        run: to figures by name, and what else it found. options: of its own, as a protocol notes them.
        needs: ``"nothing"`` of a reference, its ``"moments"``, or its ``"features"``.
        extractor: the only one that it is defined for; None for any.
        summary: one line.
    """

    run: Callable[[_Sides], tuple[dict[str, Estimate], dict[str, Any]]]
    needs: str
    summary: str
    options: str = ""
    extractor: str | None = None


def _fd(sides: _Sides) -> tuple[dict[str, Estimate], dict[str, Any]]:
    found = frechet.frechet_estimate(sides.images.features_ND, sides.reference_moments, seed=sides.seed)
    return {"fd": found}, {}


def _fd_infinity(sides: _Sides) -> tuple[dict[str, Estimate], dict[str, Any]]:
    found = frechet.frechet_at_infinity(sides.images.features_ND, sides.reference_moments, seed=sides.seed)
    return {"fd-infinity": found}, {}


def _kid(sides: _Sides) -> tuple[dict[str, Estimate], dict[str, Any]]:
    return {"kid": kernel.kid_estimate(*sides.pair, seed=sides.seed)}, {}


def _cmmd(sides: _Sides) -> tuple[dict[str, Estimate], dict[str, Any]]:
    return {"cmmd": kernel.cmmd_estimate(*sides.pair, seed=sides.seed)}, {}


def _prdc(sides: _Sides) -> tuple[dict[str, Estimate], dict[str, Any]]:
    found = manifold.manifold_estimates(*sides.pair)
    return {name: getattr(found, name) for name in ("precision", "recall", "density", "coverage")}, {}


def _is(sides: _Sides) -> tuple[dict[str, Estimate], dict[str, Any]]:
    probabilities = inception_score.softmax(sides.extractor.logits(sides.images.features_ND))
    return {"is": inception_score.score_estimate(probabilities, seed=sides.seed)}, {}


def _memorization(sides: _Sides) -> tuple[dict[str, Estimate], dict[str, Any]]:
    if sides.training is None:
        raise ValueError("memorization is against the training set, with the reference held out of it: give both")
    drawn, held_out = sides.pair
    found = memorization.memorization(drawn, held_out, sides.training.features_ND)
    return {"memorization": found.share}, {"memorization": {**asdict(found), "training_hash": sides.training.hash}}


def _following(sides: _Sides) -> tuple[dict[str, Estimate], dict[str, Any]]:
    images, reference = sides.images, sides.reference
    assert isinstance(reference, FeatureSet)
    captions, labels = (images.captions, reference.captions), (images.labels, reference.labels)
    return following.following_estimates(sides.pair, captions, labels)


METRICS = {
    "fd": Metric(_fd, "moments", "Frechet distance of the features, FID where they are Inception's"),
    "fd-infinity": Metric(
        _fd_infinity, "moments", "Frechet distance extrapolated to infinitely many images", "seed={seed}"
    ),
    "kid": Metric(
        _kid,
        "features",
        "kernel distance, without bias",
        f"subsets={kernel.SUBSETS}, size={kernel.SUBSET_SIZE}, seed={{seed}}",
    ),
    "prdc": Metric(_prdc, "features", "precision, recall, density, coverage", f"nearest_k={manifold.NEAREST_K}"),
    "is": Metric(_is, "nothing", "Inception Score", f"splits={inception_score.SPLITS}, seed={{seed}}"),
    "cmmd": Metric(_cmmd, "features", "kernel distance of CLIP's embeddings", f"sigma={kernel.SIGMA}", "clip"),
    "following": Metric(
        _following, "features", "whether the nearest images have the caption, and the class", "captions={captions}"
    ),
    "memorization": Metric(_memorization, "features", "share nearer to the training set than held-out images are"),
}
"""By name."""


def evaluate(
    images: ImageSet | FeatureSet,
    reference: ImageSet | FeatureSet | Statistics | None,
    extractor: Extractor,
    *,
    metrics: Sequence[str] = ("fd", "kid", "prdc"),
    training: ImageSet | FeatureSet | None = None,
    preset: str | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Metrics of images against a reference; nothing is looked at where a metric cannot be had.

    Args:
        images, reference: sets, or what :func:`extract` made of them with this extractor. The reference may be None
            for metrics that need none.
        metrics: names of :data:`METRICS`.
        training: what the model was trained on, for ``memorization``; the reference is held out of it then.
        preset: the name that the protocol is noted with. cache, progress: see :func:`extract`.
        seed: of the subsets and groups of images that intervals are of.

    Raises:
        ValueError: an unknown metric, one that this extractor or reference has not, a reference of another protocol,
            too few images, or images that cannot be read; one line.
        OSError, FloatingPointError: as :func:`extract`.
    """
    check_metrics(metrics, extractor, reference)
    if isinstance(reference, Statistics):
        reference.check(extractor)

    def features(side: Any) -> Any:
        if isinstance(side, FeatureSet) and side.extractor_hash != extractor.hash:
            raise ValueError(
                f"{side.name} is of another protocol: extractor {side.extractor_hash}, "
                f"not {extractor.name} {extractor.hash}"
            )
        if side is None or isinstance(side, (FeatureSet, Statistics)):
            return side
        return extract(side, extractor, cache=cache, progress=progress)

    # first the reference: what is wrong with it is known sooner than images are drawn
    target, trained = features(reference), features(training)
    check_following(metrics, images, target)
    sides = _Sides(features(images), target, trained, extractor, seed)
    texts = target.captions if isinstance(target, FeatureSet) else ()
    told = {"seed": seed, "captions": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]}
    warnings = _warnings(sides, metrics)
    base = _protocol(sides, preset)
    scores, details = dict[str, Score](), dict[str, Any]()
    for name in dict.fromkeys(metrics):
        figures, found = METRICS[name].run(sides)
        details |= found
        for figure, estimate in figures.items():
            scores[figure] = Score(estimate, replace(base, metric=figure, options=METRICS[name].options.format(**told)))
    return Evaluation(scores, tuple(warnings), sides.images, target, details)


def check_metrics(metrics: Sequence[str], extractor: Extractor, reference: object) -> None:
    """Raises ``ValueError`` for those that are unknown, or not to be had of this extractor and reference."""
    if not metrics:
        raise ValueError(f"no metric is asked for; there are {', '.join(METRICS)}")
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"unknown metric {with_nearest(name, METRICS)}; there are {', '.join(METRICS)}")
        metric = METRICS[name]
        if metric.extractor not in (None, extractor.name):
            raise ValueError(f"{name} is defined for the extractor {metric.extractor}, not for {extractor.name}")
        if name == "is" and extractor.head is None:
            raise ValueError(f"is takes an extractor with classes, and {extractor.name} has none")
        if metric.needs != "nothing" and reference is None:
            raise ValueError(f"{name} takes a reference")
        if metric.needs == "features" and isinstance(reference, Statistics):
            raise ValueError(f"{name} takes the images of the reference, and {reference.name} holds statistics alone")


def check_following(metrics: Sequence[str], images: object, reference: object) -> None:
    """Raises ``ValueError`` where pictures are of captions that the reference has not: before any is drawn."""
    if "following" not in metrics or not isinstance(reference, FeatureSet):
        return
    asked = images.captions if isinstance(images, FeatureSet) else ()
    if isinstance(images, DrawnImages):
        asked = images.asked(range(len(images)))[0]
    following.check_captions(asked, reference.captions)


def open_reference(source: str | Path, count: int | None = None, *, holdout: float = 0.0) -> ImageSet | Statistics:
    """A reference by name: what :func:`open_images` takes, or a file of statistics.

    Args:
        count: how many images, taken evenly from all over it, since data sets may be in the order of their classes;
            None for all.
        holdout: see :func:`open_images`.

    Raises:
        ValueError: ``holdout`` of a file of statistics.
        As :func:`open_images` and :func:`~madformer.evaluation.moments.read_statistics`.
    """
    if not is_statistics(source):
        return open_images(source, count, spread=True, holdout=holdout)
    if holdout:
        raise ValueError(f"holdout={holdout} is of images, and {source} holds statistics alone")
    moments, description = read_statistics(Path(source))
    digest = hashlib.sha256(moments.mean_D.tobytes() + moments.covariance_DD.tobytes()).hexdigest()[:16]
    return Statistics(moments, str(source), description.get("hash", digest), description)


def save_statistics(path: str | Path, features: FeatureSet, extractor: Extractor) -> None:
    """Write mean and covariance for :func:`open_reference`, and for pytorch-fid.

    Raises:
        ValueError: fewer than two images, or a path that does not end in ``.npz``. OSError: it cannot be written.
    """
    description = {
        "extractor": extractor.name,
        "extractor_hash": extractor.hash,
        "resizer": extractor.resizer,
        "images": features.name,
        "hash": features.hash,
        "image_size": list(features.image_size),
    }
    write_statistics(Path(path), Moments.of(features.features_ND), description)


def compare(drawn: DrawnImages, exact: DrawnImages, extractor: Extractor) -> dict[str, Score]:
    """How far pictures of one mode of the engine are from those of another on the same seeds, drawn in turns.

    Args:
        drawn, exact: the same number of images of the same seeds.

    Raises:
        ValueError: pictures of other sizes. FloatingPointError: one that is not finite.
    """
    pairs = (
        (Pictures(*ours), Pictures(*theirs)) for ours, theirs in zip(drawn.batches(), exact.batches(), strict=True)
    )
    found, size = paired_estimates(pairs, extractor)
    digest = hashlib.sha256(json.dumps(exact.drawn, sort_keys=True).encode()).hexdigest()[:16]
    base = Protocol(
        metric="",
        options="",
        extractor=extractor.name,
        extractor_hash=extractor.hash,
        resizer=extractor.resizer,
        normalization=extractor.normalization,
        num_images=len(drawn),
        image_size=size,
        image_format="RGB, as decoded",
        images_hash=hashlib.sha256(json.dumps(drawn.drawn, sort_keys=True).encode()).hexdigest()[:16],
        reference=f"the same seeds, {exact.settings.precision}, refresh_every={exact.settings.sampling.refresh_every}",
        reference_hash=digest,
        num_reference=len(exact),
        **how_drawn(drawn.drawn),
    )
    return {name: Score(estimate, replace(base, metric=name)) for name, estimate in found.items()}


def _protocol(sides: _Sides, preset: str | None) -> Protocol:
    images, reference, extractor = sides.images, sides.reference, sides.extractor
    if isinstance(reference, Statistics):
        num_reference = reference.moments.count
    else:
        num_reference = None if reference is None else len(reference)
    return Protocol(
        metric="",
        options="",
        extractor=extractor.name,
        extractor_hash=extractor.hash,
        resizer=extractor.resizer,
        normalization=extractor.normalization,
        num_images=len(images),
        image_size=images.image_size,
        image_format=IMAGE_FORMAT,
        images_hash=images.hash,
        reference=None if reference is None else reference.name,
        reference_hash=None if reference is None else reference.hash,
        num_reference=num_reference,
        preset=preset,
        **how_drawn(images.drawn),
    )


def _warnings(sides: _Sides, metrics: Sequence[str]) -> list[str]:
    lines, width = [], sides.extractor.width
    if {"fd", "fd-infinity"} & set(metrics):
        counts = {sides.images.name: len(sides.images)}
        if sides.reference is not None and (count := sides.reference_moments.count) is not None:
            counts[sides.reference.name] = count
        for name, count in counts.items():
            if count <= width:
                lines.append(
                    f"{count} images of {name} are no more than the {width} features: their covariance has no full "
                    f"rank, and fd depends on their number; kid does not"
                )
    if isinstance(sides.reference, FeatureSet) and sides.reference.image_size != sides.images.image_size:
        ours, theirs = ("{} x {}".format(*side.image_size) for side in (sides.images, sides.reference))
        lines.append(f"images of {ours} pixels are compared with a reference of {theirs}")
    return lines
