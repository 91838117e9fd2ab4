"""Asking a policy: greedy chains for judging, sampled ones for pass@k."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from she_jax.cot import Chain
from she_jax.rl.sampling import jit_sample
from she_jax.train.evaluate import pass_at_k
from she_jax.train.setup import Policy
from she_jax.types import Example, Rollout

Show = Callable[[int], None]


class Judge:
    """Reads chains off a policy, a batch at a time, whatever its parameters are at the moment.

    Args:
      policy: model, prompts and devices; its parameters are not kept.
      batch_size: pairs at a time; the last batch is filled up with repetitions.
    """

    def __init__(self, policy: Policy, batch_size: int):
        self.format, self._batch_size = policy.format, batch_size
        self._policy = policy
        self._greedy = self._sampler(1)

    def _sampler(self, group_size: int) -> Callable[..., Rollout]:
        return jit_sample(
            self._policy.model,
            group_size=group_size,
            max_new_tokens=self.format.completion_length,
            eos_id=self.format.eos_ids,
            pad_id=self.format.pad_id,
            mesh=self._policy.mesh,
        )

    def chains(self, params: Any, examples: Sequence[Example], show: Show) -> list[Chain]:
        """The greedy chain of each pair. ``show`` is told how many pairs are done."""
        chains: list[Chain] = []
        for part in self._parts(examples, self._batch_size):
            rollout = self._ask(
                self._greedy, params, part, self._batch_size, jax.random.key(0), 0.0
            )
            chains += self._read(rollout)[: len(part)]
            show(len(chains))
        return chains

    def pass_at(
        self, params: Any, examples: Sequence[Example], k: int, seed: int, show: Show
    ) -> dict[str, float]:
        """How often the right label is among k chains sampled at temperature 1.

        Returns:
          ``pass_at_k`` and ``pass_at_1`` (the share of right labels among all that was sampled).
        """
        sampler, size = self._sampler(k), max(1, self._batch_size // k)
        right: list[list[bool]] = []
        for part in self._parts(examples, size):
            key = jax.random.fold_in(jax.random.key(seed), len(right))
            labels = [c.label for c in self._read(self._ask(sampler, params, part, size, key, 1.0))]
            for n, example in enumerate(part):
                right.append([label == example.label for label in labels[n * k : (n + 1) * k]])
            show(len(right))
        correct = np.array(right)
        return {f"pass_at_{k}": pass_at_k(correct), "pass_at_1": float(correct.mean())}

    @staticmethod
    def _parts(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
        return [examples[i : i + size] for i in range(0, len(examples), size)]

    def _ask(
        self,
        sampler: Callable[..., Rollout],
        params: Any,
        part: Sequence[Example],
        size: int,
        key: jax.Array,
        temperature: float,
    ) -> Rollout:
        filled = [*part, *[part[-1]] * (size - len(part))]
        return jax.device_get(sampler(params, self.format.prompts(filled)[0], key, temperature))

    def _read(self, rollout: Rollout) -> list[Chain]:
        return [self.format.schema.parse(text) for text in self.format.texts(rollout)]
