"""What an update learns from, and how groups that teach nothing give way to others."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from she_jax.cot import Chain, CotSchema
from she_jax.data.examinations import FULL_MARKS
from she_jax.train.examiner import Examiner, chain_examinations
from she_jax.train.report import write_samples
from she_jax.types import Example, StepBatch, TrainBatch


@dataclass(frozen=True, kw_only=True)
class Experience:
    """One step's rollouts, as the update reads them and as people do."""

    batch: TrainBatch
    figures: dict[str, float]
    examples: Sequence[Example]
    texts: Sequence[str]
    chains: Sequence[Chain]
    steps: StepBatch
    outcome: np.ndarray  # reward of each rollout, [B]
    rewards: np.ndarray  # of each step, the hybrid's, [B, S]
    known: np.ndarray  # where there is one, [B, S]
    advantages: np.ndarray  # of each step's tokens, [B, S]
    informative: np.ndarray  # groups that are not known to teach nothing, [N]
    # Groups that were sampled and not taken: prompt, pass rate, whether it was informative.
    dropped: tuple[tuple[Example, float, bool], ...] = ()

    @property
    def pass_rates(self) -> np.ndarray:
        """The share of each group's rollouts that the verifier finds right, [N]."""
        right = np.asarray(self.steps.outcome) >= FULL_MARKS
        return right.reshape(len(self.examples), -1).mean(axis=1)

    @property
    def rates(self) -> tuple[list[Example], list[float]]:
        """All prompts that were sampled, the dropped ones too, and their pass rates.

        Without those that nobody judged: of them no rollout can come out right.
        """
        kept = zip(self.examples, self.pass_rates.tolist(), strict=True)
        every = [*((example, rate) for example, rate, _ in self.dropped), *kept]
        known = [(example, rate) for example, rate in every if example.label is not None]
        return [example for example, _ in known], [rate for _, rate in known]

    def write(
        self,
        path: Path,
        step: int,
        schema: CotSchema,
        examiner: Examiner | None = None,
        groups: int = 2,
    ) -> None:
        """Writes the first few groups as a page one can read, with the examiner's remarks."""
        size = len(self.texts) // len(self.examples)
        rows, remarks = size * groups, {}
        if examiner is not None:
            owners = [example for example in self.examples[:groups] for _ in range(size)]
            where, steps = chain_examinations(self.chains[:rows], owners, schema)
            scores, scored = map(np.asarray, (self.steps.model_score, self.steps.model_known))
            said = zip(where, examiner.remarks(steps), strict=True)
            remarks = {
                place: f"{f'{scores[place]:.2f}' if scored[place] else 'unknown'} {text}"
                for place, text in said
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


def refilled(
    collect: Callable[[Any, Sequence[Example], Array], Experience],
    params: Any,
    draw: Callable[[], Sequence[Example]],
    key: Array,
    rounds: int,
) -> Experience:
    """Experience whose groups the verifier tells apart, as far as so many rounds can make it so.

    Groups that teach nothing give way to informative ones of another batch of prompts; those of the
    first batch that are informative stay. After the last round what is left stays too: it has no
    advantage but what a reward model gives it. Groups that were sampled and not taken are counted,
    ``dropped`` those that teach nothing and ``surplus`` those for which there was no place, and
    they count in the running pass rates. All other figures are of the first batch, which is what
    the policy meets, but ``zero_variance/refilled``, ``sampled_tokens`` and the times. DAPO's
    dynamic sampling (arXiv 2503.14476, section 3.2), with a bound.

    Args:
      collect: a ``she_jax.train.rollouts.Collector``.
      params: of the policy.
      draw: gives the next batch of prompts.
      key: consumed.
      rounds: further batches at most, >= 0.
    """
    seen = collect(params, draw(), key)
    used = 0
    while used < rounds and not seen.informative.all():
        used += 1
        # Far from the numbers of tokens, which the sampler folds into its own key.
        seen = _replaced(seen, collect(params, draw(), jax.random.fold_in(key, 2**31 - used)))
    if not rounds:
        return seen
    surplus = sum(informative for *_, informative in seen.dropped)
    figures = {
        "refills": used,
        "dropped": len(seen.dropped) - surplus,
        "surplus": surplus,
        "zero_variance/refilled": 1.0 - float(seen.informative.mean()),
    }
    return dataclasses.replace(seen, figures=seen.figures | figures)


def _replaced(seen: Experience, more: Experience) -> Experience:
    """The uninformative groups of one experience exchanged for informative ones of another."""
    gaps, found = np.flatnonzero(~seen.informative), np.flatnonzero(more.informative)
    count, groups = min(len(gaps), len(found)), len(seen.examples)
    source = np.arange(groups)
    source[gaps[:count]] = groups + found[:count]
    size = len(seen.texts) // groups
    rows = (source[:, None] * size + np.arange(size)).reshape(-1)

    def by_row(one: Any, other: Any) -> Any:
        """Rows of arrays of rollouts; what is one for all stays."""
        if not np.ndim(one):
            return one
        module = np if isinstance(one, np.ndarray) else jnp
        return module.concatenate([one, other])[rows]

    both = [*seen.examples, *more.examples]
    rates = np.concatenate([seen.pass_rates, more.pass_rates])
    left = np.setdiff1d(np.arange(len(both)), source)
    arrays = {
        name: jax.tree.map(by_row, getattr(seen, name), getattr(more, name))
        for name in ("batch", "steps", "outcome", "rewards", "known", "advantages")
    }
    informative = np.concatenate([seen.informative, more.informative])
    figures = {
        name: value + more.figures[name] if name.startswith(("time/", "sampled")) else value
        for name, value in seen.figures.items()
    }
    return Experience(
        **arrays,
        figures=figures,
        examples=[both[n] for n in source],
        texts=[[*seen.texts, *more.texts][row] for row in rows],
        chains=[[*seen.chains, *more.chains][row] for row in rows],
        informative=informative[source],
        dropped=(
            *seen.dropped,
            *((both[n], float(rates[n]), bool(informative[n])) for n in left),
        ),
    )
