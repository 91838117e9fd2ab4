"""Advantages: golden values by hand, special cases, invariances, and the errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import random_groups

from she_jax.rl.advantages import (
    CRITICAL,
    grpo_advantages,
    informative_groups,
    srpo_advantages,
    token_advantages,
)
from she_jax.types import Advantages


def test_grpo_by_hand():
    """Rewards 1, 0, 0, 0: mean 1/4, deviation sqrt(3)/4; the second group has equal rewards."""
    outcome = np.array([1, 0, 0, 0, 1, 1, 1, 1], dtype=np.float32)
    steps = np.ones((8, 2), dtype=np.float32)
    got = grpo_advantages(steps, steps > 0, outcome, group_size=4, eps=0.0)
    root = np.sqrt(3)
    want = [root, -1 / root, -1 / root, -1 / root, 0, 0, 0, 0]
    np.testing.assert_allclose(got.outcome, want, rtol=1e-6)
    np.testing.assert_array_equal(got.step, np.zeros((8, 2)))


# One group of four rollouts with four steps. Step 0: all right. Step 1: rollouts 2 and 3 wrong.
# Step 2: of the rollouts that have it (3 does not) only 1 is wrong. Step 3: only 0 is right.
REWARDS = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0.9, 0]], dtype=np.float32)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1]], dtype=bool)
OUTCOME = np.array([1, 0, 0, 0], dtype=np.float32)
R2, R3 = np.sqrt(2), np.sqrt(3)
# Step 1: mean 1/2, deviation 1/2. Step 2: 1, 0, 1: mean 2/3, deviation sqrt(2)/3. Step 3: equal to
# the outcome.
DEVIATIONS = np.array(
    [
        [0, 1, 1 / R2, R3],
        [0, 1, -R2, -1 / R3],
        [0, -1, 1 / R2, -1 / R3],
        [0, -1, 0, -1 / R3],
    ]
)


def test_srpo_by_hand_all():
    got = srpo_advantages(REWARDS, MASK, OUTCOME, group_size=4, critical="all", w_step=2.0, eps=0.0)
    np.testing.assert_allclose(got.step, 2 * DEVIATIONS, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got.outcome, [R3, -1 / R3, -1 / R3, -1 / R3], rtol=1e-6)


def test_srpo_by_hand_first_error():
    """Every step after the first wrong one has weight 1/4, the others weight 1."""
    got = srpo_advantages(
        REWARDS, MASK, OUTCOME, group_size=4, critical="first_error", after_error=0.25, eps=0.0
    )
    weights = np.array([[1, 1, 1, 1], [1, 1, 1, 0.25], [1, 1, 0.25, 0.25], [1, 1, 1, 0.25]])
    np.testing.assert_allclose(got.step, weights * DEVIATIONS, rtol=1e-5, atol=1e-7)


def test_srpo_first_error_skips_a_step_that_no_rollout_has_wrong():
    """Rewards 1 and 0.8 differ, but no rollout is wrong: the step is not critical."""
    rewards = np.array([[1.0], [0.8]], dtype=np.float32)
    outcome = np.zeros(2, dtype=np.float32)
    args = (rewards, np.ones((2, 1), dtype=bool), outcome)
    half = srpo_advantages(*args, group_size=2, correct_from=0.5)
    np.testing.assert_array_equal(half.step, np.zeros((2, 1)))
    strict = srpo_advantages(*args, group_size=2, eps=0.0)
    np.testing.assert_allclose(strict.step, [[1], [-1]], rtol=1e-5)


def test_srpo_passes_the_advantage_of_a_step_without_tokens_to_the_next_written_step():
    """Rollout 1 leaves out step 1, which rollout 0 has right: its step 2 gets the advantage. No
    step follows step 3 of rollout 1, whose advantage is dropped."""
    rewards = np.array([[1, 1, 1, 1], [1, 0, 1, 0]], dtype=np.float32)
    args = (rewards, np.ones((2, 4), dtype=bool), np.zeros(2, dtype=np.float32))
    tokens = np.array([[3, 2, 2, 1], [3, 0, 2, 0]])
    options = {"group_size": 2, "after_error": 0.5, "eps": 0.0}
    got = srpo_advantages(*args, step_tokens=tokens, **options)
    np.testing.assert_allclose(got.step, [[0, 1, 0, 1], [0, 0, -1, 0]], rtol=1e-5)
    all_written = srpo_advantages(*args, step_tokens=np.maximum(tokens, 1), **options)
    plain = srpo_advantages(*args, **options)
    np.testing.assert_array_equal(all_written.step, plain.step)
    np.testing.assert_allclose(plain.step, [[0, 1, 0, 1], [0, -1, 0, -0.5]], rtol=1e-5)


def test_a_step_that_does_not_exist_takes_no_part():
    """Values where the mask is False change nothing, not even NaN."""
    rewards, mask, outcome = random_groups()
    clean = srpo_advantages(rewards, mask, outcome, group_size=4)
    for junk in (np.nan, np.inf, -3.0):
        dirty = np.where(mask, rewards, np.float32(junk))
        got = srpo_advantages(dirty, mask, outcome, group_size=4)
        np.testing.assert_array_equal(got.step, clean.step)
    np.testing.assert_array_equal(np.asarray(clean.step)[~mask], 0)


def test_a_step_that_only_one_rollout_has_gets_no_advantage():
    rewards = np.array([[1.0], [0.0]], dtype=np.float32)
    mask = np.array([[True], [False]])
    got = srpo_advantages(rewards, mask, rewards[:, 0], group_size=2, critical="all")
    np.testing.assert_array_equal(got.step, [[0], [0]])


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1.0])
def test_a_group_without_variance_is_exactly_zero(value):
    """The sum of sixteen times 0.1 is not 1.6 in float32; that is no signal."""
    equal = np.full((16, 3), value, dtype=np.float32)
    got = srpo_advantages(equal, equal >= 0, equal[:, 0], group_size=16, critical="all", eps=0.0)
    assert not np.any(got.outcome)
    assert not np.any(got.step)


def test_srpo_of_one_step_without_outcome_is_grpo_on_its_reward():
    rng = np.random.default_rng(1)
    rewards = rng.random((12, 1)).astype(np.float32)
    mask = np.ones((12, 1), dtype=bool)
    outcome = rng.random(12).astype(np.float32)
    srpo = srpo_advantages(rewards, mask, outcome, group_size=4, critical="all", w_outcome=0.0)
    grpo = grpo_advantages(rewards, mask, rewards[:, 0], group_size=4)
    ids, full = np.zeros((12, 6), dtype=np.int32), np.ones((12, 6), dtype=bool)
    np.testing.assert_allclose(
        token_advantages(srpo, ids, full), token_advantages(grpo, ids, full), rtol=1e-6
    )


@pytest.mark.parametrize("critical", CRITICAL)
def test_without_step_weight_srpo_is_vanilla_grpo(critical):
    rewards, mask, outcome = random_groups()
    srpo = srpo_advantages(rewards, mask, outcome, group_size=4, critical=critical, w_step=0.0)
    grpo = grpo_advantages(rewards, mask, outcome, group_size=4)
    np.testing.assert_array_equal(srpo.outcome, grpo.outcome)
    np.testing.assert_array_equal(srpo.step, grpo.step)


@pytest.mark.parametrize("critical", CRITICAL)
def test_permuting_a_group_permutes_the_result(critical):
    rewards, mask, outcome = random_groups()
    order = np.concatenate([4 * g + np.random.default_rng(g).permutation(4) for g in range(3)])
    plain = srpo_advantages(rewards, mask, outcome, group_size=4, critical=critical)
    moved = srpo_advantages(
        rewards[order], mask[order], outcome[order], group_size=4, critical=critical
    )
    np.testing.assert_allclose(moved.step, np.asarray(plain.step)[order], atol=1e-6)
    np.testing.assert_allclose(moved.outcome, np.asarray(plain.outcome)[order], atol=1e-6)


def test_groups_do_not_affect_each_other():
    rewards, mask, outcome = random_groups()
    together = srpo_advantages(rewards, mask, outcome, group_size=4)
    alone = srpo_advantages(rewards[4:8], mask[4:8], outcome[4:8], group_size=4)
    np.testing.assert_allclose(np.asarray(together.step)[4:8], alone.step, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(together.outcome)[4:8], alone.outcome, rtol=1e-6)


@pytest.mark.parametrize("critical", CRITICAL)
def test_jitted_equals_eager(critical):
    rewards, mask, outcome = random_groups()

    def estimate(rewards, mask, outcome, w_step):
        options = {"group_size": 4, "critical": critical, "w_step": w_step}
        return srpo_advantages(rewards, mask, outcome, **options)

    eager = estimate(rewards, mask, outcome, 0.7)
    jitted = jax.jit(estimate)(rewards, mask, outcome, 0.7)
    np.testing.assert_allclose(jitted.step, eager.step, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jitted.outcome, eager.outcome, rtol=1e-5, atol=1e-6)


def test_token_advantages_by_hand():
    """Outside every step: the outcome part; outside the completion: 0; clipped at 2."""
    advantages = Advantages(
        outcome=jnp.array([0.5, -1.0]), step=jnp.array([[0.25, -1.0, 9.0], [0.0, 1.0, -9.0]])
    )
    ids = np.array([[-1, 0, 1, 2, 2], [0, 0, 1, -1, 2]])
    mask = np.array([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=bool)
    want = [[0.5, 0.75, -0.5, 2.0, 0.0], [0.0, -1.0, 0.0, -1.0, -2.0]]
    np.testing.assert_allclose(token_advantages(advantages, ids, mask), want)
    want = [[0.5, 0.6, -0.5, 0.6, 0.0], [0.0, -0.6, 0.0, -0.6, -0.6]]
    np.testing.assert_allclose(token_advantages(advantages, ids, mask, clip=0.6), want)
    want = [[0.5, 0.75, -0.25, 2.0, 0.0], [0.0, -0.5, 0.0, -0.5, -1.0]]  # of -2, not of -10
    np.testing.assert_allclose(token_advantages(advantages, ids, mask, negative_weight=0.5), want)
    want = [[0.5, 0.75, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]
    np.testing.assert_allclose(token_advantages(advantages, ids, mask, negative_weight=0.0), want)


def test_trap_9_a_shaped_reward_does_not_make_a_group_informative():
    """A length bonus differs between any two rollouts; the verifier's rewards do not."""
    outcome = np.array([0, 0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 1], dtype=np.float32)
    shaped = outcome + 0.01 * np.arange(12, dtype=np.float32)
    assert np.all(shaped.reshape(3, 4).std(axis=1) != 0)
    rewards = np.zeros((12, 2), dtype=np.float32)
    mask = np.ones((12, 2), dtype=bool)
    got = informative_groups(outcome, rewards, mask, group_size=4)
    np.testing.assert_array_equal(got, [False, True, False])


def test_informative_groups_read_steps_and_ignore_tiny_differences():
    outcome = np.full(8, 0.1, dtype=np.float32)
    outcome[0] += 1e-7
    rewards = np.zeros((8, 2), dtype=np.float32)
    rewards[5, 1] = 1
    mask = np.ones((8, 2), dtype=bool)
    known = informative_groups(outcome, rewards, mask, group_size=4)
    np.testing.assert_array_equal(known, [False, True])
    unknown = informative_groups(outcome, rewards, ~mask, group_size=4)
    np.testing.assert_array_equal(unknown, [False, False])


@pytest.mark.parametrize("estimator", [srpo_advantages, grpo_advantages])
def test_errors_name_the_value(estimator):
    rewards, mask, outcome = random_groups()
    with pytest.raises(ValueError, match="group_size=1: the group baseline needs at least 2"):
        estimator(rewards, mask, outcome, group_size=1)
    with pytest.raises(ValueError, match="12 rollouts do not divide into groups of 5"):
        estimator(rewards, mask, outcome, group_size=5)


def test_an_unknown_critical_lists_the_choices():
    rewards, mask, outcome = random_groups()
    with pytest.raises(ValueError, match=r"critical='last': expected one of .*first_error"):
        srpo_advantages(rewards, mask, outcome, group_size=4, critical="last")
