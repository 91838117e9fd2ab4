"""The figures of a judge: macro F1 and its peers, per class, per step and per kind of query."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from she_jax.cot import Chain, CotSchema
from she_jax.types import Example

UNREAD = 0  # the prediction of a chain whose label cannot be read; never a gold class
CLASSES = (1, 2, 3, 4)
RESAMPLES = 500


def score(
    chains: Sequence[Chain], examples: Sequence[Example], schema: CotSchema
) -> dict[str, Any]:
    """Scores parsed chains against the truth.

    Examples without a gold label are left out of every figure but ``parse_rate``. A chain whose
    label cannot be read counts as wrong everywhere. A figure over nothing is None.

    Args:
      chains: a chain an example, parsed by ``schema``.
      examples: the pairs, in the same order.
      schema: the steps of the chains.

    Returns:
      A dict that JSON can hold:
        macro_f1: mean F1 over the classes that are present in the gold labels.
        macro_f1_se: its standard error (bootstrap over pairs, fixed seed); pairs of one query are
          treated as independent, so it is a lower bound where queries repeat.
        accuracy: share of right labels.
        good_f1: F1 of "good" (classes 3 and 4 against 1 and 2); None without a good one in the
          gold. An unread label counts as the wrong side.
        f1: class ("1" to "4") to its F1, None for a class absent from the gold.
        step_accuracy: step to the share of right verdicts, over the examples where its truth is
          known; a missing or unreadable verdict is wrong. The label is not among them: that is
          ``accuracy``.
        wrong_reason: share of pairs, among those of which a step's truth is known, whose label is
          right although the verdict of such a step is not.
        parse_rate: share of well-formed chains, over all chains.
        confusion: gold class 1 to 4 down, predicted 1 to 4 and "none" across.
        n: number of examples scored.
        by_kind: kind of query to its own ``macro_f1`` and ``n``; "unknown" where it has no name.

    Raises:
      ValueError: if there are not as many chains as examples.
    """
    if len(chains) != len(examples):
        raise ValueError(f"{len(chains)} chains for {len(examples)} examples: expected one each")
    parsed = [chain.well_formed for chain in chains]
    rows = [(c, e) for c, e in zip(chains, examples, strict=True) if e.label is not None]
    gold = np.array([example.label for _, example in rows], int)
    predicted = np.array([chain.label or UNREAD for chain, _ in rows], int)
    kinds = np.array([example.kind or "unknown" for _, example in rows], str)
    confusion = np.zeros((4, 5), int)
    if rows:
        confusion = confusion_matrix(gold, predicted, labels=[*CLASSES, UNREAD])[:4]
    present = confusion.sum(1) > 0
    f1 = _class_f1(confusion)
    verdicts = [right_verdicts(chain, example, schema) for chain, example in rows]
    return {
        "macro_f1": _macro_f1(gold, predicted),
        "macro_f1_se": _macro_f1_se(confusion),
        "accuracy": float(accuracy_score(gold, predicted)) if rows else None,
        "good_f1": _good_f1(gold, predicted),
        "f1": {str(c): float(f1[c - 1]) if present[c - 1] else None for c in CLASSES},
        "step_accuracy": _step_accuracy(verdicts, schema),
        "wrong_reason": _wrong_reason(verdicts, gold == predicted),
        "parse_rate": float(np.mean(parsed)) if parsed else None,
        "confusion": confusion.tolist(),
        "n": len(rows),
        "by_kind": {
            str(kind): {
                "macro_f1": _macro_f1(gold[kinds == kind], predicted[kinds == kind]),
                "n": int(np.sum(kinds == kind)),
            }
            for kind in np.unique(kinds)
        },
    }


def pass_at_k(correct: Bool[np.ndarray, "N K"]) -> float:
    """Share of prompts with at least one right rollout among their K.

    Args:
      correct: whether rollout k of prompt n is right; N and K at least 1.
    """
    if correct.size == 0:
        raise ValueError(
            f"correct has shape {correct.shape}: expected at least one prompt and rollout"
        )
    return float(np.mean(np.any(correct, axis=1)))


def _macro_f1(gold: Int[np.ndarray, "M"], predicted: Int[np.ndarray, "M"]) -> float | None:
    if not gold.size:
        return None
    labels = np.unique(gold)
    return float(f1_score(gold, predicted, labels=labels, average="macro"))


def _good_f1(gold: Int[np.ndarray, "M"], predicted: Int[np.ndarray, "M"]) -> float | None:
    good = gold >= 3
    if not good.any():
        return None
    return float(f1_score(good, np.where(predicted == UNREAD, ~good, predicted >= 3)))


def _class_f1(confusion: Int[np.ndarray, "*R 4 5"]) -> np.ndarray:
    """F1 = 2 TP / (2 TP + FP + FN) of each class; 0 where it is neither there nor predicted."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    both = confusion.sum(-1) + confusion.sum(-2)[..., :4]
    return 2 * hits / np.maximum(both, 1)


def _macro_f1_se(confusion: Int[np.ndarray, "4 5"]) -> float | None:
    """Resampling pairs with replacement is drawing the confusion matrix from a multinomial."""
    n = int(confusion.sum())
    if n == 0:
        return None
    draws = np.random.default_rng(0).multinomial(n, confusion.ravel() / n, size=RESAMPLES)
    present = confusion.sum(1) > 0
    return float(_class_f1(draws.reshape(-1, 4, 5))[:, present].mean(1).std())


def right_verdicts(chain: Chain, example: Example, schema: CotSchema) -> dict[str, bool]:
    """Whether each step's verdict is the true one, for the steps whose truth is known."""
    truth = example.steps or {}
    return {
        step.name: (parsed.verdict if parsed else None) == truth[step.name]
        for step, parsed in zip(schema.steps, chain.steps, strict=True)
        if step.verdicts and step.name != "label" and step.name in truth
    }


def _step_accuracy(verdicts: list[dict[str, bool]], schema: CotSchema) -> dict[str, float]:
    right = {name: [own[name] for own in verdicts if name in own] for name in schema.names}
    return {name: float(np.mean(own)) for name, own in right.items() if own}


def _wrong_reason(
    verdicts: list[dict[str, bool]], label_right: Bool[np.ndarray, "M"]
) -> float | None:
    known = [
        bool(right and not all(own.values()))
        for own, right in zip(verdicts, label_right, strict=True)
        if own
    ]
    return float(np.mean(known)) if known else None
