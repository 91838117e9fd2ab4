"""Training on the policy's current rollouts: SRPO and the estimators it is compared with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from she_jax.data.curriculum import PromptPool
from she_jax.rewards.prm.refresh import Refresher
from she_jax.rollouts.batch import RolloutBatch
from she_jax.rollouts.collector import Collector
from she_jax.rollouts.dynamic_sampling import dynamic_sampling
from she_jax.rollouts.monitor import TrainingMonitor
from she_jax.rollouts.page import write_rollouts
from she_jax.rollouts.self_imitation import SelfImitation
from she_jax.training.logging import log
from she_jax.training.optimizer import OptimizerConfig
from she_jax.types import TrainBatch, TrainState


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """How long training after the cold start runs, and what it does beside its updates.

    Attributes:
      optimizer: see ``OptimizerConfig``.
      steps: updates; 0 ends with the cold start.
      eval_every, checkpoint_every, page_every: updates between two evaluations, checkpoints, and
        pages of rollouts.
      patience: evaluations without improvement that end training; 0 for never.
      dynamic_sampling_rounds: further batches at most to replace uninformative groups.
      self_imitation: advantage of imitated rollouts; 0 for none.

    Raises:
      ValueError: if a value is out of its range.
    """

    optimizer: OptimizerConfig
    steps: int
    eval_every: int
    checkpoint_every: int
    page_every: int
    patience: int
    dynamic_sampling_rounds: int
    self_imitation: float

    def __post_init__(self):
        for name in ("eval_every", "checkpoint_every", "page_every"):
            if getattr(self, name) < 1:
                key = name.replace("page", "sample")
                raise ValueError(f"rl.{key}={getattr(self, name)}: expected at least 1")
        for name in ("steps", "dynamic_sampling_rounds", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"rl.{name}={getattr(self, name)}: expected 0 (none) or more")
        if not self.self_imitation >= 0:
            raise ValueError(
                f"rl.self_imitation={self.self_imitation}: expected 0 (none) or a positive "
                "advantage"
            )


@dataclass(frozen=True, kw_only=True)
class OnlineParts:
    """What online training works with; built when the first update is due.

    Attributes:
      pool: draws the prompts.
      collector: samples and rewards.
      refresher: keeps the collector's process reward model up to date, or None.
    """

    pool: PromptPool
    collector: Collector
    refresher: Refresher | None = None


class OnlineRL:
    """A batch source of fresh rollouts: groups, steps, step rewards, advantages.

    Args:
      build: builds the parts for a run that has done so many updates.
      config: how it runs.
      pages: folder of the pages with rollouts to read.
      title: the estimator's name.
      fingerprint: of the data.
      self_imitation: replaces groups without advantage by earlier correct rollouts, or None.
    """

    phase = "rl"
    shown: tuple[str, ...] = ("reward", "kl")

    def __init__(
        self,
        build: Callable[[int], OnlineParts],
        config: OnlineConfig,
        pages: Path,
        *,
        title: str,
        fingerprint: str,
        self_imitation: SelfImitation | None = None,
    ):
        self._build, self._config, self._pages = build, config, pages
        self.title, self.fingerprint = title, fingerprint
        self._self_imitation, self._monitor = self_imitation, TrainingMonitor()
        self._sampled = 0
        self._parts: OnlineParts
        self._rollouts: RolloutBatch

    @property
    def state(self) -> dict[str, Any]:
        """Positions of prompts and monitor, kept rollouts, and the tokens sampled so far."""
        state: dict[str, Any] = {"pool": self._parts.pool.state, "monitor": self._monitor.state}
        if self._self_imitation:
            state["self_imitation"] = self._self_imitation.state
        return state | {"sampled_tokens": self._sampled}

    def begin(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Builds the parts and restores a checkpoint's ``state``."""
        self._parts = self._build(step)
        if state is None:
            return
        self._parts.pool.restore(state["pool"])
        self._monitor.restore(state["monitor"])
        if self._self_imitation:
            self._self_imitation.restore(state["self_imitation"])
        self._sampled = state["sampled_tokens"]

    def batch(self, state: TrainState, step: int) -> tuple[TrainBatch, dict[str, float]]:
        """Rollouts of the current policy, as the update reads them."""
        parts, key = self._parts, jax.random.fold_in(state.key, step)
        rounds = self._config.dynamic_sampling_rounds
        rollouts = dynamic_sampling(parts.collector, state.params, parts.pool.draw, key, rounds)
        self._rollouts = rollouts
        parts.pool.learn(*rollouts.rates)
        self._sampled += int(rollouts.metrics["sampled_tokens"])
        if not self._self_imitation:
            return rollouts.batch, rollouts.metrics
        batch, metrics = self._self_imitation(rollouts, step)
        return batch, rollouts.metrics | metrics

    def on_step_end(self, step: int, params: Any, metrics: Mapping[str, float], last: bool) -> bool:
        """Writes a page of rollouts, warns of collapse, refreshes the process reward model."""
        parts = self._parts
        if step == 1 or step % self._config.page_every == 0:
            page = self._pages / f"step_{step:06d}.md"
            write_rollouts(page, step, self._rollouts, parts.collector.page_parts)
        for warning in self._monitor.warnings(metrics):
            log(f"step {step}: {warning}")
        return parts.refresher is not None and not last and parts.refresher(step, params)
