"""Dynamic sampling: uninformative groups are replaced within a bound, informative ones stay."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import config

from she_jax.cot import CotSchema
from she_jax.rollouts.batch import RolloutBatch
from she_jax.rollouts.diagnostics import exploration
from she_jax.rollouts.dynamic_sampling import dynamic_sampling
from she_jax.rollouts.online import OnlineParts, OnlineRL
from she_jax.runs.config import parse
from she_jax.types import Example, Rollout, StepBatch, TrainBatch, TrainState

G, S, T = 2, 5, 3
SCHEMA = CotSchema()


def make_rollouts(names, informative):
    """Rollouts of some prompts; every number names its prompt and its rollout."""
    number = np.repeat([float(name) for name in names], G) + np.tile([0.0, 0.5], len(names))
    rows = len(number)
    by_token, by_step = np.tile(number[:, None], T), np.tile(number[:, None], S)
    correct = np.repeat(np.asarray(informative), G) & (np.arange(rows) % G == 0)
    steps = StepBatch(
        step_ids=jnp.asarray(by_token, jnp.int32),
        step_mask=jnp.ones((rows, S), bool),
        verifier=jnp.asarray(by_step, jnp.float32),
        verifier_known=jnp.ones((rows, S), bool),
        model_score=jnp.zeros((rows, S)),
        model_known=jnp.zeros((rows, S), bool),
        outcome=jnp.asarray(correct, jnp.float32),
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
        metrics={"zero_variance": 1 - float(np.mean(informative)), "time/sample": 1.0, "reward": 0},
        examples=[
            Example(uid=str(name), query="q", product={"title": "t"}, label=1) for name in names
        ],
        texts=[f"{value}" for value in number],
        chains=[SCHEMA.parse(f"label: {int(value) % 4 + 1}") for value in number],
        steps=steps,
        outcome=correct.astype(np.float32),
        rewards=by_step,
        known=np.ones((rows, S), bool),
        advantages=by_step,
        informative=np.asarray(informative),
    )


def sample_dynamically(*batches, rounds):
    """The rollouts of batches that are collected one after the other, and how many were drawn."""
    queue = iter(batches)
    drawn, keys = [], []

    def draw():
        drawn.append(next(queue))
        return drawn[-1].examples

    def collect(params, examples, key):
        keys.append(tuple(np.asarray(key).tolist()))
        return drawn[-1]

    rollouts = dynamic_sampling(collect, None, draw, jax.random.PRNGKey(0), rounds)
    assert len(set(keys)) == len(keys)
    return rollouts, len(drawn)


def names(rollouts):
    return [example.uid for example in rollouts.examples]


def test_informative_groups_stay_and_the_others_are_replaced():
    first = make_rollouts([10, 11, 12, 13], [True, False, True, False])
    second = make_rollouts([20, 21, 22, 23], [False, True, False, False])
    third = make_rollouts([30, 31, 32, 33], [True, True, True, True])
    rollouts, drawn = sample_dynamically(first, second, third, rounds=5)
    assert drawn == 3
    assert names(rollouts) == ["10", "21", "12", "30"]
    assert rollouts.informative.all()
    assert rollouts.metrics["zero_variance"] == 0.5  # of the first batch
    assert rollouts.metrics["dynamic_sampling/zero_variance"] == 0
    assert rollouts.metrics["dynamic_sampling/rounds"] == 2
    assert rollouts.metrics["dynamic_sampling/dropped"] == 5  # 11, 13, 20, 22, 23
    assert rollouts.metrics["dynamic_sampling/surplus"] == 3  # 31, 32, 33
    assert rollouts.metrics["time/sample"] == 3  # of all rounds
    # Everything about a rollout moves with it.
    rows = [10, 10.5, 21, 21.5, 12, 12.5, 30, 30.5]
    assert rollouts.texts == [f"{float(row)}" for row in rows]
    np.testing.assert_array_equal(rollouts.batch.advantages[:, 0], rows)
    np.testing.assert_array_equal(rollouts.batch.tokens[:, 0], np.floor(rows))
    np.testing.assert_array_equal(rollouts.steps.verifier[:, 0], rows)
    np.testing.assert_array_equal(rollouts.rewards[:, 0], rows)
    np.testing.assert_array_equal(rollouts.advantages[:, 0], rows)
    assert [chain.label for chain in rollouts.chains] == [int(row) % 4 + 1 for row in rows]
    assert rollouts.batch.group_size == G
    assert rollouts.batch.ref_logps is None


def test_the_bound_holds_and_groups_without_a_replacement_stay():
    uninformative = [make_rollouts([n, n + 1], [False, False]) for n in (10, 20, 30, 40)]
    rollouts, drawn = sample_dynamically(*uninformative, rounds=2)
    assert drawn == 3
    assert names(rollouts) == ["10", "11"]
    assert rollouts.metrics["dynamic_sampling/rounds"] == 2
    assert rollouts.metrics["dynamic_sampling/dropped"] == 4
    assert rollouts.metrics["dynamic_sampling/surplus"] == 0
    assert rollouts.metrics["dynamic_sampling/zero_variance"] == 1


@pytest.mark.parametrize("rounds", [0, 3])
def test_no_further_batch_is_drawn_without_rounds_or_need(rounds):
    first = make_rollouts([10, 11], [rounds > 0, rounds > 0])
    rollouts, drawn = sample_dynamically(first, rounds=rounds)
    assert drawn == 1
    assert names(rollouts) == ["10", "11"]
    assert ("dynamic_sampling/rounds" in rollouts.metrics) == (rounds > 0)


def test_the_pass_rates_of_dropped_groups_are_known_too():
    rollouts, _ = sample_dynamically(
        make_rollouts([10, 11], [True, False]), make_rollouts([20, 21], [True, False]), rounds=1
    )
    examples, rates = rollouts.rates
    by_uid = {example.uid: rate for example, rate in zip(examples, rates, strict=True)}
    assert by_uid == {"10": 0.5, "20": 0.5, "11": 0.0, "21": 0.0}


def test_every_update_samples_with_another_key(tmp_path):
    """The key of the state never changes, and prompts and parameters may be the same too."""
    rollouts = make_rollouts([10, 11], [True, True])
    parsed = parse(config(rl__prompts=2), Path("unused"))
    keys = []

    def collect(params, examples, key):
        keys.append(tuple(np.asarray(key).tolist()))
        return dataclasses.replace(rollouts, metrics={"sampled_tokens": 1.0})

    def build(step):
        return OnlineParts(pool=parsed.prompts.pool(rollouts.examples, {}), collector=collect)

    source = OnlineRL(build, parsed.online, tmp_path, title="SRPO", fingerprint="data")
    source.begin(None, 0)
    state = TrainState(step=jnp.int32(0), params={}, opt_state=(), key=jax.random.PRNGKey(0))
    for step in range(3):
        source.batch(state, step)
    assert len(set(keys)) == 3
    assert source.state["sampled_tokens"] == 3


def test_prompts_without_a_label_have_no_pass_rate():
    rollouts = make_rollouts([10, 11], [True, True])
    examples = [dataclasses.replace(rollouts.examples[0], label=None), rollouts.examples[1]]
    labeled, rates = dataclasses.replace(rollouts, examples=examples).rates
    assert ([example.uid for example in labeled], rates) == (["11"], [0.5])


def test_the_paths_and_the_entropy_of_each_step_by_hand():
    """Two groups of two rollouts; a step's entropy is the mean of -log p over its tokens."""
    texts = ["category: match\nlabel: 4", "category: near\nlabel: 3"] + ["label: 1"] * 2
    chains = [SCHEMA.parse(text) for text in texts]
    ids = np.array([[-1, 2, 4], [-1, 2, 4], [-1, -1, 4], [-1, -1, 4]])
    logps = -np.array([[9, 1, 4], [9, 3, 4], [9, 9, 0], [9, 9, 0]], np.float32)
    mask = np.ones((4, 3), bool)
    rollout = Rollout(tokens=ids, prompt_mask=~mask, completion_mask=mask, logps=logps)
    steps = dataclasses.replace(make_rollouts([0, 1], [True, True]).steps, step_ids=ids)
    metrics = exploration(chains, rollout, steps, SCHEMA, 2)
    assert metrics == {"paths": 1.5, "entropy/category": 2.0, "entropy/label": 2.0}
