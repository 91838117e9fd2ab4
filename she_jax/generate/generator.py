"""Generation with a policy: greedy chains, sampled completions, and a file of predictions."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from she_jax.cot import Chain
from she_jax.data.dataset import ExampleSource
from she_jax.evaluation.metrics import pass_at_k
from she_jax.generate.language_model import Policy
from she_jax.generate.sampler import jit_sample
from she_jax.training.logging import say
from she_jax.types import Example, Rollout

Show = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sampled completion: its tokens with the end-of-sequence token, its text, its parsed chain.

    ``truncated`` means that it has no end-of-sequence token.
    """

    tokens: tuple[int, ...]
    text: str
    chain: Chain
    truncated: bool


class Judge:
    """Generator of a policy's chains, batch by batch, greedy or sampled, with any parameters.

    Args:
      policy: model, prompts and devices; its parameters are not used.
      batch_size: completions per batch; the last batch is padded with repetitions.
    """

    def __init__(self, policy: Policy, batch_size: int):
        self.format, self._policy = policy.format, policy
        self._devices = policy.mesh.shape["data"] * policy.mesh.shape["fsdp"]
        self._batch_size = self._round_up(batch_size)
        self._samplers: dict[int, Callable[..., Rollout]] = {}
        self._reported_cut = False

    def _round_up(self, rows: int) -> int:
        """The next multiple of the number of devices, at least one row each."""
        return max(1, math.ceil(rows / self._devices)) * self._devices

    def read(
        self, params: Any, examples: Sequence[Example] | ExampleSource, rows: Sequence[int]
    ) -> Iterator[tuple[Sequence[Example], Rollout, list[Chain]]]:
        """Yields examples, greedy rollouts (on the host, padded) and chains, batch by batch."""
        size = self._batch_size
        for first in range(0, len(rows), size):
            part = [examples[row] for row in rows[first : first + size]]
            rollout = self._generate(self._sampler(1), params, part, size, jax.random.key(0), 0.0)
            yield part, rollout, self._parse(rollout)[: len(part)]

    def chains(self, params: Any, examples: Sequence[Example], show: Show) -> list[Chain]:
        """The greedy chain of each pair. ``show`` is called with the number of finished pairs.

        Pairs are batched by query length: longer queries have longer chains, and a batch takes as
        long as its longest chain.
        """
        rows = sorted(range(len(examples)), key=lambda row: len(examples[row].query))
        chains: list[Chain] = []
        for _, _, batch_chains in self.read(params, examples, rows):
            chains += batch_chains
            show(len(chains))
        return [chains[index] for index in np.argsort(rows)]

    def pass_at(
        self, params: Any, examples: Sequence[Example], k: int, seed: int, show: Show
    ) -> dict[str, float]:
        """pass@k of the label, over k chains per pair sampled at temperature 1.

        Returns:
          ``pass_at_<k>``, and ``sampled_accuracy``, the share of correct labels among all chains.
          Both are over the pairs that have a label; empty if there are none.
        """
        groups = self.samples(params, examples, k, seed, show)
        correct = np.array(
            [
                [sample.chain.label == example.label for sample in group]
                for group, example in zip(groups, examples, strict=True)
                if example.label is not None
            ]
        )
        if not correct.size:
            return {}
        return {f"pass_at_{k}": pass_at_k(correct), "sampled_accuracy": float(correct.mean())}

    def samples(
        self, params: Any, examples: Sequence[Example], k: int, seed: int, show: Show
    ) -> list[list[Sample]]:
        """k completions of each pair, sampled at temperature 1."""
        sampler, size = self._sampler(k), self._round_up(self._batch_size // k)
        groups: list[list[Sample]] = []
        for first in range(0, len(examples), size):
            part = examples[first : first + size]
            key = jax.random.fold_in(jax.random.key(seed), first)
            samples = self._to_samples(self._generate(sampler, params, part, size, key, 1.0))
            groups += [samples[n * k : (n + 1) * k] for n in range(len(part))]
            show(len(groups))
        return groups

    def _sampler(self, group_size: int) -> Callable[..., Rollout]:
        if group_size not in self._samplers:  # each compiles once
            self._samplers[group_size] = jit_sample(
                self._policy.model,
                group_size=group_size,
                max_new_tokens=self.format.completion_length,
                eos_id=self.format.eos_ids,
                pad_id=self.format.pad_id,
                mesh=self._policy.mesh,
            )
        return self._samplers[group_size]

    def _generate(
        self,
        sampler: Callable[..., Rollout],
        params: Any,
        part: Sequence[Example],
        size: int,
        key: Array,
        temperature: float,
    ) -> Rollout:
        padded = [*part, *[part[-1]] * (size - len(part))]
        prompts, cut = self.format.prompts(padded)
        if cut and not self._reported_cut:
            self._reported_cut = True
            say(
                f"{cut} of {len(padded)} pairs do not fit into model.prompt_length="
                f"{self.format.prompt_length}: their product texts are truncated"
            )
        return jax.device_get(sampler(params, prompts, key, temperature))

    def _parse(self, rollout: Rollout) -> list[Chain]:
        return [self.format.schema.parse(text) for text in self.format.texts(rollout)]

    def _to_samples(self, rollout: Rollout) -> list[Sample]:
        rows = zip(np.asarray(rollout.tokens), np.asarray(rollout.completion_mask), strict=True)
        completions = [tuple(tokens[mask].tolist()) for tokens, mask in rows]
        texts, truncated = self.format.texts(rollout), self.format.truncated(rollout).tolist()
        return [
            Sample(tokens=ids, text=text, chain=self.format.schema.parse(text), truncated=no_end)
            for ids, text, no_end in zip(completions, texts, truncated, strict=True)
        ]
