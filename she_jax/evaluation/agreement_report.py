"""The agreement report: how far a judge agrees with people, beside the floor and people themselves.

Everything is computed from the labeled pairs and the lines of ``predictions.jsonl``. An answer that
cannot be read counts as the label farthest from the human one.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from she_jax.data.intake import normalize_text
from she_jax.evaluation.agreement import (
    Judgments,
    accuracy,
    judge_metrics,
    macro_f1,
    quadratic_kappa,
)
from she_jax.evaluation.confidence import brier, log_loss, reliability, review_limit, trusted
from she_jax.evaluation.decide import UNREAD
from she_jax.evaluation.floor import LabeledPairs, labeled_floor
from she_jax.evaluation.intervals import Interval, interval_of_tables
from she_jax.evaluation.judged import JudgedPairs
from she_jax.evaluation.lazy import Lazy
from she_jax.evaluation.ranking import compare_systems, mean_ndcg, ndcg_by_query
from she_jax.evaluation.raters import judge_alpha, rater_metrics
from she_jax.rewards.calibration import calibration_error
from she_jax.types import Example

METRICS = (
    "accuracy", "macro_f1", "good_f1", "good_macro_f1", "kappa", "quadratic_kappa", "alpha",
    "good_auc", "ndcg@10",
)  # fmt: skip
SHARES = (0.95, 0.99)  # agreement of the labels that nobody looks at


def agreement_report(
    judged: JudgedPairs,
    train: Sequence[Example],
    ranks: Mapping[str, Mapping[int, float]] | None = None,
    known: Collection[str] = (),
) -> dict[str, Any]:
    """The report as plain values.

    Args:
      judged: labeled pairs with a judge's answers, at least one.
      train: the pairs that the judge was trained on, for the floor; none if they are not known.
      ranks: of ranking systems to compare, see ``compare_systems``; None for none.
      known: further queries that the judge was trained or tuned on.

    Returns:
      ``pairs``, ``queries``, ``seen`` (pairs whose query the judge knows), ``labels``,
      ``metrics`` (of ``judge``, ``unseen``, ``floor`` and ``raters``, each by name an interval; the
      floor's are those of the unseen queries, if there are any, as it has seen the others too),
      ``confusion``, ``calibration``, ``review``, ``slices``, ``unread`` (a count), ``systems``
      (see ``compare_systems``; None without).
    """
    labels, size = judged.labels, len(judged.labels.values)
    folded = {_folded(query) for query in (*known, *(example.query for example in train))}
    is_known = {query: _folded(query) in folded for query in set(judged.queries)}
    seen = np.array([is_known[query] for query in judged.queries], bool)
    metrics, others = {"judge": judge_report(judged)}, judged
    if train and 0 < seen.sum() < len(seen):
        others = judged.subset(~seen)
        metrics["unseen"] = judge_report(others)
    if train and (baselines := labeled_floor(train, _pairs(others), labels)):
        floor = baselines["word_overlap"]
        predicted, expected = floor.judgments.predicted, floor.probabilities @ np.arange(size)
        metrics["floor"] = floor.metrics | {
            "alpha": judge_alpha(others.queries, others.gold, predicted, size),
            "ndcg@10": _ndcg(others, expected),
        }
    ratings = judged.ratings
    if any(len(given) > 1 for given in ratings):
        metrics["raters"] = rater_metrics(judged.queries, ratings, size)
    columns = np.where(judged.predicted == UNREAD, size, judged.predicted)
    matrix = np.zeros((size, size + 1), int)
    np.add.at(matrix, (judged.gold, columns), 1)
    return {
        "pairs": len(judged.gold),
        "queries": len(set(judged.queries)),
        "seen": int(seen.sum()),
        "labels": list(labels.texts),
        "rated_twice": sum(len(given) > 1 for given in ratings),
        "metrics": {
            name: {metric: asdict(value) for metric, value in values.items()}
            for name, values in metrics.items()
        },
        "confusion": matrix.tolist(),
        "calibration": _calibration(judged),
        "review": _review(judged),
        "slices": {title: _slice(judged, groups) for title, groups in judged.slices.items()},
        "unread": int((judged.predicted == UNREAD).sum()),
        "systems": compare_systems(ranks, judged.queries, judged.gold, judged.farthest)
        if ranks
        else None,
    }


def _pairs(judged: JudgedPairs) -> LabeledPairs:
    """The pairs for the floor, their products read when they are asked for."""
    products = Lazy(range(len(judged.gold)), lambda n: judged.examples[n].product)
    return LabeledPairs(queries=judged.queries, products=products, labels=judged.gold.tolist())


def judge_report(judged: JudgedPairs) -> dict[str, Interval]:
    """The ``METRICS`` of a judge, with intervals by query."""
    size = len(judged.labels.values)
    good = [judged.labels.index(value) for value in judged.labels.good]
    score = judged.expected
    if judged.confident is not None:
        by_label = np.isin(judged.farthest, good).astype(float)
        score = judged.confident[:, good].sum(1)
        score = np.where(np.isnan(score), by_label, score)
    judgments = Judgments(judged.farthest, score)
    metrics = judge_metrics(judged.queries, judged.gold, judgments, classes=size, good=good)
    unread = np.where(judged.predicted == UNREAD, size, judged.predicted)
    table = judged.queries, judged.gold, unread, size + 1
    for name, metric in (("macro_f1", macro_f1), ("accuracy", accuracy)):  # as ``metrics.score``
        metrics[name] = _interval(metric, *table)
    metrics["alpha"] = judge_alpha(judged.queries, judged.gold, judged.farthest, size)
    metrics["ndcg@10"] = _ndcg(judged, judged.expected)
    return {name: metrics[name] for name in METRICS}


def worst_disagreements(judged: JudgedPairs, most: int = 50) -> list[int]:
    """The pairs whose labels are farthest apart, the judge's surest first among equals."""
    gaps = np.abs(judged.farthest - judged.gold)
    sure = np.nan_to_num(judged.confidence)
    order = np.lexsort((np.arange(len(gaps)), -sure, -gaps))
    return [int(n) for n in order[:most] if gaps[n] and judged.predicted[n] != UNREAD]


def _ndcg(judged: JudgedPairs, scores: Float[np.ndarray, "N"]) -> Interval:
    return mean_ndcg(ndcg_by_query(judged.queries, judged.gold, scores))


def _known(judged: JudgedPairs) -> tuple[np.ndarray, ...] | None:
    """Of the pairs with probabilities and a label: these before and after, gold and predicted."""
    if judged.probabilities is None or judged.confident is None:
        return None
    known = ~np.isnan(judged.probabilities).any(1) & (judged.predicted != UNREAD)
    arrays = (judged.probabilities, judged.confident, judged.gold, judged.predicted)
    return tuple(array[known] for array in arrays) if known.any() else None


def _calibration(judged: JudgedPairs) -> dict[str, Any] | None:
    if (known := _known(judged)) is None:
        return None
    before, after, gold, predicted = known
    found = {}
    for name, rows in (("before", before), ("after", after)):
        confidence, correct = rows[np.arange(len(gold)), predicted], predicted == gold
        loss = log_loss(rows, gold)
        found[name] = {
            "ece": calibration_error(correct, confidence),
            "brier": brier(rows, gold),
            "log_loss": loss if np.isfinite(loss) else None,
            "curve": reliability(confidence, correct),
        }
    return found


def _review(judged: JudgedPairs) -> dict[str, Any] | None:
    """How many pairs a human has to look at, and the accuracy of the surest pairs."""
    if (known := _known(judged)) is None:
        return None
    _, after, gold, predicted = known
    confidence, correct = after[np.arange(len(gold)), predicted], predicted == gold
    unsure = len(judged.gold) - len(gold)  # nothing is known of these: a human looks at them
    limits = {}
    for share in SHARES:
        limit, below = review_limit(confidence, correct, share)
        count = round(below * len(gold)) + unsure
        limits[f"{share:g}"] = {"limit": limit if np.isfinite(limit) else None, "pairs": count}
    levels, pairs, accuracies = (values.tolist() for values in trusted(confidence, correct))
    curve = [
        {"confidence": level, "share": n / len(judged.gold), "accuracy": reached}
        for level, n, reached in zip(levels, pairs, accuracies, strict=True)
    ]
    return {"limits": limits, "curve": curve[:: max(1, len(curve) // 100)]}


def _slice(judged: JudgedPairs, values: Sequence[str]) -> dict[str, dict[str, Any]]:
    size = len(judged.labels.values)
    metrics = {"accuracy": accuracy, "quadratic_kappa": quadratic_kappa}
    places = {value: n for n, value in enumerate(dict.fromkeys(values))}
    number = np.array([places[value] for value in values])
    slices = {}
    for value, count in Counter(values).most_common():
        part = judged.subset(number == places[value])
        table = part.queries, part.gold, part.farthest, size
        intervals = {name: _interval(metric, *table) for name, metric in metrics.items()}
        slices[value] = {"pairs": count, **{n: asdict(i) for n, i in intervals.items()}}
    return slices


def flagged(judged: JudgedPairs, limit: float) -> dict[str, Any]:
    """What a limit of review that was fitted on other pairs does here.

    Returns:
      ``limit``, the number of ``pairs`` below it, and the ``accuracy`` of the others; None if there
      are none.
    """
    rest = np.nan_to_num(judged.confidence) >= limit
    right = judged.predicted[rest] == judged.gold[rest]
    accuracy = float(right.mean()) if right.size else None
    return {"limit": limit, "pairs": int((~rest).sum()), "accuracy": accuracy}


def _interval(
    metric: Callable[[np.ndarray], np.ndarray],
    queries: Sequence[str],
    gold: Int[np.ndarray, "N"],
    predicted: Int[np.ndarray, "N"],
    classes: int,
) -> Interval:
    return interval_of_tables(queries, metric, gold, predicted, (classes, classes))


def _folded(query: str) -> str:
    return normalize_text(query).casefold()
