"""Whether pictures follow what they were asked for: their caption's own image among all, and their class.

Shape legend: K drawn pictures, N images of the reference, D features, P tokens of a caption.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from madformer.evaluation.moments import Array
from madformer.evaluation.uncertainty import Estimate, mean_estimate, share

__all__ = ["ClassAccuracy", "Retrieval", "class_accuracy", "following_estimates", "retrieval"]

NEAREST = 10
BLOCK = 256
"""Pictures whose distances from all images are in memory at once."""
NEIGHBOURS = 5
"""That vote for the class of a picture."""


@dataclass(frozen=True)
class Retrieval:
    """How pictures find the captions they were drawn for.

    Attributes:
        precision_at_1: the share whose nearest image has the caption. precision_at_10: that has one with it among its
            ten nearest.
        median_rank: of the image that the caption is from, 1 being the nearest. own_distance: from it, the mean over
            pictures of the mean squared difference.
    """

    precision_at_1: Estimate
    precision_at_10: Estimate
    median_rank: Estimate
    own_distance: Estimate

    def values(self) -> dict[str, float]:
        """Without the intervals, by name."""
        return {name: estimate.value for name, estimate in vars(self).items()}


@dataclass(frozen=True)
class ClassAccuracy:
    """The share of pictures whose nearest images are of the class asked for; ``ceiling``: of the reference's own."""

    accuracy: Estimate
    ceiling: Estimate


def retrieval(drawn_KD: Tensor, own_K: Tensor, all_ND: Tensor, texts_NP: Tensor) -> Retrieval:
    """Look every drawn picture up among all images.

    Args:
        drawn_KD: latents or features of the pictures, of any shape behind K. own_K: from which images their captions
            are.
        all_ND: the same of all images. texts_NP: their captions, as whole numbers: equal ones are one caption.
    """
    rows_KD, images_ND, dim = drawn_KD.flatten(1), all_ND.flatten(1), all_ND[0].numel()
    own_distances, ranks, found = list[Tensor](), list[Tensor](), list[Tensor]()
    for rows_BD, own_B in zip(rows_KD.split(BLOCK), own_K.split(BLOCK), strict=True):
        # not by a matrix product, in which equal ones would be apart by its rounding
        exact = "donot_use_mm_for_euclid_dist"
        distance_BN = torch.cdist(rows_BD, images_ND, compute_mode=exact).square() / dim
        own_distance_B1 = distance_BN.gather(1, own_B[:, None])
        nearest_BT = distance_BN.topk(min(NEAREST, len(all_ND)), largest=False).indices
        found.append((texts_NP[nearest_BT] == texts_NP[own_B][:, None]).all(-1))
        own_distances.append(own_distance_B1[:, 0])
        ranks.append(1 + (distance_BN < own_distance_B1).sum(1))
    found_KT, count = torch.cat(found), len(drawn_KD)
    return Retrieval(
        precision_at_1=share(int(found_KT[:, 0].sum()), count),
        precision_at_10=share(int(found_KT.any(1).sum()), count),
        median_rank=_median(torch.cat(ranks).tolist()),
        own_distance=mean_estimate(torch.cat(own_distances).double().tolist()),
    )


def class_accuracy(features_KD: Array, labels_K: Array, reference_ND: Array, labels_N: Array) -> ClassAccuracy:
    """By a vote of the five nearest images of the reference; of equal votes the nearest one's decides.

    Args:
        labels_K: the classes asked for. labels_N: of the reference. Negative ones are unknown, and left out.

    Raises:
        ValueError: no picture or fewer than six images with a class.
    """
    known_K, known_N = np.asarray(labels_K) >= 0, np.asarray(labels_N) >= 0
    if not known_K.any() or known_N.sum() <= NEIGHBOURS:
        raise ValueError(f"accuracy takes pictures with a class, and more than {NEIGHBOURS} images of the reference")
    rows_ND, classes_N = np.asarray(reference_ND)[known_N], np.asarray(labels_N)[known_N]
    asked_K = np.asarray(labels_K)[known_K]
    right = int((_vote(np.asarray(features_KD)[known_K], rows_ND, classes_N) == asked_K).sum())
    own = int((_vote(rows_ND, rows_ND, classes_N, skip_own=True) == classes_N).sum())
    return ClassAccuracy(share(right, len(asked_K)), share(own, len(classes_N)))


def numbered(texts: Sequence[str]) -> Tensor:
    """Captions as whole numbers ``(N, 1)``, equal ones as equal ones."""
    numbers: dict[str, int] = {}
    return torch.tensor([[numbers.setdefault(text, len(numbers))] for text in texts])


def check_captions(asked: Sequence[str], known: Sequence[str]) -> None:
    """Raises ``ValueError`` where pictures are drawn for captions that no image of the reference has."""
    if asked and not any(known):
        raise ValueError("following takes a reference with captions, and this one has none")
    if missing := sorted(set(asked) - set(known)):
        raise ValueError(f"following takes captions of the reference, and none of its images has {missing[0]!r}")


def following_estimates(
    features: tuple[Array, Array], captions: tuple[Sequence[str], Sequence[str]], labels: tuple[Sequence[int], ...]
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Retrieval of captions and accuracy of classes in an extractor's features, as far as there are such.

    Args:
        features: ``(K, D)`` of the pictures and ``(N, D)`` of the reference. captions, labels: of both, likewise.

    Raises:
        ValueError: captions that no image of the reference has, or neither captions nor classes; one line.
    """
    drawn_KD, images_ND = features
    asked, known = captions
    figures, details = dict[str, Estimate](), dict[str, Any]()
    if any(asked):
        check_captions(asked, known)
        first: dict[str, int] = {}
        for index, text in enumerate(known):
            first.setdefault(text, index)
        own_K = torch.tensor([first[text] for text in asked])
        drawn, images = (torch.from_numpy(np.array(rows)) for rows in (drawn_KD, images_ND))
        found = retrieval(drawn, own_K, images, numbered(known))
        figures = {
            "caption_at_1": found.precision_at_1,
            "caption_at_10": found.precision_at_10,
            "caption_rank": found.median_rank,
        }
        if not labels[0] and any(label >= 0 for label in labels[1]):
            # of a model that is told the caption alone: that image's class
            labels = (tuple(np.array(labels[1])[own_K.numpy()].tolist()), labels[1])
    if len(labels[0]) == len(drawn_KD) and max(labels[0]) >= 0 and len(labels[1]) == len(images_ND):
        accuracy = class_accuracy(drawn_KD, np.array(labels[0]), images_ND, np.array(labels[1]))
        figures["class_accuracy"] = accuracy.accuracy
        details["class_accuracy_of_reference"] = accuracy.ceiling.value
    if not figures:
        raise ValueError("following takes pictures with captions or classes of the reference")
    return figures, details


def _vote(rows_KD: Array, images_ND: Array, classes_N: Array, *, skip_own: bool = False) -> Array:
    voted = []
    images = torch.from_numpy(np.asarray(images_ND, np.float64))
    for first in range(0, len(rows_KD), 256):
        block = torch.from_numpy(np.asarray(rows_KD[first : first + 256], np.float64))
        distance = torch.cdist(block, images)
        if skip_own:
            own = torch.arange(len(block))
            distance[own, own + first] = math.inf
        for nearest in distance.topk(NEIGHBOURS, largest=False).indices.numpy():
            votes = classes_N[nearest].tolist()
            voted.append(max(votes, key=lambda one, votes=votes: (votes.count(one), -votes.index(one))))  # type: ignore[misc]
    return np.array(voted)


def _median(ranks: Sequence[int]) -> Estimate:
    """With the interval of order statistics, by the normal approximation of the binomial distribution."""
    ordered, count = sorted(ranks), len(ranks)
    half = 1.96 * math.sqrt(count) / 2
    low, high = max(0, math.floor(count / 2 - half)), min(count - 1, math.ceil(count / 2 + half))
    return Estimate(float(statistics.median(ordered)), float(ordered[low]), float(ordered[high]), "order statistics")
