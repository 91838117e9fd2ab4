"""Confidence: temperature, reliability, and which pairs a human has to look at."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as sklearn_log_loss

from she_jax.evaluation.confidence import (
    brier,
    fit_temperature,
    log_loss,
    log_votes,
    reliability,
    review_limit,
    tempered,
)
from she_jax.rewards.calibration import calibration_error


def test_votes_have_one_more_for_each_class():
    rows = np.exp(log_votes(np.array([[0, 8, 0], [0, 0, 0]])))
    assert rows[0] == pytest.approx([1 / 11, 9 / 11, 1 / 11])
    assert rows[1] == pytest.approx([1 / 3] * 3)


@given(st.floats(0.2, 5), st.integers(0, 100))
def test_the_fitted_temperature_undoes_a_wrong_one(wrong, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (4000, 3))
    gold = (softmax(logits, 1).cumsum(1) > rng.random((4000, 1))).argmax(1)
    temperature = fit_temperature(logits * wrong, gold)
    assert temperature == pytest.approx(wrong, rel=0.15)
    fitted = log_loss(tempered(logits * wrong, temperature), gold)
    for other in (0.8, 1.25):
        assert fitted <= log_loss(tempered(logits * wrong, temperature * other), gold)


def test_losses_equal_scikit_learn():
    rng = np.random.default_rng(0)
    rows, gold = softmax(rng.normal(size=(50, 4)), 1), rng.integers(0, 4, 50)
    labels = [0, 1, 2, 3]
    assert log_loss(rows, gold) == pytest.approx(sklearn_log_loss(gold, rows, labels=labels))
    expected = brier_score_loss(gold, rows, labels=labels, scale_by_half=False)
    assert brier(rows, gold) == pytest.approx(expected)
    assert log_loss(np.array([[1.0, 0.0]]), np.array([1])) == np.inf
    assert tempered(log_softmax(rows, 1), 1.0) == pytest.approx(softmax(rows, 1))
    with pytest.raises(ValueError, match="no validation pairs"):
        fit_temperature(np.zeros((0, 2)), np.zeros(0, int))


def test_the_reliability_curve_by_hand():
    confidence = np.array([1.0, 0.95, 0.55, 0.5, 0.45, 0.0])
    correct = np.array([True, False, True, False, True, False])
    curve = reliability(confidence, correct)
    assert [(point["low"], point["n"]) for point in curve] == [(0, 1), (0.4, 1), (0.5, 2), (0.9, 2)]
    assert [point["accuracy"] for point in curve] == [0, 1, 0.5, 0.5]
    assert [point["confidence"] for point in curve] == pytest.approx([0, 0.45, 0.525, 0.975])
    gaps = [point["n"] * abs(point["accuracy"] - point["confidence"]) for point in curve]
    assert sum(gaps) / 6 == pytest.approx(calibration_error(correct, confidence))


@given(st.lists(st.tuples(st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.booleans()), min_size=1))
def test_from_the_limit_on_the_labels_have_the_accuracy(pairs):
    confidence = np.array([value for value, _ in pairs])
    correct = np.array([right for _, right in pairs])
    limit, share = review_limit(confidence, correct, 0.8)
    trusted = confidence >= limit
    assert share == pytest.approx(1 - trusted.mean())
    if limit == np.inf:
        assert all(correct[confidence >= value].mean() < 0.8 for value in confidence)
    else:
        assert correct[trusted].mean() >= 0.8
        assert all(correct[confidence >= v].mean() < 0.8 for v in confidence if v < limit)


def test_a_limit_needs_so_many_pairs():
    confidence, correct = np.array([0.9] * 3 + [0.5] * 3), np.array([True] * 3 + [False] * 3)
    assert review_limit(confidence, correct, 0.95) == (0.9, 0.5)
    assert review_limit(confidence, correct, 0.95, least=4) == (np.inf, 1.0)
