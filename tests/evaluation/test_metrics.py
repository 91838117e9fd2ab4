"""Metrics against hand-computed values and against scikit-learn on random predictions."""

import json

import numpy as np
import pytest
from sklearn.metrics import f1_score

from she_jax.cot import CotSchema
from she_jax.evaluation.evaluate import pass_at
from she_jax.evaluation.metrics import pass_at_k, score
from she_jax.generate.generator import Generator, Sample
from she_jax.types import Example

SCHEMA = CotSchema()


def chain(label, category="match", attributes="met"):
    lines = ["query: q", "product: p", f"category: {category}", f"attributes: {attributes}"]
    return SCHEMA.parse("\n".join([*lines, f"label: {label}"]))


def example(label, kind="", **steps):
    return Example(
        uid="u", query="q", product={"title": "t"}, label=label, kind=kind, steps=steps or None
    )


def score_labels(gold, predicted):
    return score([chain(p) for p in predicted], [example(g) for g in gold], SCHEMA)


def test_metrics_by_hand():
    """Gold 4 4 3 1, predicted 4 3 3 unread: F1 is 2/3, 2/3 and 0 over the three present classes."""
    scores = score_labels([4, 4, 3, 1], [4, 3, 3, "?"])
    assert scores["macro_f1"] == pytest.approx(4 / 9)
    assert scores["accuracy"] == 0.5
    assert scores["f1"] == {
        "1": 0.0,
        "2": None,
        "3": pytest.approx(2 / 3),
        "4": pytest.approx(2 / 3),
    }
    assert scores["confusion"] == [[0, 0, 0, 0, 1], [0] * 5, [0, 0, 1, 0, 0], [0, 0, 1, 1, 0]]
    # good: three correct, and the unread label of a bad pair counts as a false positive.
    assert scores["good_f1"] == pytest.approx(6 / 7)
    assert scores["parse_rate"] == 0.75
    assert scores["n"] == 4


def test_metrics_equal_scikit_learn_on_random_predictions():
    rng = np.random.default_rng(0)
    gold, predicted = rng.integers(1, 5, 300), rng.integers(1, 5, 300)
    scores = score_labels(gold.tolist(), predicted.tolist())
    assert scores["macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro"))
    each = f1_score(gold, predicted, average=None)
    assert list(scores["f1"].values()) == pytest.approx(list(each))
    assert scores["good_f1"] == pytest.approx(f1_score(gold >= 3, predicted >= 3))


def test_perfect_and_unreadable_predictions():
    gold = [1, 2, 3, 4]
    perfect, unread = score_labels(gold, gold), score_labels(gold, ["?"] * 4)
    for key in ("macro_f1", "accuracy", "good_f1", "parse_rate"):
        assert (perfect[key], unread[key]) == (1.0, 0.0), key
    assert perfect["macro_f1_se"] >= 0


def test_an_unread_label_is_never_better_than_a_wrong_one():
    """An unread label lowers the F1 of good as much as the opposite side would."""
    gold = [4, 1, 2, 3]
    assert (
        score_labels(gold, [4, "?", 2, 3])["good_f1"] == score_labels(gold, [4, 3, 2, 3])["good_f1"]
    )
    assert (
        score_labels(gold, ["?", 1, 2, 3])["good_f1"] == score_labels(gold, [2, 1, 2, 3])["good_f1"]
    )


def test_pairs_without_a_label_count_only_in_the_parse_rate():
    scores = score([chain(4), chain("?")], [example(4), example(None, category="near")], SCHEMA)
    assert (scores["n"], scores["accuracy"], scores["parse_rate"]) == (1, 1.0, 0.5)
    assert scores["step_accuracy"] == {}


def test_step_accuracy_is_over_known_truths_and_a_missing_step_is_wrong():
    chains = [
        chain(4),
        chain(4, category="near"),
        chain(4, category="perhaps"),
        SCHEMA.parse("label: 4"),
    ]
    examples = [example(4, category="match", query="shoes"), *[example(4, category="near")] * 3]
    scores = score(chains, examples, SCHEMA)
    assert scores["step_accuracy"] == {"category": 0.5}, "free steps and unknown steps are excluded"


def test_metrics_by_kind_of_query():
    chains, examples = [chain(4), chain(1), chain(2)], []
    for label, kind in ((4, "negation"), (2, "negation"), (2, "")):
        examples.append(example(label, kind))
    assert score(chains, examples, SCHEMA)["by_kind"] == {
        "negation": {"macro_f1": 0.5, "n": 2},
        "unknown": {"macro_f1": 1.0, "n": 1},
    }


def test_metrics_over_no_examples_are_none_and_valid_json():
    scores = score([], [], SCHEMA)
    assert (scores["n"], scores["macro_f1"], scores["macro_f1_se"], scores["parse_rate"]) == (
        0, None, None, None,
    )  # fmt: skip
    json.dumps(scores, allow_nan=False)
    json.dumps(score_labels([1, 4], [4, "?"]), allow_nan=False)


def test_chains_and_examples_must_be_equally_many():
    with pytest.raises(ValueError, match="1 chains for 2 examples"):
        score([chain(1)], [example(1)] * 2, SCHEMA)


def test_standard_error_agrees_with_resampled_rows():
    rng = np.random.default_rng(1)
    gold = rng.integers(1, 5, 2000)
    predicted = np.where(rng.random(2000) < 0.7, gold, rng.integers(1, 5, 2000))
    error = score_labels(gold.tolist(), predicted.tolist())["macro_f1_se"]
    draws = [rng.integers(0, 2000, 2000) for _ in range(200)]
    resampled = [f1_score(gold[i], predicted[i], average="macro") for i in draws]
    assert error == pytest.approx(np.std(resampled), rel=0.25)


def test_pass_at_k_is_over_the_labeled_pairs():
    """An unreadable chain of an unlabeled pair has no label either, and is not correct."""

    class FixedGenerator(Generator):
        def __init__(self):
            """Has no model."""

        def sample(self, params, examples, k, seed, show):
            groups = [[chain(4), chain(1)], [SCHEMA.parse("?")] * 2]
            return [
                [Sample(tokens=(), text="", chain=c, truncated=False) for c in chains]
                for chains in groups
            ]

    def metrics(*labels):
        examples = [example(label) for label in labels]
        return pass_at(FixedGenerator(), None, examples, 2, 0, lambda done: None)

    assert metrics(4, None) == {"pass_at_2": 1.0, "sampled_accuracy": 0.5}
    assert metrics(None, None) == {}


def test_pass_at_k():
    correct = np.array([[False, True], [False, False], [True, True], [False, False]])
    assert pass_at_k(correct) == 0.5
    with pytest.raises(ValueError, match="at least one"):
        pass_at_k(np.zeros((0, 4), bool))
