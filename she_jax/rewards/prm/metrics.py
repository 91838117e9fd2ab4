"""Metrics of a process reward model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32
from rich.table import Table
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from she_jax.cot import CotSchema
from she_jax.rewards.prm.dataset import POLICY
from she_jax.rewards.prm.model import Scores
from she_jax.rewards.prm.step_query import (
    Examination,
)
from she_jax.rewards.verifier import FULL_MARKS
from she_jax.training.logging import rows_table


def contradictions(
    verifier: Float32[np.ndarray, "B S"],
    verifier_known: Bool[np.ndarray, "B S"],
    scores: Scores,
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
      ``examiner/<step>``, the mean of the known scores. ``disagreement/<step>``, the share of
      disagreement among the steps that both know. ``examiner`` and ``disagreement`` are the same
      over all steps. A metric with no such step is left out.
    """
    both_known = verifier_known & scores.known
    disagree = both_known & ((verifier >= FULL_MARKS) != (scores.score >= 0.5))
    columns = {f"/{name}": slice(k, k + 1) for k, name in enumerate(schema.names)}
    metrics = {}
    for name, column in (columns | {"": slice(None)}).items():
        if known := scores.known[:, column].sum():
            score = np.where(scores.known, scores.score, 0.0)[:, column].sum() / known
            metrics[f"examiner{name}"] = float(score)
        if count := both_known[:, column].sum():
            metrics[f"disagreement{name}"] = float(disagree[:, column].sum() / count)
    return metrics


BINS = 10  # of the calibration error


def examiner_figures(pool: Sequence[Examination], told: Scores) -> dict[str, Any]:
    """Scores against the truth, all of them, by step and by source.

    Returns:
      ``n``, ``unreadable`` (left out of the rest), ``incorrect`` (share of wrong steps),
      ``accuracy``, ``f1_incorrect``, ``auroc``, ``ece`` (see ``calibration_error``),
      ``agreement`` (with the verifier, over the steps that humans annotated); the same in
      ``by_step`` and ``by_source``, and for the policy's own steps ``policy_by_step`` and
      ``policy_by_phase`` (``sft`` is its cold start, ``srpo`` its best); and ``first_errors``, see
      there. A figure over nothing, or of one verdict alone where it needs both, is None.
    """
    steps = np.array([one.step for one in pool])
    sources = np.array([one.source for one in pool])
    truth = np.array([one.correct for one in pool], bool)
    annotated = np.array([one.annotated for one in pool], bool)

    def of(chosen: np.ndarray) -> dict[str, Any]:
        """The figures of some of the examinations."""
        return _figures(truth[chosen], annotated[chosen], told, chosen)

    own = sources == POLICY
    phases = np.array([one.chain.split("/")[-2] if one.source == POLICY else "" for one in pool])
    return of(np.ones(len(pool), bool)) | {
        "by_step": {str(name): of(steps == name) for name in dict.fromkeys(steps)},
        "by_source": {str(name): of(sources == name) for name in dict.fromkeys(sources)},
        "policy_by_step": {
            str(name): of(own & (steps == name)) for name in dict.fromkeys(steps[own])
        },
        "policy_by_phase": {str(name): of(phases == name) for name in dict.fromkeys(phases[own])},
        "first_errors": first_errors(pool, told),
    }


def _figures(
    truth: np.ndarray, annotated: np.ndarray, told: Scores, chosen: np.ndarray
) -> dict[str, Any]:
    known = told.known[chosen]
    both = annotated & known
    agree = (told.score[chosen] >= 0.5) == truth
    score, right = told.score[chosen][known], truth[known]
    return {
        "n": len(truth),
        "unreadable": int((~known).sum()),
        "incorrect": float(1 - truth.mean()) if len(truth) else None,
        "f1_incorrect": float(f1_score(~right, score < 0.5)) if not right.all() else None,
        "agreement": float(agree[both].mean()) if both.any() else None,
    } | score_figures(right, score)


def score_figures(right: np.ndarray, score: np.ndarray) -> dict[str, float | None]:
    """``accuracy`` from one half on, ``auroc`` and ``ece`` of probabilities of being right.

    A figure over nothing, or of one outcome alone where it needs both, is None.
    """
    both = len(set(right.tolist())) == 2
    return {
        "accuracy": float(accuracy_score(right, score >= 0.5)) if len(right) else None,
        "auroc": float(roc_auc_score(right, score)) if both else None,
        "ece": calibration_error(right, score) if len(right) else None,
    }


def calibration_error(right: np.ndarray, score: np.ndarray) -> float:
    """Expected calibration error: |share right - mean score| over equal bins, weighted by size.

    Guo et al. (arXiv 1706.04599), equation 3, for P(correct) in ``BINS`` bins.
    """
    place = np.minimum((score * BINS).astype(int), BINS - 1)
    gaps = np.bincount(place, right, BINS) - np.bincount(place, score, BINS)
    return float(np.abs(gaps).sum() / len(right))


def first_errors(pool: Sequence[Examination], told: Scores) -> dict[str, Any]:
    """How well the first error of the policy's chains is found.

    Returns:
      ``found``: the share, among chains with a wrong step, of those whose first wrong step is the
      first that the examiner calls incorrect; ``spared``: the share, among the others, of those in
      which it calls none incorrect; ``wrong`` and ``right``, how many of each there are. An unknown
      step is not called incorrect.
    """
    chains: dict[str, list[tuple[bool, bool]]] = {}
    for one, score, known in zip(pool, told.score, told.known, strict=True):
        if one.source == POLICY:
            called = bool(known and score < 0.5)
            chains.setdefault(one.chain, []).append((not one.correct, called))
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for steps in chains.values():
        wrong, called = ([n for n, step in enumerate(steps) if step[i]][:1] for i in (0, 1))
        hits[bool(wrong)].append(wrong == called)
    share = {flag: float(np.mean(own)) if own else None for flag, own in hits.items()}
    return {
        "found": share[True],
        "spared": share[False],
        "wrong": len(hits[True]),
        "right": len(hits[False]),
    }


def figures_table(title: str, told: dict[str, Any]) -> Table:
    """The figures of one split for the screen."""
    columns = ("n", "incorrect", "accuracy", "f1_incorrect", "auroc", "ece", "agreement")
    columns += ("unreadable",)
    rows = {"all": told}
    rows |= {f"step {name}": own for name, own in told["by_step"].items()}
    rows |= {f"source {name}": own for name, own in told["by_source"].items()}
    rows |= {f"policy's {name}": own for name, own in told["policy_by_step"].items()}
    rows |= {f"policy after {name}": own for name, own in told["policy_by_phase"].items()}
    table = rows_table(title, columns, rows)
    first = told["first_errors"]
    if first["found"] is not None:
        table.caption = f"first errors found: {first['found']:.3f} of {first['wrong']} chains"
    return table
