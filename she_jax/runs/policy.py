"""What comes after the cold start: updates, judged as they go, the best of them kept."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from she_jax.data.dataset import Prepared
from she_jax.rl.losses import LossConfig
from she_jax.rl.update import jit_update_step, make_dpo_step, make_sft_step, make_update_step
from she_jax.training.checkpoint import Checkpoints
from she_jax.runs.validate import check_data, fingerprint, finite
from she_jax.evaluation.evaluate import judge_before, judge_validation, judged
from she_jax.training.logging import MetricsWriter, Progress, say
from she_jax.generate.generator import Judge
from she_jax.training.setup import Policy, make_optimizer
from she_jax.training.sft import leave, new_state
from she_jax.training.stop import StopSignal
from she_jax.training.workdir import Config
from she_jax.types import TrainState


class Lessons(Protocol):
    """What a policy learns from: its own rollouts (``online``), or chains kept (``offline``)."""

    title: str  # of the work, for the screen
    shown: tuple[str, ...]  # figures of an update that the screen shows

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON can: ``sampled_tokens`` so far is always there."""
        ...

    def begin(self, state: Mapping[str, Any], start: int) -> None:
        """Makes ready for update ``start``, from the state a checkpoint kept."""
        ...

    def batch(self, state: TrainState, step: int) -> tuple[Any, dict[str, float]]:
        """What update ``step`` reads, and figures about it."""
        ...

    def after(self, step: int, params: Any, figures: Mapping[str, float], last: bool) -> bool:
        """Takes note of ``step`` updates being done; says whether a checkpoint is due."""
        ...


def learn(
    config: Config,
    workdir: Path,
    policy: Policy,
    reference: Any,
    lines: int,
    made: Prepared,
    make_lessons: Callable[[Judge], Lessons],
    stop: StopSignal,
) -> tuple[dict[str, Any], Any]:
    """Updates the policy ``rl.steps`` times, or goes on where an earlier run stopped.

    Args:
      reference: the cold start's parameters, where the policy starts and what KL holds it to.
      lines: lines of ``metrics.jsonl`` by then.
      make_lessons: makes what the policy learns from, given who asks it.

    Returns:
      The figures for ``summary.json``, and the parameters that did best on the validation split.
    """
    rl = config.rl
    judge = Judge(policy, config.eval.batch_size)
    before = judge_before(config, workdir, judge, reference, made)
    if not rl.steps:
        judge_validation(config, workdir, judge, reference, made, 0)  # for runs that start here
        return before | {"before": before}, reference
    optimizer = make_optimizer(rl)
    # A copy, since the update is given its state for good and the reference must stay.
    start_policy = Policy(**vars(policy) | {"params": jax.tree.map(jnp.copy, reference)})
    state = new_state(start_policy, optimizer, config.seed + 1)
    del start_policy
    saved = Checkpoints(workdir / "checkpoints" / "srpo", warn=say)
    host: Any = {"lines": lines, "best": -1.0, "stale": 0, "data": fingerprint(made)}
    start, state, host = saved.restore(state) or (0, state, host)
    check_data(host, fingerprint(made))
    lessons, seconds = None, 0.0
    if start < rl.steps and not settled(rl, host["stale"]):
        began = time.perf_counter()
        lessons = make_lessons(judge)  # which may sample for a while
        seconds = time.perf_counter() - began
        host.setdefault("lessons", lessons.state)
    if not saved.steps:  # what the stage begins with stays if nothing better comes of it
        began_with = judge_validation(config, workdir, judge, reference, made, 0)
        with MetricsWriter(workdir, lines=host["lines"]) as metrics:
            metrics.write("eval", 0, began_with)
        host |= {"lines": metrics.lines, "best": began_with.get("validation/macro_f1", 0.0)}
        saved.save(0, state, host, best=True)
    if stop:
        leave(stop, "srpo", start, rl.steps)
    if lessons is not None:
        lessons.begin(host["lessons"], start)
        update = jit_update_step(make_step(config, policy, optimizer), policy.mesh, state)
        begun = start, state, host, seconds
        state = _updates(config, workdir, judge, made, lessons, update, saved, begun, stop)
    if settled(rl, host["stale"]):
        say(f"no better judging for {host['stale']} in a row: the stage ends here (rl.patience)")
    step, params = saved.restore_params(state.params) or (rl.steps, state.params)
    after = judged(config, workdir, judge, params, made, "after")
    told = {"checkpoint": step, "sampled_tokens": host["lessons"]["sampled_tokens"]}
    return after | told | {"before": before}, params


def make_step(
    config: Config, policy: Policy, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """The update (state, batch) -> (state, metrics) of the config's method, not compiled."""
    forward, loss = policy.model.forward, LossConfig(**config.rl.loss)
    if config.method == "sft":
        return make_sft_step(forward, optimizer, micro_batches=loss.micro_batches)
    if config.method == "dpo":
        beta = config.offline.beta
        return make_dpo_step(forward, optimizer, beta=beta, micro_batches=loss.micro_batches)
    return make_update_step(forward, optimizer, loss)


def _updates(
    config: Config,
    workdir: Path,
    judge: Judge,
    made: Prepared,
    lessons: Lessons,
    update: Callable[..., Any],
    saved: Checkpoints,
    begun: tuple[int, TrainState, dict[str, Any], float],
    stop: StopSignal,
) -> TrainState:
    """The updates that are left.

    ``begun`` says where, with what, what a checkpoint keeps on the host (which is kept up to date),
    and how many seconds it took to make the lessons.
    """
    rl, (start, state, host, before) = config.rl, begun
    with (
        MetricsWriter(workdir, lines=host["lines"]) as metrics,
        Progress(lessons.title, total=rl.steps, done=start) as progress,
    ):
        for step in range(start, rl.steps):
            began = time.perf_counter()
            batch, about = lessons.batch(state, step)
            state, figures = update(state, batch)
            figures = finite(jax.device_get(figures), "srpo", step, saved) | about
            seconds = time.perf_counter() - began
            rate = {"time/step": seconds, "time/tokens_per_s": figures["tokens"] / seconds}
            rate |= {"time/lessons": before} if step == start else {}
            metrics.write("srpo", step + 1, figures | rate)
            progress.update(step + 1, **{name: figures[name] for name in lessons.shown})
            last, best = step + 1 == rl.steps, False
            if last or (step + 1) % rl.eval_every == 0:
                now = judge_validation(config, workdir, judge, state.params, made, step + 1)
                metrics.write("eval", step + 1, now)
                reached = now.get("validation/macro_f1", 0.0)
                best = reached > host["best"]
                host |= {"best": max(host["best"], reached)}
                host |= {"stale": 0 if best else host["stale"] + 1}
            last |= settled(rl, host["stale"])
            due = lessons.after(step + 1, state.params, figures, last)
            host |= {"lines": metrics.lines, "lessons": lessons.state}
            if last or best or stop or due or (step + 1) % rl.checkpoint_every == 0:
                saved.save(step + 1, state, host, best=best)
            if stop and not last:
                leave(stop, "srpo", step + 1, rl.steps)
            if last:
                break
    return state


def settled(rl: Config, stale: int) -> bool:
    """Whether the validation split has not got better for as long as the config has patience."""
    return 0 < rl.patience <= stale
