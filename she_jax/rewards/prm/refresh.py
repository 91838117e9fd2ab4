"""Refreshes a process reward model (PRM) during RL, by training it on the policy's current steps.

A PRM is trained on the steps of earlier policies. As the policy changes, its steps drift away from
those. At a fixed interval the PRM may be trained further on current steps of annotated pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from she_jax.generate.generator import Generator
from she_jax.rewards.prm.dataset import (
    POLICY,
    BalancedSampler,
    label_steps,
    read_step_queries,
    step_query_file,
)
from she_jax.rewards.prm.model import PRM, ProcessRewardModel
from she_jax.rewards.prm.step_query import StepQuery
from she_jax.rl.update import jit_update_step, make_sft_step
from she_jax.training.checkpoint import Checkpoints
from she_jax.training.logging import log
from she_jax.training.sft import new_state
from she_jax.types import Example, TrainState, UserError

EARLIER = "earlier policy"  # source of the policy steps in the PRM's original training data


@dataclass(frozen=True, kw_only=True)
class RefreshConfig:
    """How often and how long a process reward model keeps learning.

    Attributes:
      every: policy updates between two refreshes; 0 for never.
      steps: updates of the reward model at each refresh.
      batch_size: chains in each of these updates.
      learning_rate: constant.
      seed: of sampling and of the draws.

    Raises:
      ValueError: if a number is out of its range.
    """

    every: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int

    def __post_init__(self):
        if self.every < 0:
            raise ValueError(f"reward.refresh_every={self.every}: expected 0 (never) or more")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"reward.refresh_{name}={value}: expected at least 1")


class Refresher:
    """Refreshes a process reward model in place, and restores it when a run resumes.

    Its parameters are saved by update number, so that a resumed run continues with the same PRM.

    Args:
      config: how often and how long.
      folder: of the checkpoints, in the policy's run.
      artifact: folder of the run that trained the PRM.
      prm: the PRM.
      generator: samples from the policy.
      batches: batches of the stage's pairs by position, one per policy update.
    """

    def __init__(
        self,
        config: RefreshConfig,
        folder: Path,
        artifact: Path,
        prm: ProcessRewardModel,
        generator: Generator,
        batches: Any,
    ):
        self._config, self._prm, self._generator = config, prm, generator
        self._batches: Sequence[list[Example]] = batches
        self._answer_budget = PRM.check(artifact, generator.prompts.schema)["room"]
        self._pool = [
            replace(step_query, source=EARLIER) if step_query.source == POLICY else step_query
            for step_query in read_step_queries(step_query_file(artifact, "train"))
        ]
        self._saved = Checkpoints(folder, warn=log)
        # A constant rate: which refresh will be the last is not known in advance.
        self._optimizer = optax.adamw(config.learning_rate, b2=0.98, weight_decay=0.01)
        self._update = jit_update_step(
            make_sft_step(prm.lm.model.forward, self._optimizer),
            prm.lm.mesh,
            new_state(prm.params, prm.lm.mesh, self._optimizer, 0),
        )

    def resume(self, step: int) -> None:
        """Restores the PRM as it was after ``step`` policy updates.

        Raises:
          UserError: if the checkpoint that this needs is missing.
        """
        last = step - step % self._config.every
        if last and not self._restore(last):
            raise UserError(
                f"the process reward model as refreshed at update {last} is not in "
                f"{self._saved.directory}: put it back, or start anew in another --workdir"
            )

    def __call__(self, step: int, params: Any) -> bool:
        """Refreshes the process reward model if it is due after ``step`` policy updates.

        The training data are samples for the prompts of all updates since the last refresh. If
        this refresh was done before, its checkpoint is restored instead.

        Args:
          step: number of policy updates done.
          params: parameters of the policy.

        Returns:
          Whether a refresh was due.
        """
        if step % self._config.every:
            return False
        if self._restore(step):
            return True
        step_queries = self._collect(step, params)
        if not step_queries:
            log(f"step {step}: the reward model is not refreshed: none of these pairs is annotated")
        state, losses = self._train(step_queries, step)
        self._prm.set_params(state.params)
        self._saved.save(step, state, {})
        if losses:
            count = len(step_queries)
            log(
                f"step {step}: the reward model learned from {count} annotated steps of the "
                f"policy; loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last"
            )
        return True

    def _restore(self, step: int) -> bool:
        """Restores the process reward model of a refresh, and returns whether it was saved."""
        restored = None
        if step in self._saved.steps:
            restored = self._saved.restore_params(self._prm.params, up_to=step)
        if restored is None or restored[0] != step:
            return False
        self._prm.set_params(restored[1])
        return True

    def _collect(self, step: int, params: Any) -> list[StepQuery]:
        """Samples the policy on the prompts since the last refresh; returns the annotated steps."""
        first, seed = step - self._config.every, self._config.seed + step
        examples: list[Example] = [
            example for n in range(first, step) for example in self._batches[n]
        ]
        samples = self._generator.sample(params, examples, 1, seed, lambda done: None)
        schema = self._generator.prompts.schema
        return [
            step_query
            for example, (sample,) in zip(examples, samples, strict=True)
            for step_query in label_steps(
                sample.chain, example, schema, POLICY, f"{example.uid}/{step}"
            )
        ]

    def _train(self, step_queries: list[StepQuery], step: int) -> tuple[TrainState, list[float]]:
        """Returns the state of the process reward model after the updates, and their losses."""
        prm, config, seed = self._prm, self._config, self._config.seed
        rng = np.random.default_rng((seed, step))
        sampler, losses = BalancedSampler([*self._pool, *step_queries]), []
        params = jax.tree.map(jnp.copy, prm.params)  # an update donates its state
        state = new_state(params, prm.lm.mesh, self._optimizer, seed)
        for _ in range(config.steps if step_queries else 0):
            chains = sampler.draw(config.batch_size, rng)
            # These may be wrong. They are targets only to keep the PRM writing as before.
            references = prm.reference_chains([chain[0].example for chain in chains])
            batch, _ = prm.format.sft_batch(chains, self._answer_budget, rng, references)
            state, figures = self._update(state, batch)
            losses.append(float(jax.device_get(figures["loss"])))
        return state, losses
