"""Metrics of a process reward model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32
from rich.table import Table

from she_jax.cot import CotSchema
from she_jax.rewards.calibration import probability_metrics
from she_jax.rewards.prm.dataset import POLICY
from she_jax.rewards.prm.model import StepScores
from she_jax.rewards.prm.step_query import (
    StepQuery,
)
from she_jax.rewards.verifier import FULL_REWARD
from she_jax.training.logging import rows_table


def prm_diagnostics(
    verifier: Float32[np.ndarray, "B S"],
    verifier_known: Bool[np.ndarray, "B S"],
    scores: StepScores,
    schema: CotSchema,
) -> dict[str, float]:
    """Returns metrics of process reward model scores, and of their disagreement with the verifier.

    A step is correct for the verifier if its reward is 1, for the process reward model if its score
    is at least 1/2. Reward hacking shows here: the score rises and so does the disagreement.

    Args:
      verifier: verifier rewards in [0, 1], valid where ``verifier_known``.
      verifier_known: mask of the known ones.
      scores: ``[B, S]`` scores of the process reward model.
      schema: the steps.

    Returns:
      ``prm/<step>``, the mean of the known scores. ``disagreement/<step>``, the share of
      disagreement among the steps that both know. ``prm`` and ``disagreement`` are the same
      over all steps. A metric with no such step is left out.
    """
    both_known = verifier_known & scores.known
    disagree = both_known & ((verifier >= FULL_REWARD) != (scores.score >= 0.5))
    columns = {f"/{name}": slice(k, k + 1) for k, name in enumerate(schema.names)}
    metrics = {}
    for name, column in (columns | {"": slice(None)}).items():
        if known := scores.known[:, column].sum():
            score = np.where(scores.known, scores.score, 0.0)[:, column].sum() / known
            metrics[f"prm{name}"] = float(score)
        if count := both_known[:, column].sum():
            metrics[f"disagreement{name}"] = float(disagree[:, column].sum() / count)
    return metrics


def prm_metrics(pool: Sequence[StepQuery], scores: StepScores) -> dict[str, Any]:
    """Metrics of scores against the labels of step queries, overall, by step and by source.

    Returns:
      ``n``; ``unreadable``, the number of unknown scores, left out of the rest; ``incorrect``, the
      share of incorrect steps; ``accuracy``, ``f1_incorrect``, ``auroc``, ``ece`` (see
      ``calibration_error``); ``agreement`` with the verifier, over the annotated steps. The same in
      ``by_step`` and ``by_source``, and for the policy's steps in ``policy_by_step`` and
      ``policy_by_phase`` (``sft`` is its cold start, ``policy`` its best checkpoint). And
      ``first_errors``. A metric over nothing, or over one class where it needs both, is None.
    """
    steps = np.array([query.step for query in pool])
    sources = np.array([query.source for query in pool])
    labels = np.array([query.correct for query in pool], bool)
    annotated = np.array([query.annotated for query in pool], bool)

    def subset(rows: np.ndarray) -> dict[str, Any]:
        """The metrics of some of the step queries."""
        return _subset_metrics(labels[rows], annotated[rows], scores, rows)

    policy = sources == POLICY
    phases = np.array([q.chain.split("/")[-2] if q.source == POLICY else "" for q in pool])
    return subset(np.ones(len(pool), bool)) | {
        "by_step": {str(name): subset(steps == name) for name in dict.fromkeys(steps)},
        "by_source": {str(name): subset(sources == name) for name in dict.fromkeys(sources)},
        "policy_by_step": {
            str(name): subset(policy & (steps == name)) for name in dict.fromkeys(steps[policy])
        },
        "policy_by_phase": {
            str(name): subset(phases == name) for name in dict.fromkeys(phases[policy])
        },
        "first_errors": first_errors(pool, scores),
    }


def _subset_metrics(
    labels: np.ndarray, annotated: np.ndarray, scores: StepScores, rows: np.ndarray
) -> dict[str, Any]:
    from sklearn.metrics import f1_score  # slow, so not at every start

    known = scores.known[rows]
    both = annotated & known
    agree = (scores.score[rows] >= 0.5) == labels
    score, correct = scores.score[rows][known], labels[known]
    return {
        "n": len(labels),
        "unreadable": int((~known).sum()),
        "incorrect": float(1 - labels.mean()) if len(labels) else None,
        "f1_incorrect": float(f1_score(~correct, score < 0.5)) if not correct.all() else None,
        "agreement": float(agree[both].mean()) if both.any() else None,
    } | probability_metrics(correct, score)


def first_errors(pool: Sequence[StepQuery], scores: StepScores) -> dict[str, Any]:
    """How well the first error of the policy's chains is found.

    Returns:
      ``found``: among chains with an incorrect step, the share whose first incorrect step is the
      first one scored below 1/2. ``spared``: among the others, the share without a step scored
      below 1/2. ``wrong`` and ``right``: the numbers of both kinds of chains. A step whose score is
      unknown does not count as scored below 1/2.
    """
    chains: dict[str, list[tuple[bool, bool]]] = {}
    for query, score, known in zip(pool, scores.score, scores.known, strict=True):
        if query.source == POLICY:
            rejected = bool(known and score < 0.5)
            chains.setdefault(query.chain, []).append((not query.correct, rejected))
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for steps in chains.values():
        wrong, rejected = ([n for n, step in enumerate(steps) if step[i]][:1] for i in (0, 1))
        hits[bool(wrong)].append(wrong == rejected)
    share = {flag: float(np.mean(values)) if values else None for flag, values in hits.items()}
    return {
        "found": share[True],
        "spared": share[False],
        "wrong": len(hits[True]),
        "right": len(hits[False]),
    }


def metrics_table(title: str, metrics: dict[str, Any]) -> Table:
    """The metrics of one split as a table for the console."""
    columns = ("n", "incorrect", "accuracy", "f1_incorrect", "auroc", "ece", "agreement")
    columns += ("unreadable",)
    rows = {"all": metrics}
    rows |= {f"step {name}": values for name, values in metrics["by_step"].items()}
    rows |= {f"source {name}": values for name, values in metrics["by_source"].items()}
    rows |= {f"policy's {name}": values for name, values in metrics["policy_by_step"].items()}
    rows |= {f"policy from {name}": values for name, values in metrics["policy_by_phase"].items()}
    table = rows_table(title, columns, rows)
    first = metrics["first_errors"]
    if first["found"] is not None:
        table.caption = f"first errors found: {first['found']:.3f} of {first['wrong']} chains"
    return table
