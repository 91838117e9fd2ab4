"""From rollouts to a batch: where rewards come from, which groups are informative, diagnostics."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import config

from she_jax.cot import CotSchema
from she_jax.data.shopworld.builder import World, generate
from she_jax.generate.prompts import tokenizer_corpus, train_tokenizer
from she_jax.models.sharding import make_mesh
from she_jax.rewards.hybrid import RewardSources
from she_jax.rewards.prm.model import StepScores
from she_jax.rewards.verifier import annotation_reward, label_reward
from she_jax.rollouts import collector as collector_module
from she_jax.rollouts.collector import Collector, RolloutConfig
from she_jax.rollouts.diagnostics import credit_diagnostics
from she_jax.runs.config import parse
from she_jax.training.setup import make_language_model
from she_jax.types import Example, Rollout, StepBatch

SCHEMA = CotSchema()
GOOD = "query: mug\nproduct: cup\ncategory: match\nattributes: met\nlabel: 4"
NEAR = GOOD.replace("match", "near")
PAIR = Example(uid="a", query="mug", product={"title": "cup"}, label=4)
WITHOUT_LABEL = Example(uid="b", query="mug", product={"title": "cup"})


@pytest.fixture(scope="module")
def lm():
    """A small language model, its completions long enough for a chain."""
    pairs = list(generate(World(seed=4, pairs=(40, 0, 0, 0), chains="gold"), "train"))
    tokenizer = train_tokenizer(tokenizer_corpus(pairs), 300)
    parsed = parse(config(model__completion_length=96), Path("unused"))
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    return make_language_model(parsed.model, SCHEMA, mesh, tokenizer=tokenizer)[0]


@pytest.fixture
def collect(lm, monkeypatch):
    """Collects rollouts whose completions a test gives, in groups of two."""

    def collect(texts, examples, changes=None, **sources):
        tokens, mask, cut = lm.prompts.encode_chains(texts)
        assert not cut

        def sampler(params, prompts, key, temperature, top_p):
            prompt, real = (np.repeat(array, 2, axis=0) for array in (prompts.tokens, prompts.mask))
            whole = np.concatenate([prompt, tokens], axis=1)
            completion = np.concatenate([np.zeros_like(real), mask], axis=1)
            return Rollout(
                tokens=jnp.asarray(whole),
                prompt_mask=jnp.asarray(np.concatenate([real, np.zeros_like(mask)], axis=1)),
                completion_mask=jnp.asarray(completion),
                logps=jnp.zeros(whole.shape),
            )

        monkeypatch.setattr(collector_module, "jit_sample", lambda *args, **options: sampler)
        small = {"rl__prompts": len(examples), "rl__kl_coef": 0.0}
        parsed = parse(config(**small, **(changes or {})), Path("unused"))
        given = {"step": annotation_reward(SCHEMA), "outcome": label_reward()} | sources
        rewards = RewardSources(**given)
        collector = Collector(lm, None, parsed.rollout, parsed.credit, rewards)
        return collector(None, examples, jax.random.key(0))

    return collect


def no_step_reward(chains, examples):
    shape = len(chains), len(SCHEMA.names)
    return np.zeros(shape, np.float32), np.zeros(shape, bool)


def no_outcome(chains, examples):
    return np.zeros(len(chains), np.float32)


def test_a_users_own_rewards_become_the_advantages_of_their_tokens(collect):
    """In the second step the first rollout is wrong; of the third and on nothing is known."""
    step = SCHEMA.names.index("product")

    def step_reward(chains, examples):
        assert [chain.label for chain in chains] == [4, 4]
        assert [example.uid for example in examples] == ["a", "a"]
        rewards, known = no_step_reward(chains, examples)
        known[:, [0, step]], rewards[:, 0], rewards[1, step] = True, 1.0, 1.0
        return rewards, known

    def outcome(chains, examples):
        return np.array([0.5, 0.0], np.float32)

    rollouts = collect([GOOD, NEAR], [PAIR], step=step_reward, outcome=outcome)
    np.testing.assert_array_equal(rollouts.outcome, [0.5, 0.0])
    np.testing.assert_array_equal(rollouts.rewards[:, :2], [[1, 0], [1, 1]])
    np.testing.assert_array_equal(rollouts.known, [[True, True, False, False, False]] * 2)
    np.testing.assert_allclose(rollouts.advantages[:, 0], [1, -1], rtol=1e-3)
    np.testing.assert_allclose(rollouts.advantages[:, step], [0, 0], atol=1e-3)
    np.testing.assert_allclose(rollouts.advantages[:, 2], [1, -1], rtol=1e-3)
    ids = np.asarray(rollouts.steps.step_ids)
    by_token = np.asarray(rollouts.batch.advantages)
    assert set(ids.ravel().tolist()) == {-1, 0, 1, 2, 3, 4}
    for row, k in np.ndindex(2, 5):
        np.testing.assert_array_equal(by_token[row][ids[row] == k], rollouts.advantages[row, k])
    assert (np.asarray(rollouts.batch.loss_weights) > 0).tolist() == (ids >= 0).tolist()
    assert rollouts.batch.ref_logps is None  # without a KL term nobody reads it
    assert rollouts.metrics["reward"] == 0.25
    assert rollouts.metrics["reward/query"] == 1.0
    assert rollouts.metrics["reward/product"] == 0.5
    assert "reward/category" not in rollouts.metrics


def test_the_verifier_is_what_rewards_annotated_steps(collect):
    example = Example(
        uid="a", query="mug", product={"title": "cup"}, label=4,
        steps={"category": "match", "attributes": "met"}, annotations=("category",),
    )  # fmt: skip
    rollouts = collect([GOOD, NEAR], [example])
    np.testing.assert_array_equal(rollouts.known, [[False, False, True, False, True]] * 2)
    np.testing.assert_array_equal(rollouts.rewards[:, 2], [1, 0])
    np.testing.assert_array_equal(rollouts.outcome, [1, 1])
    np.testing.assert_allclose(rollouts.advantages[:, 2], [1, -1], rtol=1e-3)
    assert rollouts.metrics["paths"] == 2
    assert rollouts.metrics["credit/category"] == 1.0
    assert rollouts.metrics["wrong_sign/category"] == 0.0


@pytest.mark.parametrize("estimator", ["srpo", "grpo"])
def test_a_group_is_informative_if_the_verifier_tells_its_rollouts_apart(collect, estimator):
    """By outcome or, if the estimator reads steps, by a step: more than ``rl.min_std``.

    Outcomes that differ by 0.09 have a standard deviation of 0.045, those by 0.11 of 0.055. The
    last group has a step that is known in one rollout only.
    """

    def step_reward(chains, examples):
        rewards, known = no_step_reward(chains, examples)
        known[:], rewards[:], rewards[4, 1] = True, 1.0, 0.0
        known[6, 1], rewards[6, 1] = False, 0.0
        return rewards, known

    def outcome(chains, examples):
        return np.array([0.0, 0.09, 0.0, 0.11, 1.0, 1.0, 1.0, 1.0], np.float32)

    changes = {"rl__min_std": 0.05, "rl__estimator": estimator}
    sources = {"step": step_reward, "outcome": outcome}
    rollouts = collect([GOOD] * 8, [PAIR] * 4, changes, **sources)
    expected = [False, True, estimator == "srpo", False]
    assert rollouts.informative.tolist() == expected
    np.testing.assert_array_equal((rollouts.advantages != 0).any(axis=1), np.repeat(expected, 2))
    assert rollouts.metrics["zero_variance"] == pytest.approx(1 - np.mean(expected))


class Prm:
    """A process reward model that scores each step by its place in the batch."""

    asked, repeated = 7, 3

    def __init__(self):
        self.steps = []

    def score(self, step_queries, key):
        self.steps += [step_query.step for step_query in step_queries]
        score = np.linspace(0.1, 0.9, len(step_queries)).astype(np.float32)
        return StepScores(score=score, known=np.ones(len(score), bool))


class Orm:
    """An outcome reward model that prefers the second rollout of each group."""

    def score(self, rollout):
        return np.tile(np.array([0.2, 0.7], np.float32), len(rollout.tokens) // 2)


def test_a_process_reward_model_scores_the_steps_that_the_verifier_does_not_know(collect):
    """Its scores make a group without a label informative, and no other."""

    def step_reward(chains, examples):
        rewards, known = no_step_reward(chains, examples)
        known[:, 0], rewards[:, 0] = True, 1.0
        return rewards, known

    prm = Prm()
    sources = {"step": step_reward, "outcome": no_outcome, "prm": prm}
    rollouts = collect([GOOD] * 4, [PAIR, WITHOUT_LABEL], **sources)
    assert prm.steps == [*SCHEMA.names] * 4
    scores = np.linspace(0.1, 0.9, 20).astype(np.float32).reshape(4, 5)
    np.testing.assert_array_equal(rollouts.steps.model_score, scores)
    np.testing.assert_array_equal(rollouts.rewards[:, 1:], scores[:, 1:])
    np.testing.assert_array_equal(rollouts.rewards[:, 0], 1)
    assert rollouts.known.all()
    assert rollouts.informative.tolist() == [False, True]
    assert rollouts.metrics["prm"] == pytest.approx(0.5)
    assert rollouts.metrics["prm/queries"] == 7
    assert rollouts.metrics["prm/repeated"] == 3
    assert rollouts.metrics["prm/unreadable"] == 0
    assert rollouts.metrics["disagreement"] == 0.5  # of the first step two scores are below 1/2


def test_an_outcome_reward_model_takes_the_place_of_the_outcome_in_the_advantages_only(collect):
    sources = {"step": no_step_reward, "outcome": no_outcome, "orm": Orm()}
    rollouts = collect([GOOD] * 4, [PAIR, WITHOUT_LABEL], **sources)
    np.testing.assert_allclose(rollouts.outcome, [0.2, 0.7] * 2)
    np.testing.assert_allclose(rollouts.advantages[:, 0], [-1, 1] * 2, rtol=1e-3)
    assert rollouts.metrics["reward"] == pytest.approx(0.45)
    assert rollouts.metrics["outcome"] == 0
    np.testing.assert_array_equal(rollouts.steps.outcome, 0)  # nor does a rollout count as correct
    assert rollouts.informative.tolist() == [False, True]


def test_the_share_of_credit_with_the_wrong_sign_by_hand():
    """Which steps have an advantage, and which an advantage against the verifier's reward.

    In the first step all rollouts have one, and that of the third, half right, is positive. In the
    second the verifier knows two rollouts, of which a correct one has a negative advantage. In the
    third it knows none. The fourth rollout left two steps out: they have no tokens, and do not
    count.
    """
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
    advantages = np.array([[1.0, -1.0, 5.0], [-1.0, 2.0, 5.0], [0.5, 0.0, 5.0], [3.0, 3.0, 5.0]])
    assert credit_diagnostics(advantages, steps, schema) == {
        "credit/category": 1.0,
        "wrong_sign/category": pytest.approx(1 / 3),
        "credit/attributes": 0.5,
        "wrong_sign/attributes": 0.5,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": 0}, "rl.prompts=0: expected at least 1"),
        ({"temperature": 0.0}, "rl.temperature=0.0: expected a positive"),
        ({"temperature": float("nan")}, "rl.temperature=nan: expected a positive"),
        ({"batch_compactions": -1}, "rl.batch_compactions=-1: expected 0"),
        ({"top_p": 0.9}, "rl.top_p=0.9 narrows the top k"),
        ({"loss_aggregation": "mean"}, "rl.loss_aggregation='mean': expected one of"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**{"prompts": 2, "group_size": 2} | values)
