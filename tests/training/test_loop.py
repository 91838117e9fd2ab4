"""The training loop, on a quadratic model: resuming, evaluation, and what ends it."""

import functools
import math
import os
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipes
from recipes import fresh_state

from she_jax.training.checkpoint import Checkpoints
from she_jax.training.logging import MetricsWriter
from she_jax.training.loop import Evaluation, finite, fit, machine
from she_jax.training.stop import StopSignal
from she_jax.types import UserError

STEPS = 6
lines = functools.partial(recipes.lines, explained=False)  # the toy's scalars are its own
OPTIMIZER = optax.adam(0.1)


@functools.partial(jax.jit, donate_argnums=0)
def update(state, target):
    """A step towards a target with noise, so that parameters, moments, step and key all count."""

    def loss(params):
        noise = 0.1 * jax.random.normal(jax.random.fold_in(state.key, state.step), (3,))
        return jnp.mean((params["w"] - target - noise) ** 2)

    value, grads = jax.value_and_grad(loss)(state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), "tokens": target.size}
    state = replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    return state, metrics


class ToySource:
    """Random targets; the position in them is known to the source alone.

    Args:
      fingerprint: of the data.
      due: numbers of updates after which it requests a checkpoint.
      at: what to call while a batch is drawn, by the update's number (from 0).
    """

    title, phase, shown = "toy", "toy", ("loss",)

    def __init__(self, fingerprint="data", due=(), at=None):
        self.fingerprint, self._due, self._at = fingerprint, due, at or {}
        self.position, self.begun, self.ended = 0, [], []

    @property
    def state(self):
        return {"position": self.position}

    def begin(self, state, step):
        self.begun.append((state, step))
        self.position = state["position"] if state else 0

    def batch(self, state, step):
        assert len(self.begun) == 1
        target = self._at[step]() if step in self._at else None
        self.position += 7
        if target is None:
            target = np.random.default_rng(self.position).normal(size=3)
        return jnp.asarray(target, jnp.float32), {"position": self.position}

    def on_step_end(self, step, params, metrics, last):
        assert metrics["position"] == self.position
        self.ended.append((step, last))
        return step in self._due


class Scores:
    """Evaluates to given scores by step, 0 at others; ``steps`` are those of the evaluations."""

    def __init__(self, scores):
        self._scores, self.steps = scores, []

    def __call__(self, params, step):
        self.steps.append(step)
        return {"validation/macro_f1": self._scores.get(step, 0.0), "w": params["w"][0]}


def run(folder, source, steps=STEPS, every=2, evaluate=None, keep=2):
    """What ``fit`` returns, on the host."""
    state = fresh_state({"w": jnp.zeros(3)}, OPTIMIZER)
    checkpoints = Checkpoints(folder / "checkpoints", every=every, keep=keep)
    with StopSignal() as stop, MetricsWriter(folder) as metrics:
        state, host = fit(
            update,
            state,
            source,
            checkpoints,
            metrics,
            steps=steps,
            stop=stop,
            evaluate=evaluate,
        )
        assert metrics.lines == host["lines"] == len(lines(folder))
    return jax.device_get(state), host


def evaluation(function, every=2, patience=0):
    return Evaluation(function=function, every=every, patience=patience)


def saved_steps(folder):
    return Checkpoints(folder / "checkpoints").steps


def best(folder):
    """The step and the parameters of the best checkpoint."""
    template = {"w": jnp.zeros(3)}
    step, params = Checkpoints(folder / "checkpoints").restore_params(template)
    return step, np.asarray(params["w"])


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


def die():
    raise KeyboardInterrupt


SCORES = {0: 0.2, 2: 0.5, 4: 0.4, 6: 0.5}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder, its source, its scores, and what ``fit`` returned."""
    folder, source, scores = tmp_path_factory.mktemp("whole"), ToySource(), Scores(SCORES)
    return folder, source, scores, run(folder, source, evaluate=evaluation(scores), keep=9)


def test_a_run_makes_its_updates_evaluations_and_checkpoints(whole):
    folder, source, scores, (state, host) = whole
    assert source.begun == [(None, 0)]
    assert source.ended == [(step, step == STEPS) for step in range(1, STEPS + 1)]
    assert scores.steps == [0, 2, 4, 6]
    assert saved_steps(folder) == [0, 2, 4, 6]
    rows = lines(folder)
    order = [(row["phase"], row["step"]) for row in rows]
    toy, evals = ([(phase, n) for n in range(STEPS + 1)] for phase in ("toy", "eval"))
    assert order == [evals[0], *toy[1:3], evals[2], *toy[3:5], evals[4], *toy[5:7], evals[6]]
    assert [row["position"] for row in rows if row["phase"] == "toy"] == [7, 14, 21, 28, 35, 42]
    assert int(state.step) == STEPS
    expected = {"lines": 10, "data": "data", "best": 0.5, "stale": 2, "source": {"position": 42}}
    assert host == expected | {"machine": machine()}


@pytest.mark.parametrize(
    ("at", "kind", "resumed_at"),
    [
        pytest.param({0: interrupt}, SystemExit, 1, id="signal in the first update"),
        pytest.param({2: interrupt}, SystemExit, 3, id="signal between checkpoints"),
        pytest.param({5: die}, KeyboardInterrupt, 4, id="killed after a checkpoint"),
        pytest.param({0: die}, KeyboardInterrupt, 0, id="killed in the first update"),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(whole, tmp_path, capsys, at, kind, resumed_at):
    folder, _, _, expected = whole
    with pytest.raises(kind) as stopped:
        run(tmp_path, ToySource(at=at), evaluate=evaluation(Scores(SCORES)))
    if kind is SystemExit:
        assert stopped.value.code == 143
        assert f"SIGTERM: saved toy at step {resumed_at} of {STEPS}" in capsys.readouterr().out
    assert saved_steps(tmp_path)[-1] == resumed_at
    resumed, scores = ToySource(), Scores(SCORES)
    actual = run(tmp_path, resumed, evaluate=evaluation(scores))
    assert resumed.begun == [({"position": 7 * resumed_at}, resumed_at)]
    assert scores.steps == [step for step in (2, 4, 6) if step > resumed_at]
    assert actual[1] == expected[1]
    jax.tree.map(np.testing.assert_array_equal, actual[0], expected[0])
    assert lines(tmp_path) == lines(folder)
    assert best(tmp_path)[0] == best(folder)[0]


def test_a_signal_in_the_last_update_does_not_stop_a_run_that_is_done(tmp_path):
    _, host = run(tmp_path, ToySource(at={STEPS - 1: interrupt}))
    assert host["source"] == {"position": 42}


def test_a_signal_in_the_first_evaluation_is_obeyed_before_any_update(whole, tmp_path):
    source, scores = ToySource(), Scores(SCORES)
    with pytest.raises(SystemExit):
        run(tmp_path, source, evaluate=evaluation(lambda *args: interrupt() or scores(*args)))
    assert (saved_steps(tmp_path), source.ended) == ([0], [])
    run(tmp_path, ToySource(), evaluate=evaluation(scores))
    assert scores.steps == [0, 2, 4, 6], "the first evaluation is not repeated"
    assert lines(tmp_path) == lines(whole[0])


def test_the_source_begins_only_when_updates_are_left(tmp_path):
    state, host = run(tmp_path, ToySource())
    source = ToySource()
    again, host_again = run(tmp_path, source)
    assert (source.begun, source.ended) == ([], [])
    assert host_again == host
    jax.tree.map(np.testing.assert_array_equal, again, state)
    longer = ToySource()
    run(tmp_path, longer, steps=STEPS + 1)
    assert longer.begun == [({"position": 42}, STEPS)]


def test_checkpoints_are_saved_at_their_interval_on_request_and_at_the_end(tmp_path):
    _, host = run(tmp_path, ToySource(due=(2,)), steps=5, every=3, keep=9)
    assert saved_steps(tmp_path) == [2, 3, 5]
    assert host.keys() == {"lines", "data", "machine", "source"}


@pytest.mark.parametrize(
    ("scores", "step"),
    [
        ({0: 0.1, 2: 0.3, 4: 0.5, 5: 0.4}, 4),
        ({0: 0.1, 2: 0.5, 4: 0.5, 5: 0.5}, 2),
        ({0: 0.1, 2: 0.1, 4: 0.1, 5: 0.6}, 5),
        ({0: 0.3, 2: 0.2, 4: 0.3, 5: 0.1}, 0),
    ],
)
def test_the_best_evaluation_is_saved_and_the_first_among_equals(tmp_path, scores, step):
    """Outside the interval of checkpoints, too; the last update is always evaluated."""
    function = Scores(scores)
    _, host = run(tmp_path, ToySource(), steps=5, every=9, evaluate=evaluation(function))
    assert function.steps == list(scores)
    assert host["best"] == scores[step]
    number, w = best(tmp_path)
    assert number == step
    by_step = {row["step"]: row["w"] for row in lines(tmp_path) if row["phase"] == "eval"}
    assert w[0] == np.float32(by_step[step])


@pytest.mark.parametrize(
    ("scores", "ends"),
    [({0: 0.5}, 2), ({0: 0.1, 2: 0.2}, 4), ({0: 0.1, 1: 0.2, 3: 0.3}, 5)],
)
def test_evaluations_without_improvement_end_the_training(tmp_path, scores, ends):
    source, function = ToySource(), Scores(scores)
    evaluate = evaluation(function, every=1, patience=2)
    state, host = run(tmp_path, source, steps=9, every=9, evaluate=evaluate)
    assert source.ended == [(step, step == ends) for step in range(1, ends + 1)]
    assert evaluate.exhausted(host["stale"])
    assert (int(state.step), host["stale"]) == (ends, 2)
    assert best(tmp_path)[0] == max(scores, key=scores.get)
    # The same command again makes no update.
    again = ToySource()
    _, host_again = run(tmp_path, again, steps=9, every=9, evaluate=evaluate)
    assert (again.begun, host_again) == ([], host)
    assert function.steps == list(range(ends + 1))


def test_other_data_are_refused(tmp_path):
    """Of a finished run, too; nothing of the run is touched."""
    with pytest.raises(SystemExit):
        run(tmp_path, ToySource("old", at={2: interrupt}))
    before, other = lines(tmp_path), ToySource("new")
    message = r"the pairs changed since the last checkpoint \(data set old then, new now\)"
    with pytest.raises(UserError, match=message):
        run(tmp_path, other)
    assert (other.begun, lines(tmp_path), saved_steps(tmp_path)) == ([], before, [2, 3])
    run(tmp_path, ToySource("old"))
    with pytest.raises(UserError, match=message):
        run(tmp_path, other)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    source = ToySource(at={3: lambda: [math.nan, 0.0, 0.0]})
    with pytest.raises(UserError, match=r"toy step 4: loss nan.* checkpoint is step 2 in "):
        run(tmp_path, source)
    assert saved_steps(tmp_path) == [2]
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"rl step 8: loss 1\.0, gradient norm inf"):
        finite({"loss": 1, "grad_norm": np.float32("inf")}, "rl", 7, checkpoints)
    numbers = finite({"loss": 1, "grad_norm": jnp.float32(2)}, "rl", 7, checkpoints)
    assert numbers == {"loss": 1.0, "grad_norm": 2.0}


def test_a_resume_on_another_machine_is_said(tmp_path, monkeypatch, capsys):
    run(tmp_path, ToySource(), steps=2)
    monkeypatch.setattr(
        "she_jax.training.loop.machine", lambda: "64 tpu devices with 8 CPU threads"
    )
    run(tmp_path, ToySource(), steps=4)
    said = capsys.readouterr().out
    assert "toy: this run began on 8 cpu devices with " in said
    assert "is resumed on 64 tpu devices with 8 CPU threads: from here on it need not equal" in said
