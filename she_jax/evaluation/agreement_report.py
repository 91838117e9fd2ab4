"""The agreement report: how far a judge agrees with people, beside the floor and people themselves.

Everything is computed from the labeled pairs and the lines of ``predictions.jsonl``. An answer that
cannot be read counts as the label farthest from the human one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from she_jax.cot import LabelSet
from she_jax.data.intake import normalize_text
from she_jax.data.languages import language_of
from she_jax.evaluation.agreement import (
    Judgments,
    accuracy,
    confusions,
    judge_metrics,
    macro_f1,
    quadratic_kappa,
)
from she_jax.evaluation.confidence import (
    brier,
    log_loss,
    log_votes,
    reliability,
    review_limit,
    tempered,
)
from she_jax.evaluation.decide import UNREAD
from she_jax.evaluation.floor import labeled_floor
from she_jax.evaluation.intervals import Interval, interval_of_sums
from she_jax.evaluation.ranking import mean_ndcg, ndcg_by_query
from she_jax.evaluation.raters import judge_alpha, rater_metrics
from she_jax.rewards.calibration import calibration_error
from she_jax.types import Example

METRICS = (
    "accuracy", "macro_f1", "good_f1", "good_macro_f1", "kappa", "quadratic_kappa", "alpha",
    "good_auc", "ndcg@10",
)  # fmt: skip
SHARES = (0.95, 0.99)  # agreement of the labels that nobody looks at
LENGTHS = {"product text up to 100 characters": 100, "up to 300": 300, "longer": np.inf}


@dataclass(frozen=True)
class JudgedPairs:
    """Labeled pairs with a judge's answers, as class indices worst to best.

    Attributes:
      examples: the pairs, each with a label.
      lines: their lines of ``predictions.jsonl``.
      gold: human labels; shape [N].
      predicted: the judge's, or ``UNREAD``; shape [N].
      probabilities: as voted, NaN where there are none; None if no pair has any. Shape [N, K].
      confident: the same after the temperature.
      labels: the label set.
    """

    examples: Sequence[Example]
    lines: Sequence[Mapping[str, Any]]
    gold: Int[np.ndarray, "N"]
    predicted: Int[np.ndarray, "N"]
    probabilities: Float[np.ndarray, "N K"] | None
    confident: Float[np.ndarray, "N K"] | None
    labels: LabelSet

    @property
    def queries(self) -> list[str]:
        """The query of each pair."""
        return [example.query for example in self.examples]

    @property
    def expected(self) -> Float[np.ndarray, "N"]:
        """What ranks the products: the expected grade, else the label; the worst if unread."""
        places = np.maximum(self.predicted, 0).astype(float)
        if self.confident is None:
            return places
        return np.where(np.isnan(self.confident).any(1), places, self.confident @ _places(self))

    @property
    def farthest(self) -> Int[np.ndarray, "N"]:
        """The judge's labels; where none could be read, the class farthest from the human one."""
        last = len(self.labels.values) - 1
        return np.where(
            self.predicted == UNREAD, np.where(self.gold * 2 > last, 0, last), self.predicted
        )


def judged_pairs(
    examples: Sequence[Example],
    lines: Sequence[Mapping[str, Any]],
    labels: LabelSet,
    *,
    samples: int,
    temperature: float | None,
) -> JudgedPairs:
    """The labeled ones of some pairs, with their answers.

    Args:
      examples: the pairs.
      lines: their lines of ``predictions.jsonl``.
      labels: the label set.
      samples: k, chains that voted; 0 if the probabilities are the label's own.
      temperature: that was fitted; None for none.
    """
    kept = [(e, line) for e, line in zip(examples, lines, strict=True) if e.label is not None]
    gold = np.array([labels.index(e.label) for e, _ in kept if e.label is not None], int)
    given = [line["label"] for _, line in kept]
    predicted = np.array([UNREAD if v is None else labels.index(v) for v in given], int)
    rows = [line["probabilities"] for _, line in kept]
    probabilities = confident = None
    if any(rows):
        unknown = dict.fromkeys(labels.texts, np.nan)
        probabilities = np.array([list((row or unknown).values()) for row in rows])
        confident = probabilities
        if temperature is not None:
            logits = (
                log_votes(np.round(probabilities * samples)) if samples else np.log(probabilities)
            )
            confident = tempered(logits, temperature)
    return JudgedPairs(
        examples=[e for e, _ in kept],
        lines=[line for _, line in kept],
        gold=gold,
        predicted=predicted,
        probabilities=probabilities,
        confident=confident,
        labels=labels,
    )


def agreement_report(judged: JudgedPairs, train: Sequence[Example]) -> dict[str, Any]:
    """The report as plain values.

    Args:
      judged: labeled pairs with a judge's answers, at least one.
      train: the pairs that the judge was trained on, for the floor; none if they are not known.

    Returns:
      ``pairs``, ``queries``, ``seen`` (pairs whose query is one of the training pairs), ``labels``,
      ``metrics`` (of ``judge``, ``unseen``, ``floor`` and ``raters``, each by name an interval),
      ``confusion``, ``calibration``, ``review``, ``slices``, ``unread`` (a count).
    """
    labels, size = judged.labels, len(judged.labels.values)
    seen_queries = {_folded(example.query) for example in train}
    seen = np.array([_folded(query) in seen_queries for query in judged.queries], bool)
    metrics = {"judge": judge_report(judged)}
    if train and 0 < seen.sum() < len(seen):
        metrics["unseen"] = judge_report(subset(judged, ~seen))
    if train and (baselines := labeled_floor(train, judged.examples, labels)):
        floor = baselines["word_overlap"]
        metrics["floor"] = floor.metrics | {
            "alpha": judge_alpha(judged.queries, judged.gold, floor.judgments.predicted, size),
            "ndcg@10": _ndcg(judged, floor.probabilities @ np.arange(size)),
        }
    ratings = [[labels.index(rating) for rating in e.raters] for e in judged.examples]
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
        "slices": _slices(judged),
        "unread": int((judged.predicted == UNREAD).sum()),
    }


def judge_report(judged: JudgedPairs) -> dict[str, Interval]:
    """The ``METRICS`` of a judge, with intervals by query."""
    size = len(judged.labels.values)
    good = [judged.labels.index(value) for value in judged.labels.good]
    score = judged.expected
    if judged.confident is not None:
        score = np.nan_to_num(judged.confident[:, good].sum(1), nan=-1.0)
    judgments = Judgments(judged.farthest, score)
    metrics = judge_metrics(judged.queries, judged.gold, judgments, classes=size, good=good)
    unread = np.where(judged.predicted == UNREAD, size, judged.predicted)
    matrices = confusions(judged.gold, unread, size + 1)
    for name, metric in (("macro_f1", macro_f1), ("accuracy", accuracy)):  # as ``metrics.score``
        metrics[name] = interval_of_sums(judged.queries, metric, matrices)
    metrics["alpha"] = judge_alpha(judged.queries, judged.gold, judged.farthest, size)
    metrics["ndcg@10"] = _ndcg(judged, judged.expected)
    return {name: metrics[name] for name in METRICS}


def subset(judged: JudgedPairs, rows: np.ndarray) -> JudgedPairs:
    """Some of the pairs, by a boolean for each."""
    kept = np.flatnonzero(rows).tolist()
    return JudgedPairs(
        examples=[judged.examples[n] for n in kept],
        lines=[judged.lines[n] for n in kept],
        gold=judged.gold[kept],
        predicted=judged.predicted[kept],
        probabilities=None if judged.probabilities is None else judged.probabilities[kept],
        confident=None if judged.confident is None else judged.confident[kept],
        labels=judged.labels,
    )


def worst_disagreements(judged: JudgedPairs, most: int = 50) -> list[int]:
    """The pairs whose labels are farthest apart, the judge's surest first among equals."""
    gaps = np.abs(judged.farthest - judged.gold)
    sure = np.array([line["confidence"] or 0.0 for line in judged.lines])
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
    curve = [
        {
            "confidence": float(level),
            "share": float((confidence >= level).sum() / len(judged.gold)),
            "accuracy": float(correct[confidence >= level].mean()),
        }
        for level in np.unique(confidence)
    ]
    return {"limits": limits, "curve": curve[:: max(1, len(curve) // 100)]}


def _slices(judged: JudgedPairs) -> dict[str, dict[str, dict[str, Any]]]:
    lengths = [sum(map(len, example.product.values())) for example in judged.examples]
    by_length = [next(n for n, most in LENGTHS.items() if size <= most) for size in lengths]
    names: dict[str, Sequence[str]] = {
        "kind": [example.kind or "unknown" for example in judged.examples],
        "language": [_language(example) for example in judged.examples],
        "length": by_length,
    }
    return {title: _slice(judged, values) for title, values in names.items()}


def _slice(judged: JudgedPairs, values: Sequence[str]) -> dict[str, dict[str, Any]]:
    size = len(judged.labels.values)
    metrics = {"accuracy": accuracy, "quadratic_kappa": quadratic_kappa}
    found = {}
    for value, count in Counter(values).most_common():
        part = subset(judged, np.array([v == value for v in values]))
        matrices = confusions(part.gold, part.farthest, size)
        intervals = {n: interval_of_sums(part.queries, m, matrices) for n, m in metrics.items()}
        found[value] = {"pairs": count, **{n: asdict(i) for n, i in intervals.items()}}
    return found


def _language(example: Example) -> str:
    name = language_of(example.query, example.product).name
    return "too few known words" if name == "unknown" else name


def _places(judged: JudgedPairs) -> np.ndarray:
    return np.arange(len(judged.labels.values))


def _folded(query: str) -> str:
    return normalize_text(query).casefold()
