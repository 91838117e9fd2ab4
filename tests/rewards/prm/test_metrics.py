"""Metrics of a process reward model, by hand."""

import numpy as np
import pytest

from she_jax.rewards.prm.metrics import first_errors, prm_metrics
from she_jax.rewards.prm.model import StepScores
from she_jax.rewards.prm.step_query import StepQuery
from she_jax.types import Example

PAIR = Example(uid="a", query="mug", product={"title": "mug"})


def step(name, correct, source="policy", chain="a/sft/0", annotated=True):
    return StepQuery(
        example=PAIR,
        step=name,
        written="",
        correct=correct,
        source=source,
        chain=chain,
        annotated=annotated,
    )


def test_metrics_by_hand():
    pool = [
        step("query", True),
        step("query", False, annotated=False),
        step("label", False),
        step("label", False, "verdict"),
        step("label", True, "gold"),
    ]
    scores = StepScores(
        score=np.array([0.9, 0.2, 0.6, 0.1, 0.0], np.float32),
        known=np.array([True, True, True, True, False]),
    )
    metrics = prm_metrics(pool, scores)
    assert (metrics["n"], metrics["unreadable"]) == (5, 1)
    assert metrics["accuracy"] == 3 / 4
    assert metrics["f1_incorrect"] == pytest.approx(2 * 2 / (2 * 2 + 0 + 1))
    assert metrics["auroc"] == 1
    assert metrics["agreement"] == 2 / 3  # the second step is not annotated
    assert metrics["by_step"]["label"]["accuracy"] == 1 / 2
    assert metrics["by_step"]["label"]["auroc"] is None  # the score of the correct step is unknown
    assert metrics["by_source"]["gold"]["accuracy"] is None
    assert metrics["policy_by_step"]["label"]["n"] == 1
    assert metrics["policy_by_phase"]["sft"]["n"] == 3


def test_first_errors_by_hand():
    truth = {"hit": [1, 0, 0], "late": [0, 1, 0], "early": [1, 0, 1], "clean": [1, 1, 1]}
    score = {
        "hit": [0.9, 0.1, 0.9],
        "late": [0.9, 0.9, 0.1],
        "early": [0.1, 0.1, 0.9],
        "clean": [0.9, 0.9, 0.9],
    }
    pool = [step("query", bool(t), chain=name) for name, values in truth.items() for t in values]
    values = np.array([s for values in score.values() for s in values], np.float32)
    scores = StepScores(score=values, known=np.ones(12, bool))
    assert first_errors(pool, scores) == {
        "found": pytest.approx(1 / 3),
        "spared": 1.0,
        "wrong": 3,
        "right": 1,
    }
    unknown = StepScores(score=values, known=np.zeros(12, bool))
    assert first_errors(pool, unknown)["found"] == 0
