"""Metrics of parsed chains: macro F1, accuracy and others, per class, step and kind of query."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from she_jax.cot import LABEL_STEP, Chain, CotSchema
from she_jax.types import Example

UNREAD = -1  # the predicted class of a chain without a readable label; never a gold class
RESAMPLES = 500  # of the bootstrap


def score(
    chains: Sequence[Chain], examples: Sequence[Example], schema: CotSchema
) -> dict[str, Any]:
    """Computes the metrics of parsed chains against gold labels and step annotations.

    Examples without a gold label are excluded from every metric except ``parse_rate``, unless the
    schema has no label. A chain without a readable label counts as wrong. A metric over no examples
    is None.

    Args:
      chains: one chain per example, parsed by ``schema``.
      examples: the pairs, in the same order.
      schema: the steps of the chains.

    Returns:
      A dict that can be written as JSON:
        macro_f1: mean F1 over the classes that are present in the gold labels.
        macro_f1_se: its standard error (bootstrap over pairs, fixed seed); pairs of one query are
          treated as independent, so it is a lower bound if queries repeat.
        accuracy: share of correct labels.
        good_f1: F1 of the label set's good values against the others; None if no gold label is
          good. An unreadable label counts as wrong.
        f1: label, as text, to its F1, None for a class absent from the gold labels.
        step_accuracy: step to the share of correct verdicts, over the examples whose truth for it
          is known; a missing or unreadable verdict is wrong. Excludes the label, which is
          ``accuracy``.
        right_for_wrong_reason: among the pairs with the truth of at least one step, the share with
          a correct label and a wrong verdict in such a step.
        parse_rate: share of well-formed chains, over all chains.
        confusion: rows are gold labels, worst to best, columns predicted ones and "none".
        n: number of examples scored.
        by_kind: kind of query to its ``macro_f1`` and ``n``; "unknown" if the kind is empty.

    Raises:
      ValueError: if the numbers of chains and examples differ.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix  # slow, so not at every start

    if len(chains) != len(examples):
        raise ValueError(f"{len(chains)} chains for {len(examples)} examples: expected one each")
    if schema.label_index < 0:
        return _score_steps(chains, examples, schema)
    labels, parsed, rows = schema.labels, 0, []
    known: dict[tuple[Any, ...], dict[str, bool]] = {}  # equal verdicts are the same object
    for chain, example in zip(chains, examples, strict=True):
        parsed += chain.well_formed
        if example.label is None:
            continue
        guess = UNREAD if chain.label is None else labels.index(chain.label)
        steps = correct_verdicts(chain, example, schema)
        steps = known.setdefault(tuple(steps.items()), steps)
        rows.append((labels.index(example.label), guess, example.kind or "unknown", steps))
    gold, predicted = (np.array([row[n] for row in rows], int) for n in (0, 1))
    kinds, verdicts = np.array([row[2] for row in rows], str), [row[3] for row in rows]
    classes = range(len(labels.values))
    confusion = np.zeros((len(classes), len(classes) + 1), int)
    if rows:
        confusion = confusion_matrix(gold, predicted, labels=[*classes, UNREAD])[:-1]
    present = confusion.sum(1) > 0
    f1 = _class_f1(confusion)
    return {
        "macro_f1": _macro_f1(gold, predicted),
        "macro_f1_se": _macro_f1_se(confusion),
        "accuracy": float(accuracy_score(gold, predicted)) if rows else None,
        "good_f1": _good_f1(gold, predicted, [labels.index(value) for value in labels.good]),
        "f1": {labels.texts[c]: float(f1[c]) if present[c] else None for c in classes},
        "step_accuracy": _step_accuracy(verdicts, schema),
        "right_for_wrong_reason": _right_for_wrong_reason(verdicts, gold == predicted),
        "parse_rate": parsed / len(chains) if chains else None,
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


def _score_steps(
    chains: Sequence[Chain], examples: Sequence[Example], schema: CotSchema
) -> dict[str, Any]:
    """The metrics of chains without a label."""
    pairs = zip(chains, examples, strict=True)
    verdicts = [correct_verdicts(chain, example, schema) for chain, example in pairs]
    return {
        **dict.fromkeys(("macro_f1", "macro_f1_se", "accuracy", "good_f1")),
        "f1": {},
        "step_accuracy": _step_accuracy(verdicts, schema),
        "right_for_wrong_reason": None,
        "parse_rate": float(np.mean([chain.well_formed for chain in chains])) if chains else None,
        "confusion": [],
        "n": len(chains),
        "by_kind": {},
    }


def pass_at_k(correct: Bool[np.ndarray, "N K"]) -> float:
    """pass@K: the share of prompts with at least one correct rollout among their K.

    Args:
      correct: whether rollout k of prompt n is correct; N and K at least 1.

    Raises:
      ValueError: if ``correct`` is empty.
    """
    if correct.size == 0:
        raise ValueError(
            f"correct has shape {correct.shape}: expected at least one prompt and rollout"
        )
    return float(np.mean(np.any(correct, axis=1)))


def _macro_f1(gold: Int[np.ndarray, "M"], predicted: Int[np.ndarray, "M"]) -> float | None:
    from sklearn.metrics import f1_score

    if not gold.size:
        return None
    labels = np.unique(gold)
    return float(f1_score(gold, predicted, labels=labels, average="macro"))


def _good_f1(
    gold: Int[np.ndarray, "M"], predicted: Int[np.ndarray, "M"], good_classes: Sequence[int]
) -> float | None:
    from sklearn.metrics import f1_score

    good = np.isin(gold, good_classes)
    if not good.any():
        return None
    chosen = np.where(predicted == UNREAD, ~good, np.isin(predicted, good_classes))
    return float(f1_score(good, chosen))


def _class_f1(confusion: Int[np.ndarray, "*R K C"]) -> np.ndarray:
    """F1 = 2 TP / (2 TP + FP + FN) of each class; 0 for a class neither present nor predicted."""
    true_positives = np.diagonal(confusion, axis1=-2, axis2=-1)
    gold_and_predicted = confusion.sum(-1) + confusion.sum(-2)[..., :-1]
    return 2 * true_positives / np.maximum(gold_and_predicted, 1)


def _macro_f1_se(confusion: Int[np.ndarray, "K C"]) -> float | None:
    """Bootstrap standard error: resampled pairs have a multinomial confusion matrix."""
    n = int(confusion.sum())
    if n == 0:
        return None
    draws = np.random.default_rng(0).multinomial(n, confusion.ravel() / n, size=RESAMPLES)
    present = confusion.sum(1) > 0
    return float(_class_f1(draws.reshape(-1, *confusion.shape))[:, present].mean(1).std())


def correct_verdicts(chain: Chain, example: Example, schema: CotSchema) -> dict[str, bool]:
    """Whether each verdict is correct, for the steps with known truth; the label is excluded."""
    truth = example.steps or {}
    return {
        step.name: (parsed.verdict if parsed else None) == truth[step.name]
        for step, parsed in zip(schema.steps, chain.steps, strict=True)
        if step.verdicts and step.name != LABEL_STEP and truth.get(step.name) in step.verdicts
    }


def _step_accuracy(verdicts: list[dict[str, bool]], schema: CotSchema) -> dict[str, float]:
    by_step = {name: [steps[name] for steps in verdicts if name in steps] for name in schema.names}
    return {name: float(np.mean(correct)) for name, correct in by_step.items() if correct}


def _right_for_wrong_reason(
    verdicts: list[dict[str, bool]], label_correct: Bool[np.ndarray, "M"]
) -> float | None:
    right_for_wrong_reason = [
        bool(correct and not all(steps.values()))
        for steps, correct in zip(verdicts, label_correct, strict=True)
        if steps
    ]
    return float(np.mean(right_for_wrong_reason)) if right_for_wrong_reason else None
