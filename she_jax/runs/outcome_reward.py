"""Trains and measures a scalar reward model, the examiner's rival, for the policy of a run.

It begins as that policy's cold start and learns, from chains that the run's policies wrote, which
of them came out right. Its pairs, chain and model are the run's.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from she_jax.data.dataset import Prepared, in_no_order, open_split
from she_jax.generate.language_model import Policy
from she_jax.rewards.orm.dataset import (
    Drawer,
    Outcome,
    as_rollout,
    outcome_batch,
    read_outcomes,
    write_outcome,
)
from she_jax.rewards.orm.loss import make_scalar_step
from she_jax.rewards.orm.metrics import counts, scalar_figures
from she_jax.rewards.orm.model import SCALAR, ScalarReward, as_scalar, describe_scalar
from she_jax.rewards.verifier import outcome_reward
from she_jax.runs.policy_run import begin, policy_samples
from she_jax.training.files import write_json, write_text
from she_jax.training.logging import Progress, rows_table
from she_jax.training.sft import sft
from she_jax.training.stop import StopSignal
from she_jax.training.workdir import Config
from she_jax.types import OutcomeBatch

COUNTED = ("n", "right", "mixed", "all_right", "all_wrong")  # columns of the training pairs' table
MEASURED = ("n", "right", "accuracy", "auroc", "ece", "ranking", "mixed")  # of the others'


def train_scalar(config: Config, workdir: Path) -> None:
    """From the policy's run to a measured scalar reward model: ``summary.json``, its checkpoints.

    ``outcomes/<split>.jsonl`` has every chain it was trained and measured on. It learns from pairs
    of the training split only, and is measured on splits that share no query with it.
    """
    summary = workdir / "summary.json"
    if not summary.is_file():
        with StopSignal() as stop:
            made, policy, splits = begin(config, workdir, SCALAR.name, ("sft",))
            write_json(workdir / SCALAR.identity, describe_scalar(policy))
            pools = {
                split: outcomes(config, workdir, made, split, pairs)
                for split, pairs in {
                    "train": config.scalar.pairs,
                    **dict.fromkeys(splits, config.scalar.eval_pairs),
                }.items()
            }
            trained = learn(config, workdir, as_scalar(policy), pools["train"], stop)
            figures = {split: measure(config, trained, pools[split], split) for split in splits}
            write_json(summary, {"train": counts(pools["train"])} | figures)
    console = Console(highlight=False)
    for split, told in json.loads(summary.read_text(encoding="utf-8")).items():
        rows = {"all": told} | told.get("by_source", {})
        columns = COUNTED if split == "train" else MEASURED
        console.print(rows_table(f"{split}, {config.scalar.loss}", columns, rows))


def outcomes(
    config: Config, workdir: Path, made: Prepared, split: str, pairs: int
) -> list[Outcome]:
    """Chains of the run's policies on so many pairs of a split, from its file where that is."""
    path = workdir / "outcomes" / f"{split}.jsonl"
    if not path.is_file():
        source = open_split(made.path, split)
        rows = in_no_order(config.data.name, len(source))[:pairs].tolist()
        examples = [source[row] for row in rows]
        examples = [example for example in examples if example.label is not None]
        k, size = config.scalar.rollouts, config.scalar.batch_size
        found = [
            Outcome(
                example=example,
                source=phase,
                tokens=one.tokens,
                text=one.text,
                right=outcome_reward(one.chain, example, truncated=one.truncated) == 1,
            )
            for phase, example, samples in policy_samples(config, examples, split, k, size)
            for one in samples
        ]
        write_text(path, "".join(map(write_outcome, found)))
    return read_outcomes(path)


def learn(
    config: Config, workdir: Path, start: Policy, pool: Sequence[Outcome], stop: StopSignal
) -> Policy:
    """Learns the outcomes of draws from the pool."""
    loss, drawer = config.scalar.loss, Drawer(pool, config.scalar.loss)

    def batch_at(position: int) -> tuple[OutcomeBatch, dict[str, int]]:
        rng = np.random.default_rng((config.seed, position))
        return outcome_batch(drawer.draw(config.sft.batch_size, rng), start.format, loss), {}

    mark = sha256((workdir / "outcomes" / "train.jsonl").read_bytes()).hexdigest()[:16]
    params, _ = sft(
        config,
        workdir,
        start,
        batch_at,
        mark,
        stop,
        phase=SCALAR.kind,
        title=f"{SCALAR.name} ({loss})",
        make_step=make_scalar_step,
    )
    return Policy(**vars(start) | {"params": params})


# -------------------------------------------------------------------------- how good it is


def measure(config: Config, trained: Policy, pool: Sequence[Outcome], split: str) -> dict[str, Any]:
    """The figures of a split."""
    size = config.scalar.batch_size
    reward, scores = ScalarReward(trained, size), []
    with Progress(f"scoring {split}", total=len(pool)) as progress:
        for first in range(0, len(pool), size):
            part = pool[first : first + size]
            scores.append(reward.score(as_rollout(part, trained.format)))
            progress.update(first + len(part))
    return scalar_figures(pool, np.concatenate(scores))
