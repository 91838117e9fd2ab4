"""Refreshes a process reward model (PRM) during RL, by training it on the policy's current steps.

A PRM is trained on the steps of earlier policies. As the policy changes, its steps drift away from
those. At a fixed interval the PRM may be trained further on current steps of annotated pairs.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from she_jax.generate.generator import Judge
from she_jax.rewards.prm.dataset import POLICY, Balanced, Examination, judged, read_examinations
from she_jax.rewards.prm.model import EXAMINER, Examiner
from she_jax.rl.update import jit_update_step, make_sft_step
from she_jax.training.checkpoint import Checkpoints
from she_jax.training.logging import say
from she_jax.training.sft import new_state
from she_jax.training.workdir import Config
from she_jax.types import Example, TrainState

EARLIER = "earlier policy"  # source of the policy steps in the PRM's original training data


class Refresher:
    """Refreshes a process reward model in place, and restores it when a run resumes.

    Its parameters are saved in ``checkpoints/examiner`` by update number, so that a resumed run
    continues with the same PRM.

    Args:
      config: config of the policy's run; ``reward``, ``rl.steps`` and ``seed`` are used.
      workdir: folder of that run.
      prm: the PRM as loaded from ``config.reward.model``.
      generator: samples from the policy.
      batches: batches of the stage's pairs by position, one per policy update.
      start: number of policy updates already done.

    Raises:
      ValueError: if the PRM checkpoint that update ``start`` needs is missing.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        prm: Examiner,
        generator: Judge,
        batches: Any,
        start: int,
    ):
        self._config, self._prm, self._generator = config, prm, generator
        self._batches = batches
        folder = Path(config.reward.model)
        self._answer_budget = EXAMINER.check(folder, config).examiner.room
        self._pool = [
            replace(step_query, source=EARLIER) if step_query.source == POLICY else step_query
            for step_query in read_examinations(folder / "examinations" / "train.jsonl")
        ]
        self._saved = Checkpoints(workdir / "checkpoints" / "examiner", warn=say)
        last = min(start, config.rl.steps - 1)  # there is no refresh after the last update
        last -= last % config.reward.refresh_every
        if last and not self._restore(last):
            raise ValueError(
                f"the examiner as refreshed at update {last} is not in {self._saved.directory}: "
                "put it back, or start anew in another --workdir"
            )
        # A constant rate: which refresh will be the last is not known in advance.
        rate = config.reward.refresh_learning_rate
        self._optimizer = optax.adamw(rate, b2=0.98, weight_decay=0.01)
        self._update = jit_update_step(
            make_sft_step(prm.policy.model.forward, self._optimizer),
            prm.policy.mesh,
            new_state(prm.policy, self._optimizer, 0),
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
        if step % self._config.reward.refresh_every:
            return False
        if self._restore(step):
            return True
        step_queries = self._collect(step, params)
        if not step_queries:
            say(f"step {step}: the examiner is not refreshed: none of these pairs is annotated")
        state, losses = self._train(step_queries, step)
        self._prm.learnt(state.params)
        self._saved.save(step, state, {})
        if losses:
            count = len(step_queries)
            say(
                f"step {step}: the examiner learned from {count} annotated steps of the policy; "
                f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last"
            )
        return True

    def _restore(self, step: int) -> bool:
        """Restores the process reward model of a refresh, and returns whether it was saved."""
        restored = None
        if step in self._saved.steps:
            restored = self._saved.restore_params(self._prm.policy.params, up_to=step)
        if restored is None or restored[0] != step:
            return False
        self._prm.learnt(restored[1])
        return True

    def _collect(self, step: int, params: Any) -> list[Examination]:
        """Samples the policy on the prompts since the last refresh; returns the annotated steps."""
        first, seed = step - self._config.reward.refresh_every, self._config.seed + step
        examples: list[Example] = [
            example for n in range(first, step) for example in self._batches[n]
        ]
        samples = self._generator.samples(params, examples, 1, seed, lambda done: None)
        schema = self._generator.format.schema
        return [
            step_query
            for example, (sample,) in zip(examples, samples, strict=True)
            for step_query in judged(sample.chain, example, schema, POLICY, f"{example.uid}/{step}")
        ]

    def _train(self, step_queries: list[Examination], step: int) -> tuple[TrainState, list[float]]:
        """Returns the state of the process reward model after the updates, and their losses."""
        prm, reward, seed = self._prm, self._config.reward, self._config.seed
        rng = np.random.default_rng((seed, step))
        sampler, losses = Balanced([*self._pool, *step_queries]), []
        params = jax.tree.map(jnp.copy, prm.policy.params)  # an update donates its state
        state = new_state(replace(prm.policy, params=params), self._optimizer, seed)
        for _ in range(reward.refresh_steps if step_queries else 0):
            chains = sampler.draw(reward.refresh_batch_size, rng)
            # These may be wrong. They are targets only to keep the PRM writing as before.
            references = prm.own_chains([chain[0].example for chain in chains])
            batch, _ = prm.format.sft_batch(chains, self._answer_budget, rng, references)
            state, figures = self._update(state, batch)
            losses.append(float(jax.device_get(figures["loss"])))
        return state, losses
