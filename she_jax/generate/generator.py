"""Generation with a policy: greedy chains and sampled completions, batch by batch."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from she_jax.cot import Chain
from she_jax.data.dataset import ExampleSource
from she_jax.generate.batching import by_length, narrowed
from she_jax.generate.language_model import LanguageModel
from she_jax.generate.prompts import PromptFormat
from she_jax.generate.sampler import jit_sample
from she_jax.types import Example, PromptBatch, Rollout

Show = Callable[[int], None]
COMPACTIONS = 1  # how often a batch goes on with its unfinished half only
_LOG = logging.getLogger("she_jax")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sampled completion: its tokens with the end-of-sequence token, its text, its parsed chain.

    ``truncated`` means that it has no end-of-sequence token.
    """

    tokens: tuple[int, ...]
    text: str
    chain: Chain
    truncated: bool


def cut_sentence(prompts: PromptFormat, examples: Sequence[Example]) -> str:
    """How many pairs are longer than a prompt may be."""
    cut = int((prompts.prompt_sizes(examples) > prompts.prompt_length).sum())
    return (
        f"{cut} of the first {len(examples)} pairs do not fit into model.prompt_length="
        f"{prompts.prompt_length}: their product texts are truncated"
    )


class Generator:
    """Generates a policy's chains, batch by batch, greedy or sampled.

    Args:
      lm: model, prompt format and devices.
      batch_size: completions per batch; the last batch is padded with repetitions.
      warn: called once, with a message, when prompts are first cut.
    """

    def __init__(
        self, lm: LanguageModel, batch_size: int, warn: Callable[[str], Any] = _LOG.warning
    ):
        self.prompts, self._lm, self._warn = lm.prompts, lm, warn
        self._devices = lm.mesh.shape["data"] * lm.mesh.shape["fsdp"]
        self._batch_size = self._round_up(batch_size)
        self._samplers: dict[int, Callable[..., Rollout]] = {}
        self._reported_cut = False

    def _round_up(self, rows: int) -> int:
        """The next multiple of the number of devices, at least one row each."""
        return max(1, math.ceil(rows / self._devices)) * self._devices

    def greedy_rollouts(
        self, params: Any, examples: Sequence[Example] | ExampleSource, rows: Sequence[int]
    ) -> Iterator[tuple[Sequence[Example], Rollout]]:
        """Yields examples and greedy rollouts (on the host, padded), batch by batch."""
        size = self._batch_size
        for first in range(0, len(rows), size):
            part = [examples[row] for row in rows[first : first + size]]
            prompts = narrowed(self._encode(part, size))
            yield part, jax.device_get(self._greedy(params, prompts))

    def greedy(
        self,
        params: Any,
        examples: Sequence[Example],
        show: Show,
        look: Callable[[Chain, str, bool], Any] = lambda chain, text, truncated: None,
    ) -> list[Chain]:
        """The greedy chain of each pair.

        Pairs are batched by the length of their prompts, then of their queries: longer queries have
        longer chains.

        Args:
          params: of the policy.
          examples: the pairs.
          show: called with the number of finished pairs.
          look: called with each chain, its text, and whether it has no end-of-sequence token.
        """
        samples = self.greedy_samples(params, examples, show)
        for sample in samples:
            look(sample.chain, sample.text, sample.truncated)
        return [sample.chain for sample in samples]

    def greedy_samples(self, params: Any, examples: Sequence[Example], show: Show) -> list[Sample]:
        """The greedy completion of each pair, batched as by ``greedy``."""
        samples: dict[int, Sample] = {}

        def read(rows: Sequence[int], rollout: Rollout) -> None:
            samples.update(zip(rows, self._to_samples(rollout), strict=False))
            show(len(samples))

        pending: tuple[Sequence[int], Rollout] | None = None
        queries = [len(example.query) for example in examples]
        for rows, prompts in by_length(self._encode(examples), self._batch_size, queries):
            rollout = self._greedy(params, prompts)
            if pending:  # the host reads while the device goes on
                read(*pending)
            pending = rows.tolist(), rollout
        if pending:
            read(*pending)
        return [samples[row] for row in range(len(examples))]

    def sample(
        self, params: Any, examples: Sequence[Example], k: int, seed: int, show: Show
    ) -> list[list[Sample]]:
        """k completions of each pair, sampled at temperature 1."""
        sampler, size = self._sampler(k), self._round_up(self._batch_size // k)
        groups: list[list[Sample]] = []
        for first in range(0, len(examples), size):
            part = examples[first : first + size]
            key = jax.random.fold_in(jax.random.key(seed), first)
            prompts = narrowed(self._encode(part, size))
            samples = self._to_samples(sampler(params, prompts, key, 1.0))
            groups += [samples[n * k : (n + 1) * k] for n in range(len(part))]
            show(len(groups))
        return groups

    def _sampler(self, group_size: int) -> Callable[..., Rollout]:
        if group_size not in self._samplers:  # each compiles once
            self._samplers[group_size] = jit_sample(
                self._lm.model,
                group_size=group_size,
                max_new_tokens=self.prompts.completion_length,
                eos_id=self.prompts.eos_ids,
                pad_id=self.prompts.pad_id,
                compactions=COMPACTIONS,
                shared=self.prompts.shared,
                mesh=self._lm.mesh,
            )
        return self._samplers[group_size]

    def _greedy(self, params: Any, prompts: PromptBatch) -> Rollout:
        return self._sampler(1)(params, prompts, jax.random.key(0), 0.0)

    def _encode(self, examples: Sequence[Example], size: int = 0) -> PromptBatch:
        """The prompts of examples, filled up to ``size`` with repetitions of the last."""
        filled = [*examples, *[examples[-1]] * (size - len(examples))]
        prompts, cut = self.prompts.encode_prompts(filled)
        if cut and not self._reported_cut:
            self._reported_cut = True
            self._warn(cut_sentence(self.prompts, examples))
        return prompts

    def _to_samples(self, rollout: Rollout) -> list[Sample]:
        rollout = jax.device_get(rollout)
        rows = zip(np.asarray(rollout.tokens), np.asarray(rollout.completion_mask), strict=True)
        completions = [tuple(tokens[mask].tolist()) for tokens, mask in rows]
        texts, truncated = self.prompts.decode(rollout), self.prompts.truncated(rollout).tolist()
        parse = self.prompts.schema.parse
        return [
            Sample(
                tokens=ids,
                text=text,
                chain=replace(parse(text), truncated=no_end),
                truncated=no_end,
            )
            for ids, text, no_end in zip(completions, texts, truncated, strict=True)
        ]
