"""Metrics of an outcome reward model."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from she_jax.rewards.calibration import probability_metrics
from she_jax.rewards.orm.dataset import Outcome, contrastive_pairs


def orm_metrics(pool: Sequence[Outcome], score: np.ndarray) -> dict[str, Any]:
    """Metrics of scores against outcomes, overall and by the policy that wrote the chains.

    Returns:
      Those of ``counts``; ``accuracy``, ``auroc`` and ``ece`` of the scores as probabilities;
      ``ranking``, the share of all combinations of a correct and a wrong chain of one pair in which
      the correct one scores higher, a tie counting a half (None if there is no combination); the
      same of each policy in ``by_source``. Scores of pairwise training are no probabilities: only
      ``ranking`` is what they were trained for.
    """

    def subset(rows: Sequence[int]) -> dict[str, Any]:
        outcomes, scores = [pool[n] for n in rows], score[list(rows)]
        correct = np.array([outcome.right for outcome in outcomes], bool)
        wins = [
            np.heaviside(scores[better][:, None] - scores[worse], 0.5).ravel()
            for better, worse in contrastive_pairs(outcomes)[0]
        ]
        ranking = float(np.concatenate(wins).mean()) if wins else None
        return counts(outcomes) | probability_metrics(correct, scores) | {"ranking": ranking}

    sources: dict[str, list[int]] = {}
    for n, outcome in enumerate(pool):
        sources.setdefault(outcome.source, []).append(n)
    by_source = {name: subset(rows) for name, rows in sources.items()}
    return subset(range(len(pool))) | {"by_source": by_source}


def counts(pool: Sequence[Outcome]) -> dict[str, Any]:
    """Numbers of chains and of pairs with something to rank.

    Returns:
      ``n``, the chains; ``right``, the share of correct ones; ``mixed``, the pairs with both
      correct and wrong chains; ``all_right`` and ``all_wrong``, the pairs with only one kind.
    """
    mixed, all_right, all_wrong = contrastive_pairs(pool)
    return {
        "n": len(pool),
        "right": float(np.mean([outcome.right for outcome in pool])) if pool else None,
        "mixed": len(mixed),
        "all_right": all_right,
        "all_wrong": all_wrong,
    }
