"""Self-imitation: stored correct rollouts, trained on in place of zero-advantage groups."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from she_jax.generate.prompts import positions
from she_jax.rewards.verifier import FULL_REWARD
from she_jax.rollouts.batch import RolloutBatch
from she_jax.types import TrainBatch

FEWEST = 32  # stored groups before any is replayed: with fewer, they would be memorized
MOST = 4_096  # stored groups at most, the latest ones


class SelfImitation:
    """Self-imitation: replays correct rollouts of mixed groups in place of zero-advantage groups.

    A policy may unlearn rare cases while it learns others. Once it is confidently wrong, no rollout
    of such a group is correct, none has an advantage, and no gradient leads back. So a group
    without any advantage is replaced by a stored group, whose correct rollouts fill its rows in
    turn. They are imitated (``TrainBatch.imitation_mask``) with
    the given advantage. Stored groups
    are drawn in proportion to 1 minus their share of correct rollouts.

    Oh et al. (arXiv 1806.05635, section 3) imitate past decisions in proportion to how far their
    return exceeds the value, which is the share here. Reconstruction: storing groups, and replacing
    zero-advantage ones, is added here; no available source says that the paper (arXiv 2510.07972)
    does it.

    Args:
      advantage: of the imitated tokens, > 0.
      seed: of the draws.
      stepwise: only rollouts without any wrong step are stored, not all with the correct label.
    """

    def __init__(self, advantage: float, seed: int, *, stepwise: bool):
        self._advantage, self._seed, self._stepwise = advantage, seed, stepwise
        # Each group: prompt tokens, (tokens, weights) of each correct rollout, share of correct.
        self._stored: list[list[Any]] = []

    @property
    def state(self) -> list[list[Any]]:
        """All stored groups; survives a round trip through JSON unchanged."""
        return list(self._stored)

    def restore(self, state: Sequence[list[Any]]) -> None:
        """Restores the stored groups from a ``state``."""
        self._stored = list(state)

    def __call__(self, rollouts: RolloutBatch, step: int) -> tuple[TrainBatch, dict[str, float]]:
        """Replaces the zero-advantage groups of a batch, once ``FEWEST`` groups are stored.

        Then stores those of its other groups that have both correct and wrong rollouts.

        Returns:
          The batch, and the metrics ``self_imitation/share`` (share of its groups) and
          ``self_imitation/stored`` (stored groups before this update).
        """
        batch = jax.device_get(rollouts.batch)
        size = len(rollouts.texts) // len(rollouts.examples)
        no_signal = ~batch.advantages.reshape(-1, size * batch.advantages.shape[1]).any(axis=1)
        stored, targets = len(self._stored), np.flatnonzero(no_signal)
        targets = targets if stored >= FEWEST else targets[:0]
        sources = self._draw(len(targets), step)
        arrays = {
            name: getattr(batch, name).copy() for name in ("tokens", "loss_weights", "advantages")
        }
        arrays |= {
            "positions": batch.positions.copy(),
            "imitation_mask": np.zeros(batch.tokens.shape, bool),
        }
        for group, source in zip(targets, sources, strict=True):
            rows = slice(group * size, (group + 1) * size)
            for name, values in self._rows(self._stored[source], size, batch).items():
                arrays[name][rows] = values
        self._store(rollouts, batch, np.flatnonzero(~no_signal), size)
        sharding = rollouts.batch.tokens.sharding
        changed = {name: jax.device_put(values, sharding) for name, values in arrays.items()}
        metrics = {
            "self_imitation/share": len(targets) / len(no_signal),
            "self_imitation/stored": stored,
        }
        return dataclasses.replace(rollouts.batch, **changed), metrics

    def _draw(self, count: int, step: int) -> list[int]:
        """Draws ``count`` indices of stored groups."""
        if not count:
            return []
        rarity = 1 - np.array([share for *_, share in self._stored])
        rng = np.random.default_rng((self._seed, 2, step))
        return rng.choice(len(rarity), size=count, p=rarity / rarity.sum()).tolist()

    def _rows(self, group: list[Any], size: int, batch: TrainBatch) -> dict[str, np.ndarray]:
        """A stored group as ``size`` rows in the shape of ``batch``."""
        prompt, chains, _ = group
        start, shape = batch.prompt_length, (size, batch.tokens.shape[1])
        tokens, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        real = np.zeros(shape, bool)
        real[:, start - len(prompt) : start] = True
        tokens[:, start - len(prompt) : start] = prompt
        for row in range(size):
            ids, loss_weights = chains[row % len(chains)]
            completion = slice(start, start + len(ids))
            tokens[row, completion], weights[row, completion] = ids, loss_weights
            real[row, completion] = True
        return {
            "tokens": tokens,
            "positions": positions(real),
            "loss_weights": weights,
            "advantages": self._advantage * (weights > 0),
            "imitation_mask": weights > 0,
        }

    def _store(
        self, rollouts: RolloutBatch, batch: TrainBatch, groups: np.ndarray, size: int
    ) -> None:
        """Stores the correct rollouts of the given groups, each distinct chain once."""
        start, correct = batch.prompt_length, fully_correct(rollouts, self._stepwise)
        for group in groups:
            rows = [row for row in range(group * size, (group + 1) * size) if correct[row]]
            if not 0 < len(rows) < size:
                continue
            chains = {}
            for row in rows:
                real = batch.positions[row, start:] >= 0
                ids = batch.tokens[row, start:][real].tolist()
                chains[tuple(ids)] = [ids, batch.loss_weights[row, start:][real].tolist()]
            real = batch.positions[rows[0], :start] >= 0
            prompt = batch.tokens[rows[0], :start][real].tolist()
            self._stored.append([prompt, list(chains.values()), len(rows) / size])
        del self._stored[:-MOST]


def fully_correct(rollouts: RolloutBatch, stepwise: bool) -> Bool[np.ndarray, "B"]:
    """Rollouts with a correct label and no step that is known to be wrong.

    Args:
      rollouts: the rollouts.
      stepwise: False checks the label only, as an estimator without step rewards does. A step is
        wrong without full marks from the verifier or, if the verifier does not know it, with a
        known reward below 1/2 (the probability from the PRM).
    """
    correct = np.asarray(rollouts.steps.outcome) >= FULL_REWARD
    if not stepwise:
        return correct
    verified = np.asarray(rollouts.steps.step_mask & rollouts.steps.verifier_known)
    full_marks = np.asarray(rollouts.steps.verifier) >= FULL_REWARD
    steps_correct = np.where(verified, full_marks, ~rollouts.known | (rollouts.rewards >= 0.5))
    return correct & steps_correct.all(axis=1)
