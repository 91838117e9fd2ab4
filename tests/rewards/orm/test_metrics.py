"""Metrics of an outcome reward model, by hand."""

import numpy as np

from she_jax.rewards.orm.dataset import Outcome
from she_jax.rewards.orm.metrics import orm_metrics
from she_jax.types import Example


def outcome(uid, right, source="sft"):
    pair = Example(uid=uid, query="mug", product={"title": "mug"})
    return Outcome(example=pair, source=source, tokens=(5,), text="mug", right=right)


def test_metrics_by_hand():
    pool = [
        *(outcome("a", True), outcome("a", False), outcome("a", False, "policy")),
        *(outcome("b", True), outcome("b", True, "policy"), outcome("b", False, "policy")),
        *(outcome("c", True), outcome("d", False)),
    ]
    score = np.array([0.7, 0.2, 0.8, 0.6, 0.4, 0.6, 0.9, 0.1], np.float32)
    metrics = orm_metrics(pool, score)
    assert (metrics["n"], metrics["right"]) == (8, 0.5)
    assert (metrics["mixed"], metrics["all_right"], metrics["all_wrong"]) == (2, 1, 1)
    assert metrics["accuracy"] == 5 / 8
    # Pair a: above one of two; pair b: a tie and one below.
    assert metrics["ranking"] == (1 + 0 + 0.5 + 0) / 4
    by_policy = metrics["by_source"]["policy"]
    assert (by_policy["n"], by_policy["mixed"], by_policy["all_wrong"]) == (3, 1, 1)
    assert by_policy["ranking"] == 0
    assert orm_metrics(pool[6:], score[6:])["ranking"] is None
