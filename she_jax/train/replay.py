"""Right rollouts that are kept, to be imitated where a group teaches nothing."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from she_jax.data.examinations import FULL_MARKS
from she_jax.data.prompts import positions
from she_jax.rl.advantages import STEPWISE
from she_jax.train.experience import Experience
from she_jax.train.workdir import Config
from she_jax.types import TrainBatch

FEWEST = 32  # groups kept before one is shown again: fewer would be learnt by heart
MOST = 4_096  # groups kept, the last ones


class Replay:
    """The right rollouts of groups that had wrong ones too, shown again in silent groups' places.

    What a policy seldom meets may drift from right to wrong while it learns other things; once it
    is sure of the wrong word, no rollout of the group is right, none has an advantage, and nothing
    leads back. So a group without any advantage gives way to one that was kept, whose right
    rollouts fill its rows by turns. They are imitated (``TrainBatch.imitated``) with the advantage
    ``rl.replay``. The rarer right rollouts were in a group, the more often it is drawn: in
    proportion to 1 less their share.

    Oh et al. (arXiv 1806.05249, section 3) imitate past decisions in proportion to how far their
    return exceeds the value, which here is the share. Reconstruction: groups, and the places of the
    silent ones, are ours; nothing that could be obtained says that the paper (arXiv 2510.07972)
    does so.

    Args:
      config: of the run.
    """

    def __init__(self, config: Config):
        self._advantage, self._seed = config.rl.replay, config.seed
        self._stepwise = config.rl.estimator in STEPWISE
        # Of each group its prompt, the tokens and weights of each right rollout, and their share.
        self._kept: list[list[Any]] = []

    @property
    def state(self) -> list[list[Any]]:
        """All that is kept; JSON gives it back unchanged."""
        return list(self._kept)

    def restore(self, state: Sequence[list[Any]]) -> None:
        """Goes on from such a state."""
        self._kept = list(state)

    def __call__(self, seen: Experience, step: int) -> tuple[TrainBatch, dict[str, float]]:
        """The batch of some experience with its silent groups replaced, as far as enough is kept.

        Returns:
          The batch, and the figures ``replayed`` (share of the groups) and ``replay/kept`` (groups
          before this update). Afterwards those of its other groups that had right rollouts and
          wrong ones are kept too.
        """
        batch = jax.device_get(seen.batch)
        size = len(seen.texts) // len(seen.examples)
        silent = ~batch.advantages.reshape(-1, size * batch.advantages.shape[1]).any(axis=1)
        kept, places = len(self._kept), np.flatnonzero(silent)
        shown = places if kept >= FEWEST else places[:0]
        drawn = self._draw(len(shown), step)
        rows = {name: getattr(batch, name).copy() for name in ("tokens", "weights", "advantages")}
        rows |= {
            "positions": batch.positions.copy(),
            "imitated": np.zeros(batch.tokens.shape, bool),
        }
        for group, source in zip(shown, drawn, strict=True):
            own = slice(group * size, (group + 1) * size)
            for name, values in self._rows(self._kept[source], size, batch).items():
                rows[name][own] = values
        self._keep(seen, batch, np.flatnonzero(~silent), size)
        sharding = seen.batch.tokens.sharding
        changed = {name: jax.device_put(values, sharding) for name, values in rows.items()}
        figures = {"replayed": len(shown) / len(silent), "replay/kept": kept}
        return dataclasses.replace(seen.batch, **changed), figures

    def _draw(self, count: int, step: int) -> list[int]:
        """So many of the groups kept."""
        if not count:
            return []
        rare = 1 - np.array([share for *_, share in self._kept])
        rng = np.random.default_rng((self._seed, 2, step))
        return rng.choice(len(rare), size=count, p=rare / rare.sum()).tolist()

    def _rows(self, group: list[Any], size: int, batch: TrainBatch) -> dict[str, np.ndarray]:
        """A kept group as so many rows of such a batch."""
        prompt, chains, _ = group
        start, shape = batch.prompt_length, (size, batch.tokens.shape[1])
        tokens, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        real = np.zeros(shape, bool)
        real[:, start - len(prompt) : start] = True
        tokens[:, start - len(prompt) : start] = prompt
        for row in range(size):
            ids, own = chains[row % len(chains)]
            end = start + len(ids)
            tokens[row, start:end], weights[row, start:end], real[row, start:end] = ids, own, True
        return {
            "tokens": tokens,
            "positions": positions(real),
            "weights": weights,
            "advantages": self._advantage * (weights > 0),
            "imitated": weights > 0,
        }

    def _keep(self, seen: Experience, batch: TrainBatch, groups: np.ndarray, size: int) -> None:
        """Keeps the right rollouts of some groups, each chain once."""
        start, right = batch.prompt_length, nothing_wrong(seen, self._stepwise)
        for group in groups:
            rows = [row for row in range(group * size, (group + 1) * size) if right[row]]
            if not 0 < len(rows) < size:
                continue
            chains = {}
            for row in rows:
                real = batch.positions[row, start:] >= 0
                ids = batch.tokens[row, start:][real].tolist()
                chains[tuple(ids)] = [ids, batch.weights[row, start:][real].tolist()]
            real = batch.positions[rows[0], :start] >= 0
            prompt = batch.tokens[rows[0], :start][real].tolist()
            self._kept.append([prompt, list(chains.values()), len(rows) / size])
        del self._kept[:-MOST]


def nothing_wrong(seen: Experience, stepwise: bool) -> Bool[np.ndarray, "B"]:
    """The rollouts with the right label, and no step of which anyone says that it is wrong.

    Args:
      seen: the rollouts.
      stepwise: False asks for the label alone, as an estimator does that reads no steps. An
        examiner calls a step wrong with a probability below 1/2, where the verifier is silent.
    """
    right = np.asarray(seen.steps.outcome) >= FULL_MARKS
    if not stepwise:
        return right
    human = np.asarray(seen.steps.step_mask & seen.steps.verifier_known)
    verified = np.asarray(seen.steps.verifier) >= FULL_MARKS
    return right & np.where(human, verified, ~seen.known | (seen.rewards >= 0.5)).all(axis=1)
