"""Raters: against krippendorff and scikit-learn, with missing ratings and with one class."""

import krippendorff
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from she_jax.evaluation.raters import (
    coincidences,
    judge_alpha,
    krippendorff_alpha,
    rater_metrics,
)


def lists(table):
    """The ratings of each pair, without the missing ones (negative)."""
    return [[int(rating) for rating in row if rating >= 0] for row in table]


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(2, 4))
def test_alpha_equals_krippendorff_with_missing_ratings(seed, classes, raters):
    rng = np.random.default_rng(seed)
    table = rng.integers(-2, classes, (20, raters))
    rows = lists(table)
    twice = {rating for row in rows if len(row) > 1 for rating in row}
    alpha = krippendorff_alpha(coincidences(rows, classes).sum(0))
    if len(twice) < 2:
        assert np.isnan(alpha)
        return
    counts = np.array([np.bincount(row, minlength=classes) for row in rows])
    expected = krippendorff.alpha(
        value_counts=counts, value_domain=range(classes), level_of_measurement="ordinal"
    )
    assert alpha == pytest.approx(expected)


def test_rows_that_nobody_rated_twice_change_nothing():
    rated = [[0, 0], [1, 2, 2], [3, 3], [0, 1]]
    queries = ["a", "a", "b", "b"]
    more = rater_metrics([*queries, "a", "b"], [*rated, [], [2]], 4)
    assert more == rater_metrics(queries, rated, 4)
    assert more["accuracy"].estimate == pytest.approx((1 + 1 + 1) / (1 + 3 + 1 + 1))


def test_two_raters_equal_scikit_learn_in_both_orders():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 4, 200)
    second = np.where(rng.random(200) < 0.6, first, rng.integers(0, 4, 200))
    metrics = rater_metrics(np.arange(200), list(zip(first, second, strict=True)), 5)
    both = np.concatenate([first, second]), np.concatenate([second, first])
    for name, weights in (("kappa", None), ("quadratic_kappa", "quadratic")):
        expected = cohen_kappa_score(*both, labels=range(5), weights=weights)
        assert metrics[name].estimate == pytest.approx(expected)
    alpha = judge_alpha(np.arange(200), first, second, 5).estimate
    assert alpha == metrics["alpha"].estimate


def test_one_class_has_no_agreement_above_chance():
    metrics = rater_metrics(["a", "b"], [[1, 1], [1, 1]], 3)
    assert metrics["accuracy"].estimate == 1
    assert metrics["alpha"].estimate is metrics["kappa"].estimate is None
    with pytest.raises(ValueError, match=r"expected class indices in \[0, 3\)"):
        coincidences([[0, 3]], 3)
