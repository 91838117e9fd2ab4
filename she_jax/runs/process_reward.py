"""Trains and measures a process reward model (SHE's "examiner") for the policy of a run.

It begins as that policy's best checkpoint, which reads queries and products already. It first
learns to write correct chains itself, from pairs whose steps are all annotated, and then to answer
step queries, while it keeps writing chains. In use it writes a reference chain and compares: a
model of this size does not see in one pass where two lists differ. All of it is supervised
fine-tuning; pairs, chain and model are those of the policy's run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from shlex import quote
from typing import Any

import jax
import numpy as np

from she_jax.data.dataset import PreparedDataset, fingerprint
from she_jax.generate.language_model import LanguageModel
from she_jax.rewards.prm.dataset import (
    POLICY,
    BalancedSampler,
    correct_evidence,
    label_steps,
    rationale_step_queries,
    read_step_queries,
    step_query_file,
    with_correct_rationale,
    write_step_queries,
)
from she_jax.rewards.prm.metrics import metrics_table, prm_metrics
from she_jax.rewards.prm.model import PRM, REFERENCE, ProcessRewardModel
from she_jax.rewards.prm.packing import step_query_format
from she_jax.rewards.prm.step_query import StepQuery
from she_jax.rewards.verifier import fully_annotated
from she_jax.runs.config import PrmRunConfig
from she_jax.runs.load import PHASES
from she_jax.runs.policy_data import (
    drawn_examples,
    measured_splits,
    policy_samples,
    start_from_policy,
)
from she_jax.training.files import write_json
from she_jax.training.logging import MetricsWriter, Progress, log, show
from she_jax.training.packing import pack_pairs
from she_jax.training.sft import BatchSeries, sft, sft_batch
from she_jax.training.stop import StopSignal
from she_jax.types import Example, SftBatch

NEIGHBORS = 8  # rows to either side among which another pair of the same query is looked for
BLOCK_SIZE = 4  # neighboring rows that stay together where pairs are drawn


def train_prm(config: PrmRunConfig, workdir: Path) -> None:
    """Trains a process reward model and measures it: ``summary.json``, checkpoints, ``prm.json``.

    ``step_queries/<split>.jsonl`` holds every step that it is trained and measured on. It is
    trained on pairs of the training split, and measured on splits that share no query with it.
    """
    summary = workdir / "summary.json"
    if not summary.is_file():
        with StopSignal() as stop, MetricsWriter(workdir) as metrics:
            dataset, lm, params = start_from_policy(config, workdir, PRM.name, PHASES)
            splits = measured_splits(dataset, config.eval_split)
            sizes = {"train": (config.prm.pairs, config.prm.policy_pairs)}
            sizes |= {split: (config.prm.eval_pairs,) * 2 for split in splits}
            pools = {
                split: step_queries(config, workdir, dataset, split, *counts)
                for split, counts in sizes.items()
            }
            references = reference_chains(config, dataset, pools["train"])
            params = learn_references(
                config, workdir, lm, params, references, fingerprint(dataset), metrics, stop
            )
            params = learn_answers(
                config, workdir, lm, params, pools["train"], references, metrics, stop
            )
            PRM.describe(
                workdir,
                lm,
                config.model,
                config.chain,
                answer_length=config.prm.answer_length,
                room=config.prm.room,
                reference_chains=bool(references),
            )
            others = {split: pools[split] for split in splits}
            results = measure(config, lm, params, others, with_references=bool(references))
            write_json(summary, results)
    results = json.loads(summary.read_text(encoding="utf-8"))
    for method, by_split in results.items():
        for split, values in by_split.items():
            show(metrics_table(f"{split}, {method}", values))
    log(f"results: {summary}; train a policy with it: --config.reward.prm={quote(str(workdir))}")


def reference_chains(
    config: PrmRunConfig, dataset: PreparedDataset, pool: Sequence[StepQuery]
) -> dict[str, Example]:
    """By uid, the training pairs whose steps are all annotated, with a correct chain as rationale.

    Empty if the reward model is not to write chains itself.
    """
    if not config.reference_sft.steps:
        return {}
    count, evidence = max(config.prm.pairs, config.prm.policy_pairs), correct_evidence(pool)
    examples = drawn_examples(
        dataset, "train", count, shuffled=config.data.shuffled, block_size=BLOCK_SIZE
    )
    corrected = [
        with_correct_rationale(example, config.schema, evidence.get(example.uid, {}))
        for example in examples
    ]
    if chains := {example.uid: example for example in corrected if example is not None}:
        return chains
    log("no pair has all of its steps annotated: the reward model does not learn to write chains")
    return {}


def learn_references(
    config: PrmRunConfig,
    workdir: Path,
    lm: LanguageModel,
    params: Any,
    references: Mapping[str, Example],
    data: str,
    metrics: MetricsWriter,
    stop: StopSignal,
) -> Any:
    """Trains the model to write the chains in ``references``; with none, ``params`` are unchanged.

    Args:
      references: see ``reference_chains``.
      data: fingerprint of the pairs.
    """
    if not references:
        return params
    examples = list(references.values())

    def batch_at(step: int) -> tuple[SftBatch, dict[str, float]]:
        rng = np.random.default_rng((config.seed, step))
        rows = rng.integers(len(examples), size=config.reference_sft.batch_size)
        return sft_batch(lm.prompts, [examples[row] for row in rows], (config.seed, step))

    source = BatchSeries(
        batch_at, title="reference chains (SFT)", fingerprint=data, phase=REFERENCE
    )
    folder = workdir / "checkpoints" / REFERENCE
    return sft(config.reference_sft, lm, params, source, folder, metrics, stop)


def learn_answers(
    config: PrmRunConfig,
    workdir: Path,
    lm: LanguageModel,
    params: Any,
    pool: Sequence[StepQuery],
    references: Mapping[str, Example],
    metrics: MetricsWriter,
    stop: StopSignal,
) -> Any:
    """The parameters after learning to answer balanced draws of step queries.

    With ``references``, the chains of the same pairs are learned along.
    """
    sampler = BalancedSampler(pool)
    queries = step_query_format(lm, config.prm.answer_length)
    chains = {uid: str(example.rationale) for uid, example in references.items()}

    def batch_at(step: int) -> tuple[SftBatch, dict[str, float]]:
        rng = np.random.default_rng((config.seed, step))
        samples = sampler.draw(config.sft.batch_size, rng)
        targets = [chains.get(s[0].example.uid, "") for s in samples] if chains else None
        batch, left_out = queries.sft_batch(samples, config.prm.room, rng, targets)
        return pack_pairs(batch), {"left_out": left_out}

    file = step_query_file(workdir, "train")
    source = BatchSeries(
        batch_at,
        title=f"{PRM.name} (SFT)",
        fingerprint=sha256(file.read_bytes()).hexdigest()[:16],
        phase=PRM.kind,
    )
    folder = workdir / "checkpoints" / PRM.kind
    return sft(config.sft, lm, params, source, folder, metrics, stop)


# -------------------------------------------------------------------------- step queries


def step_queries(
    config: PrmRunConfig,
    workdir: Path,
    dataset: PreparedDataset,
    split: str,
    pairs: int,
    policy_pairs: int,
) -> list[StepQuery]:
    """The step queries of a split, from their file if it exists.

    Outside the training split every known truth counts as annotated.

    Args:
      pairs: pairs of the split that give steps of their rationale, correct and corrupted.
      policy_pairs: pairs that give steps of the run's policies, sampled at temperature 1.
    """
    path = step_query_file(workdir, split)
    if path.is_file():
        return read_step_queries(path)
    count = max(pairs, policy_pairs)
    examples = drawn_examples(
        dataset, split, count, shuffled=config.data.shuffled, block_size=BLOCK_SIZE
    )
    examples = [example for example in examples if example.label is not None]
    annotated = {example.uid: {"label", *example.annotations} for example in examples}
    if split != "train":
        examples = [fully_annotated(example) for example in examples]
    rng = np.random.default_rng(config.seed)
    queries: list[StepQuery] = []
    for row, example in enumerate(examples[:pairs]):
        other = _other_pair(examples, row, rng)
        queries += rationale_step_queries(example, other, config.schema, rng)
    queries += _policy_step_queries(config, examples[:policy_pairs], split)
    queries = [replace(q, annotated=q.step in annotated[q.example.uid]) for q in queries]
    write_step_queries(path, queries)
    return queries


def _other_pair(examples: Sequence[Example], row: int, rng: np.random.Generator) -> Example:
    """Another pair; half of the time a nearby one of the same query, with a similar product."""
    near = [
        example
        for example in examples[max(0, row - NEIGHBORS) : row + NEIGHBORS + 1]
        if example.query == examples[row].query and example.uid != examples[row].uid
    ]
    if near and rng.random() < 0.5:
        return near[int(rng.integers(len(near)))]
    return examples[int(rng.integers(len(examples)))]


def _policy_step_queries(
    config: PrmRunConfig, examples: Sequence[Example], split: str
) -> list[StepQuery]:
    """Steps that the policies of the run write."""
    k, size = config.prm.rollouts, config.prm.batch_size
    return [
        query
        for phase, example, samples in policy_samples(config, examples, split, k, size)
        for n, sample in enumerate(samples)
        for query in label_steps(
            sample.chain, example, config.schema, POLICY, f"{example.uid}/{phase}/{n}"
        )
    ]


# -------------------------------------------------------------------------- measurement


def measure(
    config: PrmRunConfig,
    lm: LanguageModel,
    params: Any,
    pools: Mapping[str, Sequence[StepQuery]],
    *,
    with_references: bool,
) -> dict[str, dict[str, Any]]:
    """Metrics by split, with verdicts read directly and, with votes, after critiques."""
    results: dict[str, dict[str, Any]] = {}
    for votes in sorted({0, config.prm.votes}):
        prm = ProcessRewardModel(
            lm,
            params,
            answer_length=config.prm.answer_length,
            batch_size=config.prm.batch_size,
            votes=votes,
            reference_chains=with_references,
        )
        method = f"critique_{votes}" if votes else "direct"
        results[method] = {}
        for split, pool in pools.items():
            with Progress(f"scoring {split}, {method}", total=len(pool)) as progress:
                scores = prm.score(pool, jax.random.key(config.seed))
                progress.update(len(pool))
            results[method][split] = prm_metrics(pool, scores)
    return results
