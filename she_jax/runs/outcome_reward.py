"""Trains and measures an outcome reward model for the policy of a run.

It is what the process reward model is compared with (SHE's "scalar reward model"). It begins as the
policy's cold start and learns, from chains that the run's policies wrote, which of them are
correct. Pairs, chain and model are those of the policy's run.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from she_jax.data.dataset import PreparedDataset
from she_jax.generate.language_model import LanguageModel
from she_jax.rewards.orm.dataset import (
    Outcome,
    OutcomeSampler,
    as_rollout,
    orm_batch,
    read_outcomes,
    write_outcome,
)
from she_jax.rewards.orm.loss import make_orm_step
from she_jax.rewards.orm.metrics import counts, orm_metrics
from she_jax.rewards.orm.model import ORM, OutcomeRewardModel, as_orm
from she_jax.rewards.verifier import outcome_reward
from she_jax.runs.config import OrmRunConfig
from she_jax.runs.policy_data import (
    drawn_examples,
    measured_splits,
    policy_samples,
    start_from_policy,
)
from she_jax.training.files import write_json, write_text
from she_jax.training.logging import MetricsWriter, Progress, log, rows_table, show
from she_jax.training.sft import BatchSeries, sft
from she_jax.training.stop import StopSignal
from she_jax.types import OrmBatch

TRAINING_COLUMNS = ("n", "right", "mixed", "all_right", "all_wrong")
EVAL_COLUMNS = ("n", "right", "accuracy", "auroc", "ece", "ranking", "mixed")


def train_orm(config: OrmRunConfig, workdir: Path) -> None:
    """Trains an outcome reward model and measures it: ``summary.json``, checkpoints, ``orm.json``.

    ``chains/<split>.jsonl`` holds every chain that it is trained and measured on. It is trained on
    pairs of the training split, and measured on splits that share no query with it.
    """
    summary = workdir / "summary.json"
    if not summary.is_file():
        with StopSignal() as stop, MetricsWriter(workdir) as metrics:
            dataset, lm, params = start_from_policy(config, workdir, ORM.name, ("sft",))
            splits = measured_splits(dataset, config.eval_split)
            sizes = {"train": config.orm.pairs} | dict.fromkeys(splits, config.orm.eval_pairs)
            pools = {
                split: policy_chains(config, workdir, dataset, split, pairs)
                for split, pairs in sizes.items()
            }
            params = learn(config, workdir, lm, as_orm(lm, params), pools["train"], metrics, stop)
            ORM.describe(workdir, lm, config.model, config.chain)
            results = {split: measure(config, lm, params, pools[split], split) for split in splits}
            write_json(summary, {"train": counts(pools["train"])} | results)
    for split, values in json.loads(summary.read_text(encoding="utf-8")).items():
        rows = {"all": values} | values.get("by_source", {})
        columns = TRAINING_COLUMNS if split == "train" else EVAL_COLUMNS
        show(rows_table(f"{split}, {config.orm.loss}", columns, rows))
    log(f"results: {summary}; train a policy with it: --config.reward.orm={quote(str(workdir))}")


def policy_chains(
    config: OrmRunConfig, workdir: Path, dataset: PreparedDataset, split: str, pairs: int
) -> list[Outcome]:
    """Chains of the run's policies for pairs of a split, from their file if it exists."""
    path = chain_file(workdir, split)
    if not path.is_file():
        examples = drawn_examples(dataset, split, pairs, shuffled=config.data.shuffled)
        examples = [example for example in examples if example.label is not None]
        k, size = config.orm.rollouts, config.orm.batch_size
        outcomes = [
            Outcome(
                example=example,
                source=phase,
                tokens=sample.tokens,
                text=sample.text,
                right=outcome_reward(sample.chain, example, truncated=sample.truncated) == 1,
            )
            for phase, example, samples in policy_samples(config, examples, split, k, size)
            for sample in samples
        ]
        write_text(path, "".join(map(write_outcome, outcomes)))
    return read_outcomes(path)


def chain_file(workdir: Path, split: str) -> Path:
    """Where the run of an outcome reward model keeps the chains of a split."""
    return workdir / "chains" / f"{split}.jsonl"


def learn(
    config: OrmRunConfig,
    workdir: Path,
    lm: LanguageModel,
    params: Any,
    pool: Sequence[Outcome],
    metrics: MetricsWriter,
    stop: StopSignal,
) -> Any:
    """The parameters after learning the outcomes of draws from the pool."""
    loss, sampler = config.orm.loss, OutcomeSampler(pool, config.orm.loss)

    def batch_at(step: int) -> tuple[OrmBatch, dict[str, float]]:
        rng = np.random.default_rng((config.seed, step))
        return orm_batch(sampler.draw(config.sft.batch_size, rng), lm.prompts, loss), {}

    source = BatchSeries(
        batch_at,
        title=f"{ORM.name} ({loss})",
        fingerprint=sha256(chain_file(workdir, "train").read_bytes()).hexdigest()[:16],
        phase=ORM.kind,
    )
    folder = workdir / "checkpoints" / ORM.kind
    return sft(config.sft, lm, params, source, folder, metrics, stop, make_orm_step)


def measure(
    config: OrmRunConfig, lm: LanguageModel, params: Any, pool: Sequence[Outcome], split: str
) -> dict[str, Any]:
    """Metrics of a split."""
    size = config.orm.batch_size
    orm, scores = OutcomeRewardModel(lm, params, size), []
    with Progress(f"scoring {split}", total=len(pool)) as progress:
        for first in range(0, len(pool), size):
            part = pool[first : first + size]
            scores.append(orm.score(as_rollout(part, lm.prompts)))
            progress.update(first + len(part))
    return orm_metrics(pool, np.concatenate(scores))
