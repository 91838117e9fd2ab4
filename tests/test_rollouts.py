"""From rewards to the tokens: who counts as wrong."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_run import config

from she_jax.train.rollouts import make_creditor
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
