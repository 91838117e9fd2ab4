"""The rollouts of one update."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from she_jax.cot import Chain
from she_jax.rewards.verifier import FULL_REWARD
from she_jax.types import Example, StepBatch, TrainBatch


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """The rollouts of one update: the training batch, and the data for metrics and sample pages."""

    batch: TrainBatch
    metrics: dict[str, float]
    examples: Sequence[Example]
    texts: Sequence[str]
    chains: Sequence[Chain]
    steps: StepBatch
    outcome: np.ndarray  # outcome reward of each rollout, [B]
    rewards: np.ndarray  # hybrid step rewards, [B, S]
    known: np.ndarray  # which steps have a reward, [B, S]
    advantages: np.ndarray  # of each step's tokens, [B, S]
    informative: np.ndarray  # groups that may carry a learning signal, [N]
    by_label: bool = True  # the outcome of a pair without a label is unknown
    # Groups that were sampled and not used: prompt, pass rate, whether it was informative.
    dropped: tuple[tuple[Example, float, bool], ...] = ()

    @property
    def pass_rates(self) -> np.ndarray:
        """The share of correct rollouts in each group, according to the verifier, [N]."""
        correct = np.asarray(self.steps.outcome) >= FULL_REWARD
        return correct.reshape(len(self.examples), -1).mean(axis=1)

    @property
    def rates(self) -> tuple[list[Example], list[float]]:
        """All sampled prompts, including the dropped ones, and their pass rates.

        If outcomes go by labels, this excludes prompts without one.
        """
        used = zip(self.examples, self.pass_rates.tolist(), strict=True)
        sampled = [*((example, rate) for example, rate, _ in self.dropped), *used]
        known = [(e, rate) for e, rate in sampled if e.label is not None or not self.by_label]
        return [example for example, _ in known], [rate for _, rate in known]
