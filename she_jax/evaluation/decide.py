"""From several sampled chains of a pair to one label, and how sure it is.

The shares of the votes stand for class probabilities: where eight samples agree the label is right
far more often than where five do. (The probability that a model gives its label at the end of one
chain is conditional on that chain, and says nothing.) Labels are class indices 0 to K - 1, worst to
best; ``UNREAD`` is a chain without one, which has no vote.

Sources: TaoSR1 (arXiv 2508.12365), "CumPT", one threshold on cumulative probabilities, as the
public digest gives it; how the threshold is fitted and ``auto`` are Reconstruction.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from she_jax.evaluation.agreement import confusions, macro_f1
from she_jax.evaluation.intervals import difference_of_sums

UNREAD = -1
RULES = ("greedy", "majority", "cumulative")
THRESHOLDS = 1_001  # sums between which a threshold is tried, evenly spaced among those that occur
AUTO = "auto"  # the best rule on validation, see ``choose_rule``
FEW = 500  # validation pairs below which ``choose_rule`` takes the majority
_MARGIN = 1e-9  # shares of k votes hit a threshold exactly, but for the rounding of their sums


def count_votes(labels: Int[np.ndarray, "N k"], classes: int) -> Int[np.ndarray, "N K"]:
    """The votes of each class.

    Args:
      labels: class indices of k sampled chains of each pair, or ``UNREAD``.
      classes: K.

    Raises:
      ValueError: if a label is neither.
    """
    labels = np.asarray(labels, int)
    if labels.size and not UNREAD <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels {labels.min()} to {labels.max()}: expected -1 to {classes - 1}")
    return (labels[:, :, None] == np.arange(classes)).sum(1)


def vote_shares(votes: Int[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """The shares of the votes; NaN for a pair without any."""
    with np.errstate(invalid="ignore"):
        return votes / votes.sum(1, keepdims=True)


def majority(shares: Float[np.ndarray, "N K"]) -> Int[np.ndarray, "N"]:
    """The class of most votes, the worst of several; ``UNREAD`` without votes."""
    return np.where(np.isnan(shares).any(1), UNREAD, shares.argmax(1))


def cumulative(shares: Float[np.ndarray, "N K"], threshold: float) -> Int[np.ndarray, "N"]:
    """The best class such that it and all better ones together have the threshold (CumPT).

    Args:
      shares: class probabilities, worst to best; rows that sum to 1, or are NaN.
      threshold: in (0, 1]. A low one gives better classes than ``majority``, a high one worse.

    Returns:
      Class indices, 0 where no better one reaches it; ``UNREAD`` for rows of NaN.
    """
    at_least = np.cumsum(shares[:, ::-1], 1)[:, ::-1]  # the probability of this class or a better
    reached = at_least >= threshold - _MARGIN
    reached[:, 0] = True
    best = shares.shape[1] - 1 - reached[:, ::-1].argmax(1)
    return np.where(np.isnan(shares).any(1), UNREAD, best)


def fit_threshold(
    shares: Float[np.ndarray, "N K"], gold: Int[np.ndarray, "N"]
) -> tuple[float, float]:
    """The threshold of ``cumulative`` with the best macro F1, and that macro F1.

    All thresholds between two sums that occur give the same classes; the middle of the widest best
    range is taken, of several the one nearest to 1/2.

    Args:
      shares: class probabilities of validation pairs.
      gold: their class indices.
    """
    sums = np.cumsum(shares[~np.isnan(shares).any(1)][:, ::-1], 1)[:, :-1]
    edges = np.unique(np.round(np.append(sums, (0.0, 1.0)), 9))
    edges = edges[np.linspace(0, len(edges) - 1, min(len(edges), THRESHOLDS)).astype(int)]
    middles, widths = (edges[1:] + edges[:-1]) / 2, np.round(edges[1:] - edges[:-1], 9)
    scores = np.array([_macro_f1(gold, cumulative(shares, middle), shares) for middle in middles])
    best = scores >= scores.max() - _MARGIN
    widest = np.flatnonzero(best & (widths == widths[best].max()))
    chosen = widest[np.abs(middles[widest] - 0.5).argmin()]
    return float(middles[chosen]), float(scores[chosen])


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How the chains of a pair become one label.

    Attributes:
      rule: one of ``RULES``.
      threshold: of ``cumulative``, in (0, 1]; None for the other rules.
    """

    rule: str = "greedy"
    threshold: float | None = None

    def __post_init__(self):
        if self.rule not in RULES:
            raise ValueError(f"rule {self.rule!r}: expected one of {', '.join(RULES)}")
        if (self.rule == "cumulative") != (self.threshold is not None):
            raise ValueError(f"rule {self.rule!r} with the threshold {self.threshold}")

    def labels(
        self, greedy: Int[np.ndarray, "N"] | None, shares: Float[np.ndarray, "N K"] | None
    ) -> Int[np.ndarray, "N"]:
        """The class index of each pair, or ``UNREAD``.

        Args:
          greedy: the class of its greedy chain; read by ``greedy`` alone.
          shares: of its votes; read by the other rules.

        Raises:
          ValueError: if the rule needs what is None.
        """
        if self.rule == "greedy" and greedy is not None:
            return greedy
        if self.rule == "greedy" or shares is None:
            missing = "greedy chains" if self.rule == "greedy" else "votes: sample some chains"
            raise ValueError(f"rule {self.rule!r} decides by {missing}")
        return majority(shares) if self.threshold is None else cumulative(shares, self.threshold)


@dataclass(frozen=True, kw_only=True)
class DecideConfig:
    """How the chains of a pair become one label.

    Attributes:
      samples: k, chains that vote; 0 for none.
      rule: one of ``RULES``, or ``auto``.
      chains: write chains; without them a policy that gives its label first gives the label alone.
      seed: of the samples.

    Raises:
      ValueError: if a number is out of its range, or the rule needs votes.
    """

    samples: int = 0
    rule: str = "greedy"
    chains: bool = True
    seed: int = 0

    def __post_init__(self):
        if self.samples < 0:
            raise ValueError(f"decide.samples={self.samples}: expected 0 or more")
        if self.rule not in (*RULES, AUTO):
            rules = ", ".join((*RULES, AUTO))
            raise ValueError(f"decide.rule={self.rule!r}: expected one of {rules}")
        if self.samples and not self.chains:
            raise ValueError(f"decide.samples={self.samples} are chains: set decide.chains=true")


def choose_rule(
    queries: Sequence[Hashable],
    gold: Int[np.ndarray, "N"],
    greedy: Int[np.ndarray, "N"],
    shares: Float[np.ndarray, "N K"],
    threshold: float,
) -> tuple[Decision, dict[str, float]]:
    """The rule with the best macro F1 on validation pairs, and the macro F1 of each rule.

    It is the majority where there are fewer than ``FEW`` pairs, or where the best rule is better
    than the majority by less than a standard error (by query, of the difference on the same draws).

    Args:
      queries: the query of each pair.
      gold: class indices.
      greedy: the class of each greedy chain, or ``UNREAD``.
      shares: of the votes.
      threshold: of ``cumulative``, see ``fit_threshold``.
    """
    rules = {
        "greedy": Decision(),
        "majority": Decision(rule="majority"),
        "cumulative": Decision(rule="cumulative", threshold=threshold),
    }
    chosen = {name: rule.labels(greedy, shares) for name, rule in rules.items()}
    scores = {name: _macro_f1(gold, labels, shares) for name, labels in chosen.items()}
    best = max(scores, key=lambda name: (scores[name], name == "majority"))
    if len(gold) < FEW or best == "majority":
        return rules["majority"], scores
    sides = (_confusions(gold, chosen[name], shares) for name in (best, "majority"))
    gap = difference_of_sums(queries, macro_f1, *sides)
    if gap.low is None or gap.high is None or gap.estimate is None:
        return rules["majority"], scores
    standard_error = (gap.high - gap.low) / (2 * 1.96)
    return rules[best if gap.estimate >= standard_error else "majority"], scores


def _confusions(
    gold: Int[np.ndarray, "N"], labels: Int[np.ndarray, "N"], shares: Float[np.ndarray, "N K"]
) -> Int[np.ndarray, "N C C"]:
    """The confusion matrices with one more class, K, for labels that are ``UNREAD``."""
    classes = shares.shape[1]
    return confusions(gold, np.where(labels == UNREAD, classes, labels), classes + 1)


def _macro_f1(
    gold: Int[np.ndarray, "N"], labels: Int[np.ndarray, "N"], shares: Float[np.ndarray, "N K"]
) -> float:
    size = shares.shape[1] + 1
    cells = np.bincount(np.asarray(gold) * size + labels % size, minlength=size * size)
    return float(macro_f1(cells.reshape(size, size)))
