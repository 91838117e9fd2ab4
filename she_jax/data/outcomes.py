"""What a scalar reward model learns from: whole chains of a policy, and how they came out."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from she_jax.data.prompts import PromptFormat, positions
from she_jax.types import Example, OutcomeBatch, Rollout

LOSSES = ("pointwise", "pairwise")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A chain that a policy wrote.

    Attributes:
      example: the pair that it is about; of one that was read from a file ``uid``, query and
        product.
      source: which policy wrote it.
      tokens: as they were sampled, the end included where there is one.
      text: what they say, for people.
      right: whether it is well formed, ended, and its label the annotation's.
    """

    example: Example
    source: str
    tokens: tuple[int, ...]
    text: str
    right: bool


def write_outcome(one: Outcome) -> str:
    """A chain as a line of JSON."""
    pair = {"uid": one.example.uid, "query": one.example.query}
    rest = {"source": one.source, "right": one.right, "text": one.text, "tokens": one.tokens}
    record = pair | {"product": dict(one.example.product)} | rest
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_outcomes(path: Path) -> list[Outcome]:
    """Reads such lines back."""
    found = []
    with path.open(encoding="utf-8") as file:
        for record in map(json.loads, file):
            pair = Example(**{name: record.pop(name) for name in ("uid", "query", "product")})
            found.append(Outcome(example=pair, tokens=tuple(record.pop("tokens")), **record))
    return found


def mixed_pairs(outcomes: Iterable[Outcome]) -> tuple[list[tuple[list[int], list[int]]], int, int]:
    """Which chains can be ranked against each other.

    Returns:
      For each pair with both, the indices of its right and of its wrong chains; and how many pairs
      have right chains only, and wrong ones only.
    """
    by_pair: dict[str, tuple[list[int], list[int]]] = {}
    for n, one in enumerate(outcomes):
        by_pair.setdefault(one.example.uid, ([], []))[not one.right].append(n)
    pairs = list(by_pair.values())
    mixed = [own for own in pairs if all(own)]
    return mixed, sum(not wrong for _, wrong in pairs), sum(not right for right, _ in pairs)


class Drawer:
    """Draws batches: single chains evenly, or a right and a wrong chain of an evenly drawn pair.

    Args:
      outcomes: to draw from.
      loss: ``pointwise`` or ``pairwise``.

    Raises:
      ValueError: if there is nothing to draw.
    """

    def __init__(self, outcomes: Sequence[Outcome], loss: str):
        self._all, self._mixed = outcomes, mixed_pairs(outcomes)[0]
        self._pairwise = loss == "pairwise"
        if not (self._mixed if self._pairwise else outcomes):
            what = "no pair with a right and a wrong chain" if outcomes else "no chains"
            raise ValueError(f"{what}: raise scalar.pairs or scalar.rollouts, in another --workdir")

    def draw(self, count: int, rng: np.random.Generator) -> list[Outcome]:
        """So many chains, an even number of them for pairs, with repetition."""
        if not self._pairwise:
            return [self._all[n] for n in rng.integers(len(self._all), size=count)]
        drawn = [self._mixed[n] for n in rng.integers(len(self._mixed), size=count // 2)]
        rows = [own[rng.integers(len(own))] for pair in drawn for own in pair]
        return [self._all[n] for n in rows]


def as_rollout(outcomes: Sequence[Outcome], prompts: PromptFormat) -> Rollout:
    """The chains behind their prompts, as they were sampled; log-probabilities 0."""
    asked, _ = prompts.prompts([one.example for one in outcomes])
    tokens = np.full((len(outcomes), prompts.completion_length), prompts.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, one in enumerate(outcomes):
        tokens[row, : len(one.tokens)], mask[row, : len(one.tokens)] = one.tokens, True
    whole = np.concatenate([asked.tokens, tokens], axis=1)
    prompt = np.arange(whole.shape[1]) < asked.tokens.shape[1]
    real = np.concatenate([asked.mask, mask], axis=1)
    return Rollout(
        tokens=jnp.asarray(whole),
        prompt_mask=jnp.asarray(real & prompt),
        completion_mask=jnp.asarray(real & ~prompt),
        logps=jnp.zeros(whole.shape),
    )


def outcome_batch(outcomes: Sequence[Outcome], prompts: PromptFormat, loss: str) -> OutcomeBatch:
    """Chains as an update reads them; for ``pairwise`` right and wrong ones take turns."""
    rollout = as_rollout(outcomes, prompts)
    return OutcomeBatch(
        tokens=rollout.tokens,
        positions=jnp.asarray(positions(rollout.prompt_mask | rollout.completion_mask)),
        right=jnp.asarray([one.right for one in outcomes], jnp.float32),
        group_size=2 if loss == "pairwise" else 1,
    )
