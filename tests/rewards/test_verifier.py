"""The offline verifier, outcome rewards, batches of steps, and the hybrid reward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from she_jax.cot import CotSchema
from she_jax.rewards.hybrid import COMBINATIONS, combine_rewards
from she_jax.rewards.verifier import (
    annotation_reward,
    label_reward,
    missing_steps,
    outcome_reward,
    step_batch,
    verify,
)
from she_jax.rl.advantages import srpo_advantages
from she_jax.types import Example, StepBatch

SCHEMA = CotSchema()
CHECKS = CotSchema.build(checks=3)
GOLD = {
    "query": "running shoes; red; not leather",
    "product": "trail shoes; navy",
    "category": "near",
    "attributes": "conflict",
}
EXAMPLE = Example(
    uid="1",
    query="red running shoes not leather",
    product={"title": "Navy suede trail shoes"},
    label=2,
    steps=GOLD,
    annotations=("query", "product", "category", "attributes"),
)
RIGHT = """query: running shoes; red; not leather
product: trail shoes; navy
category: running shoes / trail shoes => near
attributes: red / navy conflict => conflict
label: 2"""


def verified(text, example=EXAMPLE, schema=SCHEMA):
    rewards, known = verify(schema.parse(text), example, schema)
    return rewards.round(4).tolist(), known.tolist()


def with_fields(**fields):
    return Example(**({name: getattr(EXAMPLE, name) for name in vars(EXAMPLE)} | fields))


def test_a_correct_chain_earns_every_reward():
    assert verified(RIGHT) == ([1, 1, 1, 1, 1], [True] * 5)


def test_a_wrong_verdict_costs_only_the_reward_of_its_step():
    assert verified(RIGHT.replace("=> near", "=> match"))[0] == [1, 1, 0, 1, 1]
    assert verified(RIGHT.replace("label: 2", "label: 3"))[0] == [1, 1, 1, 1, 0]


def test_an_unreadable_step_earns_zero_and_is_known():
    assert verified(RIGHT.replace("=> near", "=> nearly")) == ([1, 1, 0, 1, 1], [True] * 5)
    assert verified(RIGHT.replace("trail shoes; navy", "")) == ([1, 0, 1, 1, 1], [True] * 5)


def test_a_missing_step_is_not_known():
    text = "\n".join(line for line in RIGHT.split("\n") if not line.startswith("category"))
    assert verified(text) == ([1, 1, 0, 1, 1], [True, True, False, True, True])


def test_only_annotated_steps_are_known():
    """The label is known if the example has one; a step's truth counts only if it is annotated."""
    known = verified(RIGHT, with_fields(annotations=("category",)))
    assert known == ([0, 0, 1, 0, 1], [False, False, True, False, True])
    assert verified(RIGHT, with_fields(annotations=(), label=None))[1] == [False] * 5
    assert verified(RIGHT, with_fields(steps=None))[1] == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("Running Shoes; RED; not leather", 1),  # any case
        ("shoes for running; red; not leather", 2 / 3),  # one missing
        ("running shoes; red; not leather; blue", 3 / 4),  # one too many
        ("running shoes; red", 2 / 3),
        ("running shoes; redder; not leather", 2 / 3),  # whole words only
        ("not leather; running shoes; red", 1),  # in any order
        ("asks for running shoes; red; not leather", 1),  # words before the first item
        ("red, not leather running shoes", 1 / 3),  # one item counts once, whatever it says
        ("running shoes; red; leather", 2 / 3),  # a negation is part of the item
        ("; ;", 0),
        ("boots", 0),
    ],
)
def test_items_of_a_free_text_step(text, reward):
    got, _ = verified(f"query: {text}")
    np.testing.assert_allclose(got[0], reward, atol=1e-4)


def test_a_free_text_step_whose_truth_has_no_items():
    """Any written item is superfluous."""
    empty = with_fields(steps=GOLD | {"query": ""})
    assert verified("query: red", empty)[0][0] == 0
    assert verified("query: ;", empty)[0][0] == 1


def test_items_are_not_read_as_regular_expressions():
    example = with_fields(steps=GOLD | {"query": "c++ (book); 5.5 in."})
    assert verified("query: C++ (book); 5.5 in.", example)[0][0] == 1
    assert verified("query: c (book); 525 in.", example)[0][0] == 0


def test_an_optional_step_beyond_the_true_ones_is_wrong():
    """If all true steps of its family are annotated; otherwise its reward is unknown."""
    extra = RIGHT.replace("attributes:", "check_1: => met\ncheck_3: => met\nattributes:")
    checked = with_fields(
        steps=GOLD | {"check_1": "met"}, annotations=(*EXAMPLE.annotations, "check_1")
    )
    rewards, known = verified(extra, checked, CHECKS)
    assert rewards[3:6] == [1, 0, 0]
    assert known[3:6] == [True, False, True]
    assert verified(extra, EXAMPLE, CHECKS)[1][3:6] == [False, False, False]


@pytest.mark.parametrize(
    ("truth", "annotated", "known"),
    [
        (("check_1", "check_2"), ("check_2",), [False, True, False]),
        (("check_1", "check_2"), ("check_1", "check_2"), [True, True, True]),
        (("check_2",), ("check_2",), [False, True, True]),  # the truth has the second alone
        (("check_1", "check_2"), (), [False, False, False]),
    ],
)
def test_a_check_without_annotation_is_unknown_and_not_superfluous(truth, annotated, known):
    """The third check is in no truth: it is superfluous once the whole family is annotated."""
    names = ("check_1", "check_2", "check_3")
    lines = "".join(f"{name}: => met\n" for name in names)
    chain = RIGHT.replace("attributes:", f"{lines}attributes:")
    pair = with_fields(
        steps=GOLD | dict.fromkeys(truth, "met"), annotations=(*EXAMPLE.annotations, *annotated)
    )
    rewards, mask = verified(chain, pair, CHECKS)
    assert mask[3:6] == known
    assert rewards[3:6] == [float(name in annotated) for name in names]


def test_an_annotated_check_that_a_chain_omits_has_the_reward_0():
    """Otherwise a policy learns to omit the checks that it often gets wrong."""
    text = RIGHT.replace("attributes:", "check_1: => met\nattributes:")
    names = ("check_1", "check_2")
    checked = with_fields(
        steps=GOLD | dict.fromkeys(names, "met"), annotations=(*EXAMPLE.annotations, *names)
    )
    half = with_fields(steps=checked.steps, annotations=(*EXAMPLE.annotations, "check_1"))
    chain = CHECKS.parse(text)
    assert CHECKS.names[3:7] == ("check_1", "check_2", "check_3", "attributes")
    assert missing_steps(chain, checked, CHECKS).tolist() == [k == 4 for k in range(8)]
    assert not missing_steps(chain, half, CHECKS).any()  # the second check is not annotated
    _, known = verify(chain, checked, CHECKS)
    assert not known[4]  # the chain has no such step to credit
    rewards, known = annotation_reward(CHECKS)([chain, chain], [checked, half])
    assert rewards[:, 4].tolist() == [0, 0]
    assert known[:, 4].tolist() == [True, False]
    tokens = np.zeros((2, 3), np.int32)
    steps = step_batch(
        [chain, chain],
        [checked, half],
        annotation_reward(CHECKS),
        label_reward(),
        tokens=tokens,
        completion_mask=tokens == 0,
        newlines=np.zeros(1, np.int32),
    )
    assert steps.step_mask[:, 4].tolist() == steps.verifier_known[:, 4].tolist() == [True, False]
    assert steps.verifier[:, 4].tolist() == [0, 0]
    assert combine_rewards(steps, "verifier_only")[1][:, 4].tolist() == [True, False]


def test_outcome_reward():
    chain = SCHEMA.parse(RIGHT)
    assert outcome_reward(chain, EXAMPLE) == 1
    assert outcome_reward(chain, EXAMPLE, truncated=True) == 0
    assert outcome_reward(chain, with_fields(label=3)) == 0.1
    assert outcome_reward(chain, with_fields(label=3), format_weight=0.3) == 0.3
    assert outcome_reward(chain, with_fields(label=None)) == 0.1
    assert outcome_reward(SCHEMA.parse("label: 2"), EXAMPLE) == 0


def test_label_rewards_of_a_batch_know_which_chains_are_truncated():
    chain = SCHEMA.parse(RIGHT)
    chains = [chain, dataclasses.replace(chain, truncated=True), chain, SCHEMA.parse("label: 2")]
    examples = [EXAMPLE, EXAMPLE, with_fields(label=3), EXAMPLE]
    np.testing.assert_allclose(label_reward()(chains, examples), [1, 0, 0.1, 0], rtol=1e-6)
    np.testing.assert_allclose(label_reward(0.3)(chains, examples), [1, 0, 0.3, 0], rtol=1e-6)


@given(st.text(alphabet="querylabct:;=> \n2nearmet\x00\u202e", max_size=120))
def test_any_text_has_rewards_in_range(text):
    chain = CHECKS.parse(text)
    rewards, known = verify(chain, EXAMPLE, CHECKS)
    assert rewards.shape == known.shape == (8,)
    assert np.all((rewards >= 0) & (rewards <= 1))
    assert not np.any(rewards[~known])
    assert 0 <= outcome_reward(chain, EXAMPLE) <= 1


def characters(text):
    """Tokens of one character each, followed by an end-of-sequence token and padding."""
    tokens = np.zeros(256, dtype=np.int64)
    tokens[: len(text)] = [ord(c) for c in text]
    return tokens, np.arange(256) <= len(text)


def test_step_batch():
    """Two rollouts of one prompt, a correct one and one truncated in its second line."""
    texts = [RIGHT, RIGHT[: RIGHT.index("; navy")]]
    tokens, mask = (np.stack(x) for x in zip(*map(characters, texts), strict=True))
    newlines = np.arange(128) == ord("\n")
    whole, cut = map(SCHEMA.parse, texts)
    batch = step_batch(
        [whole, dataclasses.replace(cut, truncated=True)],
        [EXAMPLE] * 2,
        annotation_reward(SCHEMA),
        label_reward(),
        tokens=tokens,
        completion_mask=mask,
        newlines=newlines.astype(int),
    )
    np.testing.assert_allclose(batch.outcome, [1, 0])
    np.testing.assert_array_equal(batch.step_mask, [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.verifier_known, batch.step_mask)
    np.testing.assert_allclose(batch.verifier, [[1, 1, 1, 1, 1], [1, 0.5, 0, 0, 0]])
    ids = np.asarray(batch.step_ids)
    for row, text in zip(ids, texts, strict=True):
        steps = [k for k, line in enumerate(text.split("\n")) for _ in range(len(line) + 1)]
        np.testing.assert_array_equal(row, steps + [-1] * (256 - len(steps)))


def test_step_batch_takes_any_reward_functions():
    """A step that the function rewards counts as present: here the label that a chain lacks."""
    chains = [SCHEMA.parse(RIGHT), SCHEMA.parse("query: red")]

    def step_reward(chains, examples):
        assert [example.uid for example in examples] == ["1", "2"]
        rewards = np.zeros((2, 5))
        rewards[:, 4] = 0.25, 0.75
        return rewards, np.arange(5) == np.full((2, 1), 4)

    tokens = np.zeros((2, 3), int)
    batch = step_batch(
        chains,
        [EXAMPLE, with_fields(uid="2")],
        step_reward,
        lambda chains, examples: np.array([float(chain.well_formed) / 2 for chain in chains]),
        tokens=tokens,
        completion_mask=tokens == 0,
        newlines=np.zeros(1, int),
    )
    np.testing.assert_array_equal(batch.verifier[:, 4], [0.25, 0.75])
    np.testing.assert_array_equal(batch.verifier_known, [[0, 0, 0, 0, 1]] * 2)
    np.testing.assert_array_equal(batch.step_mask, [[1] * 5, [1, 0, 0, 0, 1]])
    np.testing.assert_array_equal(batch.outcome, [0.5, 0])
    assert not batch.model_known.any()


def test_step_batch_expects_a_chain_and_an_example_per_rollout():
    chain = SCHEMA.parse(RIGHT)
    with pytest.raises(ValueError, match="2 chains, 1 examples, 2 rows of tokens"):
        step_batch(
            [chain] * 2,
            [EXAMPLE],
            annotation_reward(SCHEMA),
            label_reward(),
            tokens=np.zeros((2, 3), dtype=int),
            completion_mask=np.ones((2, 3), dtype=bool),
            newlines=np.zeros(9, dtype=int),
        )


# Known to both sources, to the verifier, to the reward model, to none; the last step is missing.
HYBRID = StepBatch(
    step_ids=jnp.zeros((2, 1), jnp.int32),
    step_mask=jnp.array([[True, True, True, True, False]] * 2),
    verifier=jnp.array([[1.0, 0.5, 9.0, jnp.nan, 1.0]] * 2),
    verifier_known=jnp.array([[True, True, False, False, True]] * 2),
    model_score=jnp.array([[0.2, jnp.nan, 0.75, 9.0, 1.0]] * 2),
    model_known=jnp.array([[True, False, True, False, True]] * 2),
    outcome=jnp.array([1.0, 0.1]),
)


@pytest.mark.parametrize(
    ("how", "rewards", "known", "exact"),
    [
        ("precedence", [1, 0.5, 0.75, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]),
        ("gate", [1, 0.5, 0.75, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]),
        ("verifier_only", [1, 0.5, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]),
        ("model_only", [0.2, 0, 0.75, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]),
    ],
)
def test_combine_rewards(how, rewards, known, exact):
    """By hand; no value of an unknown step comes through, not even NaN."""
    for combine in (combine_rewards, jax.jit(combine_rewards, static_argnums=1)):
        combined, mask, verified_mask = combine(HYBRID, how)
        np.testing.assert_allclose(combined[0], rewards, rtol=1e-6)
        np.testing.assert_array_equal(mask[0], known)
        np.testing.assert_array_equal(verified_mask[0], exact)


def test_the_gate_hides_the_reward_model_where_the_label_is_wrong():
    rewards, known, exact = combine_rewards(HYBRID, "gate")
    np.testing.assert_allclose(rewards[1], [1, 0.5, 0, 0, 0])
    np.testing.assert_array_equal(known[1], [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(exact[1], [1, 1, 0, 0, 0])
    for how in set(COMBINATIONS) - {"gate"}:
        rewards, known, exact = combine_rewards(HYBRID, how)
        for values in (rewards, known, exact):
            np.testing.assert_array_equal(values[0], values[1])


def test_without_a_reward_model_precedence_and_gate_are_the_verifier():
    silent = dataclasses.replace(HYBRID, model_known=jnp.zeros((2, 5), bool))
    expected = combine_rewards(silent, "verifier_only")
    for how in ("precedence", "gate"):
        jax.tree.map(np.testing.assert_array_equal, combine_rewards(silent, how), expected)


def test_an_unknown_step_is_left_out_of_its_groups_statistics():
    """Of three rollouts, one has an unknown step: the other two are compared as if alone."""
    steps = StepBatch(
        step_ids=jnp.zeros((3, 1), jnp.int32),
        step_mask=jnp.ones((3, 1), bool),
        verifier=jnp.zeros((3, 1)),
        verifier_known=jnp.zeros((3, 1), bool),
        model_score=jnp.array([[0.9], [0.1], [0.5]]),
        model_known=jnp.array([[True], [True], [False]]),
        outcome=jnp.zeros(3),
    )
    rewards, known, _ = combine_rewards(steps, "precedence")
    three = srpo_advantages(rewards, known, steps.outcome, group_size=3)
    two = srpo_advantages(rewards[:2], known[:2], steps.outcome[:2], group_size=2)
    np.testing.assert_allclose(three.step[:2], two.step, rtol=1e-6)
    assert three.step[2] == 0


def test_an_unknown_combination_lists_the_choices():
    with pytest.raises(ValueError, match=r"combine='best': expected one of .*precedence"):
        combine_rewards(HYBRID, "best")
