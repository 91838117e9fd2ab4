"""Metrics of an outcome reward model."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from she_jax.rewards.orm.dataset import (
    Outcome,
    mixed_pairs,
)
from she_jax.rewards.prm.metrics import score_figures


def scalar_figures(pool: Sequence[Outcome], score: np.ndarray) -> dict[str, Any]:
    """Scores against the outcomes, all of them and by the policy that wrote the chains.

    Returns:
      what ``counts`` tells; ``accuracy``, ``auroc`` and ``ece`` of the scores as probabilities;
      ``ranking``: of all ways to take a right and a wrong chain of one pair, the share in which the
      right one scores higher, a tie counting a half (None where there is no such way); the same of
      each policy in ``by_source``. The scores of pairwise training are no probabilities: only
      ``ranking`` is what they were trained for.
    """

    def of(chosen: Sequence[int]) -> dict[str, Any]:
        own, told = [pool[n] for n in chosen], score[list(chosen)]
        right = np.array([one.right for one in own], bool)
        wins = [
            np.heaviside(told[better][:, None] - told[worse], 0.5).ravel()
            for better, worse in mixed_pairs(own)[0]
        ]
        ranking = float(np.concatenate(wins).mean()) if wins else None
        return counts(own) | score_figures(right, told) | {"ranking": ranking}

    sources: dict[str, list[int]] = {}
    for n, one in enumerate(pool):
        sources.setdefault(one.source, []).append(n)
    return of(range(len(pool))) | {"by_source": {name: of(rows) for name, rows in sources.items()}}


def counts(pool: Sequence[Outcome]) -> dict[str, Any]:
    """Chains, the share of right ones, and what the pairs give to rank.

    Returns:
      ``n``, ``right``; ``mixed``, the pairs with right and wrong chains; ``all_right`` and
      ``all_wrong``, the pairs from which nothing can be ranked.
    """
    mixed, all_right, all_wrong = mixed_pairs(pool)
    return {
        "n": len(pool),
        "right": float(np.mean([one.right for one in pool])) if pool else None,
        "mixed": len(mixed),
        "all_right": all_right,
        "all_wrong": all_wrong,
    }
