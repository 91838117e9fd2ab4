"""Rankings: nDCG by hand and against scikit-learn, ties, and the order of systems."""

import numpy as np
import pytest

from she_jax.evaluation.ranking import compare_systems, mean_ndcg, ndcg_by_query


def test_ndcg_by_hand_and_what_has_none():
    queries = ["a", "a", "a", "alone", "nothing", "nothing"]
    gains = np.array([1, 3, 0, 3, 0, 0])
    scores = np.array([3.0, 2, 1, 1, 2, 1])
    found = ndcg_by_query(queries, gains, scores)
    assert found == {"a": pytest.approx((1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3)))}
    assert mean_ndcg(found).estimate == found["a"]
    assert mean_ndcg({}).estimate is None


def test_equal_scores_share_the_mean_of_their_places():
    gains, equal = np.array([1, 0]), np.zeros(2)
    either = [ndcg_by_query("aa", gains, np.array(s))["a"] for s in ([1.0, 0.0], [0.0, 1.0])]
    assert ndcg_by_query("aa", gains, equal)["a"] == pytest.approx(np.mean(either))
    assert ndcg_by_query("aa", gains[::-1], equal)["a"] == pytest.approx(np.mean(either))


def test_only_the_first_ten_places_count():
    gains = np.array([0] * 10 + [1])
    assert ndcg_by_query(["a"] * 11, gains, -np.arange(11.0))["a"] == 0


def test_systems_keep_their_order_under_a_judge_that_agrees():
    queries = ["a"] * 3 + ["b"] * 3
    human = np.array([2, 1, 0, 2, 1, 0])
    good = dict.fromkeys(range(6), 0) | {0: 1, 1: 2, 2: 3, 3: 1, 4: 2, 5: 3}
    bad = {row: 4 - rank for row, rank in good.items()}
    middle = good | {3: 3, 5: 1}
    ranks = {"good": good, "bad": bad, "middle": middle}
    same = compare_systems(ranks, queries, human, human)
    assert same["tau"] == 1
    assert [same["systems"]["good"][side]["estimate"] for side in ("human", "judge")] == [1, 1]
    assert same["systems"]["good"]["n"] == 6
    upside_down = compare_systems(ranks, queries, human, 2 - human)
    assert upside_down["tau"] == -1
    assert compare_systems({"good": good}, queries, human, human)["tau"] is None


def test_the_ideal_order_has_all_judged_products_and_a_system_that_misses_them_has_0():
    """As trec_eval: who shows only the worse products of a query, or nothing, loses there."""
    queries = ["a"] * 4 + ["b"] * 2
    gains = np.array([3, 3, 1, 1, 2, 0])
    ranks = {"best": {0: 1, 1: 2, 4: 1}, "worse": {2: 1, 3: 2, 5: 1}, "half": {0: 1, 1: 2}}
    systems = compare_systems(ranks, queries, gains, gains)["systems"]
    ideal = [gain / np.log2(place) for place, gain in enumerate((3, 3, 1, 1), start=2)]
    a_best, a_worse = sum(ideal[:2]) / sum(ideal), (1 + 1 / np.log2(3)) / sum(ideal)
    expected = {"best": (a_best + 1) / 2, "worse": a_worse / 2, "half": a_best / 2}
    found = {name: system["human"]["estimate"] for name, system in systems.items()}
    assert found == pytest.approx(expected)
