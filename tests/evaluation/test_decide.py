"""From votes to one label: rules by hand, the fit of a threshold, and the choice among rules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from she_jax.evaluation.decide import (
    FEW,
    UNREAD,
    Decision,
    choose_rule,
    count_votes,
    cumulative,
    fit_threshold,
    majority,
    vote_shares,
)

THRESHOLDS = (0.4, 0.5, 0.7, 0.9)


@pytest.mark.parametrize(
    ("shares", "by_threshold", "largest"),
    [
        ((0.05, 0.15, 0.40, 0.40), (4, 3, 3, 2), 3),
        ((0.30, 0.30, 0.25, 0.15), (3, 2, 2, 1), 1),
        ((0.02, 0.55, 0.23, 0.20), (3, 2, 2, 2), 2),
    ],
)
def test_one_threshold_on_cumulative_probabilities_by_hand(shares, by_threshold, largest):
    rows = np.array([shares])
    found = tuple(int(cumulative(rows, threshold)[0]) + 1 for threshold in THRESHOLDS)
    assert found == by_threshold
    assert majority(rows)[0] + 1 == largest


def test_shares_of_votes_hit_a_threshold_though_their_sum_is_rounded():
    votes = count_votes(np.array([[3] * 3 + [2] * 4 + [0] * 3]), 4)
    assert votes.tolist() == [[3, 0, 4, 3]]
    assert cumulative(vote_shares(votes), 0.7)[0] == 2
    assert cumulative(np.array([[0.9, 0.1, 0.0]]), 1.0)[0] == 0


def test_chains_without_a_label_have_no_vote():
    votes = count_votes(np.array([[UNREAD, UNREAD], [UNREAD, 1]]), 3)
    shares = vote_shares(votes)
    assert votes.tolist() == [[0, 0, 0], [0, 1, 0]]
    assert majority(shares).tolist() == cumulative(shares, 0.5).tolist() == [UNREAD, 1]
    with pytest.raises(ValueError, match="expected -1 to 2"):
        count_votes(np.array([[3]]), 3)


@st.composite
def judged(draw, pairs=30):
    classes = draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    labels = rng.integers(-1, classes, (pairs, draw(st.integers(1, 8))))
    return rng.integers(0, classes, pairs), vote_shares(count_votes(labels, classes))


@settings(max_examples=25)
@given(judged())
def test_no_threshold_is_better_than_the_fitted_one(case):
    gold, shares = case
    threshold, score = fit_threshold(shares, gold)
    assert 0 < threshold < 1

    def macro_f1(limit):
        chosen = cumulative(shares, limit)
        return f1_score(gold, chosen, labels=np.unique(gold), average="macro", zero_division=0)

    assert score == pytest.approx(macro_f1(threshold))
    assert score >= max(macro_f1(limit) for limit in np.linspace(0.01, 1, 50)) - 1e-9


def test_the_threshold_undoes_an_error_that_goes_one_way():
    """Half of the votes are a class too good: the majority is wrong for two of three classes."""
    gold = np.repeat([0, 1, 2], 20)
    labels = np.stack([gold, gold, gold] + [np.minimum(gold + 1, 2)] * 5, 1)
    shares = vote_shares(count_votes(labels, 3))
    assert (majority(shares) == gold).mean() == pytest.approx(1 / 3)
    threshold, score = fit_threshold(shares, gold)
    assert score == 1
    assert threshold == pytest.approx((5 / 8 + 1) / 2)


def case(pairs, greedy_right):
    """Votes that are right for half of the pairs, a greedy chain that is for some share."""
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 3, pairs)
    labels = np.where(rng.random((pairs, 1)) < 0.5, gold[:, None], rng.integers(0, 3, (pairs, 8)))
    greedy = np.where(rng.random(pairs) < greedy_right, gold, (gold + 1) % 3)
    return np.arange(pairs) // 4, gold, greedy, vote_shares(count_votes(labels, 3))


def test_the_best_rule_is_chosen_where_validation_can_tell():
    decision, scores = choose_rule(*case(1000, 0.95), 0.5)
    assert decision == Decision()
    assert scores["greedy"] > scores["majority"] + 0.1
    assert choose_rule(*case(FEW - 1, 0.95), 0.5)[0].rule == "majority"  # too few pairs
    same = case(1000, 0.0)
    equal = majority(same[3])
    assert choose_rule(same[0], same[1], equal, same[3], 0.5)[0].rule == "majority"  # no better


def test_a_rule_of_votes_needs_votes_and_a_threshold_its_rule():
    greedy = np.array([1, UNREAD])
    assert Decision().labels(greedy, None).tolist() == [1, UNREAD]
    with pytest.raises(ValueError, match="votes: sample some chains"):
        Decision(rule="majority").labels(greedy, None)
    with pytest.raises(ValueError, match="with the threshold"):
        Decision(rule="cumulative")
    with pytest.raises(ValueError, match="expected one of greedy"):
        Decision(rule="vote")
