"""The batch of rollouts of one update, and dynamic sampling of informative groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from she_jax.cot import Chain, CotSchema
from she_jax.rewards.prm.model import Examiner, chain_examinations
from she_jax.rewards.verifier import FULL_MARKS
from she_jax.rollouts.page import write_samples
from she_jax.types import Example, StepBatch, TrainBatch


@dataclass(frozen=True, kw_only=True)
class Experience:
    """The rollouts of one update: the training batch, and the data for metrics and sample pages."""

    batch: TrainBatch
    figures: dict[str, float]
    examples: Sequence[Example]
    texts: Sequence[str]
    chains: Sequence[Chain]
    steps: StepBatch
    outcome: np.ndarray  # outcome reward of each rollout, [B]
    rewards: np.ndarray  # hybrid step rewards, [B, S]
    known: np.ndarray  # which steps have a reward, [B, S]
    advantages: np.ndarray  # of each step's tokens, [B, S]
    informative: np.ndarray  # groups that may carry a learning signal, [N]
    # Groups that were sampled and not used: prompt, pass rate, whether it was informative.
    dropped: tuple[tuple[Example, float, bool], ...] = ()

    @property
    def pass_rates(self) -> np.ndarray:
        """The share of correct rollouts in each group, according to the verifier, [N]."""
        correct = np.asarray(self.steps.outcome) >= FULL_MARKS
        return correct.reshape(len(self.examples), -1).mean(axis=1)

    @property
    def rates(self) -> tuple[list[Example], list[float]]:
        """All sampled prompts, including the dropped ones, and their pass rates.

        Excludes prompts without a label, for which no rollout can count as correct.
        """
        used = zip(self.examples, self.pass_rates.tolist(), strict=True)
        sampled = [*((example, rate) for example, rate, _ in self.dropped), *used]
        labeled = [(example, rate) for example, rate in sampled if example.label is not None]
        return [example for example, _ in labeled], [rate for _, rate in labeled]

    def write(
        self,
        path: Path,
        step: int,
        schema: CotSchema,
        examiner: Examiner | None = None,
        groups: int = 2,
    ) -> None:
        """Writes the first groups as a Markdown page, with the remarks of the PRM if given."""
        size = len(self.texts) // len(self.examples)
        rows, remarks = size * groups, {}
        if examiner is not None:
            examples = [example for example in self.examples[:groups] for _ in range(size)]
            indices, queries = chain_examinations(self.chains[:rows], examples, schema)
            scores, known = map(np.asarray, (self.steps.model_score, self.steps.model_known))
            remarks = {
                index: f"{f'{scores[index]:.2f}' if known[index] else 'unknown'} {text}"
                for index, text in zip(indices, examiner.remarks(queries), strict=True)
            }
        write_samples(
            path,
            step=step,
            schema=schema,
            examples=self.examples[:groups],
            texts=self.texts[:rows],
            chains=self.chains[:rows],
            rewards=self.rewards[:rows],
            advantages=self.advantages[:rows],
            step_mask=self.known[:rows],
            outcomes=self.outcome[:rows],
            remarks=remarks,
        )
