"""Whether pictures are copies: how near they come to the training set, beside images that it does not hold.

Shape legend: N images, M held-out images, T training images, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from madformer.evaluation.manifold import nearest_distances
from madformer.evaluation.moments import Array
from madformer.evaluation.uncertainty import Estimate, share

__all__ = ["Memorization", "memorization"]

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
NEAR = 0.05
"""The quantile of the held-out images' distances below which a picture counts as near: that many of them do."""


@dataclass(frozen=True)
class Memorization:
    """Distances to the nearest training image, in the extractor's features.

    Attributes:
        images, held_out: their quantiles, by the share below.
        threshold: the distance below which a twentieth of the held-out images are.
        share: of the images that are nearer than it: 0.05 where they are as far as held-out ones, 1 where all are
            copies.
    """

    images: dict[str, float]
    held_out: dict[str, float]
    threshold: float
    share: Estimate


def memorization(features_ND: Array, held_out_MD: Array, training_TD: Array) -> Memorization:
    """Compare the nearest training neighbours of images with those of held-out images.

    Raises:
        ValueError: fewer than 20 held-out images.
    """
    if len(held_out_MD) < 1 / NEAR:
        raise ValueError(f"{len(held_out_MD)} held-out images are too few: {1 / NEAR:.0f} at least")
    ours_N, theirs_M = (nearest_distances(rows, training_TD) for rows in (features_ND, held_out_MD))
    threshold = float(np.quantile(theirs_M, NEAR))
    ours, theirs = ({f"{q:g}": float(np.quantile(rows, q)) for q in QUANTILES} for rows in (ours_N, theirs_M))
    return Memorization(ours, theirs, threshold, share(int((ours_N <= threshold).sum()), len(ours_N)))
