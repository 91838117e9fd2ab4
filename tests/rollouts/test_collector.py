"""From rewards to the tokens: who counts as wrong."""

import jax.numpy as jnp
import numpy as np
import pytest
from recipes import config

from she_jax.cot import CotSchema
from she_jax.rollouts.credit import make_credit_assigner
from she_jax.rollouts.diagnostics import assignment
from she_jax.types import StepBatch

VERIFIER = jnp.array([[1.0, 1.0], [0.5, 1.0]])
MODEL = jnp.array([[1.0, 0.6], [0.5, 1.0]])
VERIFIED = jnp.array([[True, False], [True, False]])
BOTH = jnp.ones((2, 2), bool)


def credited(**changes):
    """By step and by token, of two rollouts with two steps of a token each and no outcome."""
    steps = StepBatch(
        step_ids=jnp.tile(jnp.arange(2), (2, 1)),
        step_mask=BOTH,
        verifier=VERIFIER,
        verifier_known=VERIFIED,
        model_score=MODEL,
        model_known=BOTH,
        outcome=jnp.zeros(2),
    )
    rewards = jnp.where(VERIFIED, VERIFIER, MODEL)
    by_step, by_token, *_ = make_credit_assigner(config(**changes))(
        steps, rewards, BOTH, steps.outcome, BOTH
    )
    return by_step, by_token


@pytest.mark.parametrize(
    ("combine", "critical"), [("precedence", True), ("verifier_only", True), ("mean", False)]
)
def test_what_the_verifier_finds_half_right_is_wrong(combine, critical):
    """One of two asked items misread earns 0.5, and the step counts; a probability of 0.6 is no
    mistake."""
    step, _ = credited(reward__combine=combine)
    assert (step[:, 0] != 0).all() == critical
    if critical:
        np.testing.assert_allclose(step[:, 0], [1, -1], rtol=1e-3)
    np.testing.assert_array_equal(step[:, 1], 0)


def test_what_did_worse_weighs_what_the_config_says():
    for credit in credited(rl__negative_advantage_weight=0.25, rl__advantage_clip=0.8):
        np.testing.assert_allclose(credit, [[0.8, 0], [-0.2, 0]], rtol=1e-3)


@pytest.mark.parametrize(("min_std", "teaches"), [(1e-6, True), (0.05, False)])
def test_what_counts_as_no_difference_teaches_nothing(min_std, teaches):
    """One of two is not well formed, and no label is right: a standard deviation of 0.045."""
    steps = StepBatch(
        step_ids=jnp.tile(jnp.arange(2), (2, 1)),
        step_mask=BOTH,
        verifier=jnp.ones((2, 2)),
        verifier_known=BOTH,
        model_score=MODEL,
        model_known=~BOTH,
        outcome=jnp.array([0.0, 0.09]),
    )
    own = config(rl__min_std=min_std)
    by_step, _, _, informative = make_credit_assigner(own)(
        steps, steps.verifier, BOTH, steps.outcome, BOTH
    )
    assert (by_step != 0).any() == teaches
    assert informative.tolist() == [teaches]


def test_credit_that_goes_astray_by_hand():
    """Of the first step all have credit, and the third rollout's, half right, goes up; of the
    second the verifier knows two, and one of them, right, goes down; of the third it knows none.
    What the fourth rollout left out has no tokens, and counts nowhere."""
    known = jnp.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0]], bool)
    steps = StepBatch(
        step_ids=jnp.array([[0, 1, 2]] * 3 + [[2, 2, -1]]),
        step_mask=jnp.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]], bool),
        verifier=jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]),
        verifier_known=known,
        model_score=jnp.zeros((4, 3)),
        model_known=jnp.zeros((4, 3), bool),
        outcome=jnp.zeros(4),
    )
    schema = CotSchema(steps=CotSchema().steps[2:])
    credit = np.array([[1.0, -1.0, 5.0], [-1.0, 2.0, 5.0], [0.5, 0.0, 5.0], [3.0, 3.0, 5.0]])
    told = assignment(credit, steps, schema)
    assert told == {
        "credit/category": 1.0,
        "astray/category": pytest.approx(1 / 3),
        "credit/attributes": 0.5,
        "astray/attributes": 0.5,
    }
