"""Agreement among several raters of the same pairs, where some have rated more of them than others.

A pair's ratings are class indices 0 to K - 1, worst to best, in no order: raters are not told
apart. Pairs with fewer than two ratings change nothing.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from she_jax.evaluation.agreement import accuracy, kappa, quadratic_kappa
from she_jax.evaluation.intervals import Interval, interval_of_sums, interval_of_tables


def rater_metrics(
    queries: Sequence[Hashable], ratings: Sequence[Sequence[int]], classes: int
) -> dict[str, Interval]:
    """How well the raters agree with one another, with intervals by query.

    Args:
      queries: the query of each pair.
      ratings: class indices that each pair was given, in [0, K).
      classes: K, the size of the whole label set.

    Returns:
      ``accuracy`` (the share of two ratings of a pair that are equal), ``kappa`` and
      ``quadratic_kappa`` of two raters, each two ratings of a pair in both orders, and
      ``alpha``, see ``krippendorff_alpha``.
    """
    metrics = {"accuracy": accuracy, "kappa": kappa, "quadratic_kappa": quadratic_kappa}
    alpha = interval_of_sums(queries, krippendorff_alpha, coincidences(ratings, classes))
    rows = coincidences(ratings, classes, by_rating=False)  # large: never both of them at once
    agreement = {name: interval_of_sums(queries, metric, rows) for name, metric in metrics.items()}
    return agreement | {"alpha": alpha}


def coincidences(
    ratings: Sequence[Sequence[int]], classes: int, *, by_rating: bool = True
) -> Float[np.ndarray, "N K K"]:
    """How often two ratings of a pair are (c, k), both orders counted; zeros below two ratings.

    Args:
      ratings: class indices that each pair was given.
      classes: K.
      by_rating: divide a pair's counts by its ratings less one, so that they sum to its number of
        ratings (Krippendorff's coincidences); otherwise each two ratings count alike.

    Raises:
      ValueError: if a class index is outside of [0, K).
    """
    rows = np.zeros((len(ratings), classes, classes))
    for row, given in zip(rows, ratings, strict=True):
        if given and not 0 <= min(given) <= max(given) < classes:
            raise ValueError(f"ratings {list(given)}: expected class indices in [0, {classes})")
        if len(given) > 1:
            counts = np.bincount(given, minlength=classes)
            row += np.outer(counts, counts) - np.diag(counts)
            row /= len(given) - 1 if by_rating else 1
    return rows


def krippendorff_alpha(
    coincidence: Shaped[np.ndarray, "*R K K"],
) -> Float[np.ndarray, "*R"]:
    """Krippendorff's alpha for ordinal data: 1 - observed / expected squared distance.

    Two classes are as far apart as there are ratings from the one to the other, half of those in
    the two themselves left out. NaN where nothing was rated twice, or all ratings are alike.

    Args:
      coincidence: sums of ``coincidences``.
    """
    counts = coincidence.sum(-1)  # n_c, ratings of each class
    upto = np.cumsum(counts, -1)
    middle = upto - counts / 2
    distance = (middle[..., :, None] - middle[..., None, :]) ** 2
    chance = counts[..., :, None] * counts[..., None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = (distance * chance).sum((-2, -1)) / (counts.sum(-1) - 1)
        observed = (distance * coincidence).sum((-2, -1))
        return 1 - observed / np.where(expected > 0, expected, np.nan)


def judge_alpha(
    queries: Sequence[Hashable],
    gold: Int[np.ndarray, "N"],
    judge: Int[np.ndarray, "N"],
    classes: int,
) -> Interval:
    """``krippendorff_alpha`` of the gold labels and a judge as two raters, by query."""
    return interval_of_tables(
        queries,
        lambda tables: krippendorff_alpha(tables + tables.swapaxes(-1, -2)),  # in both orders
        gold,
        judge,
        (classes, classes),
    )
