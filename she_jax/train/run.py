"""A run from the config to the figures: data, cold start, SRPO, judging before, during and after.

The way to the loss: ``launch.py``, ``srpo`` here, ``she_jax.rl.update``, ``she_jax.rl.losses``.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from she_jax.data.chains import write_chain
from she_jax.data.curriculum import PromptPool
from she_jax.data.dataset import ExampleSource, Prepared, open_split
from she_jax.data.pipeline import batches
from she_jax.data.prompts import PromptFormat, positions
from she_jax.models.weights import save_model
from she_jax.rl.losses import LossConfig
from she_jax.rl.update import jit_update_step, make_update_step
from she_jax.train.checkpoint import Checkpoints, StopSignal
from she_jax.train.checks import check, check_data, check_splits, fingerprint, finite
from she_jax.train.examiner import load_examiner
from she_jax.train.filter_run import filter_prompts, run_filter
from she_jax.train.judging import judge_split, judge_twice, judged
from she_jax.train.metrics import MetricsWriter, Progress, say
from she_jax.train.policy_run import inherit
from she_jax.train.predict import Judge, evaluate
from she_jax.train.refresh import make_refresher
from she_jax.train.report import before_after_table, write_json
from she_jax.train.reward_model import train_examiner
from she_jax.train.rollouts import make_collector, refilled
from she_jax.train.scalar import load_scalar
from she_jax.train.scalar_training import train_scalar
from she_jax.train.setup import Policy, make_data, make_optimizer, make_policy
from she_jax.train.sft import adopt, leave, new_state, sft
from she_jax.train.watch import Watch
from she_jax.train.workdir import Config, claim_workdir
from she_jax.types import Example, SftBatch

KINDS = ("train", "curriculum", "filter", "evaluate", "reward_model", "scalar_reward")


def run(config: Config, workdir: Path) -> None:
    """Does what the config says, or goes on where an earlier run of it stopped.

    Args:
      config: a recipe of ``configs/``.
      workdir: the run's folder.

    Raises:
      ValueError: for a config that cannot be run, or a folder of another one.
      SystemExit: when a signal asked to stop, after saving.
    """
    if config.kind not in KINDS:
        raise ValueError(f"kind={config.kind!r}: expected one of {KINDS}")
    if config.kind == "curriculum":
        run_curriculum(config, workdir)
        return
    if config.kind in ("reward_model", "scalar_reward", "filter"):
        config = inherit(config)
    if config.get("before") and config.start:
        make_start(config, workdir)
    check(config, workdir)
    claim_workdir(workdir, config)
    if config.kind == "filter":
        run_filter(config, workdir)
        return
    if config.kind == "evaluate":
        evaluate(config, workdir)
        return
    if config.kind == "reward_model":
        train_examiner(config, workdir)
        return
    if config.kind == "scalar_reward":
        train_scalar(config, workdir)
        return
    console = Console(highlight=False)
    summary = workdir / "summary.json"
    if not summary.is_file():
        with StopSignal() as stop:
            made = make_data(config, workdir)
            policy = make_policy(config, workdir, made)
            check_splits(config, made)
            reference, lines = cold_start(config, workdir, policy, made, stop)
            figures, params = srpo(config, workdir, policy, reference, lines, made, stop)
            if config.export:
                export(workdir / "export", policy, params)
            write_json(summary, figures)
        if stop:  # too late for this run, but not for one that would come after it
            raise SystemExit(stop.exit_code)
    else:
        console.print(f"all is done: the figures are in {summary}", soft_wrap=True)
    after = json.loads(summary.read_text(encoding="utf-8"))
    console.print(before_after_table(after["before"], after))


# -------------------------------------------------------------------------- stages


def run_curriculum(config: Config, workdir: Path) -> None:
    """The stages one after the other, each from the best policy of the one before.

    Each has a folder of its own, ``stage1`` and so on; a stage that is done is not done again.
    ``summary.json`` holds the figures of all.
    """
    for name, stage in config.stages.items():
        check(alone(stage), workdir / name)
    start, figures = "", {}
    for name, stage in config.stages.items():
        own: Config = ConfigDict(stage.to_dict() | {"start": start or stage.start, "before": {}})
        own.data.dir = own.data.dir or str(workdir / "data")
        say(f"{name}: {own.rl.steps} updates" + (f", from {start}" if start else ""))
        run(own.lock(), workdir / name)
        figures[name] = json.loads((workdir / name / "summary.json").read_text(encoding="utf-8"))
        start = str(workdir / name / "checkpoints" / "srpo")
    first, *_, last = figures.values()
    write_json(workdir / "summary.json", last | {"before": first["before"], "stages": figures})
    console = Console(highlight=False)
    console.print(before_after_table(first["before"], last))


def alone(stage: Config) -> Config:
    """A stage's config as if it began anew: to be checked before what it starts from is there."""
    return ConfigDict(stage.to_dict() | {"start": "", "before": {}}).lock()


def make_start(config: Config, workdir: Path) -> None:
    """Runs the stage before, or ends it, where what this one starts from is not there yet.

    A run that is there already is taken as it is, whatever its options; that they are other ones
    than those of ``config.before`` is said.
    """
    check(alone(config), workdir)
    folder = Path(config.start).absolute().parent.parent
    path = folder / "config.json"
    if path.is_file():
        then = json.loads(path.read_text(encoding="utf-8"))
        if then != json.loads(json.dumps(config.before.to_dict())):
            say(f"start={config.start}: taken as it is, though its options are not the recipe's")
            return
    if (folder / "summary.json").is_file():
        return
    say(f"start={config.start} is not there yet: first the stage before, in {folder}")
    run(config.before, folder)


# -------------------------------------------------------------------------- the cold start


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


def sft_batch(
    prompts: PromptFormat, examples: Sequence[Example], seed: tuple[int, int]
) -> tuple[SftBatch, dict[str, int]]:
    """Examples and their chains as tokens, and how many of each had to be cut."""
    rng = np.random.default_rng(seed)
    chains = [write_chain(example, prompts.schema, rng) for example in examples]
    asked, cut_prompts = prompts.prompts(examples)
    answers, answer_mask, cut_chains = prompts.chains(chains)
    mask = np.concatenate([asked.mask, answer_mask], axis=1)
    trained = np.concatenate([np.zeros_like(asked.mask), answer_mask], axis=1)
    batch = SftBatch(
        tokens=jnp.asarray(np.concatenate([asked.tokens, answers], axis=1)),
        positions=jnp.asarray(positions(mask)),
        weights=jnp.asarray(trained, dtype=jnp.float32),
        prompt_length=prompts.prompt_length,
    )
    return batch, {"cut_prompts": cut_prompts, "cut_chains": cut_chains}


# -------------------------------------------------------------------------- SRPO


def srpo(
    config: Config,
    workdir: Path,
    policy: Policy,
    reference: Any,
    lines: int,
    made: Prepared,
    stop: StopSignal,
) -> tuple[dict[str, Any], Any]:
    """Rollouts in groups, steps, rewards a step, advantages, update; and again.

    Args:
      reference: the cold start's parameters, where the policy starts and what KL holds it to.
      lines: lines of ``metrics.jsonl`` by then.

    Returns:
      The figures for ``summary.json``, and the parameters that did best on the validation split.
    """
    rl = config.rl
    optimizer = make_optimizer(rl)
    # A copy, since the update is given its state for good and the reference must stay.
    start_policy = Policy(**vars(policy) | {"params": jax.tree.map(jnp.copy, reference)})
    state = new_state(start_policy, optimizer, config.seed + 1)
    del start_policy
    judge = Judge(policy, config.eval.batch_size)
    before = judged(config, workdir, judge, reference, made, "before")
    source, rates = training_prompts(config, workdir, policy, reference, made, stop)
    pool, watch = make_pool(config, source, rates), Watch()
    saved = Checkpoints(workdir / "checkpoints" / "srpo", warn=say)
    host = {"lines": lines, "best": -1.0, "stale": 0, "data": fingerprint(made)}
    host |= {"pool": pool.state, "watch": watch.state}
    start, state, host = saved.restore(state) or (0, state, host)
    check_data(host, fingerprint(made))
    pool.restore(host["pool"])
    watch.restore(host["watch"])
    if not saved.steps:  # what the stage begins with stays if nothing better comes of it
        limit, task = config.data.eval_pairs, "judging validation, before"
        began_with = judge_split(judge, reference, made, "validation", limit, task)["macro_f1"]
        host |= {"best": began_with or 0.0}
        saved.save(0, state, host, best=True)
    if stop:
        leave(stop, "srpo", start, rl.steps)
    update = jit_update_step(
        make_update_step(policy.model.forward, optimizer, LossConfig(**rl.loss)), policy.mesh, state
    )
    examiner = load_examiner(config) if config.reward.model else None
    scalar = load_scalar(config, policy) if config.reward.scalar else None
    collect = make_collector(config, policy, reference, examiner, scalar)
    refresh = None
    refreshed = config.reward.refresh_every and not settled(rl, host["stale"])
    if examiner is not None and refreshed:
        shown = batches(source, rl.prompts, seed=config.seed, balance=config.data.balance)
        refresh = make_refresher(config, workdir, examiner, judge, shown, start)
    with (
        MetricsWriter(workdir, lines=host["lines"]) as metrics,
        Progress("SRPO", total=rl.steps, done=start) as progress,
    ):
        for step in range(start, rl.steps):
            if settled(rl, host["stale"]):
                break
            began = time.perf_counter()
            key = jax.random.fold_in(state.key, step)
            seen = refilled(collect, state.params, pool.draw, key, rl.refill)
            pool.learn(*seen.rates)
            state, figures = update(state, seen.batch)
            figures = finite(jax.device_get(figures), "srpo", step, saved) | seen.figures
            seconds = time.perf_counter() - began
            rate = {"time/step": seconds, "time/tokens_per_s": figures["tokens"] / seconds}
            metrics.write("srpo", step + 1, figures | rate)
            progress.update(step + 1, reward=figures["reward"], kl=figures["kl"])
            if step == 0 or (step + 1) % rl.sample_every == 0:
                page = workdir / "samples" / f"step_{step + 1:06d}.md"
                seen.write(page, step + 1, policy.format.schema, examiner)
            for warning in watch.warnings(figures):
                say(f"step {step + 1}: {warning}")
            last, best = step + 1 == rl.steps, False
            if last or (step + 1) % rl.eval_every == 0:
                now = judge_twice(config, workdir, judge, state.params, made, step + 1)
                metrics.write("eval", step + 1, now)
                reached = now.get("validation/macro_f1", 0.0)
                best = reached > host["best"]
                host |= {"best": max(host["best"], reached)}
                host |= {"stale": 0 if best else host["stale"] + 1}
            host |= {"lines": metrics.lines, "pool": pool.state, "watch": watch.state}
            last |= settled(rl, host["stale"])
            fresh = refresh is not None and not last and refresh(step + 1, state.params)
            if last or best or stop or fresh or (step + 1) % rl.checkpoint_every == 0:
                saved.save(step + 1, state, host, best=best)
            if stop and not last:
                leave(stop, "srpo", step + 1, rl.steps)
    if settled(rl, host["stale"]):
        say(f"no better judging for {host['stale']} in a row: the stage ends here (rl.patience)")
    step, params = saved.restore_params(state.params) or (rl.steps, state.params)
    after = judged(config, workdir, judge, params, made, "after")
    return after | {"checkpoint": step, "before": before}, params


def settled(rl: Config, stale: int) -> bool:
    """Whether the validation split has not got better for as long as the config has patience."""
    return 0 < rl.patience <= stale


def training_prompts(
    config: Config, workdir: Path, policy: Policy, params: Any, made: Prepared, stop: StopSignal
) -> tuple[Sequence[Example] | ExampleSource, Mapping[str, float]]:
    """The prompts of the stage, and their pass rates by uid as far as they were measured.

    All of the training split, or what a filter keeps of it with the policy as it is now.
    """
    source = open_split(made.path, "train")
    if not config.filter.pairs:
        return source, {}
    kept = filter_prompts(config, workdir, policy, params, made, stop)
    if kept is None:
        raise SystemExit(0)
    return [source[row] for row in kept.rows], kept.rates


def make_pool(
    config: Config, source: Sequence[Example] | ExampleSource, rates: Mapping[str, float]
) -> PromptPool:
    """The order in which the prompts of the stage come."""
    rl = config.rl
    return PromptPool(
        source,
        rl.prompts,
        seed=config.seed,
        aim=rl.aim,
        balance=config.data.balance,
        rates=rates,
    )


def export(folder: Path, policy: Policy, params: Any) -> None:
    """Writes a policy as a Hugging Face directory."""
    own = policy.format
    save_model(
        folder,
        policy.model.config,
        jax.device_get(params),
        own.tokenizer,
        eos_ids=own.eos_ids,
        pad_id=own.pad_id,
        chat_template=own.chat_template,
        specials=own.specials,
        overwrite=True,  # of a run that was stopped in between
    )
