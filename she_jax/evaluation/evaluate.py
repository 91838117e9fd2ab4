"""Evaluation of a run's policy on its splits, before, during and after training."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from she_jax.cot import Chain
from she_jax.data.dataset import PreparedDataset, evenly_spaced_rows, open_split
from she_jax.evaluation.chains import chains_file, write_chains
from she_jax.evaluation.metrics import pass_at_k, score
from she_jax.evaluation.unread import Unread
from she_jax.generate.generator import Generator
from she_jax.rewards.verifier import OutcomeRewardFn
from she_jax.training.files import write_json
from she_jax.training.logging import Progress
from she_jax.types import Example

LONGTAIL = "test_longtail"  # evaluated in addition to the evaluation split, if present
VALIDATION = "validation"


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is evaluated, and in what portions.

    Attributes:
      split: evaluated before and after training.
      pairs: of each split, evenly spaced; 0 for all.
      batch_size: pairs at a time, >= 1.
      pass_k: rollouts a pair for pass@k; 0 leaves it out.
      pass_pairs: pairs for pass@k.
      seed: of the sampled rollouts.
      outcome: a user's outcome reward, whose mean is measured too; it selects the checkpoint where
        chains have no label. None for none.

    Raises:
      ValueError: if ``batch_size`` is below 1.
    """

    split: str
    pairs: int
    batch_size: int
    pass_k: int
    pass_pairs: int
    seed: int
    outcome: OutcomeRewardFn | None = None

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"eval.batch_size={self.batch_size}: expected at least 1")


def evaluate_policy(
    generator: Generator,
    dataset: PreparedDataset,
    config: EvalConfig,
    workdir: Path,
    params: Any,
    when: str,
) -> dict[str, Any]:
    """Metrics on the evaluation split, and on the long tail if the data set has one.

    They are kept in ``eval/<when>.json``, and read from there if it exists. The chains of some
    pairs are in ``eval/chains_<when>.jsonl``.

    Args:
      generator: of the policy.
      dataset: the pairs.
      config: what is evaluated.
      workdir: the run's folder.
      params: of the policy.
      when: ``before`` or ``after`` training.
    """
    path = workdir / "eval" / f"{when}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    examples = evenly_spaced(dataset, config.split, config.pairs)
    title = f"evaluating {config.split}, {when}"
    kept = path.with_name(chains_file(when))
    metrics = evaluate_split(generator, params, examples, title, config.outcome, kept)
    if dataset.splits.get(LONGTAIL) and config.split != LONGTAIL:
        examples = evenly_spaced(dataset, LONGTAIL, config.pairs)
        title = f"evaluating {LONGTAIL}, {when}"
        metrics["longtail"] = evaluate_split(generator, params, examples, title, config.outcome)
    if k := config.pass_k:
        examples = evenly_spaced(dataset, config.split, config.pass_pairs)
        with Progress(f"pass@{k}, {when}", total=len(examples)) as progress:
            metrics |= pass_at(generator, params, examples, k, config.seed, progress.update)
    metrics["evaluated_on"] = evaluation_fingerprint(dataset, config)
    write_json(path, metrics)
    return metrics


def evaluate_validation(
    generator: Generator,
    dataset: PreparedDataset,
    config: EvalConfig,
    workdir: Path,
    params: Any,
    step: int,
) -> dict[str, float]:
    """Metrics on the validation split during training, which select the checkpoint.

    They are kept in ``eval/``. At step 0 they are read from there if they exist, since a run that
    starts from another run's policy may have been given them.
    """
    path = workdir / "eval" / validation_file(step)
    if not step and path.is_file():
        metrics = json.loads(path.read_text(encoding="utf-8"))
    else:
        examples = evenly_spaced(dataset, VALIDATION, config.pairs)
        title = f"evaluating {VALIDATION}, step {step}"
        metrics = evaluate_split(generator, params, examples, title, config.outcome)
        write_json(path, metrics)
    names = ("macro_f1", "accuracy", "good_f1", "parse_rate", "outcome")
    flat = {f"{VALIDATION}/{k}": metrics[k] for k in names if metrics.get(k) is not None}
    return flat | {f"{VALIDATION}/step/{k}": v for k, v in metrics["step_accuracy"].items()}


def validation_file(step: int) -> str:
    """Name of the file with the metrics of the validation split after so many updates."""
    return f"step_{step:06d}_{VALIDATION}.json"


def evaluate_split(
    generator: Generator,
    params: Any,
    examples: Sequence[Example],
    title: str,
    outcome: OutcomeRewardFn | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Metrics of the greedy chains of examples, see ``score``, and the mean ``outcome`` reward.

    It says so if most chains cannot be read. With ``kept``, some of the chains are written there.
    """
    unread = Unread(generator.prompts.completion_length)
    texts: list[str] = []

    def look(chain: Chain, text: str, truncated: bool) -> None:
        unread.add(chain, text, truncated)
        texts.append(text)

    with Progress(title, total=len(examples)) as progress:
        chains = generator.greedy(params, examples, progress.update, look)
        if kept is not None:
            write_chains(kept, examples, chains, texts, generator.prompts.schema)
        metrics = score(chains, examples, generator.prompts.schema)
        if outcome is not None:
            metrics["outcome"] = float(np.mean(outcome(chains, examples)))
        names = [name for name in ("macro_f1", "outcome") if metrics.get(name) is not None]
        progress.update(len(examples), **{name: metrics[name] for name in names})
        if unread.share > 0.5:
            progress.print(unread.sentence())
    return metrics


def pass_at(
    generator: Generator,
    params: Any,
    examples: Sequence[Example],
    k: int,
    seed: int,
    show: Callable[[int], None],
) -> dict[str, float]:
    """How often the correct label is among k chains sampled at temperature 1.

    Returns:
      ``pass_at_<k>``, and ``sampled_accuracy``, the share of correct labels among all k; over the
      labeled pairs, and nothing if there are none.
    """
    groups = generator.sample(params, examples, k, seed, show)
    correct = np.array(
        [
            [sample.chain.label == example.label for sample in group]
            for group, example in zip(groups, examples, strict=True)
            if example.label is not None
        ]
    )
    if not correct.size:
        return {}
    return {f"pass_at_{k}": pass_at_k(correct), "sampled_accuracy": float(correct.mean())}


def evaluation_fingerprint(dataset: PreparedDataset, config: EvalConfig) -> str:
    """Hash of the evaluated pairs: of every field that affects evaluation, whatever the data set.

    Which steps humans annotated does not: data sets that differ only in that have equal hashes.
    """
    digest = sha256(config.split.encode())
    for name in dict.fromkeys((config.split, LONGTAIL, VALIDATION)):
        if not dataset.splits.get(name):
            continue
        for pair in evenly_spaced(dataset, name, config.pairs):
            fields = (pair.query, dict(pair.product), pair.label, dict(pair.steps or {}), pair.kind)
            digest.update(json.dumps([name, *fields]).encode())
    return digest.hexdigest()[:12]


def evenly_spaced(dataset: PreparedDataset, split: str, limit: int) -> list[Example]:
    """Up to ``limit`` examples of a split, evenly spaced as a file may be sorted; 0 means all."""
    source = open_split(dataset.path, split)
    return [source[row] for row in evenly_spaced_rows(len(source), limit)]
