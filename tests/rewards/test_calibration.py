"""The calibration error of probabilities, by hand."""

import numpy as np
import pytest

from she_jax.rewards.calibration import calibration_error, probability_metrics


def test_calibration_error_by_hand():
    correct = np.array([True, False, True, True])
    score = np.array([0.95, 0.91, 0.42, 1.0], np.float32)
    # The last bin: 2 correct of 3, mean score 0.953; another bin: 1 of 1 at 0.42.
    expected = (abs(2 - 2.86) + abs(1 - 0.42)) / 4
    assert calibration_error(correct, score) == pytest.approx(expected, abs=1e-6)


def test_metrics_that_need_both_classes_are_none_over_one():
    metrics = probability_metrics(np.array([True, True]), np.array([0.5, 0.25]))
    assert metrics == {"accuracy": 0.5, "auroc": None, "ece": pytest.approx(1.25 / 2)}
    empty = probability_metrics(np.array([], bool), np.array([]))
    assert empty == {"accuracy": None, "auroc": None, "ece": None}
