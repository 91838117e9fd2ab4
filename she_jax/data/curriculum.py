"""Samples the prompts of a curriculum stage by the policy's running pass rate on each."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from she_jax.data.dataset import ExampleSource
from she_jax.data.loader import batches, label_codes, uids_of
from she_jax.types import Example, UserError

DIFFICULTIES = ("even", "easy", "medium", "hard")
LEAST = 0.05  # smallest weight, where the largest is 1, so that every prompt can still be drawn
LATEST = 0.5  # weight of the latest pass rate in the running average


def difficulty_weight(rate: Float[np.ndarray, "N"], difficulty: str) -> Float[np.ndarray, "N"]:
    """Sampling weight in [0, 1] of prompts with pass rate p.

        easy:   0 at p = 0, cos(pi (p - 1/2)) up to 1/2, then 1
        medium: cos(pi (p - 1/2))
        hard:   0.25 at p = 0, 1 up to 1/2, then cos(pi (p - 1/2))
        even:   1

    The curves are VL-Cogito's (arXiv 2507.22607). Reconstruction: there they weight advantages,
    here the sampling of prompts.

    Args:
      rate: pass rates p, in [0, 1].
      difficulty: one of ``DIFFICULTIES``.

    Raises:
      UserError: for an unknown difficulty.
    """
    rise = np.cos(np.pi * (rate - 0.5)).clip(0.0)
    if difficulty == "even":
        return np.ones_like(rate)
    if difficulty == "easy":
        return np.where(rate <= 0.5, rise, 1.0)
    if difficulty == "medium":
        return rise
    if difficulty == "hard":
        return np.where(rate <= 0, 0.25, np.where(rate <= 0.5, 1.0, rise))
    raise UserError(f"difficulty={difficulty!r}: expected one of {DIFFICULTIES}")


class PromptPool:
    """Endless batches of a stage's prompts, and the running pass rate of each prompt.

    With the difficulty ``even`` the prompts are shuffled, and each appears once per epoch. With
    another difficulty each batch is sampled by ``difficulty_weight`` of the running pass rate,
    without replacement if the pool is large enough. A prompt without a pass rate has the largest
    weight, 1.

    Each next batch is a function of the arguments and of ``state``, which is checkpointed.

    Args:
      source: the examples.
      size: prompts per batch.
      seed: seed of the order.
      difficulty: one of ``DIFFICULTIES``.
      balance: draw all labels equally often.
      rates: pass rates measured before this stage, by uid.

    Raises:
      UserError: if there is nothing to draw from, or for an unknown difficulty.
    """

    def __init__(
        self,
        source: Sequence[Example] | ExampleSource,
        size: int,
        *,
        seed: int,
        difficulty: str = "even",
        balance: bool = False,
        rates: Mapping[str, float] | None = None,
    ):
        self._source, self._size, self._seed, self._difficulty = source, size, seed, difficulty
        self._initial_rates = dict(rates or {})
        self._stage_rates: dict[str, float] = {}  # updated in this stage, so part of the state
        self._position = 0
        self._shuffled = None
        difficulty_weight(np.zeros(1), difficulty)
        if difficulty == "even":
            self._shuffled = batches(source, size, seed=seed, balance=balance)
            return
        if not len(source):
            raise UserError("no examples: the split is empty")
        process, processes = jax.process_index(), jax.process_count()
        self._rows = list(range(len(source)))[process::processes]  # of this process
        uids = uids_of(source)[process::processes]
        self._index = {uid: n for n, uid in enumerate(uids)}
        self._rates = np.array([self._initial_rates.get(uid, np.nan) for uid in uids])
        self._labels = label_codes(source)[process::processes] if balance else None

    def draw(self) -> Sequence[Example]:
        """Returns the next batch."""
        position, self._position = self._position, self._position + 1
        if self._shuffled is not None:
            batch: Any = self._shuffled[position]
            return batch
        weights = self.weights()
        if self._labels is not None:
            weights = _balance_labels(weights, self._labels)
        if not weights.any():
            raise UserError("balance: no example has a label; set it to False")
        rng = np.random.default_rng((self._seed, position))
        enough = np.count_nonzero(weights) >= self._size
        rows = rng.choice(
            len(weights), self._size, replace=not enough, p=weights / weights.sum(), shuffle=False
        )
        return [self._source[self._rows[row]] for row in rows]

    def weights(self) -> Float[np.ndarray, "N"]:
        """Current sampling weight of each prompt, in [``LEAST``, 1]."""
        weights = np.maximum(difficulty_weight(self._rates, self._difficulty), LEAST)
        return np.where(np.isnan(self._rates), 1.0, weights)

    def learn(self, examples: Sequence[Example], rates: Sequence[float]) -> None:
        """Updates the running pass rates with new pass rates of some prompts, in [0, 1]."""
        if self._shuffled is not None:
            return
        for example, rate in zip(examples, rates, strict=True):
            running = self._stage_rates.get(example.uid, self._initial_rates.get(example.uid))
            weight = 1.0 if running is None else LATEST
            self._set_rate(example.uid, weight * float(rate) + (1 - weight) * (running or 0.0))

    def _set_rate(self, uid: str, rate: float) -> None:
        self._stage_rates[uid] = self._rates[self._index[uid]] = rate

    @property
    def state(self) -> dict[str, Any]:
        """The position and the pass rates to checkpoint, unchanged by a round trip through JSON."""
        return {"position": self._position, "rates": dict(self._stage_rates)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resumes from a ``state``."""
        self._position = state["position"]
        for uid, rate in state["rates"].items():
            self._set_rate(uid, rate)


def _balance_labels(
    weights: Float[np.ndarray, "N"], labels: Int[np.ndarray, "N"]
) -> Float[np.ndarray, "N"]:
    """The weights, scaled to the same sum for each label; 0 for examples without one (code 0)."""
    labeled_weights = np.where(labels > 0, weights, 0.0)
    sums = np.bincount(labels, labeled_weights)
    return labeled_weights / np.where(sums > 0, sums, 1.0)[labels]
