"""Refreshing an examiner: it goes on learning from steps that the policy writes by now.

An examiner that was trained once knows the steps of the policies it was trained on. As the policy
moves on, its steps look less and less like those; every so many updates the examiner may look at
them anew, where humans annotated them.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from she_jax.data.examinations import POLICY, Balanced, judged
from she_jax.rl.update import jit_update_step, make_sft_step
from she_jax.train.checkpoint import Checkpoints
from she_jax.train.examiner import EXAMINER, Examiner
from she_jax.train.metrics import say
from she_jax.train.predict import Judge
from she_jax.train.reward_model import read_examinations
from she_jax.train.sft import new_state
from she_jax.train.workdir import Config
from she_jax.types import Example

EARLIER = "earlier policy"  # source of the policy steps that the examiner was trained on at first


def make_refresher(
    config: Config, workdir: Path, examiner: Examiner, judge: Judge, batches: Any, start: int
) -> Callable[[int, Any], bool]:
    """Makes the function that refreshes an examiner in place, and brings it back to where it was.

    What it learnt is in ``checkpoints/examiner``, by the number of the update, so that a run that
    is resumed goes on with the examiner it had.

    Args:
      config: of the policy's run; ``reward`` is read.
      workdir: its folder.
      examiner: as ``config.reward.model`` has it.
      judge: samples from the policy.
      batches: of the stage's pairs, by position; an update's worth each.
      start: updates that the run has done.

    Returns:
      ``refresh(step, params)``: after so many updates, with the policy's parameters. It refreshes
      the examiner where it is due, on as many batches as there were updates since the last time,
      and says whether it was. What was done before is not done again.

    Raises:
      ValueError: if the examiner of update ``start`` is gone.
    """
    reward, folder = config.reward, Path(config.reward.model)
    room = EXAMINER.check(folder, config).examiner.room
    pool = [
        replace(one, source=EARLIER) if one.source == POLICY else one
        for one in read_examinations(folder / "examinations" / "train.jsonl")
    ]
    saved = Checkpoints(workdir / "checkpoints" / "examiner", warn=say)

    def go_back(step: int) -> bool:
        """Gives the examiner what it had learnt by then, if that is there."""
        found = None
        if step in saved.steps:
            found = saved.restore_params(examiner.policy.params, up_to=step)
        if found is None or found[0] != step:
            return False
        examiner.learnt(found[1])
        return True

    every = reward.refresh_every
    last = min(start, config.rl.steps - 1)  # after the last update there is no refresh
    last -= last % every
    if last and not go_back(last):
        raise ValueError(
            f"the examiner as refreshed at update {last} is not in {saved.directory}: put it back, "
            "or start anew in another --workdir"
        )
    # A constant rate: there is no telling which refresh will be the last.
    optimizer = optax.adamw(reward.refresh_learning_rate, b2=0.98, weight_decay=0.01)
    update = make_sft_step(examiner.policy.model.forward, optimizer)
    compiled = jit_update_step(
        update, examiner.policy.mesh, new_state(examiner.policy, optimizer, 0)
    )

    def refresh(step: int, params: Any) -> bool:
        """Refreshes the examiner where that is due; says whether it was."""
        if step % every:
            return False
        if go_back(step):
            return True
        examples: list[Example] = [one for n in range(step - every, step) for one in batches[n]]
        samples = judge.samples(params, examples, 1, config.seed + step, lambda done: None)
        schema = judge.format.schema
        new = [
            one
            for example, (sample,) in zip(examples, samples, strict=True)
            for one in judged(sample.chain, example, schema, POLICY, f"{example.uid}/{step}")
        ]
        if not new:
            say(f"step {step}: the examiner is not refreshed, for nobody annotated these pairs")
        drawer, rng = Balanced([*pool, *new]), np.random.default_rng((config.seed, step))
        own = jax.tree.map(jnp.copy, examiner.policy.params)  # an update takes its state for good
        state = new_state(replace(examiner.policy, params=own), optimizer, config.seed)
        losses = []
        for _ in range(reward.refresh_steps if new else 0):
            drawn = drawer.draw(reward.refresh_batch_size, rng)
            batch, _ = examiner.format.sft_batch(drawn, room, rng)
            state, figures = compiled(state, batch)
            losses.append(float(jax.device_get(figures["loss"])))
        examiner.learnt(state.params)
        saved.save(step, state, {})
        if losses:
            say(
                f"step {step}: the examiner learnt from {len(new)} annotated steps of the policy; "
                f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last"
            )
        return True

    return refresh
