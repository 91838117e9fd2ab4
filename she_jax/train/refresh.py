"""Refreshing an examiner: it goes on learning from steps that the policy writes by now.

An examiner that was trained once knows the steps of the policies it was trained on. As the policy
moves on, its steps look less and less like those; every so many updates the examiner may look at
them anew, where humans annotated them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from she_jax.data.examinations import POLICY, Balanced, Examination, judged
from she_jax.rl.update import jit_update_step, make_sft_step
from she_jax.train.checkpoint import Checkpoints
from she_jax.train.examiner import EXAMINER, Examiner
from she_jax.train.metrics import say
from she_jax.train.predict import Judge
from she_jax.train.reward_model import read_examinations
from she_jax.train.sft import new_state
from she_jax.train.workdir import Config
from she_jax.types import Example, TrainState

EARLIER = "earlier policy"  # source of the policy steps that the examiner was trained on at first


class Refresher:
    """Refreshes an examiner in place, and brings it back to where it was.

    What it learnt is in ``checkpoints/examiner``, by the number of the update, so that a run that
    is resumed goes on with the examiner it had.

    Args:
      config: of the policy's run; ``reward`` is read.
      workdir: its folder.
      examiner: as ``config.reward.model`` has it.
      judge: samples from the policy.
      batches: of the stage's pairs, by position; an update's worth each.
      start: updates that the run has done.

    Raises:
      ValueError: if the examiner of update ``start`` is gone.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        examiner: Examiner,
        judge: Judge,
        batches: Any,
        start: int,
    ):
        self._config, self._examiner, self._judge = config, examiner, judge
        self._batches = batches
        folder = Path(config.reward.model)
        self._room = EXAMINER.check(folder, config).examiner.room
        self._pool = [
            replace(one, source=EARLIER) if one.source == POLICY else one
            for one in read_examinations(folder / "examinations" / "train.jsonl")
        ]
        self._saved = Checkpoints(workdir / "checkpoints" / "examiner", warn=say)
        last = min(start, config.rl.steps - 1)  # after the last update there is no refresh
        last -= last % config.reward.refresh_every
        if last and not self._go_back(last):
            raise ValueError(
                f"the examiner as refreshed at update {last} is not in {self._saved.directory}: "
                "put it back, or start anew in another --workdir"
            )
        # A constant rate: there is no telling which refresh will be the last.
        rate = config.reward.refresh_learning_rate
        self._optimizer = optax.adamw(rate, b2=0.98, weight_decay=0.01)
        policy = examiner.policy
        self._update = jit_update_step(
            make_sft_step(policy.model.forward, self._optimizer),
            policy.mesh,
            new_state(policy, self._optimizer, 0),
        )

    def __call__(self, step: int, params: Any) -> bool:
        """Refreshes the examiner where that is due after so many updates; says whether it was.

        It learns from as many batches as there were updates since the last time. What was done
        before is not done again.

        Args:
          step: updates that are done.
          params: the policy's.
        """
        if step % self._config.reward.refresh_every:
            return False
        if self._go_back(step):
            return True
        new = self._written(step, params)
        if not new:
            say(f"step {step}: the examiner is not refreshed, for nobody annotated these pairs")
        state, losses = self._learnt(new, step)
        self._examiner.learnt(state.params)
        self._saved.save(step, state, {})
        if losses:
            say(
                f"step {step}: the examiner learnt from {len(new)} annotated steps of the policy; "
                f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last"
            )
        return True

    def _go_back(self, step: int) -> bool:
        """Gives the examiner what it had learnt by then, if that is there."""
        found = None
        if step in self._saved.steps:
            found = self._saved.restore_params(self._examiner.policy.params, up_to=step)
        if found is None or found[0] != step:
            return False
        self._examiner.learnt(found[1])
        return True

    def _written(self, step: int, params: Any) -> list[Examination]:
        """Annotated steps that the policy writes by now, of the prompts since the last time."""
        since = step - self._config.reward.refresh_every
        examples: list[Example] = [one for n in range(since, step) for one in self._batches[n]]
        judge, seed = self._judge, self._config.seed + step
        samples = judge.samples(params, examples, 1, seed, lambda done: None)
        schema = judge.format.schema
        return [
            one
            for example, (sample,) in zip(examples, samples, strict=True)
            for one in judged(sample.chain, example, schema, POLICY, f"{example.uid}/{step}")
        ]

    def _learnt(self, new: list[Examination], step: int) -> tuple[TrainState, list[float]]:
        """The examiner's state after its updates, and their losses."""
        examiner, reward = self._examiner, self._config.reward
        rng = np.random.default_rng((self._config.seed, step))
        drawer, losses = Balanced([*self._pool, *new]), []
        own = jax.tree.map(jnp.copy, examiner.policy.params)  # an update takes its state for good
        state = new_state(replace(examiner.policy, params=own), self._optimizer, self._config.seed)
        for _ in range(reward.refresh_steps if new else 0):
            drawn = drawer.draw(reward.refresh_batch_size, rng)
            # Its own chains are none that are right for sure: it is to write them as before.
            own = examiner.own_chains([chain[0].example for chain in drawn])
            batch, _ = examiner.format.sft_batch(drawn, self._room, rng, own)
            state, figures = self._update(state, batch)
            losses.append(float(jax.device_get(figures["loss"])))
        return state, losses
