"""The floor: what a judge has to beat to have learned anything from the labels.

Two baselines are fitted on the training split and scored on the test split: the most frequent
class, and a logistic regression on how the query's words overlap with the product (``overlap.py``).
Classes are not balanced: probabilities fitted with balanced weights are not those of the data.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from she_jax.cot import LabelSet
from she_jax.evaluation.agreement import Judgments, judge_metrics
from she_jax.evaluation.intervals import Interval
from she_jax.evaluation.overlap import Overlap
from she_jax.types import Example

_ROWS = 2**16  # pairs at a time


@dataclass(frozen=True, kw_only=True)
class LabeledPairs:
    """Query-product pairs with their gold labels.

    Attributes:
      queries: the query's text of each pair; pairs with equal text are resampled together.
      products: text by field name of each pair.
      labels: class index of each pair, in [0, K), worst to best.
    """

    queries: Sequence[str]
    products: Sequence[Mapping[str, str]]
    labels: Sequence[int]

    def __post_init__(self):
        lengths = len(self.queries), len(self.products), len(self.labels)
        if len(set(lengths)) > 1:
            raise ValueError(f"{lengths} queries, products, labels: expected as many of each")


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A baseline on the test split.

    Attributes:
      judgments: predicted class and probability of good of each test pair.
      probabilities: of each class, by rows that sum to 1; shape [M, K].
      metrics: name to value and interval by query; see ``judge_metrics``.
    """

    judgments: Judgments
    probabilities: Float[np.ndarray, "M K"]
    metrics: dict[str, Interval]


def floor(
    train: LabeledPairs, test: LabeledPairs, *, classes: int, good: Collection[int]
) -> dict[str, Baseline]:
    """The baselines ``majority`` and ``word_overlap``. Deterministic, in any order of the pairs.

    Args:
      train: the pairs that the baselines are fitted on.
      test: the pairs that they are scored on, of other queries.
      classes: K, the size of the whole label set.
      good: the class indices that count as good.

    Raises:
      ValueError: if there are no training pairs, or a class index is outside of [0, K).
    """
    overlap = Overlap(train.products)
    probabilities = {
        "majority": class_shares(train.labels, len(test.labels), classes),
        "word_overlap": regression(
            overlap.features(train.queries, train.products),
            train.labels,
            overlap.features(test.queries, test.products),
            classes,
        ),
    }
    return {name: baseline(test, rows, good) for name, rows in probabilities.items()}


def labeled_floor(
    train: Sequence[Example], test: Sequence[Example] | LabeledPairs, labels: LabelSet
) -> dict[str, Baseline] | None:
    """The baselines on the labeled ones of some examples; None if a side has none."""
    parts = [
        part if isinstance(part, LabeledPairs) else _labeled(part, labels) for part in (train, test)
    ]
    if not all(part.labels for part in parts):
        return None
    good = [labels.index(value) for value in labels.good]
    return floor(*parts, classes=len(labels.values), good=good)


def _labeled(examples: Sequence[Example], labels: LabelSet) -> LabeledPairs:
    known = [example for example in examples if example.label is not None]
    return LabeledPairs(
        queries=[example.query for example in known],
        products=[example.product for example in known],
        labels=[labels.index(example.label) for example in known if example.label is not None],
    )


def baseline(
    test: LabeledPairs, probabilities: Float[np.ndarray, "M K"], good: Collection[int]
) -> Baseline:
    """Scores class probabilities: the most probable class is predicted, the worse in a tie."""
    judgments = Judgments(probabilities.argmax(1), probabilities[:, sorted(good)].sum(1))
    gold, classes = np.array(test.labels, int), probabilities.shape[1]
    metrics = judge_metrics(test.queries, gold, judgments, classes=classes, good=good)
    return Baseline(judgments=judgments, probabilities=probabilities, metrics=metrics)


def class_shares(labels: Sequence[int], n: int, classes: int) -> Float[np.ndarray, "n K"]:
    """The shares of the classes in the training labels, for each of n pairs.

    Raises:
      ValueError: if there are no labels or one is outside of [0, classes).
    """
    gold = np.array(labels, int)
    if not gold.size:
        raise ValueError("no labeled training pairs: the floor is fitted on at least one")
    if gold.min() < 0 or gold.max() >= classes:
        raise ValueError(
            f"classes {gold.min()} to {gold.max()}: expected indices in [0, {classes})"
        )
    return np.tile(np.bincount(gold, minlength=classes) / gold.size, (n, 1))


def regression(
    train: Float[np.ndarray, "N F"],
    labels: Sequence[int],
    test: Float[np.ndarray, "M F"],
    classes: int,
) -> Float[np.ndarray, "M K"]:
    """Class probabilities of a logistic regression on standardized features (scikit-learn).

    A class without training pairs has probability 0. Rows are sorted before the fit, so that their
    order does not matter to the last digit.

    Raises:
      ValueError: if there are no labels or one is outside of [0, classes).
    """
    shares = class_shares(labels, len(test), classes)
    gold = np.array(labels, int)
    present = np.unique(gold)
    if len(present) < 2 or not len(test):
        return shares
    from sklearn.linear_model import LogisticRegression  # imported late: a third of the start
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = np.lexsort([gold, *train.T])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probabilities = np.zeros_like(shares)
    # The matrices are small: more threads only wait for each other, and change the last digits.
    with threadpool_limits(1):
        model.fit(train[order], gold[order])
        for first in range(0, len(test), _ROWS):
            part = slice(first, first + _ROWS)
            probabilities[part, present] = model.predict_proba(test[part])
    return probabilities
