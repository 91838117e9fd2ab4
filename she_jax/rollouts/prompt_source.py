"""The prompts of a training stage, and the order in which they come."""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from she_jax.data.curriculum import DIFFICULTIES, PromptPool
from she_jax.data.dataset import ExampleSource
from she_jax.data.loader import uids_of
from she_jax.training.logging import log
from she_jax.types import Example, UserError

UNSOLVED = "unsolved.json"  # of a run of rejection sampling: uids of unsolved and of all seen pairs

Examples = Sequence[Example] | ExampleSource


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Which prompts a stage trains on.

    Attributes:
      prompts: prompts a batch, >= 1.
      steps: batches that the stage draws.
      seed: of the order.
      difficulty: see ``she_jax.data.curriculum``.
      balance: draw the labels in equal shares.
      unsolved_share: share of the prompts for which an earlier run of rejection sampling found no
        correct chain, in [0, 1]; the others are new ones. 0: all training pairs.
      init_from: the checkpoints of that run.

    Raises:
      ValueError: if a value is out of its range.
    """

    prompts: int
    steps: int
    seed: int
    difficulty: str = "even"
    balance: bool = False
    unsolved_share: float = 0.0
    init_from: str = ""

    def __post_init__(self):
        if self.difficulty not in DIFFICULTIES:
            raise ValueError(f"rl.difficulty={self.difficulty!r}: expected one of {DIFFICULTIES}")
        if not 0 <= self.unsolved_share <= 1:
            raise ValueError(f"rl.unsolved_share={self.unsolved_share}: expected a share in [0, 1]")

    def pool(self, source: Examples, rates: Mapping[str, float]) -> PromptPool:
        """The order in which the prompts come, given pass rates measured before (by uid)."""
        return PromptPool(
            source,
            self.prompts,
            seed=self.seed,
            difficulty=self.difficulty,
            balance=self.balance,
            rates=rates,
        )


def read_unsolved(init_from: str) -> tuple[set[str], set[str]]:
    """Uids of the pairs that an earlier run of rejection sampling did not solve, and of all seen.

    Args:
      init_from: the checkpoints of that run.
    """
    path = Path(init_from).parent.parent / UNSOLVED
    record = json.loads(path.read_text(encoding="utf-8"))
    return set(record["unsolved"]), set(record["seen"])


def unsolved_prompts(
    unsolved: Set[str], seen: Set[str], source: Examples, config: PromptConfig
) -> list[Example]:
    """Training pairs that had no correct rollout before, mixed with pairs never seen.

    The unsolved ones are what is left to learn: the rest was imitated. A few of them alone, met
    again and again, would be learned by heart.

    Args:
      unsolved, seen: uids of pairs.
      source: the training split.
      config: ``unsolved_share`` is > 0. Where there are too few pairs of one kind, more of the
        other make up for them.

    Raises:
      UserError: if there is neither an unsolved nor a new pair.
    """
    count = config.steps * config.prompts
    uids = uids_of(source)
    rng = np.random.default_rng((config.seed, 3))
    again = rng.permutation([row for row, uid in enumerate(uids) if uid in unsolved])
    new = rng.permutation([row for row, uid in enumerate(uids) if uid not in seen])
    again = again[: max(round(config.unsolved_share * count), count - len(new))]
    new = new[: count - len(again)]
    if not len(again) + len(new):
        raise UserError(
            "the earlier run found a correct chain for every pair of the split: nothing is left "
            "for rl.unsolved_share; set it to 0, or give the data set more training pairs"
        )
    log(f"{len(again):,} prompts without a correct chain so far, and {len(new):,} new ones")
    return [source[row] for row in (*again, *new)]
