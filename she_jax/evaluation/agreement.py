"""How well a judge agrees with gold labels: metrics of confusion matrices, with their intervals.

Labels are class indices 0 to K - 1, worst to best. K counts the whole label set: libraries that
take only the labels that occur give another quadratic kappa for 0 and 3 alone than for 0 to 3.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from she_jax.evaluation.intervals import (
    Interval,
    check_lengths,
    difference,
    difference_of_sums,
    interval,
    interval_of_tables,
)


class Judgments(NamedTuple):
    """What a judge says of N pairs.

    Attributes:
      predicted: class index of each pair, in [0, K), worst to best; shape [N].
      good_score: any number that is larger for pairs more likely to be good; shape [N].
    """

    predicted: Int[np.ndarray, "N"]
    good_score: Float[np.ndarray, "N"]


def judge_metrics(
    queries: Sequence[Hashable],
    gold: Int[np.ndarray, "N"],
    judge: Judgments,
    *,
    classes: int,
    good: Collection[int],
) -> dict[str, Interval]:
    """How well a judge agrees with the gold labels, with intervals by query.

    Args:
      queries: the query of each pair.
      gold: class index of each pair, in [0, K), worst to best.
      judge: what the judge says of the same pairs.
      classes: K, the size of the whole label set, whether all of it occurs or not.
      good: the class indices that count as good.

    Returns:
      ``macro_f1``, ``accuracy``, ``good_f1``, ``good_macro_f1``, ``kappa``, ``quadratic_kappa``
      (see the functions of these names) and ``good_auc``, the area under the ROC curve of
      ``good_score``.

    Raises:
      ValueError: if lengths differ or a class index is outside of [0, K).
    """
    pairs = check_classes(gold, classes, "gold"), check_classes(judge.predicted, classes)
    is_good = np.isin(gold, list(good))
    return {
        name: interval_of_tables(queries, metric, *pairs, (classes, classes))
        for name, metric in _confusion_metrics(good).items()
    } | {"good_auc": interval(queries, _auc_of_levels, is_good, _levels(judge.good_score))}


def judge_differences(
    queries: Sequence[Hashable],
    gold: Int[np.ndarray, "N"],
    first: Judgments,
    second: Judgments,
    *,
    classes: int,
    good: Collection[int],
) -> dict[str, Interval]:
    """The metrics of ``judge_metrics`` of the first judge less those of the second, paired.

    The first judge beats the second in a metric if ``low`` is above 0.
    """
    matrices = [confusions(gold, judge.predicted, classes) for judge in (first, second)]
    is_good = np.isin(gold, list(good))
    scores = [(is_good, _levels(judge.good_score)) for judge in (first, second)]
    return {
        name: difference_of_sums(queries, metric, *matrices)
        for name, metric in _confusion_metrics(good).items()
    } | {"good_auc": difference(queries, _auc_of_levels, *scores)}


def confusions(
    gold: Int[np.ndarray, "N"], predicted: Int[np.ndarray, "N"], classes: int
) -> Int[np.ndarray, "N K K"]:
    """The confusion matrix of each pair: a 1 in the row of its gold class, else 0; of bytes.

    Raises:
      ValueError: if the lengths differ or a class index is outside of [0, classes).
    """
    gold, predicted = check_classes(gold, classes, "gold"), check_classes(predicted, classes)
    check_lengths(gold, predicted)
    matrices = np.zeros((len(gold), classes, classes), np.int8)
    matrices[np.arange(len(gold)), gold, predicted] = 1
    return matrices


def check_classes(
    indices: Int[np.ndarray, "N"], classes: int, name: str = "predicted"
) -> Int[np.ndarray, "N"]:
    """The class indices, checked.

    Raises:
      ValueError: if one is outside of [0, classes).
    """
    indices = np.asarray(indices, int)
    outside = indices[(indices < 0) | (indices >= classes)]
    if outside.size:
        raise ValueError(f"{name} class {outside[0]}: expected an index in [0, {classes})")
    return indices


def macro_f1(confusion: Shaped[np.ndarray, "*R K K"]) -> Float[np.ndarray, "*R"]:
    """Mean F1 over the classes that occur in the gold labels (rows), as in ``metrics.score``."""
    present = confusion.sum(-1) > 0
    with np.errstate(invalid="ignore"):
        return (_class_f1(confusion) * present).sum(-1) / present.sum(-1)


def accuracy(confusion: Shaped[np.ndarray, "*R K K"]) -> Float[np.ndarray, "*R"]:
    """Share of correct labels."""
    with np.errstate(invalid="ignore"):
        return np.trace(confusion, axis1=-2, axis2=-1) / confusion.sum((-2, -1))


def good_f1(
    confusion: Shaped[np.ndarray, "*R K K"], good: Collection[int]
) -> Float[np.ndarray, "*R"]:
    """F1 of good against bad; NaN if no gold label is good."""
    binary = _good_confusion(confusion, good)
    return np.where(binary[..., 1, :].sum(-1) > 0, _class_f1(binary)[..., 1], np.nan)


def good_macro_f1(
    confusion: Shaped[np.ndarray, "*R K K"], good: Collection[int]
) -> Float[np.ndarray, "*R"]:
    """Mean of the F1 of good and of bad, of those that occur in the gold labels."""
    return macro_f1(_good_confusion(confusion, good))


def kappa(confusion: Shaped[np.ndarray, "*R K K"]) -> Float[np.ndarray, "*R"]:
    """Cohen's kappa: the agreement above chance; NaN if both sides give one and the same class."""
    with np.errstate(invalid="ignore", divide="ignore"):
        total = confusion.sum((-2, -1))
        chance = (confusion.sum(-1) * confusion.sum(-2)).sum(-1) / total**2
        return (accuracy(confusion) - chance) / np.where(chance < 1, 1 - chance, np.nan)


def quadratic_kappa(confusion: Shaped[np.ndarray, "*R K K"]) -> Float[np.ndarray, "*R"]:
    """Cohen's kappa with quadratic weights: 1 - observed / chance squared distance.

    Distances are those in the whole label set. NaN if both sides give one and the same class.
    """
    classes = np.arange(confusion.shape[-1])
    weights = np.subtract.outer(classes, classes) ** 2
    chance = confusion.sum(-1)[..., :, None] * confusion.sum(-2)[..., None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = (weights * chance).sum((-2, -1)) / confusion.sum((-2, -1))
        return 1 - (weights * confusion).sum((-2, -1)) / np.where(chance > 0, chance, np.nan)


def auc(good: Bool[np.ndarray, "N"], score: Float[np.ndarray, "N"]) -> float:
    """Chance that a good pair has a higher score than a bad pair, a tie being half a chance.

    The area under the ROC curve; NaN if all pairs or none are good.

    Raises:
      ValueError: if a score is NaN.
    """
    return _auc_of_levels(good, _levels(score), np.ones(len(good), int))


def _levels(score: Float[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """The rank of each score among the different ones: sorted once, not for every draw."""
    if np.isnan(score).any():
        raise ValueError("a score is NaN: expected a number for each pair")
    return np.unique(score, return_inverse=True)[1]


def _auc_of_levels(
    good: Bool[np.ndarray, "N"], levels: Int[np.ndarray, "N"], counts: Int[np.ndarray, "N"]
) -> float:
    size = levels.max() + 1
    n_good, n_bad = (np.bincount(levels, counts * of, size) for of in (good, ~good))
    wins = np.sum(n_good * (np.cumsum(n_bad) - n_bad / 2))
    pairs = n_good.sum() * n_bad.sum()
    return float(wins / pairs) if pairs else float("nan")


def _confusion_metrics(good: Collection[int]) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    return {
        "macro_f1": macro_f1,
        "accuracy": accuracy,
        "good_f1": lambda confusion: good_f1(confusion, good),
        "good_macro_f1": lambda confusion: good_macro_f1(confusion, good),
        "kappa": kappa,
        "quadratic_kappa": quadratic_kappa,
    }


def _class_f1(confusion: np.ndarray) -> np.ndarray:
    """F1 = 2 TP / (2 TP + FP + FN) of each class; 0 for a class neither present nor predicted."""
    true_positives = np.diagonal(confusion, axis1=-2, axis2=-1)
    return 2 * true_positives / np.maximum(confusion.sum(-1) + confusion.sum(-2), 1)


def _good_confusion(confusion: np.ndarray, good: Collection[int]) -> np.ndarray:
    """The confusion matrix of bad (0) and good (1)."""
    is_good = np.isin(np.arange(confusion.shape[-1]), list(good))
    sides = np.stack([~is_good, is_good]).astype(confusion.dtype)
    return sides @ confusion @ sides.T
