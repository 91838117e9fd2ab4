"""Training data of an outcome reward model: sampled chains, labeled correct or incorrect."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from she_jax.generate.prompts import PromptFormat, positions
from she_jax.types import Example, OrmBatch, Rollout, UserError

LOSSES = ("pointwise", "pairwise")


@dataclass(frozen=True, kw_only=True)
class OrmConfig:
    """What an outcome reward model is trained and measured on.

    Attributes:
      loss: one of ``LOSSES``.
      pairs: training pairs for which the policies write chains.
      rollouts: chains that each policy writes a pair.
      eval_pairs: pairs of each other split to measure on.
      batch_size: chains at a time outside training.

    Raises:
      UserError: if a value is out of its range.
    """

    loss: str
    pairs: int
    rollouts: int
    eval_pairs: int
    batch_size: int

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise UserError(f"orm.loss={self.loss!r}: expected one of {LOSSES}")
        for name in ("pairs", "rollouts", "eval_pairs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"orm.{name}={getattr(self, name)}: expected at least 1")

    def check_batches(self, batch_size: int, micro_batches: int) -> None:
        """Checks the sizes of the training batches.

        Raises:
          UserError: if pairs of chains do not divide into the micro-batches.
        """
        if self.loss == "pairwise" and batch_size % (2 * micro_batches):
            raise UserError(
                f"sft.batch_size={batch_size}: chains come in pairs and in micro_batches="
                f"{micro_batches}, so expected a multiple of {2 * micro_batches}"
            )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A chain that a policy wrote, and whether it is correct.

    Attributes:
      example: the query-product pair that it is about. After reading from a file it has only
        ``uid``, query and product.
      source: which policy wrote it.
      tokens: the sampled token ids, the end-of-sequence token included if present.
      text: the decoded tokens, for human readers.
      right: True if the chain is well formed, not truncated, and its label is the annotated one.
    """

    example: Example
    source: str
    tokens: tuple[int, ...]
    text: str
    right: bool


def write_outcome(outcome: Outcome) -> str:
    """Returns a chain as one line of JSON."""
    record = {
        "uid": outcome.example.uid,
        "query": outcome.example.query,
        "product": dict(outcome.example.product),
        "source": outcome.source,
        "right": outcome.right,
        "text": outcome.text,
        "tokens": outcome.tokens,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_outcomes(path: Path) -> list[Outcome]:
    """Reads a file of lines written by ``write_outcome``."""
    outcomes = []
    with path.open(encoding="utf-8") as file:
        for record in map(json.loads, file):
            pair = Example(**{name: record.pop(name) for name in ("uid", "query", "product")})
            outcomes.append(Outcome(example=pair, tokens=tuple(record.pop("tokens")), **record))
    return outcomes


def contrastive_pairs(
    outcomes: Iterable[Outcome],
) -> tuple[list[tuple[list[int], list[int]]], int, int]:
    """Groups chains by query-product pair, to rank correct against incorrect ones.

    Returns:
      For each pair with both kinds, the indices of its correct and of its incorrect chains. Then
      the number of pairs with correct chains only, and with incorrect ones only.
    """
    by_pair: dict[str, tuple[list[int], list[int]]] = {}
    for n, outcome in enumerate(outcomes):
        by_pair.setdefault(outcome.example.uid, ([], []))[not outcome.right].append(n)
    pairs = list(by_pair.values())
    mixed = [indices for indices in pairs if all(indices)]
    return mixed, sum(not wrong for _, wrong in pairs), sum(not right for right, _ in pairs)


class OutcomeSampler:
    """Samples batches: chains uniformly, or a correct and an incorrect chain of a uniform pair.

    Args:
      outcomes: the chains to sample from.
      loss: ``pointwise`` or ``pairwise``.

    Raises:
      UserError: if there is no chain, or for ``pairwise`` no pair with both kinds.
    """

    def __init__(self, outcomes: Sequence[Outcome], loss: str):
        self._all, self._mixed = outcomes, contrastive_pairs(outcomes)[0]
        self._pairwise = loss == "pairwise"
        if not (self._mixed if self._pairwise else outcomes):
            lack = "no pair with a right and a wrong chain" if outcomes else "no chains"
            raise UserError(f"{lack}: raise orm.pairs or orm.rollouts, in another --workdir")

    def draw(self, count: int, rng: np.random.Generator) -> list[Outcome]:
        """Samples ``count`` chains with replacement; for pairs correct and incorrect alternate."""
        if not self._pairwise:
            return [self._all[n] for n in rng.integers(len(self._all), size=count)]
        pairs = [self._mixed[n] for n in rng.integers(len(self._mixed), size=count // 2)]
        rows = [indices[rng.integers(len(indices))] for pair in pairs for indices in pair]
        return [self._all[n] for n in rows]


def as_rollout(outcomes: Sequence[Outcome], prompts: PromptFormat) -> Rollout:
    """Returns the prompts and their chains as rollouts; ``logps`` are 0."""
    batch, _ = prompts.encode_prompts([outcome.example for outcome in outcomes])
    tokens = np.full((len(outcomes), prompts.completion_length), prompts.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, outcome in enumerate(outcomes):
        length = len(outcome.tokens)
        tokens[row, :length], mask[row, :length] = outcome.tokens, True
    tokens = np.concatenate([batch.tokens, tokens], axis=1)
    mask = np.concatenate([batch.mask, mask], axis=1)
    in_prompt = np.arange(tokens.shape[1]) < batch.tokens.shape[1]
    return Rollout(
        tokens=jnp.asarray(tokens),
        prompt_mask=jnp.asarray(mask & in_prompt),
        completion_mask=jnp.asarray(mask & ~in_prompt),
        logps=jnp.zeros(tokens.shape),
    )


def orm_batch(outcomes: Sequence[Outcome], prompts: PromptFormat, loss: str) -> OrmBatch:
    """Returns a training batch of chains; for ``pairwise`` correct and incorrect ones alternate."""
    rollout = as_rollout(outcomes, prompts)
    return OrmBatch(
        tokens=rollout.tokens,
        positions=jnp.asarray(positions(rollout.prompt_mask | rollout.completion_mask)),
        right=jnp.asarray([outcome.right for outcome in outcomes], jnp.float32),
        group_size=2 if loss == "pairwise" else 1,
    )
