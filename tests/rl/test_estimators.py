"""The estimators beside SRPO and GRPO: golden values by hand, special cases, invariances."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import random_groups

from she_jax.rl.advantages import (
    ESTIMATORS,
    dr_grpo_advantages,
    grpo_advantages,
    process_advantages,
    prorag_advantages,
    rloo_advantages,
    srpo_advantages,
    token_advantages,
)
from she_jax.rl.steps import step_token_counts

NAMES = list(ESTIMATORS)
# Two rollouts of three steps; the last step of the second is not known.
REWARDS = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, np.nan]], dtype=np.float32)
MASK = np.array([[1, 1, 1], [1, 1, 0]], dtype=bool)
OUTCOME = np.array([1.0, 0.0], dtype=np.float32)


def random_tokens(rewards, seed=5):
    return np.random.default_rng(seed).integers(1, 9, rewards.shape)


def estimate(name, rewards, mask, outcome, tokens=None, group_size=4):
    """Both parts of an estimate, as arrays."""
    got = ESTIMATORS[name](rewards, mask, outcome, group_size=group_size, step_tokens=tokens)
    return np.asarray(got.outcome), np.asarray(got.step)


def test_rloo_by_hand():
    """Rewards 1, 0, 0.5: each less the mean of the other two."""
    outcome = np.array([1.0, 0.0, 0.5, 0.1, 0.1, 0.1], dtype=np.float32)
    steps = np.ones((6, 2), dtype=np.float32)
    got = rloo_advantages(steps, steps > 0, outcome, group_size=3)
    np.testing.assert_allclose(got.outcome, [0.75, -0.75, 0, 0, 0, 0], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(got.outcome[3:], np.zeros(3))
    np.testing.assert_array_equal(got.step, np.zeros((6, 2)))


def test_rloo_leaves_one_out():
    """The definition, rollout by rollout."""
    rewards, mask, outcome = random_groups()
    got, _ = estimate("rloo", rewards, mask, outcome)
    for i, reward in enumerate(outcome):
        group = range(4 * (i // 4), 4 * (i // 4) + 4)
        baseline = np.mean([outcome[j] for j in group if j != i])
        np.testing.assert_allclose(got[i], reward - baseline, atol=1e-6)


def test_dr_grpo_by_hand():
    """Half and a quarter of a group correct: no division scales the rare success up."""
    outcome = np.array([1, 1, 0, 0, 1, 0, 0, 0], dtype=np.float32)
    steps = np.ones((8, 2), dtype=np.float32)
    got = dr_grpo_advantages(steps, steps > 0, outcome, group_size=4)
    want = [0.5, 0.5, -0.5, -0.5, 0.75, -0.25, -0.25, -0.25]
    np.testing.assert_allclose(got.outcome, want, rtol=1e-6)
    np.testing.assert_array_equal(got.step, np.zeros((8, 2)))


def test_the_outcome_estimators_differ_by_scale_only():
    rewards, mask, outcome = random_groups()
    centered, leave_one_out, normalized = (
        estimate(name, rewards, mask, outcome)[0] for name in ("dr_grpo", "rloo", "grpo")
    )
    np.testing.assert_allclose(leave_one_out, centered * 4 / 3, rtol=1e-6)
    deviation = np.repeat(outcome.reshape(-1, 4).std(axis=1), 4)
    np.testing.assert_allclose(normalized * (deviation + 1e-4), centered, atol=1e-6)


def test_process_by_hand():
    """Known rewards 1, 0, 1, 0, 1: mean 3/5, deviation sqrt(6)/5, so z is ``up`` or ``down``. The
    advantage is the sum from the last step backwards; the unknown reward adds nothing."""
    got = process_advantages(REWARDS, MASK, OUTCOME, group_size=2, eps=0.0)
    up, down = 2 / np.sqrt(6), -3 / np.sqrt(6)
    want = [[2 * up + down, up + down, up], [up + down, up, 0]]
    np.testing.assert_allclose(got.step, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got.outcome, np.zeros(2))


def test_process_sums_the_steps_that_end_at_or_after_a_token():
    """The definition, token by token; outside every step the advantage is 0."""
    rewards, mask, outcome = random_groups(groups=1)
    sums = np.asarray(process_advantages(rewards, mask, outcome, group_size=4).step)
    z = sums - np.pad(sums, ((0, 0), (0, 1)))[:, 1:]  # what each step adds
    ids = np.array([-1, 0, 0, 1, 2, 2, 3, 4, 4, -1])
    ends = np.array([np.flatnonzero(ids == k)[-1] for k in range(5)])
    got = token_advantages(
        process_advantages(rewards, mask, outcome, group_size=4),
        np.tile(ids, (4, 1)),
        np.ones((4, 10), dtype=bool),
        clip=100.0,
    )
    want = [[z[i, ends >= t].sum() if ids[t] >= 0 else 0 for t in range(10)] for i in range(4)]
    np.testing.assert_allclose(got, want, atol=1e-5)
    known = rewards[mask]
    scores = (rewards - known.mean()) / (known.std() + 1e-4)
    np.testing.assert_allclose(z, np.where(mask, scores, 0), atol=1e-5)


def test_process_with_one_step_is_grpo_on_that_reward():
    rewards = np.random.default_rng(1).random((12, 1)).astype(np.float32)
    mask, outcome = np.ones((12, 1), dtype=bool), np.zeros(12, dtype=np.float32)
    step = process_advantages(rewards, mask, outcome, group_size=4).step
    grpo = grpo_advantages(rewards, mask, rewards[:, 0], group_size=4).outcome
    np.testing.assert_allclose(np.asarray(step)[:, 0], grpo, rtol=1e-6)


def test_prorag_by_hand():
    """Tokens 2, 3, 1 and 1, 1 with the rewards 1, 0, 1 and 0, 1: four of eight tokens have 1.

    So mu = sigma = 1/2, and z is 1 or -1. With equal weights: mean 3/5, deviation sqrt(6)/5.
    """
    tokens = np.array([[2, 3, 1], [1, 1, 50]])
    got = prorag_advantages(REWARDS, MASK, OUTCOME, group_size=2, step_tokens=tokens, eps=0.0)
    want = np.array([[1, -1, 1], [-1, 1, 0]])
    np.testing.assert_allclose(got.step, 0.3 * want, rtol=1e-5)
    np.testing.assert_allclose(got.outcome, [1, -1], rtol=1e-6)
    equal = prorag_advantages(REWARDS, MASK, OUTCOME, group_size=2, w_step=0.5, eps=0.0)
    up, down = 2 / np.sqrt(6), -3 / np.sqrt(6)
    want = [[up / 2, down / 2, up / 2], [down / 2, up / 2, 0]]
    np.testing.assert_allclose(equal.step, want, rtol=1e-5)


def test_prorag_equals_the_statistics_over_tokens():
    """The definition: every token has the reward of its step, and all are normalized together."""
    rewards, mask, outcome = random_groups(groups=1)
    tokens = random_tokens(rewards)
    _, got = estimate("prorag", rewards, mask, outcome, tokens)
    by_token = np.concatenate(
        [np.repeat(rewards[i][mask[i]], tokens[i][mask[i]]) for i in range(4)]
    )
    want = 0.3 * (rewards - by_token.mean()) / (by_token.std() + 1e-4)
    np.testing.assert_allclose(got, np.where(mask, want, 0), atol=1e-5)
    equal = estimate("prorag", rewards, mask, outcome, np.full_like(tokens, 7))[1]
    np.testing.assert_allclose(equal, estimate("prorag", rewards, mask, outcome)[1], rtol=1e-5)


@pytest.mark.parametrize("estimator", [srpo_advantages, prorag_advantages])
def test_without_step_weight_it_is_grpo(estimator):
    rewards, mask, outcome = random_groups()
    got = estimator(rewards, mask, outcome, group_size=4, w_step=0.0)
    grpo = grpo_advantages(rewards, mask, outcome, group_size=4)
    np.testing.assert_array_equal(got.outcome, grpo.outcome)
    np.testing.assert_array_equal(got.step, grpo.step)


def test_all_estimators_share_the_arguments_of_grpo():
    """GRPO has no constants; every estimator takes its arguments, with the same defaults."""

    def arguments(estimator):
        parameters = inspect.signature(estimator).parameters
        return {(name, x.kind, x.default) for name, x in parameters.items()}

    for estimator in ESTIMATORS.values():
        assert arguments(grpo_advantages) <= arguments(estimator)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "prorag"])
def test_the_length_of_a_written_step_matters_to_prorag_only(name):
    rewards, mask, outcome = random_groups()
    tokens = random_tokens(rewards) + 1
    with_tokens = estimate(name, rewards, mask, outcome, tokens)
    for got, want in zip(with_tokens, estimate(name, rewards, mask, outcome), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_does_not_exist_takes_no_part(name):
    """Values where the mask is False change nothing: neither the reward nor the tokens."""
    rewards, mask, outcome = random_groups()
    tokens = random_tokens(rewards)
    clean = estimate(name, rewards, mask, outcome, tokens)
    for junk in (np.nan, np.inf, -3.0):
        dirty = np.where(mask, rewards, np.float32(junk))
        got = estimate(name, dirty, mask, outcome, np.where(mask, tokens, 1000))
        for a, b in zip(got, clean, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1.0])
def test_a_group_without_variance_is_exactly_zero(name, value):
    equal = np.full((16, 3), value, dtype=np.float32)
    got = estimate(name, equal, equal >= 0, equal[:, 0], random_tokens(equal), group_size=16)
    assert not any(np.any(part) for part in got)


@pytest.mark.parametrize("name", NAMES)
def test_without_step_rewards_only_the_outcome_part_is_left(name):
    rewards, mask, outcome = random_groups()
    tokens = random_tokens(rewards)
    outcome_part, steps = estimate(name, rewards, np.zeros_like(mask), outcome, tokens)
    assert not np.any(steps)
    assert np.any(outcome_part) == (name != "process")


@pytest.mark.parametrize("name", NAMES)
def test_permuting_a_group_permutes_the_result(name):
    rewards, mask, outcome = random_groups()
    tokens = random_tokens(rewards)
    order = np.concatenate([4 * g + np.random.default_rng(g).permutation(4) for g in range(3)])
    plain = estimate(name, rewards, mask, outcome, tokens)
    moved = estimate(name, rewards[order], mask[order], outcome[order], tokens[order])
    for a, b in zip(moved, plain, strict=True):
        np.testing.assert_allclose(a, b[order], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_groups_do_not_affect_each_other(name):
    groups = random_groups()
    groups = *groups, random_tokens(groups[0])
    together, alone = estimate(name, *groups), estimate(name, *(x[4:8] for x in groups))
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a[4:8], b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_outcome_part_of_a_group_sums_to_zero(name):
    outcome_part, _ = estimate(name, *random_groups())
    np.testing.assert_allclose(outcome_part.reshape(-1, 4).sum(axis=1), 0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_jitted_equals_eager(name):
    groups = random_groups()
    groups = *groups, random_tokens(groups[0])
    jitted = jax.jit(
        lambda rewards, mask, outcome, tokens: ESTIMATORS[name](
            rewards, mask, outcome, group_size=4, step_tokens=tokens
        )
    )(*groups)
    for a, b in zip((jitted.outcome, jitted.step), estimate(name, *groups), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_errors_name_the_value(name):
    groups = random_groups()
    with pytest.raises(ValueError, match="group_size=1: the group baseline needs at least 2"):
        estimate(name, *groups, group_size=1)
    with pytest.raises(ValueError, match="12 rollouts do not divide into groups of 5"):
        estimate(name, *groups, group_size=5)


def test_step_token_counts_by_hand():
    """Tokens outside every step or the completion do not count; a step may be in two parts."""
    ids = np.array([[0, -1, 0, 0, 2, 0], [1, 1, 1, -1, -1, 1]])
    mask = np.array([[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]], dtype=bool)
    for count in (step_token_counts, jax.jit(step_token_counts, static_argnums=2)):
        np.testing.assert_array_equal(count(ids, mask, 4), [[3, 0, 1, 0], [0, 2, 0, 0]])
