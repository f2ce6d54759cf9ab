"""The Inception Score (arXiv:1606.03498): how sure a classifier is of each image, and how varied of all.

Shape legend: N images, K classes.
"""

from __future__ import annotations

import math

import numpy as np

from madformer.evaluation.moments import Array
from madformer.evaluation.uncertainty import Estimate

__all__ = ["inception_score", "score_estimate", "softmax"]

SPLITS = 10
"""Of the images at random, over which the score is the mean, as in the paper."""


def softmax(logits_NK: Array) -> Array:
    """Probabilities, in float64."""
    shifted_NK = np.asarray(logits_NK, np.float64) - logits_NK.max(1, keepdims=True)
    weights_NK = np.exp(shifted_NK)
    return np.asarray(weights_NK / weights_NK.sum(1, keepdims=True))


def inception_score(probabilities_NK: Array) -> float:
    """``exp(mean KL(p(y|x) || p(y)))``: 1 where all images are alike to the classifier, K where it is sure of each and
    they are of all classes alike.

    Raises:
        ValueError: what is given are no probabilities.
    """
    p_NK = np.asarray(probabilities_NK, np.float64)
    if p_NK.ndim != 2 or not len(p_NK) or (p_NK < 0).any() or not np.allclose(p_NK.sum(1), 1, rtol=0, atol=1e-6):
        raise ValueError("rows must be probabilities: not negative, with a sum of 1")
    mean_K = p_NK.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms_NK = np.where(p_NK > 0, p_NK * (np.log(p_NK) - np.log(mean_K)), 0.0)
    return math.exp(float(terms_NK.sum(1).mean()))


def score_estimate(probabilities_NK: Array, *, splits: int = SPLITS, seed: int = 0) -> Estimate:
    """The mean over splits of the images, with the standard deviation over them, as it is published.

    Raises:
        ValueError: fewer images than splits, or no probabilities.
    """
    if len(probabilities_NK) < splits or splits < 2:
        raise ValueError(f"splits={splits} must be at least 2, and no more than the {len(probabilities_NK)} images")
    order = np.random.default_rng(seed).permutation(len(probabilities_NK))
    scores = [inception_score(probabilities_NK[order[first::splits]]) for first in range(splits)]
    value, deviation = float(np.mean(scores)), float(np.std(scores))
    error = float(np.std(scores, ddof=1)) / math.sqrt(splits)
    return Estimate.around(value, error, f"{splits} splits", degrees=splits - 1, deviation=deviation)
