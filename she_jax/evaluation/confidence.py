"""How sure a judge is, and whether that means anything: temperature, calibration, what to review.

A confidence is the probability of the label that was given. Probabilities come from votes, or from
logits over the labels; one temperature, fitted on validation pairs, makes them honest.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from she_jax.rewards.calibration import BINS

_RANGE = (0.05, 20.0)  # of temperatures


def log_votes(votes: Int[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """Log-probabilities from votes, with one more vote for each class: log((votes + 1) / (k + K)).

    No class has probability 0, so that a log loss and a temperature exist.
    """
    votes = np.asarray(votes)
    return np.log((votes + 1) / (votes.sum(1, keepdims=True) + votes.shape[1]))


def tempered(logits: Float[np.ndarray, "N K"], temperature: float) -> Float[np.ndarray, "N K"]:
    """softmax(logits / temperature)."""
    from scipy.special import softmax

    return softmax(np.asarray(logits, np.float64) / temperature, axis=1)


def fit_temperature(logits: Float[np.ndarray, "N K"], gold: Int[np.ndarray, "N"]) -> float:
    """The temperature with the least log loss, between 0.05 and 20.

    It is ours since scikit-learn's takes columns as sorted by label, which a label set is not.

    Args:
      logits: of validation pairs, such as ``log_votes``.
      gold: their class indices.

    Raises:
      ValueError: if there are no pairs.
    """
    from scipy.optimize import minimize_scalar

    if not len(gold):
        raise ValueError("no validation pairs with a label: a temperature is fitted on them")

    def loss(log_temperature: float) -> float:
        return log_loss(tempered(logits, float(np.exp(log_temperature))), gold)

    low, high = np.log(_RANGE)
    result: Any = minimize_scalar(loss, bounds=(low, high), method="bounded")
    return float(np.exp(result.x))


def log_loss(probabilities: Float[np.ndarray, "N K"], gold: Int[np.ndarray, "N"]) -> float:
    """Mean of -log of the gold class's probability, in nats; infinite where one is 0."""
    with np.errstate(divide="ignore"):
        return float(-np.log(probabilities[np.arange(len(gold)), gold]).mean())


def brier(probabilities: Float[np.ndarray, "N K"], gold: Int[np.ndarray, "N"]) -> float:
    """Mean squared distance to the gold class as a unit vector, in [0, 2]."""
    return float(((probabilities - np.eye(probabilities.shape[1])[gold]) ** 2).sum(1).mean())


def reliability(
    confidence: Float[np.ndarray, "N"], correct: Bool[np.ndarray, "N"]
) -> list[dict[str, float]]:
    """The reliability curve: for each bin of confidence with pairs, what it promised and kept.

    The bins are those of ``she_jax.rewards.calibration.calibration_error``.

    Returns:
      ``low`` and ``high`` of the bin (high excluded, but for 1), ``n``, mean ``confidence`` and
      ``accuracy``.
    """
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    curve = []
    for n in range(BINS):
        if (rows := index == n).any():
            point = {"confidence": confidence[rows].mean(), "accuracy": correct[rows].mean()}
            place = {"low": n / BINS, "high": (n + 1) / BINS, "n": int(rows.sum())}
            curve.append({name: float(value) for name, value in (place | point).items()})
    return curve


def review_limit(
    confidence: Float[np.ndarray, "N"],
    correct: Bool[np.ndarray, "N"],
    accuracy: float,
    least: int = 1,
) -> tuple[float, float]:
    """The least confidence from which on the labels have an accuracy, and the share below it.

    Pairs below it are for a human to look at; all those of one confidence go together.

    Args:
      confidence: of each validation pair.
      correct: whether its label is right.
      accuracy: wanted of the pairs that nobody looks at, in [0, 1].
      least: pairs that have to be at or above the limit: of three, all may be right by chance.

    Returns:
      The limit and the share of pairs below it; infinity and 1 if no limit gives the accuracy.
    """
    limits, pairs, accuracies = trusted(confidence, correct)
    for limit, n, reached in zip(limits, pairs, accuracies, strict=True):
        if reached >= accuracy and n >= least:
            return float(limit), float(1 - n / len(confidence))
    return float("inf"), 1.0


def trusted(
    confidence: Float[np.ndarray, "N"], correct: Bool[np.ndarray, "N"]
) -> tuple[Float[np.ndarray, "C"], Int[np.ndarray, "C"], Float[np.ndarray, "C"]]:
    """Each confidence that occurs, ascending, with number and accuracy of the pairs from it on."""
    limits, index, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    right = np.bincount(index, correct, len(limits))
    pairs, right = np.cumsum(counts[::-1])[::-1], np.cumsum(right[::-1])[::-1]
    return limits, pairs, right / pairs
