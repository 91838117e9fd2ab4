"""Right rollouts kept and imitated where a group teaches nothing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import assert_same_run, config, lines

from she_jax.cot import CotSchema
from she_jax.rollouts import collector as rollouts
from she_jax.rollouts import self_imitation as replay
from she_jax.rollouts.batch import RolloutBatch
from she_jax.rollouts.self_imitation import SelfImitation, fully_correct
from she_jax.runs.run import run
from she_jax.types import Example, StepBatch, TrainBatch

G, P, T, S = 3, 3, 7, 2
END = 9
SCHEMA = CotSchema()


def experience(*groups):
    """Some groups: a prompt's ids, three completions, whether each is right, the advantages."""
    prompts, chains, right, signal = zip(*groups, strict=True)
    rows = G * len(groups)
    tokens, positions = np.zeros((rows, T), np.int32), np.full((rows, T), -1, np.int32)
    weights = np.zeros((rows, T), np.float32)
    for row in range(rows):
        prompt, ids = prompts[row // G], chains[row // G][row % G]
        start, end = P - len(prompt), P + len(ids)
        tokens[row, start:end] = [*prompt, *ids]
        positions[row, start:end] = np.arange(end - start)
        weights[row, P:end] = 1 / len(ids)
    sign = np.reshape([[one, -one, one] for one in signal], (rows, 1))
    outcome = np.reshape(right, rows).astype(np.float32)
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
        figures={},
        examples=[Example(uid=str(n), query="q", product={}, label=1) for n in range(len(groups))],
        texts=[""] * rows,
        chains=[SCHEMA.parse("")] * rows,
        steps=steps,
        outcome=outcome,
        rewards=np.asarray(steps.verifier),
        known=np.ones((rows, S), bool),
        advantages=np.zeros((rows, S)),
        informative=np.array([one != 0 for one in signal]),
    )


ONE = ([1, 2], ([5, END], [6, 6, 6, END], [END]), (True, False, False), 1.0)
TWO = ([4], ([7, 7, END], [8, END], [END]), (True, True, False), 0.5)
ALL = ([4], ([7, 7, END], [8, END], [END]), (True, True, True), 0.5)
NONE = ([4, 4, 4], ([8, END], [END], [7, END]), (False, False, False), 0.5)
SILENT = ([3], ([7, END], [7, END], [7, END]), (True, True, True), 0.0)


def others(count):
    """Groups of one right rollout each, all different."""
    return [
        ([n], ([n, END], [8, END], [END]), (True, False, False), 1.0) for n in range(1, count + 1)
    ]


def made(advantage=0.75, estimator="srpo", seed=0):
    return SelfImitation(config(rl__self_imitation=advantage, rl__estimator=estimator, seed=seed))


@pytest.fixture(autouse=True)
def one_is_enough(monkeypatch):
    monkeypatch.setattr(replay, "FEWEST", 1)


def test_a_silent_group_gives_way_to_what_was_right_before():
    own = made()
    first, figures = own(experience(ONE, SILENT, NONE, ALL), 0)
    assert figures == {"replayed": 0, "replay/kept": 0}
    assert not first.imitation_mask.any()
    # Kept is the right rollout of the group that had wrong ones too.
    assert own.state == [[[1, 2], [[[5, END], [0.5, 0.5]]], 1 / 3]]
    seen = experience(SILENT, NONE)
    batch, figures = own(seen, 1)
    assert figures == {"replayed": 0.5, "replay/kept": 1}
    rows = [[0, 1, 2, 5, END, 0, 0]] * G  # its prompt too, which the rows of a group share
    np.testing.assert_array_equal(batch.tokens[:G], rows)
    np.testing.assert_array_equal(batch.positions[:G], [[-1, 0, 1, 2, 3, -1, -1]] * G)
    np.testing.assert_array_equal(batch.loss_weights[:G], [[0, 0, 0, 0.5, 0.5, 0, 0]] * G)
    np.testing.assert_array_equal(batch.advantages[:G], [[0, 0, 0, 0.75, 0.75, 0, 0]] * G)
    np.testing.assert_array_equal(batch.imitation_mask[:G], np.asarray(batch.loss_weights[:G]) > 0)
    # The other group is as it was, and so is what was handed in.
    for name in ("tokens", "positions", "loss_weights", "advantages"):
        after, before = getattr(batch, name), getattr(seen.batch, name)
        np.testing.assert_array_equal(after[G:], before[G:])
        assert (after.dtype, after.sharding) == (before.dtype, before.sharding)
    assert not batch.imitation_mask[G:].any()
    assert not seen.batch.advantages[:G].any()
    assert (batch.prompt_length, batch.group_size) == (P, G)


def test_several_right_rollouts_take_turns_and_each_chain_counts_once():
    own = made()
    twice = ([1], ([5, END], [5, END], [END]), (True, True, False), 1.0)
    own(experience(TWO, twice), 0)
    assert [(len(chains), share) for _, chains, share in own.state] == [(2, 2 / 3), (1, 2 / 3)]
    own.restore(own.state[:1])
    batch, _ = own(experience(SILENT), 1)
    want = [[7, 7, END, 0], [8, END, 0, 0], [7, 7, END, 0]]
    np.testing.assert_array_equal(batch.tokens[:, P:], want)


def test_rare_right_rollouts_are_shown_more_often():
    """One of three right is drawn twice as often as two of three."""
    own = made()
    own(experience(ONE, TWO), 0)
    batch, _ = own(experience(*[SILENT] * 600), 1)
    shown = np.asarray(batch.tokens[::G, P])
    assert set(shown.tolist()) == {5, 7}
    assert abs((shown == 5).mean() - 2 / 3) < 0.08  # four standard deviations


def test_nothing_is_shown_before_enough_is_kept_and_the_oldest_go(monkeypatch):
    monkeypatch.setattr(replay, "FEWEST", 3)
    monkeypatch.setattr(replay, "MOST", 4)
    own = made()
    batches = [experience(one, SILENT) for one in others(6)]
    shown = [own(seen, step)[1]["replayed"] for step, seen in enumerate(batches)]
    assert shown == [0, 0, 0, 0.5, 0.5, 0.5]
    assert [prompt for prompt, *_ in own.state] == [[3], [4], [5], [6]]


def test_which_are_shown_follows_from_seed_and_step_alone():

    def shown(step, seed=0, through_json=False):
        own = made(seed=seed)
        own(experience(*others(7)), 0)
        state = json.loads(json.dumps(own.state)) if through_json else own.state
        assert state == own.state
        other = made(seed=seed)
        other.restore(state)
        batch, _ = other(experience(*[SILENT] * 8), step)
        return np.asarray(batch.tokens[::G, P - 1]).tolist()

    assert shown(3) == shown(3, through_json=True)
    assert shown(3) != shown(4)
    assert shown(3) != shown(3, seed=1)
    assert len(set(shown(3) + shown(4) + shown(5))) > 3


def test_a_state_that_was_handed_out_stays_as_it_is():
    """A checkpoint's must not change while later updates keep more."""
    own = made()
    own(experience(ONE), 0)
    state = own.state
    before = json.dumps(state)
    own(experience(ONE, TWO), 1)
    assert json.dumps(state) == before


def test_what_counts_as_right():
    seen = experience(TWO)
    wrong_step = np.asarray(seen.steps.verifier).copy()
    wrong_step[0, 0] = 0.5  # of a rollout with the right label
    steps = dataclasses.replace(seen.steps, verifier=jnp.asarray(wrong_step))
    seen = dataclasses.replace(seen, steps=steps, rewards=wrong_step)
    assert fully_correct(seen, True).tolist() == [False, True, False]
    # Who reads no steps must not learn of them this way.
    assert fully_correct(seen, False).tolist() == [True, True, False]
    # Where the verifier is silent, an examiner's word counts if there is one.
    known = np.ones((G, S), bool)
    known[0, 0] = False
    steps = dataclasses.replace(steps, verifier_known=jnp.asarray(known))
    for score, right in ((0.4, False), (0.6, True)):
        rewards = wrong_step.copy()
        rewards[0, 0] = score
        own = dataclasses.replace(seen, steps=steps, rewards=rewards)
        assert fully_correct(own, True).tolist() == [right, True, False]
    silent = dataclasses.replace(seen, steps=steps, known=known)
    assert fully_correct(silent, True).tolist() == [True, True, False]


@pytest.mark.parametrize("estimator", ["srpo", "grpo"])
def test_an_estimator_that_reads_no_steps_keeps_what_the_label_calls_right(estimator):
    seen = experience(TWO)
    steps = dataclasses.replace(seen.steps, verifier=jnp.zeros_like(seen.steps.verifier))
    own = made(estimator=estimator)
    own(dataclasses.replace(seen, steps=steps), 0)
    assert len(own.state) == (estimator == "grpo")


def test_trap_11_a_resumed_run_goes_on_with_what_was_kept(tmp_path, monkeypatch):
    """The rollouts of so small a policy are all wrong, so chance says which are right."""
    whole = rollouts.step_batch

    def by_chance(*args, tokens, **kwargs):
        steps = whole(*args, tokens=tokens, **kwargs)
        right = jnp.asarray(np.asarray(tokens).sum(axis=1) % 3 == 0, jnp.float32)
        verifier = jnp.where(steps.verifier_known, right[:, None], 0.0)
        return dataclasses.replace(steps, verifier=verifier, outcome=right)

    monkeypatch.setattr(rollouts, "step_batch", by_chance)
    recipe = config(
        rl__self_imitation=1.0, rl__estimator="grpo", rl__checkpoint_every=2, rl__eval_every=4
    )
    replayed = SelfImitation.__call__
    run(recipe, tmp_path / "done")
    rows = [row for row in lines(tmp_path / "done") if row["phase"] == "srpo"]
    assert rows[0]["replayed"] == 0
    assert rows[-1]["replayed"] > 0
    kept = [row["replay/kept"] for row in rows]
    assert kept == sorted(kept)
    assert kept[-1] > 0

    def dying(self, seen, step):
        if step == 3:
            raise KeyboardInterrupt
        return replayed(self, seen, step)

    with monkeypatch.context() as patch:
        patch.setattr(SelfImitation, "__call__", dying)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "again")
    run(recipe, tmp_path / "again")
    assert_same_run(tmp_path / "done", tmp_path / "again")


def test_the_batch_is_alike_with_and_without_something_to_show():
    """Else the update would be compiled twice."""
    own = made()
    batches = [own(experience(ONE, SILENT), step)[0] for step in range(2)]
    assert [bool(batch.imitation_mask.any()) for batch in batches] == [False, True]
    shapes = [jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), one) for one in batches]
    assert shapes[0] == shapes[1]
