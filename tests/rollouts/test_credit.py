"""Credit assignment: golden values by hand, thresholds, other estimators, the limits."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from recipes import config, random_groups

from she_jax.rewards.hybrid import combine_rewards
from she_jax.rewards.verifier import FULL_REWARD
from she_jax.rl.advantages import ESTIMATORS, clip_advantages, srpo_advantages, token_advantages
from she_jax.rl.steps import step_token_counts
from she_jax.rollouts.credit import CreditConfig, assign_credit, grpo_credit
from she_jax.runs.config import parse
from she_jax.types import Advantages, StepBatch

# One group. Each step is correct in two of four rollouts, and so is the outcome: all deviations
# from the group, divided by its standard deviation, are 1 or -1.
REWARDS = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
OUTCOME = np.array([1, 0, 0, 1], np.float32)
ALL = np.ones((4, 3), bool)
# The prompt, two tokens of the first step, one of each other, one outside of all steps, padding.
STEP_IDS = np.tile(np.array([-1, 0, 0, 1, 2, -1, -1], np.int32), (4, 1))
COMPLETION = np.tile(np.array([0, 1, 1, 1, 1, 1, 0], bool), (4, 1))


def credit_config(**changes):
    """The credit assignment of a recipe."""
    return parse(config(**changes), Path("unused")).credit


def assign(credit, rewards=REWARDS, known=ALL, verified=ALL, outcome=OUTCOME):
    """By step and by token, of the rollouts whose tokens are above."""
    by_step, by_token = assign_credit(
        credit, rewards, known, verified, outcome, STEP_IDS[: len(rewards)], COMPLETION
    )
    return np.asarray(by_step), np.asarray(by_token)


def test_golden_values_of_one_group():
    """A step after the first wrong one has half its weight; that of the outcome is 1 or -1."""
    by_step, by_token = assign(credit_config(rl__group_size=4))
    golden = np.array([[2, 2, 2], [0, -2, -1.5], [-2, -0.5, -1.5], [0, 0.5, 1.5]])
    np.testing.assert_allclose(by_step, golden, rtol=1e-3)
    np.testing.assert_allclose(by_token[:, 1:5], golden[:, [0, 0, 1, 2]], rtol=1e-3)
    np.testing.assert_allclose(by_token[:, 5], [1, -1, -1, 1], rtol=1e-3)
    np.testing.assert_array_equal(by_token[:, [0, 6]], 0)


def test_advantages_are_clipped_and_negative_ones_weigh_what_the_recipe_says():
    credit = credit_config(
        rl__group_size=4, rl__advantage_clip=1.5, rl__negative_advantage_weight=0.5
    )
    by_step, by_token = assign(credit)
    golden = [[1.5, 1.5, 1.5], [0, -0.75, -0.75], [-0.75, -0.25, -0.75], [0, 0.5, 1.5]]
    np.testing.assert_allclose(by_step, golden, rtol=1e-3)
    np.testing.assert_array_equal(by_token[:, 2:5], by_step)
    np.testing.assert_allclose(by_token[:, 5], [1, -0.5, -0.5, 1], rtol=1e-3)


def random_rollouts(groups=3, size=4, steps=5):
    """Rewards of some groups, and tokens that lie in some of the steps, in order."""
    rewards, known, outcome = random_groups(groups, size, steps)
    rng = np.random.default_rng(1)
    step_ids = np.sort(rng.integers(-1, steps, (groups * size, 7)).astype(np.int32), axis=1)
    return rewards, known, outcome, step_ids, rng.random(step_ids.shape) < 0.9


@pytest.mark.parametrize(
    ("credit", "options"),
    [
        (CreditConfig(estimator=srpo_advantages, group_size=4), {}),
        # Half of the verifier's reward is a wrong step.
        (credit_config(rl__group_size=4), {"correct_from": FULL_REWARD}),
        *[
            (credit_config(rl__group_size=4, rl__estimator=name), {})
            for name in ESTIMATORS
            if name != "srpo"
        ],
    ],
)
def test_the_credit_of_a_recipe_is_that_of_its_estimator_called_directly(credit, options):
    rewards, known, outcome, step_ids, completion = random_rollouts()
    by_step, by_token = assign_credit(credit, rewards, known, known, outcome, step_ids, completion)
    sizes = step_token_counts(step_ids, completion, rewards.shape[1])
    expected = credit.estimator(rewards, known, outcome, group_size=4, step_tokens=sizes, **options)
    total = clip_advantages(expected.step + expected.outcome[:, None])
    np.testing.assert_array_equal(by_step, total)
    np.testing.assert_array_equal(by_token, token_advantages(expected, step_ids, completion))
    assert by_token.any()


def test_the_recipe_of_an_estimator_names_the_function():
    for name, estimator in ESTIMATORS.items():
        assert credit_config(rl__estimator=name).estimator is estimator
        assert bool(credit_config(rl__estimator=name).options) == (name == "srpo")


def test_every_estimator_gets_the_same_call():
    calls = []

    def estimator(rewards, known, outcome, **options):
        calls.append(options)
        np.testing.assert_array_equal(rewards, REWARDS)
        np.testing.assert_array_equal(known, ALL)
        np.testing.assert_array_equal(outcome, OUTCOME)
        return Advantages(outcome=jnp.zeros(4), step=jnp.asarray(REWARDS))

    credit = CreditConfig(
        estimator=estimator, group_size=4, options={"w_step": 3.0}, min_std=0.25, advantage_clip=0.5
    )
    by_step, _ = assign(credit)
    sizes = calls[0].pop("step_tokens")
    np.testing.assert_array_equal(sizes, np.tile([2, 1, 1], (4, 1)))
    assert calls == [{"group_size": 4, "min_std": 0.25, "w_step": 3.0}]
    np.testing.assert_array_equal(by_step, 0.5 * REWARDS)


def test_a_threshold_applies_to_the_steps_of_the_verifier_only():
    """Half of an annotated step's items make it a wrong step; a probability of 0.5 does not.

    A probability below 1/2 does.
    """
    rewards = np.array([[1, 1, 1], [0.5, 0.5, 0.4]], np.float32)
    verified = np.array([[True, False, False]] * 2)
    credit = credit_config(rl__srpo__after_error=0.25)
    ids, mask = STEP_IDS[:2], COMPLETION[:2]
    by_step, _ = assign_credit(
        credit, rewards, ALL[:2], verified, np.zeros(2, np.float32), ids, mask
    )
    np.testing.assert_allclose(by_step, [[1, 0, 1], [-1, 0, -0.25]], rtol=2e-3)


VERIFIER = np.array([[1.0, 1.0], [0.5, 1.0]], np.float32)
MODEL = np.array([[1.0, 0.6], [0.5, 1.0]], np.float32)
VERIFIED = np.array([[True, False], [True, False]])


@pytest.mark.parametrize(
    ("combine", "critical"),
    [("precedence", True), ("verifier_only", True), ("model_only", False)],
)
def test_a_step_that_is_half_right_for_the_verifier_is_wrong(combine, critical):
    """With one of two requested items misread the step has the reward 0.5, and is critical.

    A probability of 0.5 or 0.6 of the reward model is no mistake.
    """
    steps = StepBatch(
        step_ids=np.tile(np.arange(2, dtype=np.int32), (2, 1)),
        step_mask=np.ones((2, 2), bool),
        verifier=VERIFIER,
        verifier_known=VERIFIED,
        model_score=MODEL,
        model_known=np.ones((2, 2), bool),
        outcome=np.zeros(2, np.float32),
    )
    by_step, by_token = assign_credit(
        credit_config(),
        *combine_rewards(steps, combine),
        steps.outcome,
        steps.step_ids,
        np.ones((2, 2), bool),
    )
    np.testing.assert_allclose(by_step[:, 0], [1, -1] if critical else [0, 0], rtol=1e-3)
    np.testing.assert_array_equal(by_step[:, 1], 0)
    np.testing.assert_array_equal(by_token, by_step)


@pytest.mark.parametrize(("min_std", "differs"), [(1e-6, True), (0.05, False)])
def test_a_standard_deviation_up_to_min_std_counts_as_none(min_std, differs):
    """Rewards that differ by 0.09 in a group of two have a standard deviation of 0.045."""
    rewards, outcome = np.array([[1, 1, 0], [1, 1, 0.09]], np.float32), np.zeros(2, np.float32)
    credit = credit_config(rl__min_std=min_std)
    for step_rewards, outcomes in ((rewards, outcome), (0 * rewards, rewards[:, 2])):
        by_step, by_token = assign_credit(
            credit, step_rewards, ALL[:2], ~ALL[:2], outcomes, STEP_IDS[:2], COMPLETION[:2]
        )
        assert (by_step != 0).any() == (by_token != 0).any() == differs


@pytest.mark.parametrize(
    "values",
    [
        {"negative_advantage_weight": -0.1},
        {"negative_advantage_weight": 1.1},
        {"negative_advantage_weight": float("nan")},
        {"min_std": -1e-6},
        {"min_std": float("nan")},
    ],
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match=r"expected a weight in \[0, 1\]"):
        CreditConfig(estimator=srpo_advantages, group_size=2, **values)


@pytest.mark.parametrize(
    ("changes", "golden"),
    [
        ({}, [1, -1, -1, 1]),
        ({"rl__advantage_clip": 0.5, "rl__negative_advantage_weight": 0.5}, [0.5, -0.25] * 2),
    ],
)
def test_what_grpo_would_give_has_the_runs_limits(changes, golden):
    outcome = OUTCOME if not changes else np.array([1, 0, 1, 0], np.float32)
    credit = credit_config(rl__group_size=4, **changes)
    np.testing.assert_allclose(grpo_credit(credit, jnp.asarray(outcome)), golden, rtol=1e-3)
