"""``madformer evaluate``: how good images are, a folder's or a model's."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from madformer.cli.request import file_of, filled, resolved
from madformer.cli.sample_options import DrawingOptions, check_drawing, texts_of
from madformer.machine import device_of
from madformer.objects import check_names

if TYPE_CHECKING:
    from madformer.evaluation import Evaluation, ImageSet, Score, Statistics

METRICS = ("fd", "kid", "prdc")


@dataclass(frozen=True, kw_only=True)
class Evaluate(DrawingOptions):
    """Compare images with a reference: distances, precision and recall, each with a 95 % interval and its protocol.

    Images and references are folders of images, tar shards, .npz batches (arr_0), data sets of the hub (hf:NAME),
    emoji:64 or clipart:128, what madformer data emoji and madformer data clipart make, rendered on the way.

    examples:
      madformer evaluate --images samples/ --reference data/emoji64
      madformer evaluate --model assets/emoji64 --protocol emoji-3k
      madformer evaluate --images samples/ --reference VIRTUAL_imagenet256_labeled.npz --extractor inception \\
          --weights pt_inception-2015-12-05-6726825d.pth --metrics fd,is
      madformer evaluate --images data/ffhq --save-statistics ffhq.npz
    """

    images: str | None = None  # images to evaluate; or --model, which draws --num-images of them on the way
    reference: str | None = None  # images to compare with, or saved statistics (.npz)
    # images that the model was trained on, for memorization; with --holdout the rest of --reference
    training: str | None = None
    # names with commas between them: fd, fd-infinity, kid, prdc, is, cmmd, following, memorization; unless given
    # fd,kid,prdc
    metrics: str | None = None
    # network that compares: efficientnet-lite0, unless given, inception, dinov2 or clip
    extractor: str | None = None
    weights: str | None = None  # its weights: a file, or a folder or hub id for dinov2 and clip
    # preset of all that is not given: emoji-3k, fid-50k, paper-ffhq-8k or paper-imagenet-50k
    protocol: str | None = None
    captions: bool = False  # draw for the captions of the reference, evenly from all over it
    holdout: float = 0.0  # compare with the part of --reference that a run with this --holdout was not trained on
    num_reference: int | None = None  # how many images of the reference, evenly from all over it; unless given, all
    # also hold what --model draws against the same seeds in fp32 with every layer in every step: --against exact
    against: Literal["exact"] | None = None
    save_statistics: Path | None = None  # .npz file for mean and covariance of the images, as pytorch-fid writes it
    cache: Path | None = None  # folder where features are kept; unless given, madformer/features in the user's cache
    fresh: bool = False  # keep no features, and use none that were kept
    json: bool = False  # print one JSON object with scores and protocols, and no progress bar
    verbose: bool = False  # print each number's protocol

    @classmethod
    def parse(cls, words: Sequence[str], prog: str) -> Self:
        from madformer.evaluation.protocol import preset

        file, values = file_of(words, prog)
        try:
            check_names(values, cls.names())
            first = filled(cls, cls.of(values), words, prog)
            if first.protocol is not None:
                chosen = preset(first.protocol).options()
                chosen["metrics"] = ",".join(chosen["metrics"])
                if first.images is not None:
                    # how they were drawn is not for an option to say
                    chosen = {
                        name: chosen[name]
                        for name in ("metrics", "extractor", "num_images", "reference")
                        if name in chosen
                    }
                return filled(cls, cls.of(chosen | values), words, prog)
        except ValueError as error:
            raise ValueError(f"{file}: {error}" if file else f"--protocol: {error}") from error
        return first

    def run(self) -> None:
        _check(self)
        request = resolved(self)
        found, paired = _evaluated(request)
        for line in found.warnings if found is not None else ():
            print(f"madformer evaluate: warning: {line}", file=sys.stderr)
        scores = (dict(found.scores) if found is not None else {}) | paired
        if not scores:
            return
        if request.json:
            told = found.to_dict() if found is not None else {}
            told["scores"] = {name: score.to_dict() for name, score in scores.items()}
            print(json.dumps(told, allow_nan=False))
            return
        _print(scores, found, request)


def _check(request: Evaluate) -> None:
    """What can be wrong with the arguments, before anything is read."""
    refusals = {
        "nothing to evaluate: give --images, or --model": request.images is None and request.model is None,
        "--images and --model are ways to say what to evaluate: give one": None not in (request.images, request.model),
        "--model draws --num-images: give it, or a --protocol": request.model is not None and not request.num_images,
        "nothing to compare with: give --reference, --save-statistics, --against, or a metric without one (is)": (
            request.reference is None
            and request.save_statistics is None
            and request.metrics is None
            and request.against is None
        ),
        "--against is for --model": request.against is not None and request.model is None,
        "--captions are of --reference, and for --model": request.captions
        and (request.model is None or request.reference is None),
        "--captions say what to draw: leave out --prompt and --prompts": request.captions
        and bool(request.prompt or request.prompts),
        "--holdout is of --reference": bool(request.holdout) and request.reference is None,
        "--cache keeps features and --fresh keeps none: give one": request.cache is not None and request.fresh,
    }
    for message, refused in refusals.items():
        if refused:
            raise ValueError(message)
    for name in ("num_images", "num_reference"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if request.model is not None:
        check_drawing(request)


def _evaluated(request: Evaluate) -> tuple[Evaluation | None, dict[str, Score]]:
    """What metrics say, None where there are none; and what ``--against`` does."""
    from madformer import evaluation
    from madformer.evaluation.scoring import check_following, check_metrics, compare
    from madformer.files.atomic import check_writable

    if request.save_statistics is not None:
        if request.save_statistics.suffix != ".npz":
            raise ValueError(f"--save-statistics {request.save_statistics} must end in .npz")
        check_writable(request.save_statistics.parent)
    extractor = evaluation.load_extractor(
        request.extractor or "efficientnet-lite0", request.weights, device_of(request.device)
    )
    reference = None if request.reference is None else _reference(request)
    metrics = [name for name in (request.metrics or ",".join(METRICS)).split(",") if name]
    training = None
    if request.training is not None:
        training = evaluation.open_images(request.training)
    elif request.holdout and "memorization" in metrics and request.reference is not None:
        training = evaluation.open_images(request.reference, holdout=request.holdout, side="training")
    judged = request.reference is not None or request.metrics is not None
    if judged:
        check_metrics(metrics, extractor, reference)
        if isinstance(reference, evaluation.Statistics):
            reference.check(extractor)
    images = _images(request, reference)
    cache = None if request.fresh else request.cache or evaluation.default_cache()
    progress = not request.json
    target: Any = reference
    if reference is not None and not isinstance(reference, evaluation.Statistics):
        # what is wrong with it is known before images are drawn
        target = evaluation.extract(reference, extractor, cache=cache, progress=progress)
    paired: dict[str, Score] = {}
    if request.against is not None:
        assert isinstance(images, evaluation.DrawnImages)
        exact = _images(replace(request, precision=request.against, refresh_every=1), reference)
        assert isinstance(exact, evaluation.DrawnImages)
        paired = compare(images, exact, extractor)
        if not judged and request.save_statistics is None:
            return None, paired
    check_following(metrics, images, target)
    features = evaluation.extract(images, extractor, cache=cache, progress=progress)
    if request.save_statistics is not None:
        evaluation.save_statistics(request.save_statistics, features, extractor)
    if not judged:
        print(f"{len(features)} images of {features.name}: statistics in {request.save_statistics}")
        return None, paired
    found = evaluation.evaluate(
        features, target, extractor, metrics=metrics, training=training, preset=_preset(request), cache=cache,
        progress=progress,
    )  # fmt: skip
    return found, paired


def _reference(request: Evaluate) -> ImageSet | Statistics:
    from madformer.evaluation import Statistics, open_reference

    assert request.reference is not None
    reference = open_reference(request.reference, request.num_reference, holdout=request.holdout)
    if isinstance(reference, Statistics) and request.num_reference is not None:
        raise ValueError(f"--num-reference is of images, and {request.reference} holds statistics alone")
    return reference


def _images(request: Evaluate, reference: ImageSet | Statistics | None) -> ImageSet:
    from madformer.evaluation import DrawnImages, open_images

    if request.images is not None:
        return open_images(request.images, request.num_images)
    from madformer.bulk import Prompts, Settings
    from madformer.cli.loading import load, prepare
    from madformer.engine.schedule import Schedule

    assert request.num_images is not None
    pipeline, lora = load(request)
    # a number of steps is refused before anything is looked at
    Schedule.of(pipeline.scheduler, request.steps, pipeline.transformer.device)
    texts = _captions(request, reference) if request.captions else texts_of(request)
    guided = request.sampling.guidance > 1
    prompts = Prompts.of(pipeline.reader, texts, request.classes, negative_text=request.negative_prompt, guided=guided)
    settings = Settings.of(
        pipeline, request.sampling, precision=request.precision, seed=request.seed, batch_size=request.batch_size,
        prompts=prompts, lora=lora,
    )  # fmt: skip
    prepare(pipeline, request)
    return DrawnImages(pipeline, settings, request.num_images, str(request.model))


def _captions(request: Evaluate, reference: ImageSet | Statistics | None) -> list[str]:
    """Of the reference, one for every image that is drawn, evenly from all over it."""
    from madformer.evaluation import StoredImages

    assert request.num_images is not None
    if not isinstance(reference, StoredImages):
        raise ValueError(f"--captions: {request.reference} has none")
    count = min(request.num_images, len(reference))
    texts = [reference.caption(index * len(reference) // count) for index in range(count)]
    if not any(texts):
        raise ValueError(f"--captions: {request.reference} has none")
    return texts


def _preset(request: Evaluate) -> str | None:
    """The preset's name, if nothing that it decides was changed."""
    from madformer.evaluation.protocol import preset

    if request.protocol is None:
        return None
    chosen = preset(request.protocol).options()
    chosen["metrics"] = ",".join(chosen["metrics"])
    if request.images is not None:
        chosen = {name: chosen[name] for name in ("extractor", "num_images", "reference") if name in chosen}
    same = all(getattr(request, name) == value for name, value in chosen.items() if name != "metrics")
    return request.protocol if same else None


def _print(scores: Mapping[str, Score], found: Evaluation | None, request: Evaluate) -> None:
    from madformer.evaluation import FeatureSet

    for side in (found.images, found.reference) if found is not None else ():
        if isinstance(side, FeatureSet):
            rate = side.images_per_second
            how = f"{rate:.3g} images/s" if rate else "features were kept"
            print(
                f"{side.name}: {len(side)} images of {side.image_size[0]} x {side.image_size[1]}, {how}",
                file=sys.stderr,
            )
    width = max(map(len, scores))
    for name, score in scores.items():
        one = score.estimate
        interval = f"[{one.low:.6g}, {one.high:.6g}]" if math.isfinite(one.low) else "[no interval]"
        deviation = f" ± {one.deviation:.3g}" if one.deviation is not None else ""
        print(f"{name:<{width}}  {f'{one.value:.6g}{deviation}':<22} {interval:<24} {one.method}")
        if request.verbose:
            print(f"{'':<{width}}  {score.protocol.line()}")
    for name, value in found.details.items() if found is not None else ():
        print(f"{name}: {json.dumps(value, default=str)}")
