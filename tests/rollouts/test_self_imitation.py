"""Self-imitation: stored correct rollouts in place of groups without any advantage."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import assert_same_run, config, lines

from she_jax.cot import CotSchema
from she_jax.rollouts import collector, self_imitation
from she_jax.rollouts.batch import RolloutBatch
from she_jax.rollouts.self_imitation import SelfImitation, fully_correct
from she_jax.runs.config import parse
from she_jax.runs.run import run
from she_jax.types import Example, StepBatch, TrainBatch

G, P, T, S = 3, 3, 7, 2
END = 9
SCHEMA = CotSchema()


def make_rollouts(*groups):
    """Groups: token ids of a prompt and of three completions, which are correct, the advantage."""
    prompts, chains, correct, advantages = zip(*groups, strict=True)
    rows = G * len(groups)
    tokens, positions = np.zeros((rows, T), np.int32), np.full((rows, T), -1, np.int32)
    weights = np.zeros((rows, T), np.float32)
    for row in range(rows):
        prompt, ids = prompts[row // G], chains[row // G][row % G]
        start, end = P - len(prompt), P + len(ids)
        tokens[row, start:end] = [*prompt, *ids]
        positions[row, start:end] = np.arange(end - start)
        weights[row, P:end] = 1 / len(ids)
    sign = np.reshape([[value, -value, value] for value in advantages], (rows, 1))
    outcome = np.reshape(correct, rows).astype(np.float32)
    batch = TrainBatch(
        tokens=jnp.asarray(tokens),
        positions=jnp.asarray(positions),
        loss_weights=jnp.asarray(weights),
        advantages=jnp.asarray(sign * (weights > 0), jnp.float32),
        old_logps=jnp.full((rows, T), -1.0),
        ref_logps=jnp.full((rows, T), -2.0),
        prompt_length=P,
        group_size=G,
    )
    steps = StepBatch(
        step_ids=jnp.zeros((rows, T), jnp.int32),
        step_mask=jnp.ones((rows, S), bool),
        verifier=jnp.asarray(np.tile(outcome[:, None], S)),
        verifier_known=jnp.ones((rows, S), bool),
        model_score=jnp.zeros((rows, S)),
        model_known=jnp.zeros((rows, S), bool),
        outcome=jnp.asarray(outcome),
    )
    return RolloutBatch(
        batch=batch,
        metrics={},
        examples=[Example(uid=str(n), query="q", product={}, label=1) for n in range(len(groups))],
        texts=[""] * rows,
        chains=[SCHEMA.parse("")] * rows,
        steps=steps,
        outcome=outcome,
        rewards=np.asarray(steps.verifier),
        known=np.ones((rows, S), bool),
        advantages=np.zeros((rows, S)),
        informative=np.array([value != 0 for value in advantages]),
    )


RARE = ([1, 2], ([5, END], [6, 6, 6, END], [END]), (True, False, False), 1.0)
COMMON = ([4], ([7, 7, END], [8, END], [END]), (True, True, False), 0.5)
ALL = ([4], ([7, 7, END], [8, END], [END]), (True, True, True), 0.5)
NONE = ([4, 4, 4], ([8, END], [END], [7, END]), (False, False, False), 0.5)
SILENT = ([3], ([7, END], [7, END], [7, END]), (True, True, True), 0.0)


def distinct(count):
    """Groups of one correct rollout each, all different."""
    return [
        ([n], ([n, END], [8, END], [END]), (True, False, False), 1.0) for n in range(1, count + 1)
    ]


def make_imitation(seed=0, stepwise=True):
    return SelfImitation(0.75, seed, stepwise=stepwise)


@pytest.fixture(autouse=True)
def one_group_is_enough(monkeypatch):
    monkeypatch.setattr(self_imitation, "FEWEST", 1)


def test_a_group_without_any_advantage_is_replaced_by_a_stored_one():
    imitation = make_imitation()
    first, metrics = imitation(make_rollouts(RARE, SILENT, NONE, ALL), 0)
    assert metrics == {"self_imitation/share": 0, "self_imitation/stored": 0}
    assert not first.imitation_mask.any()
    # Stored is the correct rollout of the group that had wrong ones too.
    assert imitation.state == [[[1, 2], [[[5, END], [0.5, 0.5]]], 1 / 3]]
    rollouts = make_rollouts(SILENT, NONE)
    batch, metrics = imitation(rollouts, 1)
    assert metrics == {"self_imitation/share": 0.5, "self_imitation/stored": 1}
    rows = [[0, 1, 2, 5, END, 0, 0]] * G  # with its prompt, which the rows of a group share
    np.testing.assert_array_equal(batch.tokens[:G], rows)
    np.testing.assert_array_equal(batch.positions[:G], [[-1, 0, 1, 2, 3, -1, -1]] * G)
    np.testing.assert_array_equal(batch.loss_weights[:G], [[0, 0, 0, 0.5, 0.5, 0, 0]] * G)
    np.testing.assert_array_equal(batch.advantages[:G], [[0, 0, 0, 0.75, 0.75, 0, 0]] * G)
    np.testing.assert_array_equal(batch.imitation_mask[:G], np.asarray(batch.loss_weights[:G]) > 0)
    # The other group is as it was, and so is the batch that was passed.
    for name in ("tokens", "positions", "loss_weights", "advantages"):
        after, before = getattr(batch, name), getattr(rollouts.batch, name)
        np.testing.assert_array_equal(after[G:], before[G:])
        assert (after.dtype, after.sharding) == (before.dtype, before.sharding)
    assert not batch.imitation_mask[G:].any()
    assert not rollouts.batch.advantages[:G].any()
    assert (batch.prompt_length, batch.group_size) == (P, G)


def test_several_correct_rollouts_take_turns_and_each_chain_counts_once():
    imitation = make_imitation()
    twice = ([1], ([5, END], [5, END], [END]), (True, True, False), 1.0)
    imitation(make_rollouts(COMMON, twice), 0)
    sizes = [(len(chains), share) for _, chains, share in imitation.state]
    assert sizes == [(2, 2 / 3), (1, 2 / 3)]
    imitation.restore(imitation.state[:1])
    batch, _ = imitation(make_rollouts(SILENT), 1)
    expected = [[7, 7, END, 0], [8, END, 0, 0], [7, 7, END, 0]]
    np.testing.assert_array_equal(batch.tokens[:, P:], expected)


def test_rare_correct_rollouts_are_imitated_more_often():
    """A group with one correct rollout of three is drawn twice as often as one with two."""
    imitation = make_imitation()
    imitation(make_rollouts(RARE, COMMON), 0)
    batch, _ = imitation(make_rollouts(*[SILENT] * 600), 1)
    drawn = np.asarray(batch.tokens[::G, P])
    assert set(drawn.tolist()) == {5, 7}
    assert abs((drawn == 5).mean() - 2 / 3) < 0.08  # four standard deviations


def test_no_group_is_replaced_before_enough_are_stored_and_the_oldest_are_dropped(monkeypatch):
    monkeypatch.setattr(self_imitation, "FEWEST", 3)
    monkeypatch.setattr(self_imitation, "MOST", 4)
    imitation = make_imitation()
    batches = [make_rollouts(group, SILENT) for group in distinct(6)]
    metrics = [imitation(rollouts, step)[1] for step, rollouts in enumerate(batches)]
    assert [values["self_imitation/share"] for values in metrics] == [0, 0, 0, 0.5, 0.5, 0.5]
    assert [prompt for prompt, *_ in imitation.state] == [[3], [4], [5], [6]]


def test_the_draw_is_a_function_of_seed_step_and_state():
    def drawn(step, seed=0, through_json=False):
        imitation = make_imitation(seed=seed)
        imitation(make_rollouts(*distinct(7)), 0)
        state = json.loads(json.dumps(imitation.state)) if through_json else imitation.state
        assert state == imitation.state
        restored = make_imitation(seed=seed)
        restored.restore(state)
        batch, _ = restored(make_rollouts(*[SILENT] * 8), step)
        return np.asarray(batch.tokens[::G, P - 1]).tolist()

    assert drawn(3) == drawn(3, through_json=True)
    assert drawn(3) != drawn(4)
    assert drawn(3) != drawn(3, seed=1)
    assert len(set(drawn(3) + drawn(4) + drawn(5))) > 3


def test_later_updates_leave_an_earlier_state_as_it_was():
    """It may be part of a checkpoint that is being written."""
    imitation = make_imitation()
    imitation(make_rollouts(RARE), 0)
    state = imitation.state
    before = json.dumps(state)
    imitation(make_rollouts(RARE, COMMON), 1)
    assert json.dumps(state) == before


def test_which_rollouts_are_fully_correct():
    rollouts = make_rollouts(COMMON)
    wrong_step = np.asarray(rollouts.steps.verifier).copy()
    wrong_step[0, 0] = 0.5  # of a rollout with the correct label
    steps = dataclasses.replace(rollouts.steps, verifier=jnp.asarray(wrong_step))
    rollouts = dataclasses.replace(rollouts, steps=steps, rewards=wrong_step)
    assert fully_correct(rollouts, True).tolist() == [False, True, False]
    # An estimator that reads no steps must not learn of them this way.
    assert fully_correct(rollouts, False).tolist() == [True, True, False]
    # Where the verifier does not know the step, a reward model's score counts if there is one.
    known = np.ones((G, S), bool)
    known[0, 0] = False
    steps = dataclasses.replace(steps, verifier_known=jnp.asarray(known))
    for score, correct in ((0.4, False), (0.6, True)):
        rewards = wrong_step.copy()
        rewards[0, 0] = score
        scored = dataclasses.replace(rollouts, steps=steps, rewards=rewards)
        assert fully_correct(scored, True).tolist() == [correct, True, False]
    unscored = dataclasses.replace(rollouts, steps=steps, known=known)
    assert fully_correct(unscored, True).tolist() == [True, True, False]


@pytest.mark.parametrize("estimator", ["srpo", "grpo"])
def test_an_estimator_that_reads_no_steps_stores_rollouts_with_the_correct_label(estimator):
    parsed = parse(config(rl__estimator=estimator), Path("unused"))
    rollouts = make_rollouts(COMMON)
    steps = rollouts.steps
    steps = dataclasses.replace(steps, verifier=jnp.zeros_like(steps.verifier))
    imitation = make_imitation(stepwise=parsed.rollout.stepwise)
    imitation(dataclasses.replace(rollouts, steps=steps), 0)
    assert len(imitation.state) == (estimator == "grpo")


@pytest.mark.slow
def test_trap_11_a_resumed_run_imitates_what_was_stored_before(policy, tmp_path, monkeypatch):
    """The rollouts of so small a policy are all wrong, so here chance decides which are correct."""
    step_batch = collector.step_batch

    def by_chance(*args, tokens, **kwargs):
        steps = step_batch(*args, tokens=tokens, **kwargs)
        correct = jnp.asarray(np.asarray(tokens).sum(axis=1) % 3 == 0, jnp.float32)
        verifier = jnp.where(steps.verifier_known, correct[:, None], 0.0)
        return dataclasses.replace(steps, verifier=verifier, outcome=correct)

    monkeypatch.setattr(collector, "step_batch", by_chance)
    recipe = config(
        init_from=str(policy / "checkpoints" / "sft"),
        eval__pass_k=0,
        rl__self_imitation=1.0,
        rl__estimator="grpo",
        rl__checkpoint_every=2,
        rl__eval_every=4,
    )
    call = SelfImitation.__call__
    run(recipe, tmp_path / "done")
    rows = [row for row in lines(tmp_path / "done") if row["phase"] == "rl"]
    assert rows[0]["self_imitation/share"] == 0
    assert rows[-1]["self_imitation/share"] > 0
    stored = [row["self_imitation/stored"] for row in rows]
    assert stored == sorted(stored)
    assert stored[-1] > 0

    def dying(self, rollouts, step):
        if step == 3:
            raise KeyboardInterrupt
        return call(self, rollouts, step)

    with monkeypatch.context() as patch:
        patch.setattr(SelfImitation, "__call__", dying)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "again")
    run(recipe, tmp_path / "again")
    assert_same_run(tmp_path / "done", tmp_path / "again")


def test_the_batch_has_the_same_shapes_with_and_without_imitation():
    """Else the update would be compiled twice."""
    imitation = make_imitation()
    batches = [imitation(make_rollouts(RARE, SILENT), step)[0] for step in range(2)]
    assert [bool(batch.imitation_mask.any()) for batch in batches] == [False, True]
    shapes = [jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), b) for b in batches]
    assert shapes[0] == shapes[1]
