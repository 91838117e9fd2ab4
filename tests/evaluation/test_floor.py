"""The floor: what it learns, what it must not learn, and what it does without enough to learn."""

import dataclasses

import numpy as np
import pytest

from she_jax.evaluation.floor import LabeledPairs, class_shares, floor, regression
from she_jax.evaluation.intervals import Interval

WORDS = [f"word{letter}" for letter in "abcdfghjklmnpqrtvwxz"]


def shop(n, seed, noise=0.1):
    """Pairs of 5 to a query; the label is the number of the query's 3 words in the title."""
    rng = np.random.default_rng(seed)
    by_five = [rng.permutation(WORDS)[:3] for _ in range(0, n, 5)]
    queries, products, labels = [], [], []
    for i in range(n):
        query = by_five[i // 5]
        shared = int(rng.integers(0, 4))
        others = rng.permutation([word for word in WORDS if word not in query])[: 6 - shared]
        queries.append(" ".join(query))
        products.append({"title": " ".join([*query[:shared], *others]), "brand": WORDS[i % 20]})
        labels.append(int(rng.integers(0, 4)) if rng.random() < noise else shared)
    return LabeledPairs(queries=queries, products=products, labels=labels)


def shuffled(pairs, seed):
    labels = np.random.default_rng(seed).permutation(pairs.labels).tolist()
    return dataclasses.replace(pairs, labels=labels)


def floor_of(train, test):
    return floor(train, test, classes=4, good=(2, 3))


TRAIN, TEST = shop(400, 0), shop(200, 1)


@pytest.fixture(scope="module")
def baselines():
    return floor_of(TRAIN, TEST)


def test_the_majority_is_the_same_for_every_pair(baselines):
    majority = baselines["majority"]
    shares = np.bincount(TRAIN.labels) / 400
    np.testing.assert_allclose(majority.probabilities, np.tile(shares, (200, 1)))
    assert set(majority.judgments.predicted) == {shares.argmax()}
    accuracy = majority.metrics["accuracy"]
    assert accuracy.estimate == np.mean(np.array(TEST.labels) == shares.argmax())
    assert accuracy.low < accuracy.estimate < accuracy.high
    assert majority.metrics["quadratic_kappa"] == Interval(estimate=0.0, low=0.0, high=0.0)
    assert majority.metrics["good_auc"] == Interval(estimate=0.5, low=0.5, high=0.5)


def test_overlap_is_learned_and_the_probabilities_are_those_of_the_judgments(baselines):
    overlap = baselines["word_overlap"]
    np.testing.assert_allclose(overlap.probabilities.sum(1), 1)
    np.testing.assert_array_equal(overlap.judgments.predicted, overlap.probabilities.argmax(1))
    np.testing.assert_allclose(overlap.judgments.good_score, overlap.probabilities[:, 2:].sum(1))
    for name in ("macro_f1", "accuracy", "good_f1", "good_macro_f1", "quadratic_kappa", "good_auc"):
        assert overlap.metrics[name].low > 0.7, name


def test_nothing_is_learned_from_shuffled_labels():
    """Shuffled in both splits: a regression on noise alone still ranks by overlap, up or down."""
    metrics = floor_of(shuffled(TRAIN, 0), shuffled(TEST, 100))["word_overlap"].metrics
    assert metrics["quadratic_kappa"].estimate == pytest.approx(0, abs=0.15)
    assert metrics["good_auc"].low < 0.5 < metrics["good_auc"].high


def test_the_order_of_pairs_changes_nothing(baselines):
    order, places = (np.random.default_rng(seed).permutation(n) for seed, n in ((0, 400), (1, 200)))

    def reordered(pairs, rows):
        columns = (pairs.queries, pairs.products, pairs.labels)
        return LabeledPairs(
            **{
                name: [column[i] for i in rows]
                for name, column in zip(("queries", "products", "labels"), columns, strict=True)
            }
        )

    again = floor_of(reordered(TRAIN, order), reordered(TEST, places))
    for name, expected in baselines.items():
        np.testing.assert_allclose(
            again[name].probabilities, expected.probabilities[places], rtol=1e-12
        )
        assert again[name].metrics == expected.metrics, name


def test_classes_that_training_lacks_are_never_predicted_and_a_single_class_is_the_majority():
    train = dataclasses.replace(TRAIN, labels=[min(label, 1) * 3 for label in TRAIN.labels])
    probabilities = floor_of(train, TEST)["word_overlap"].probabilities
    assert (probabilities[:, [1, 2]] == 0).all()
    assert set(probabilities.argmax(1)) == {0, 3}
    alone = floor_of(dataclasses.replace(TRAIN, labels=[2] * 400), TEST)
    np.testing.assert_array_equal(alone["word_overlap"].probabilities[0], [0, 0, 1, 0])


def test_an_empty_test_split_has_no_metrics_and_an_empty_training_split_no_floor():
    nothing = LabeledPairs(queries=[], products=[], labels=[])
    for baseline in floor_of(TRAIN, nothing).values():
        assert set(baseline.metrics.values()) == {Interval(estimate=None, note="no pairs")}
    with pytest.raises(ValueError, match="no labeled training pairs"):
        floor_of(nothing, TEST)
    with pytest.raises(ValueError, match=r"classes 1 to 4: expected indices in \[0, 4\)"):
        class_shares([1, 4], 1, 4)
    with pytest.raises(ValueError, match=r"\(1, 0, 0\) queries, products, labels"):
        LabeledPairs(queries=["q"], products=[], labels=[])


def test_the_regression_gives_the_shares_where_features_say_nothing():
    probabilities = regression(np.zeros((8, 3)), [0, 0, 0, 0, 2, 2, 3, 3], np.ones((1, 3)), 4)
    np.testing.assert_allclose(probabilities, [[0.5, 0, 0.25, 0.25]], atol=1e-3)
