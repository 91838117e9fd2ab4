"""From chains to judgments: votes, the chain that speaks, confidence, expected grade, review."""

import numpy as np
import pytest

from she_jax.cot import CotSchema, LabelSet
from she_jax.evaluation.confidence import log_votes, tempered
from she_jax.evaluation.decide import Decision
from she_jax.evaluation.judge import Calibration, Evidence, judge
from she_jax.generate.generator import Sample

SCHEMA = CotSchema.build(labels="0-2")
LABELS = SCHEMA.labels


def sample(label, words="mug"):
    text = f"query: {words}\nproduct: mug\nlabel: {label}"
    return Sample(tokens=(), text=text, chain=SCHEMA.parse(text), truncated=False)


EVIDENCE = Evidence(
    greedy=[sample(2, "greedy"), sample("?"), sample("?")],
    samples=[
        [sample(0, "first"), sample(0, "second"), sample(2), sample("?")],
        [sample(1), sample(1), sample(1), sample(1)],
        [sample("?")] * 4,
    ],
)


def test_greedy_labels_keep_their_chain_and_the_votes_are_their_probabilities():
    first, second, third = judge(EVIDENCE, Calibration(), LABELS)
    assert (first.label, first.answer.chain.steps[0].text) == (2, "greedy")
    assert first.probabilities == pytest.approx((2 / 3, 0, 1 / 3))
    assert first.confidence == pytest.approx(1 / 3)
    assert first.expected == pytest.approx(2 / 3)
    assert (second.label, second.confidence, second.expected) == (None, None, 1)
    assert (third.label, third.probabilities, third.expected) == (None, None, None)
    assert first.review is None


def test_the_chain_that_speaks_gives_the_label_that_was_voted():
    majority = Calibration(decision=Decision(rule="majority"), temperature=2.0, review_below=0.55)
    first, second, third = judge(EVIDENCE, majority, LABELS)
    assert (first.label, first.answer.chain.steps[0].text) == (0, "first")
    votes = np.array([[2, 0, 1], [0, 4, 0], [0, 0, 0]])
    honest = tempered(log_votes(votes), 2.0)
    assert first.confidence == pytest.approx(honest[0, 0])
    assert second.confidence == pytest.approx(honest[1, 1])
    assert [j.review for j in (first, second, third)] == [True, honest[1, 1] < 0.55, True]
    assert third.answer.text == EVIDENCE.greedy[2].text  # something that was written
    cumulative = Calibration(decision=Decision(rule="cumulative", threshold=0.3))
    assert judge(EVIDENCE, cumulative, LABELS)[0].label == 2


def test_a_label_that_comes_first_has_probabilities_without_any_chain():
    logits = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    judgments = judge(Evidence(logits=logits), Calibration(temperature=1.0), LABELS)
    assert [judgment.label for judgment in judgments] == [0, 2]
    assert judgments[0].answer is None
    assert judgments[0].probabilities == pytest.approx((0.5, 0.3, 0.2))
    assert judgments[1].expected == pytest.approx(1.7)


def test_grades_that_are_words_are_expected_by_their_place():
    words = LabelSet.parse("poor,fair,good")
    logits = np.log(np.array([[0.5, 0.25, 0.25]]))
    (judgment,) = judge(Evidence(logits=logits), Calibration(), words)
    assert (judgment.label, judgment.expected) == ("poor", pytest.approx(0.75))
