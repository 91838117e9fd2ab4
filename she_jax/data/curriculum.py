"""Which prompts a stage of the curriculum shows next, and how well the policy does on each."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from she_jax.data.dataset import ExampleSource
from she_jax.data.pipeline import batches
from she_jax.types import Example

AIMS = ("even", "easy", "medium", "hard")
LEAST = 0.05  # of the largest weight, so that no prompt is lost for good
LATEST = 0.5  # weight of the latest pass rate in the running one


def aim_weight(rate: Float[np.ndarray, "N"], aim: str) -> Float[np.ndarray, "N"]:
    """How much a prompt of a pass rate p is wanted, in [0, 1].

        easy:   0 at p = 0, cos(pi (p - 1/2)) up to 1/2, then 1
        medium: cos(pi (p - 1/2))
        hard:   0.25 at p = 0, 1 up to 1/2, then cos(pi (p - 1/2))
        even:   1

    The curves are VL-Cogito's (arXiv 2507.22607). Reconstruction: there they weigh advantages, here
    the draw of prompts.

    Raises:
      ValueError: for an unknown aim.
    """
    rise = np.cos(np.pi * (rate - 0.5)).clip(0.0)
    if aim == "even":
        return np.ones_like(rate)
    if aim == "easy":
        return np.where(rate <= 0.5, rise, 1.0)
    if aim == "medium":
        return rise
    if aim == "hard":
        return np.where(rate <= 0, 0.25, np.where(rate <= 0.5, 1.0, rise))
    raise ValueError(f"aim={aim!r}: expected one of {AIMS}")


class PromptPool:
    """The prompts of a stage, in batches without end, and the running pass rate of each.

    With the aim ``even`` they come in a shuffled order, all of them once an epoch. With another
    aim each batch is drawn anew, without repetition, by ``aim_weight`` of the running pass rate; a
    prompt that was never measured weighs as much as any can.

    Whatever comes next is a function of the arguments and of ``state``, which goes into the
    checkpoint.

    Args:
      source: the examples.
      size: prompts a batch.
      seed: of the order.
      aim: see above.
      balance: the labels have equal shares.
      rates: pass rates measured before, by uid.

    Raises:
      ValueError: if there is nothing to draw from, or for an unknown aim.
    """

    def __init__(
        self,
        source: Sequence[Example] | ExampleSource,
        size: int,
        *,
        seed: int,
        aim: str = "even",
        balance: bool = False,
        rates: Mapping[str, float] | None = None,
    ):
        self._source, self._size, self._seed, self._aim = source, size, seed, aim
        self._before = dict(rates or {})
        self._known: dict[str, float] = {}  # what this stage has seen; the rest is in the arguments
        self._position = 0
        self._series = None
        aim_weight(np.zeros(1), aim)
        if aim == "even":
            self._series = batches(source, size, seed=seed, balance=balance)
            return
        if not len(source):
            raise ValueError("no examples: the split is empty")
        process, processes = jax.process_index(), jax.process_count()
        self._own = list(range(len(source)))[process::processes]
        examples = [source[row] for row in self._own]
        self._place = {example.uid: n for n, example in enumerate(examples)}
        self._rates = np.array([self._before.get(example.uid, np.nan) for example in examples])
        labels = np.array([example.label or 0 for example in examples])
        self._labels = labels if balance else None

    def draw(self) -> Sequence[Example]:
        """The next batch."""
        position, self._position = self._position, self._position + 1
        if self._series is not None:
            found: Any = self._series[position]
            return found
        weights = self.weights()
        if self._labels is not None:
            weights = _equal_shares(weights, self._labels)
        if not weights.any():
            raise ValueError("balance: no example has a label; set it to False")
        rng = np.random.default_rng((self._seed, position))
        enough = np.count_nonzero(weights) >= self._size
        rows = rng.choice(
            len(weights), self._size, replace=not enough, p=weights / weights.sum(), shuffle=False
        )
        return [self._source[self._own[row]] for row in rows]

    def weights(self) -> Float[np.ndarray, "N"]:
        """How much each prompt is wanted now."""
        weights = np.maximum(aim_weight(self._rates, self._aim), LEAST)
        return np.where(np.isnan(self._rates), 1.0, weights)

    def learn(self, examples: Sequence[Example], rates: Sequence[float]) -> None:
        """Takes note of how often rollouts of some prompts came out right."""
        if self._series is not None:
            return
        for example, rate in zip(examples, rates, strict=True):
            before = self._known.get(example.uid, self._before.get(example.uid))
            share = 1.0 if before is None else LATEST
            self._know(example.uid, share * float(rate) + (1 - share) * (before or 0.0))

    def _know(self, uid: str, rate: float) -> None:
        self._known[uid] = self._rates[self._place[uid]] = rate

    @property
    def state(self) -> dict[str, Any]:
        """Where the series stands; JSON gives it back unchanged."""
        return {"position": self._position, "rates": dict(self._known)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from such a state."""
        self._position = state["position"]
        for uid, rate in state["rates"].items():
            self._know(uid, rate)


def _equal_shares(
    weights: Float[np.ndarray, "N"], labels: Int[np.ndarray, "N"]
) -> Float[np.ndarray, "N"]:
    """The weights, scaled so that each label has the same sum; 0 for no label (0)."""
    own = np.where(labels > 0, weights, 0.0)
    sums = np.bincount(labels, own, minlength=5)
    return own / np.where(sums > 0, sums, 1.0)[labels]
