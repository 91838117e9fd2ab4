"""Groups that teach nothing give way to others: within a bound, counted, the good ones kept."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import config

from she_jax.cot import CotSchema
from she_jax.rollouts.batch import RolloutBatch
from she_jax.rollouts.diagnostics import exploration
from she_jax.rollouts.dynamic_sampling import dynamic_sampling
from she_jax.rollouts.online import OnlineRL
from she_jax.types import Example, Rollout, StepBatch, TrainBatch, TrainState

G, S, T = 2, 5, 3
SCHEMA = CotSchema()


def experience(names, informative):
    """Rollouts of some prompts; every number names its prompt and its rollout."""
    number = np.repeat([float(name) for name in names], G) + np.tile([0.0, 0.5], len(names))
    rows = len(number)
    by_token, by_step = np.tile(number[:, None], T), np.tile(number[:, None], S)
    right = np.repeat(np.asarray(informative), G) & (np.arange(rows) % G == 0)
    steps = StepBatch(
        step_ids=jnp.asarray(by_token, jnp.int32),
        step_mask=jnp.ones((rows, S), bool),
        verifier=jnp.asarray(by_step, jnp.float32),
        verifier_known=jnp.ones((rows, S), bool),
        model_score=jnp.zeros((rows, S)),
        model_known=jnp.zeros((rows, S), bool),
        outcome=jnp.asarray(right, jnp.float32),
    )
    batch = TrainBatch(
        tokens=jnp.asarray(by_token, jnp.int32),
        positions=jnp.asarray(by_token, jnp.int32),
        loss_weights=jnp.asarray(by_token),
        advantages=jnp.asarray(by_token),
        old_logps=jnp.asarray(by_token),
        temperature=jnp.float32(1.0),
        group_size=G,
    )
    return RolloutBatch(
        batch=batch,
        figures={"zero_variance": 1 - float(np.mean(informative)), "time/sample": 1.0, "reward": 0},
        examples=[
            Example(uid=str(name), query="q", product={"title": "t"}, label=1) for name in names
        ],
        texts=[f"{value}" for value in number],
        chains=[SCHEMA.parse(f"label: {int(value) % 4 + 1}") for value in number],
        steps=steps,
        outcome=right.astype(np.float32),
        rewards=by_step,
        known=np.ones((rows, S), bool),
        advantages=by_step,
        informative=np.asarray(informative),
    )


def refill(*batches, rounds):
    """What becomes of batches that come one after the other, and how many were drawn."""
    queue = iter(batches)
    drawn, keys = [], []

    def draw():
        drawn.append(next(queue))
        return drawn[-1].examples

    def collect(params, examples, key):
        keys.append(tuple(np.asarray(key).tolist()))
        return drawn[-1]

    seen = dynamic_sampling(collect, None, draw, jax.random.PRNGKey(0), rounds)
    assert len(set(keys)) == len(keys)
    return seen, len(drawn)


def names(seen):
    return [example.uid for example in seen.examples]


def test_informative_groups_stay_and_the_others_are_replaced():
    first = experience([10, 11, 12, 13], [True, False, True, False])
    second = experience([20, 21, 22, 23], [False, True, False, False])
    third = experience([30, 31, 32, 33], [True, True, True, True])
    seen, drawn = refill(first, second, third, rounds=5)
    assert drawn == 3
    assert names(seen) == ["10", "21", "12", "30"]
    assert seen.informative.all()
    assert seen.figures["zero_variance"] == 0.5  # of the first batch
    assert seen.figures["zero_variance/refilled"] == 0
    assert seen.figures["refills"] == 2
    assert seen.figures["dropped"] == 5  # 11, 13, 20, 22, 23
    assert seen.figures["surplus"] == 3  # 31, 32, 33
    assert seen.figures["time/sample"] == 3  # of all rounds
    # Everything about a rollout moves with it.
    rows = [10, 10.5, 21, 21.5, 12, 12.5, 30, 30.5]
    assert seen.texts == [f"{float(row)}" for row in rows]
    np.testing.assert_array_equal(seen.batch.advantages[:, 0], rows)
    np.testing.assert_array_equal(seen.batch.tokens[:, 0], np.floor(rows))
    np.testing.assert_array_equal(seen.steps.verifier[:, 0], rows)
    np.testing.assert_array_equal(seen.rewards[:, 0], rows)
    assert [chain.label for chain in seen.chains] == [int(row) % 4 + 1 for row in rows]
    assert seen.batch.group_size == G
    assert seen.batch.ref_logps is None


def test_the_bound_holds_and_what_could_not_be_replaced_stays():
    dull = [experience([n, n + 1], [False, False]) for n in (10, 20, 30, 40)]
    seen, drawn = refill(*dull, rounds=2)
    assert drawn == 3
    assert names(seen) == ["10", "11"]
    assert seen.figures["refills"] == 2
    assert seen.figures["dropped"] == 4
    assert seen.figures["surplus"] == 0
    assert seen.figures["zero_variance/refilled"] == 1


@pytest.mark.parametrize("rounds", [0, 3])
def test_no_refill_where_none_is_wanted_or_needed(rounds):
    first = experience([10, 11], [rounds > 0, rounds > 0])
    seen, drawn = refill(first, rounds=rounds)
    assert drawn == 1
    assert names(seen) == ["10", "11"]
    assert ("refills" in seen.figures) == (rounds > 0)


def test_the_pass_rates_of_the_dropped_are_known_too():
    seen, _ = refill(
        experience([10, 11], [True, False]), experience([20, 21], [True, False]), rounds=1
    )
    examples, rates = seen.rates
    told = {example.uid: rate for example, rate in zip(examples, rates, strict=True)}
    assert told == {"10": 0.5, "20": 0.5, "11": 0.0, "21": 0.0}


def test_every_step_samples_with_a_key_of_its_own(tmp_path):
    """The state's key is the same all along, and so may the prompts and the parameters be."""
    seen, own = experience([10, 11], [True, True]), config(rl__prompts=2)
    online: Any = OnlineRL(own, tmp_path, None, None, seen.examples, {}, None)
    keys = []

    def collect(params, examples, key):
        keys.append(tuple(np.asarray(key).tolist()))
        return dataclasses.replace(seen, figures={"sampled_tokens": 1.0})

    online._collect = collect
    state = TrainState(step=jnp.int32(0), params={}, opt_state=(), key=jax.random.PRNGKey(0))
    for step in range(3):
        online.batch(state, step)
    assert len(set(keys)) == 3


def test_prompts_that_nobody_judged_have_no_pass_rate():
    seen = experience([10, 11], [True, True])
    label = [dataclasses.replace(seen.examples[0], label=None), seen.examples[1]]
    examples, rates = dataclasses.replace(seen, examples=label).rates
    assert ([example.uid for example in examples], rates) == (["11"], [0.5])


def test_the_paths_and_the_entropy_of_each_step_by_hand():
    """Two groups of two rollouts; a step's entropy is the mean of -log p over its tokens."""
    texts = ["category: match\nlabel: 4", "category: near\nlabel: 3"] + ["label: 1"] * 2
    chains = [SCHEMA.parse(text) for text in texts]
    ids = np.array([[-1, 2, 4], [-1, 2, 4], [-1, -1, 4], [-1, -1, 4]])
    logps = -np.array([[9, 1, 4], [9, 3, 4], [9, 9, 0], [9, 9, 0]], np.float32)
    mask = np.ones((4, 3), bool)
    rollout = Rollout(tokens=ids, prompt_mask=~mask, completion_mask=mask, logps=logps)
    steps = dataclasses.replace(experience([0, 1], [True, True]).steps, step_ids=ids)
    told = exploration(chains, rollout, steps, SCHEMA, 2)
    assert told == {"paths": 1.5, "entropy/category": 2.0, "entropy/label": 2.0}
