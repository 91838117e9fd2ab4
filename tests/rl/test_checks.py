"""What the core refuses: every message has what was found, what was expected and what to do."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Float

from configs import base
from she_jax.cot import CotSchema
from she_jax.rewards.verifier import label_reward, outcome_reward
from she_jax.rl.advantages import (
    ESTIMATORS,
    clip_advantages,
    informative_groups,
    srpo_advantages,
    token_advantages,
)
from she_jax.rl.checks import checked
from she_jax.rl.logprobs import token_logps
from she_jax.rl.losses import (
    LossConfig,
    dpo_loss,
    loss_denominators,
    policy_loss,
    sft_loss,
    token_weights,
)
from she_jax.rl.steps import step_ids, step_token_counts
from she_jax.rl.update import make_dpo_step
from she_jax.types import Advantages, LMOutput, TrainBatch

REWARDS = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], np.float32)
MASK = np.ones((4, 2), bool)
OUTCOME = np.array([1, 0, 0, 0], np.float32)
CREDIT = Advantages(outcome=jnp.asarray(OUTCOME), step=jnp.asarray(REWARDS))
IDS = np.array([[-1, 0, 1]] * 4)
COMPLETION = IDS >= 0
LOGPS = np.zeros((4, 3), np.float32)
WEIGHTS = COMPLETION.astype(np.float32)
BATCH = TrainBatch(
    tokens=IDS, positions=IDS, loss_weights=WEIGHTS, advantages=LOGPS, old_logps=LOGPS
)
NO_LOGP = jnp.full((4, 3), np.nan)
BEYOND = np.array([[-1, 0, 1]] * 3 + [[-1, 0, 2]])
NAN = np.where(REWARDS == 0, np.float32(np.nan), REWARDS)


def estimate(rewards=REWARDS, mask=MASK, outcome=OUTCOME, group_size=2, **options):
    return lambda: srpo_advantages(rewards, mask, outcome, group_size=group_size, **options)


def with_batch(**fields):
    return lambda: policy_loss(
        jnp.asarray(LOGPS), dataclasses.replace(BATCH, **fields), LossConfig()
    )


def steps_of(line_steps, tokens=IDS[:1]):
    # The tests' check of annotations would come first.
    return inspect.unwrap(step_ids)(tokens, COMPLETION[:1], np.zeros(5, int), line_steps)


REFUSED = {
    "srpo_advantages: step_rewards is a list, expected a numpy or JAX array [B, S]: pass "
    "jnp.asarray(step_rewards)": estimate(REWARDS.tolist()),
    "outcome has shape [3], expected [B] with B=4 (B: rollouts, a row each), as in step_rewards "
    "[4, 2]: pass arrays of the same B": estimate(outcome=OUTCOME[:3]),
    "outcome has shape [4, 1], expected [B] (B: rollouts": estimate(outcome=OUTCOME[:, None]),
    "step_mask has shape [4, 1], expected [B, S] with S=2 (S: steps)": estimate(mask=MASK[:, :1]),
    "step_mask has dtype float32, expected booleans: pass step_mask.astype(bool)": estimate(
        mask=MASK.astype(np.float32)
    ),
    "correct_from has shape [3], expected [] or [B, S]": estimate(correct_from=OUTCOME[:3]),
    "step_tokens is a tuple, expected": estimate(step_tokens=((1, 1),) * 4),
    "step_rewards[1, 1] is nan: expected a number in [0, 1], or a mask or weight of 0 there": (
        estimate(NAN)
    ),
    "step_rewards[1, 1] is -1.0: expected a number in [0, 1]": estimate(2 * REWARDS - 1),
    "step_rewards[0, 0] is 100.0: expected a number in [0, 1]": estimate(100 * REWARDS),
    "step_rewards has shape [4, 0]": estimate(REWARDS[:, :0], MASK[:, :0]),
    "outcome[1] is nan: expected a finite number": estimate(outcome=NAN[:, 1]),
    "after_error=2.0: expected a number in [0, 1]": estimate(after_error=2.0),
    "correct_from=0.0: expected a number in (0, 1]": estimate(correct_from=0.0),
    "correct_from[0, 1] is 0.0: expected": estimate(correct_from=jnp.array([[1.0, 0.0]] * 4)),
    "w_outcome=-1.0: expected a number in [0, inf)": estimate(w_outcome=-1.0),
    "w_step=-1.0: expected": estimate(w_step=-1.0),
    "min_std=-1.0: expected": estimate(min_std=-1.0),
    "eps=-1.0: expected": estimate(eps=-1.0),
    "group_size is 2.0, expected a whole number": estimate(group_size=2.0),
    "expected a whole number, known outside of jit (static_argnames)": lambda: jax.jit(
        srpo_advantages
    )(REWARDS, MASK, OUTCOME, group_size=2),
    "clip=0.0: expected a number in (0, inf]": lambda: clip_advantages(CREDIT.step, clip=0.0),
    "clip=-1.0: expected": lambda: token_advantages(CREDIT, IDS, COMPLETION, clip=-1.0),
    "negative_weight=2.0: expected a number in [0, 1]": lambda: clip_advantages(
        CREDIT.step, negative_weight=2.0
    ),
    "group_size=1: the group baseline needs at least 2": estimate(group_size=1),
    "4 rollouts do not divide into groups of 3": estimate(group_size=3),
    "0 rollouts do not divide": estimate(REWARDS[:0], MASK[:0], OUTCOME[:0]),
    "informative_groups: outcome is a list": lambda: informative_groups(
        OUTCOME.tolist(), REWARDS, MASK, group_size=2
    ),
    "step_ids[3, 2] is 2: expected -1 (outside every step) or 0 to 1, for the 2 steps there are: "
    "number the steps from 0": lambda: token_advantages(CREDIT, BEYOND, COMPLETION),
    "step_ids[0, 0] is -2: expected -1": lambda: token_advantages(CREDIT, IDS - 1, COMPLETION),
    "step_ids has dtype float32, expected integers: pass step_ids.astype(jnp.int32)": lambda: (
        token_advantages(CREDIT, IDS.astype(np.float32), COMPLETION)
    ),
    "completion_mask has shape [4, 2], expected [B, T] with T=3 (T: tokens of a row), as in "
    "step_ids [4, 3]": lambda: token_advantages(CREDIT, IDS, COMPLETION[:, 1:]),
    "advantages.outcome is a list": lambda: token_advantages(
        dataclasses.replace(CREDIT, outcome=[1.0, 0, 0, 0]), IDS, COMPLETION
    ),
    "advantages is an array [4, 2], expected a she_jax.Advantages, which estimators": lambda: (
        token_advantages(REWARDS, IDS, COMPLETION)
    ),
    "clip_advantages: advantages is a list": lambda: clip_advantages([1.0]),
    "step_ids[3, 2] is 2": lambda: step_token_counts(BEYOND, COMPLETION, 2),
    "-2: expected -1 (outside every step) or 0 or more": lambda: token_weights(
        COMPLETION, IDS - 1, "step"
    ),
    "aggregation='tokens': expected one of": lambda: loss_denominators(4, 2, "tokens"),
    "slots=0: expected the maximum": lambda: loss_denominators(4, 0, "constant"),
    "batch.tokens has shape [4, 3], expected [B, T] with T=2": lambda: policy_loss(
        LOGPS[:, 1:], BATCH, LossConfig()
    ),
    "batch.old_logps is a list": lambda: policy_loss(
        LOGPS, dataclasses.replace(BATCH, old_logps=LOGPS.tolist()), LossConfig()
    ),
    "policy_loss: logps is a tuple, expected a numpy or JAX array [B, T]: token_logps returns "
    "(logps, entropy), take [0]": lambda: policy_loss((LOGPS, LOGPS), BATCH, LossConfig()),
    "batch.old_logps is a tuple, expected a numpy or JAX array [B, T]: token_logps": with_batch(
        old_logps=(LOGPS, LOGPS)
    ),
    "batch.advantages is an Advantages, expected a numpy or JAX array [B, T]: pass what "
    "token_advantages": with_batch(advantages=CREDIT),
    "batch.positions is None, expected a numpy or JAX array [B, T]": with_batch(positions=None),
    "batch.old_logps[0, 1] is nan: expected a finite number, or a": with_batch(old_logps=NO_LOGP),
    "batch.ref_logps[0, 1] is nan: expected a finite number": with_batch(ref_logps=NO_LOGP),
    "batch.advantages[0, 1] is nan: expected a finite number": with_batch(advantages=NO_LOGP),
    "batch.temperature=0.0: expected a number in (0, inf)": with_batch(temperature=0.0),
    "config is a dict, expected a she_jax.LossConfig": lambda: policy_loss(LOGPS, BATCH, {}),
    "LossConfig has no kl_coef: it is a field of she_jax.TrainBatch": lambda: LossConfig(
        **{"kl_coef": 0.1}
    ),
    "token ids from 0 to 9, but the logits have 7 entries: expected ids from 0 to 6": lambda: (
        token_logps(jnp.zeros((1, 3, 7)), np.array([[0, 0, 9]]))
    ),
    "temperature=0.0: expected a number in (0, inf)": lambda: token_logps(
        jnp.zeros((1, 3, 7)), np.zeros((1, 3), int), temperature=0.0
    ),
    "line_steps[0] is a Chain, expected a step for each line of the text: pass [chain.line_steps": (
        lambda: steps_of([CotSchema().parse("query: a")])
    ),
    "line_steps[0] is 2, expected a step for each line": lambda: steps_of([2]),
    "step_ids works on the host, beside the text: call it outside of jax.jit": lambda: jax.jit(
        lambda tokens: steps_of([[0]], tokens)
    )(np.zeros((1, 3), int)),
    "sft_loss: weights has shape [4], expected [B, T]": lambda: sft_loss(LOGPS, OUTCOME),
    "rejected has shape [3], expected [M] with M=4 (M: pairs)": lambda: dpo_loss(
        OUTCOME, OUTCOME[:3], OUTCOME, OUTCOME, beta=0.1
    ),
    "tokens has shape [4, 2], expected [B, T] with T=3": lambda: token_logps(
        LMOutput(hidden=jnp.zeros((4, 3, 5)), head=jnp.zeros((5, 7))), IDS[:, 1:]
    ),
    "token ids from 0 to 9, but newlines has 5 entries: expected one for each id": lambda: step_ids(
        np.full((1, 3), 9), np.array([[False, True, True]]), np.zeros(5, int), [[0]]
    ),
    "line_steps has 2 rows and tokens 1": lambda: step_ids(
        np.zeros((1, 3), int), np.ones((1, 3), bool), np.zeros(5, int), [[0], [0]]
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_core_refuses_in_words(message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        REFUSED[message]()
    assert message in str(error.value)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_refuses_lists_and_an_outcome_of_another_length(name):
    with pytest.raises(ValueError, match=f"{name}_advantages: step_mask is a list"):
        ESTIMATORS[name](REWARDS, MASK.tolist(), OUTCOME, group_size=2)
    with pytest.raises(ValueError, match=r"outcome has shape \[2\], expected \[B\] with B=4"):
        ESTIMATORS[name](REWARDS, MASK, OUTCOME[:2], group_size=2)


@pytest.mark.parametrize("name", ["grpo", "rloo", "dr_grpo", "process", "prorag"])
def test_an_estimator_without_a_threshold_takes_rewards_of_any_range(name):
    got = ESTIMATORS[name](20 * REWARDS - 10, MASK, 2 * OUTCOME - 1, group_size=2)
    assert np.isfinite(np.asarray(got.outcome)).all()
    assert np.isfinite(np.asarray(got.step)).all()


def test_srpo_compares_outcomes_of_any_range_within_their_group():
    plain, signed = estimate(eps=0.0)(), estimate(outcome=2 * OUTCOME - 1, eps=0.0)()
    np.testing.assert_allclose(signed.outcome, plain.outcome, rtol=1e-6)


def test_integers_and_booleans_are_read_where_floats_are_expected_and_numbers_for_scalars():
    @checked
    def shape(rewards: Float[np.ndarray, "B S"], weight: Float[jax.Array, ""] = 1.0):
        return rewards.shape

    for dtype in (bool, int, jnp.bfloat16):
        assert shape(REWARDS.astype(dtype), weight=2) == (4, 2)
    with pytest.raises(ValueError, match="rewards has dtype complex64, expected numbers"):
        shape(REWARDS.astype(np.complex64))


def test_shapes_are_checked_while_tracing_and_nothing_is_left_in_the_program():
    def credit(rewards, mask, outcome, ids):
        advantages = srpo_advantages(rewards, mask, outcome, group_size=2)
        return token_advantages(advantages, ids, ids >= 0)

    with pytest.raises(ValueError, match="outcome has shape"):
        jax.eval_shape(credit, REWARDS, MASK, OUTCOME[:3], IDS)
    args = REWARDS, MASK, OUTCOME
    checked, plain = (
        str(jax.make_jaxpr(lambda *args, f=f: f(*args, group_size=2))(*args))
        for f in (srpo_advantages, inspect.unwrap(srpo_advantages))
    )
    assert checked == plain
    # Where the ids are not known, one out of range is outside every step, and not NaN.
    compiled = jax.jit(credit)
    beyond, within = (np.array(compiled(*args, ids)) for ids in (BEYOND, IDS))
    assert beyond[3, 2] == 0  # of the outcome, which is the same in this group
    assert within[3, 2] < -0.4
    beyond[3, 2] = within[3, 2]
    np.testing.assert_array_equal(beyond, within)


def test_the_defaults_of_the_core_are_those_of_the_recipes():
    recipe = base.get_config()
    rl = recipe.rl

    def defaults(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}

    srpo = defaults(srpo_advantages)
    assert {name: srpo[name] for name in rl.srpo} == rl.srpo.to_dict()
    for function in (*ESTIMATORS.values(), informative_groups):
        assert defaults(function)["min_std"] == rl.min_std
    for function in (clip_advantages, token_advantages):
        assert defaults(function)["clip"] == rl.advantage_clip
        assert defaults(function)["negative_weight"] == rl.negative_advantage_weight
    loss, batch = (
        LossConfig(),
        TrainBatch(
            **dict.fromkeys(("tokens", "positions", "loss_weights", "advantages", "old_logps"))
        ),
    )
    assert (loss.clip_low, loss.clip_high) == (rl.loss.clip_low, rl.loss.clip_high)
    assert (batch.kl_coef, batch.temperature) == (rl.kl_coef, rl.temperature)
    assert defaults(token_logps)["temperature"] == rl.temperature
    assert defaults(make_dpo_step)["beta"] == recipe.offline.beta
    for function in (label_reward, outcome_reward):
        assert defaults(function)["format_weight"] == rl.format_weight
