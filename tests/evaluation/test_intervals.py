"""Intervals by query: against hand-computed draws, invariances, and what has no interval."""

import dataclasses
import json

import numpy as np
import pytest

from she_jax.evaluation.intervals import (
    Interval,
    difference,
    difference_of_sums,
    interval,
    interval_of_sums,
)


def of_mean(queries, values):
    return interval_of_sums(queries, ratio, np.stack([values, np.ones(len(values))], 1))


def mean(values, counts):
    return np.average(values, weights=counts)


def ratio(sums):
    with np.errstate(invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


def test_the_interval_of_two_queries_by_hand():
    """Queries of mean 0 and 1 are drawn as 00, 01, 10 or 11: means 0, 1/2, 1/2 and 1."""
    queries, values = ["a", "a", "b", "b"], np.array([0, 0, 1, 1])
    assert interval(queries, mean, values) == Interval(estimate=0.5, low=0.0, high=1.0)


def test_sums_give_the_interval_of_the_metric_itself():
    rng = np.random.default_rng(1)
    queries, values = rng.integers(0, 20, 200).tolist(), rng.integers(0, 4, 200)
    fast, slow = of_mean(queries, values), interval(queries, mean, values)
    assert dataclasses.astuple(fast)[:3] == pytest.approx(dataclasses.astuple(slow)[:3])


def test_pairs_that_agree_within_a_query_give_a_wider_interval_by_query_than_by_pair():
    """Ten equal pairs a query say as much as one pair: the interval is sqrt(10) times as wide."""
    values = np.repeat(np.random.default_rng(2).integers(0, 2, 60), 10)
    by_query = of_mean(np.repeat(np.arange(60), 10).tolist(), values)
    by_pair = of_mean(list(range(600)), values)
    width = (by_query.high - by_query.low) / (by_pair.high - by_pair.low)
    assert width == pytest.approx(np.sqrt(10), rel=0.1)


def test_queries_of_a_single_pair_give_the_interval_of_the_normal_distribution():
    values = np.tile([0, 1], 200)
    by_pair = of_mean(list(range(400)), values)
    assert by_pair.high - by_pair.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)


def test_the_order_of_pairs_and_the_names_of_queries_in_their_order_change_nothing():
    rng = np.random.default_rng(3)
    queries, values = rng.integers(0, 9, 80), rng.integers(0, 4, 80)
    order = rng.permutation(80)
    expected = of_mean(queries.tolist(), values)
    assert of_mean([f"query {q}" for q in queries[order]], values[order]) == expected


def test_the_difference_of_a_judge_with_itself_is_0_and_with_a_constant_shift_the_shift():
    rng = np.random.default_rng(4)
    queries, values = rng.integers(0, 9, 80).tolist(), rng.integers(0, 64, 80) / 64
    rows = np.stack([values, np.ones(80)], 1)
    zero = Interval(estimate=0.0, low=0.0, high=0.0)
    assert difference(queries, mean, [values], [values]) == zero
    assert difference_of_sums(queries, ratio, rows, rows) == zero
    shifted = difference_of_sums(queries, ratio, rows + np.array([0.25, 0]), rows)
    assert dataclasses.astuple(shifted)[:3] == pytest.approx((0.25, 0.25, 0.25))


def test_a_difference_is_that_on_the_same_draws():
    """Two judges, always .1 apart: each is uncertain by far more than their difference."""
    rng = np.random.default_rng(5)
    queries, easy = np.repeat(np.arange(30), 5), np.repeat(rng.random(30), 5)
    first, second = easy + 0.1 + rng.normal(0, 0.01, 150), easy
    paired = difference(queries.tolist(), mean, [first], [second])
    alone = interval(queries.tolist(), mean, first)
    assert 0.09 < paired.low < paired.high < 0.11
    assert alone.high - alone.low > 10 * (paired.high - paired.low)


@pytest.mark.parametrize(
    ("queries", "values", "expected"),
    [
        ([], [], Interval(estimate=None, note="no pairs")),
        (
            ["a"] * 3,
            [0, 1, 1],
            Interval(estimate=2 / 3, note="one query: an interval takes two or more"),
        ),
        (["a", "b"], [np.nan] * 2, Interval(estimate=None, note="undefined for these labels")),
    ],
)
def test_what_has_no_interval_says_why(queries, values, expected):
    values = np.array(values, float)
    assert of_mean(queries, values) == interval(queries, mean, values) == expected


def test_draws_without_a_value_are_counted_and_many_leave_no_interval():
    """The share of hits among rated pairs, rated in one or in nine of ten queries."""

    def rated(n):
        return np.stack([np.arange(10) % 2 * (np.arange(10) < n), np.arange(10) < n], 1)

    most = interval_of_sums(list(range(10)), ratio, rated(9))
    few = interval_of_sums(list(range(10)), ratio, rated(2))
    assert most.low is not None
    assert most.note == ""
    assert (few.estimate, few.low, few.high) == (0.5, None, None)
    undefined = int(few.note.split()[2])
    assert undefined == pytest.approx(1000 * 0.8**10, rel=0.3)


def test_an_interval_is_json_and_reads_as_a_cell_of_a_table():
    value = Interval(estimate=0.3649, low=0.301, high=0.43)
    assert Interval(**json.loads(json.dumps(dataclasses.asdict(value)))) == value
    assert str(value) == "0.365 [0.301, 0.430]"
    assert str(Interval(estimate=0.5, note="one query")) == "0.500 (one query)"
    assert str(Interval(estimate=None, note="no pairs")) == "none (no pairs)"


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 3\] rows"):
        interval(["a", "b"], mean, np.zeros(3))
