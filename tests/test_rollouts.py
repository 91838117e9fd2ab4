"""From rewards to the tokens: who counts as wrong."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_run import config

from she_jax.cot import CotSchema
from she_jax.train.rollouts import assignment, make_creditor
from she_jax.types import StepBatch


@pytest.mark.parametrize(
    ("combine", "critical"), [("precedence", True), ("verifier_only", True), ("mean", False)]
)
def test_what_the_verifier_finds_half_right_is_wrong(combine, critical):
    """One of two asked items misread earns 0.5, and the step counts; a probability of 0.6 is no
    mistake."""
    verifier = jnp.array([[1.0, 1.0], [0.5, 1.0]])
    model = jnp.array([[1.0, 0.6], [0.5, 1.0]])
    verifier_known = jnp.array([[True, False], [True, False]])
    steps = StepBatch(
        step_ids=jnp.tile(jnp.arange(2), (2, 1)),
        step_mask=jnp.ones((2, 2), bool),
        verifier=verifier,
        verifier_known=verifier_known,
        model_score=model,
        model_known=jnp.ones((2, 2), bool),
        outcome=jnp.zeros(2),
    )
    credit = make_creditor(config(reward__combine=combine))
    rewards = jnp.where(verifier_known, verifier, model)
    known = jnp.ones((2, 2), bool)
    advantages, *_ = credit(steps, rewards, known, steps.outcome, known)
    step = np.asarray(advantages.step)
    assert (step[:, 0] != 0).all() == critical
    if critical:
        np.testing.assert_allclose(step[:, 0], [1, -1], rtol=1e-3)
    np.testing.assert_array_equal(step[:, 1], 0)


def test_credit_that_goes_astray_by_hand():
    """Of the first step all have credit, and the third rollout's, half right, goes up; of the
    second the verifier knows two, and one of them, right, goes down; of the third it knows none."""
    known = jnp.array([[1, 1, 0], [1, 0, 0], [1, 1, 0]], bool)
    steps = StepBatch(
        step_ids=jnp.zeros((3, 1), jnp.int32),
        step_mask=jnp.array([[1, 1, 1], [1, 1, 1], [1, 1, 0]], bool),
        verifier=jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.5, 1.0, 0.0]]),
        verifier_known=known,
        model_score=jnp.zeros((3, 3)),
        model_known=jnp.zeros((3, 3), bool),
        outcome=jnp.zeros(3),
    )
    schema = CotSchema(steps=CotSchema().steps[2:])
    told = assignment(
        np.array([[1.0, -1.0, 5.0], [-1.0, 2.0, 5.0], [0.5, 0.0, 5.0]]), steps, schema
    )
    assert told == {
        "credit/category": 1.0,
        "astray/category": pytest.approx(1 / 3),
        "credit/attributes": 0.5,
        "astray/attributes": 0.5,
    }
