"""A run from the config to the figures: data, cold start, SRPO, judging before, during and after.

The way to the loss: ``launch.py``, ``srpo`` here, ``she_jax.rl.update``, ``she_jax.rl.losses``.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from grain import MapDataset
from rich.console import Console

from she_jax.data.chains import write_chain
from she_jax.data.dataset import Prepared, open_split
from she_jax.data.pipeline import batches
from she_jax.data.prompts import PromptFormat, positions
from she_jax.models.weights import save_model
from she_jax.rl.losses import LossConfig
from she_jax.rl.update import jit_update_step, make_update_step
from she_jax.train.checkpoint import Checkpoints, StopSignal
from she_jax.train.checks import check, check_data, check_splits, fingerprint, finite
from she_jax.train.evaluate import score
from she_jax.train.examiner import WINDOW, drift, load_examiner
from she_jax.train.metrics import MetricsWriter, Progress, say
from she_jax.train.policy_run import inherit
from she_jax.train.predict import Judge, evaluate
from she_jax.train.refresh import make_refresher
from she_jax.train.report import before_after_table, write_json
from she_jax.train.reward_model import train_examiner
from she_jax.train.rollouts import make_collector
from she_jax.train.scalar import load_scalar
from she_jax.train.scalar_training import train_scalar
from she_jax.train.setup import Policy, make_data, make_optimizer, make_policy
from she_jax.train.sft import adopt, leave, new_state, sft
from she_jax.train.workdir import Config, claim_workdir
from she_jax.types import Example, SftBatch

KINDS = ("train", "evaluate", "reward_model", "scalar_reward")


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
    if config.kind in ("reward_model", "scalar_reward"):
        config = inherit(config)
    check(config, workdir)
    claim_workdir(workdir, config)
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
    else:
        console.print(f"all is done: the figures are in {summary}", soft_wrap=True)
    after = json.loads(summary.read_text(encoding="utf-8"))
    console.print(before_after_table(after["before"], after))


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
    data = training_batches(config, made, config.sft.batch_size)

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
    saved = Checkpoints(workdir / "checkpoints" / "srpo", warn=say)
    host = {"position": 0, "lines": lines, "best": -1.0, "data": fingerprint(made), "examined": []}
    start, state, host = saved.restore(state) or (0, state, host)
    check_data(host, fingerprint(made))
    judge = Judge(policy, config.eval.batch_size)
    before = judged(config, workdir, judge, reference, made, "before")
    if stop:
        leave(stop, "srpo", start, rl.steps)
    loss = LossConfig(**rl.loss)
    update = jit_update_step(
        make_update_step(policy.model.forward, optimizer, loss), policy.mesh, state
    )
    examiner = load_examiner(config) if config.reward.model else None
    scalar = load_scalar(config, policy) if config.reward.scalar else None
    collect = make_collector(config, policy, reference, examiner, scalar)
    refresh = None
    if examiner is not None and config.reward.refresh_every:
        refresh = make_refresher(config, workdir, examiner, judge, start)
    data = training_batches(config, made, rl.prompts)
    with (
        MetricsWriter(workdir, lines=host["lines"]) as metrics,
        Progress("SRPO", total=rl.steps, done=start) as progress,
    ):
        for step in range(start, rl.steps):
            began = time.perf_counter()
            examples = data[host["position"]]
            seen = collect(state.params, examples, jax.random.fold_in(state.key, step))
            state, figures = update(state, seen.batch)
            figures = finite(jax.device_get(figures), "srpo", step, saved) | seen.figures
            seconds = time.perf_counter() - began
            rate = {"time/step": seconds, "time/tokens_per_s": figures["tokens"] / seconds}
            metrics.write("srpo", step + 1, figures | rate)
            progress.update(step + 1, reward=figures["reward"], kl=figures["kl"])
            if step == 0 or (step + 1) % rl.sample_every == 0:
                page = workdir / "samples" / f"step_{step + 1:06d}.md"
                seen.write(page, step + 1, policy.format.schema, examiner)
            if "disagreement" in figures:
                host["examined"].append([figures["examiner"], figures["disagreement"]])
                del host["examined"][: -2 * WINDOW]
                if warning := drift(host["examined"]):
                    say(f"step {step + 1}: {warning}")
                    host["examined"].clear()
            last, best = step + 1 == rl.steps, False
            if last or (step + 1) % rl.eval_every == 0:
                now = judge_twice(config, workdir, judge, state.params, made, step + 1)
                metrics.write("eval", step + 1, now)
                reached = now.get("validation/macro_f1", 0.0)
                best = reached > host["best"]
                host |= {"best": max(host["best"], reached)}
            host |= {"position": host["position"] + 1, "lines": metrics.lines}
            fresh = refresh is not None and not last and refresh(step + 1, state.params, data)
            if last or best or stop or fresh or (step + 1) % rl.checkpoint_every == 0:
                saved.save(step + 1, state, host, best=best)
            if stop and not last:
                leave(stop, "srpo", step + 1, rl.steps)
    step, params = saved.restore_params(state.params) or (rl.steps, state.params)
    after = judged(config, workdir, judge, params, made, "after")
    return after | {"checkpoint": step, "before": before}, params


# -------------------------------------------------------------------------- what both share


def training_batches(config: Config, made: Prepared, size: int) -> MapDataset:
    """The training split in batches, by position."""
    source = open_split(made.path, "train")
    return batches(source, size, seed=config.seed, balance=config.data.balance)


def judged(
    config: Config, workdir: Path, judge: Judge, params: Any, made: Prepared, when: str
) -> dict[str, Any]:
    """The figures on the evaluation split; from ``eval/<when>.json`` where they are there."""
    path = workdir / "eval" / f"{when}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    split, limit = config.data.eval_split, config.data.eval_pairs
    figures = judge_split(judge, params, made, split, limit, f"judging {split}, {when}")
    if k := config.eval.pass_k:
        examples = take(made, split, config.eval.pass_pairs)
        with Progress(f"pass@{k}, {when}", total=len(examples)) as progress:
            figures |= judge.pass_at(params, examples, k, config.seed, progress.update)
    write_json(path, figures)
    return figures


def judge_twice(
    config: Config, workdir: Path, judge: Judge, params: Any, made: Prepared, step: int
) -> dict[str, float]:
    """During training: the validation split, which picks the checkpoint, and the evaluation one."""
    flat = {}
    for split in dict.fromkeys(("validation", config.data.eval_split)):
        limit = config.data.eval_pairs
        figures = judge_split(judge, params, made, split, limit, f"judging {split}, step {step}")
        write_json(workdir / "eval" / f"step_{step:06d}_{split}.json", figures)
        names = ("macro_f1", "accuracy", "good_f1", "parse_rate")
        flat |= {f"{split}/{name}": figures[name] for name in names if figures[name] is not None}
        flat |= {f"{split}/step/{k}": v for k, v in figures["step_accuracy"].items()}
    return flat


def judge_split(
    judge: Judge, params: Any, made: Prepared, split: str, limit: int, task: str
) -> dict[str, Any]:
    """Greedy chains for a split, scored."""
    examples = take(made, split, limit)
    with Progress(task, total=len(examples)) as progress:
        chains = judge.chains(params, examples, progress.update)
        figures = score(chains, examples, judge.format.schema)
        progress.update(len(examples), macro_f1=figures["macro_f1"] or 0.0)
    return figures


def take(made: Prepared, split: str, limit: int) -> list[Example]:
    """The first examples of a split; all of them for a limit of 0."""
    source = open_split(made.path, split)
    return [source[i] for i in range(min(limit or len(source), len(source)))]


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
