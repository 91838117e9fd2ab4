"""Agreement with gold labels: by hand, against scikit-learn, and what every judge obeys."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, f1_score, roc_auc_score

from she_jax.evaluation.agreement import (
    Judgments,
    accuracy,
    auc,
    confusions,
    good_f1,
    good_macro_f1,
    judge_differences,
    judge_metrics,
    kappa,
    macro_f1,
    quadratic_kappa,
)
from she_jax.evaluation.intervals import Interval

GOOD = (2, 3)
rng = np.random.default_rng(0)
QUERIES = [f"query {i}" for i in rng.integers(0, 30, 300)]
LABELS = rng.integers(0, 4, 300)
GUESSES = np.where(rng.random(300) < 0.5, LABELS, rng.integers(0, 4, 300))
JUDGE = Judgments(GUESSES, GUESSES + rng.integers(0, 2, 300) / 2)


def test_metrics_by_hand():
    """Gold 0 0 2 3, predicted 0 2 2 0: F1 is 1/2, 2/3 and 0 over the three classes that occur."""
    matrix = confusions(np.array([0, 0, 2, 3]), np.array([0, 2, 2, 0]), 4).sum(0)
    assert macro_f1(matrix) == pytest.approx(7 / 18)
    assert accuracy(matrix) == 0.5
    assert good_f1(matrix, GOOD) == 0.5
    assert good_macro_f1(matrix, GOOD) == 0.5
    # Squared distances 0, 4, 0, 9; of each of 0 0 2 3 with each of 0 2 2 0: 8 + 8 + 8 + 20.
    assert quadratic_kappa(matrix) == pytest.approx(1 - (13 / 4) / (44 / 16))


def test_metrics_equal_scikit_learn():
    matrix = confusions(LABELS, GUESSES, 4).sum(0)
    good, guessed = LABELS >= 2, GUESSES >= 2
    assert macro_f1(matrix) == pytest.approx(f1_score(LABELS, GUESSES, average="macro"))
    assert good_f1(matrix, GOOD) == pytest.approx(f1_score(good, guessed))
    assert good_macro_f1(matrix, GOOD) == pytest.approx(f1_score(good, guessed, average="macro"))
    for ours, weights in ((kappa, None), (quadratic_kappa, "quadratic")):
        assert ours(matrix) == pytest.approx(cohen_kappa_score(LABELS, GUESSES, weights=weights))
    assert auc(good, JUDGE.good_score) == pytest.approx(roc_auc_score(good, JUDGE.good_score))


def test_the_whole_label_set_counts_though_not_all_of_it_occurs():
    """Labels 0, 1 and 9 of ten: of these alone, 9 would be as far from 1 as 1 from 0."""
    gold, predicted = np.array([0, 1, 9, 9, 0]), np.array([0, 1, 9, 1, 1])
    found = quadratic_kappa(confusions(gold, predicted, 10).sum(0))
    given = cohen_kappa_score(gold, predicted, weights="quadratic", labels=range(10))
    assert found == pytest.approx(given)
    assert found != pytest.approx(cohen_kappa_score(gold, predicted, weights="quadratic"), abs=0.01)


def test_a_judge_that_sees_the_label_has_1_in_every_metric_and_draw():
    judge = Judgments(LABELS, LABELS.astype(float))
    metrics = judge_metrics(QUERIES, LABELS, judge, classes=4, good=GOOD)
    assert len(metrics) == 7
    assert set(metrics.values()) == {Interval(estimate=1.0, low=1.0, high=1.0)}


def test_a_judge_of_a_single_class_has_no_kappa_and_ties_in_every_rank():
    judge = Judgments(np.zeros(300, int), np.zeros(300))
    metrics = judge_metrics(QUERIES, LABELS, judge, classes=4, good=GOOD)
    assert metrics["quadratic_kappa"] == Interval(estimate=0.0, low=0.0, high=0.0)
    assert metrics["good_auc"] == Interval(estimate=0.5, low=0.5, high=0.5)


def test_the_order_of_pairs_changes_nothing():
    order = np.random.default_rng(1).permutation(300)
    shuffled = judge_metrics(
        [QUERIES[i] for i in order],
        LABELS[order],
        Judgments(GUESSES[order], JUDGE.good_score[order]),
        classes=4,
        good=GOOD,
    )
    assert shuffled == judge_metrics(QUERIES, LABELS, JUDGE, classes=4, good=GOOD)


def test_differences_of_equal_judges_are_0_and_of_unequal_ones_those_of_their_metrics():
    same = judge_differences(QUERIES, LABELS, JUDGE, JUDGE, classes=4, good=GOOD)
    assert set(same.values()) == {Interval(estimate=0.0, low=0.0, high=0.0)}
    perfect = Judgments(LABELS, LABELS)
    better = judge_differences(QUERIES, LABELS, perfect, JUDGE, classes=4, good=GOOD)
    alone = judge_metrics(QUERIES, LABELS, JUDGE, classes=4, good=GOOD)
    for name, value in better.items():
        assert value.estimate == pytest.approx(1 - alone[name].estimate), name
        assert value.low == pytest.approx(1 - alone[name].high), name


def test_labels_of_a_single_side_leave_what_needs_both_undefined():
    labels = np.zeros(3, int)
    metrics = judge_metrics("abc", labels, Judgments(labels, labels), classes=4, good=GOOD)
    undefined = {name for name, value in metrics.items() if value.estimate is None}
    assert undefined == {"good_f1", "kappa", "quadratic_kappa", "good_auc"}
    assert metrics["macro_f1"] == Interval(estimate=1.0, low=1.0, high=1.0)


def test_classes_outside_of_the_set_and_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match=r"predicted class 4: expected an index in \[0, 4\)"):
        confusions(np.array([0, 1]), np.array([4, 1]), 4)
    with pytest.raises(ValueError, match="gold class -1"):
        confusions(np.array([-1, 1]), np.array([0, 1]), 4)
    with pytest.raises(ValueError, match="NaN"):
        auc(np.array([True, False]), np.array([0.5, np.nan]))
