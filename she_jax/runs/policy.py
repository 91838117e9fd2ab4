"""What comes after the cold start: updates, judged as they go, the best of them kept."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from she_jax.data.dataset import Prepared, fingerprint, open_split
from she_jax.data.loader import batches
from she_jax.evaluation.evaluate import judge_before, judge_validation, judged
from she_jax.evaluation.report import before_after_table
from she_jax.generate.generator import Judge
from she_jax.generate.language_model import Policy
from she_jax.rl.losses import LossConfig
from she_jax.rl.update import jit_update_step, make_dpo_step, make_sft_step, make_update_step
from she_jax.rollouts.offline import Imitation, Preferences
from she_jax.rollouts.online import Online
from she_jax.rollouts.prompt_source import training_prompts
from she_jax.runs.export import export
from she_jax.runs.validate import check_splits
from she_jax.training.checkpoint import Checkpoints
from she_jax.training.files import write_json
from she_jax.training.logging import MetricsWriter, Progress, say
from she_jax.training.loop import Lessons, check_data, finite
from she_jax.training.setup import ASKED, make_data, make_optimizer, make_policy
from she_jax.training.sft import adopt, leave, new_state, sft, sft_batch
from she_jax.training.stop import StopSignal
from she_jax.training.workdir import Config
from she_jax.types import SftBatch, TrainState


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


def train(config: Config, workdir: Path) -> None:
    """Trains a policy and judges it, as far as that is not done; prints before and after.

    Raises:
      SystemExit: when a signal asked to stop, after saving.
    """
    console = Console(highlight=False)
    summary = workdir / "summary.json"
    exported = not config.export or (workdir / "export" / ASKED).is_file()
    if not summary.is_file() or not exported:
        with StopSignal() as stop:
            made = make_data(config, workdir)
            policy = make_policy(config, workdir, made)
            check_splits(config, made)
            reference, lines = cold_start(config, workdir, policy, made, stop)
            make = partial(lessons, config, workdir, policy, reference, made, stop)
            figures, params = learn(config, workdir, policy, reference, lines, made, make, stop)
            if config.export:
                export(config, workdir / "export", policy, params)
            write_json(summary, figures)
        if stop:  # too late for this run, but not for one that would come after it
            raise SystemExit(stop.exit_code)
    else:
        console.print(f"all is done: the figures are in {summary}", soft_wrap=True)
    after = json.loads(summary.read_text(encoding="utf-8"))
    console.print(before_after_table(after["before"], after))


def cold_start(
    config: Config, workdir: Path, policy: Policy, made: Prepared, stop: StopSignal
) -> tuple[Any, int]:
    """Imitates the chains of the training split, or begins where another run ended.

    Returns:
      The parameters, and how many lines ``metrics.jsonl`` has by then.
    """
    if config.start:
        return adopt(config, workdir, policy), 0
    source = open_split(made.path, "train")
    data = batches(source, config.sft.batch_size, seed=config.seed, balance=config.data.balance)

    def batch_at(position: int) -> tuple[SftBatch, dict[str, int]]:
        examples: Any = data[position]
        return sft_batch(policy.format, examples, (config.seed, position))

    return sft(config, workdir, policy, batch_at, fingerprint(made), stop)


def lessons(
    config: Config,
    workdir: Path,
    policy: Policy,
    reference: Any,
    made: Prepared,
    stop: StopSignal,
    judge: Judge,
) -> Lessons:
    """What the policy learns from after its cold start, as ``method`` says."""
    source, rates = training_prompts(config, workdir, policy, reference, made, stop)
    if config.method == "online":
        return Online(config, workdir, policy, reference, source, rates, judge)
    offline = Imitation if config.method == "sft" else Preferences
    return offline(config, workdir, policy, reference, source, judge, stop)
