"""Learning from the policy's own rollouts: SRPO, and the estimators it is compared with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from she_jax.data.dataset import ExampleSource
from she_jax.data.loader import batches
from she_jax.generate.generator import Judge
from she_jax.generate.language_model import Policy
from she_jax.rewards.orm.model import load_scalar
from she_jax.rewards.prm.model import load_examiner
from she_jax.rewards.prm.refresh import Refresher
from she_jax.rollouts.batch import Experience
from she_jax.rollouts.collector import Collector
from she_jax.rollouts.dynamic_sampling import refilled
from she_jax.rollouts.monitor import Watch
from she_jax.rollouts.prompt_source import make_pool
from she_jax.rollouts.self_imitation import Replay
from she_jax.training.logging import say
from she_jax.training.workdir import Config
from she_jax.types import Example, TrainBatch, TrainState


class Online:
    """Rollouts in groups, steps, rewards a step, advantages; for one update after another.

    Args:
      config: of the run.
      workdir: its folder.
      policy: model, prompts and devices; its parameters are not read.
      reference: the cold start's parameters.
      source: the prompts of the stage.
      rates: their pass rates by uid, as far as they were measured.
      judge: samples from the policy, where the examiner learns anew from it.
    """

    shown: tuple[str, ...] = ("reward", "kl")

    def __init__(
        self,
        config: Config,
        workdir: Path,
        policy: Policy,
        reference: Any,
        source: Sequence[Example] | ExampleSource,
        rates: Mapping[str, float],
        judge: Judge,
    ):
        self._config, self._workdir, self._policy = config, workdir, policy
        self._reference, self._source, self._judge = reference, source, judge
        self._pool, self._watch = make_pool(config, source, rates), Watch()
        self._replay = Replay(config) if config.rl.replay else None
        self._sampled = 0
        self._refresh: Refresher | None = None
        self.title = config.rl.estimator.upper().replace("_", " ")

    @property
    def state(self) -> dict[str, Any]:
        """Where the prompts stand, what the watch has seen, what is kept, tokens sampled so far."""
        own = {"pool": self._pool.state, "watch": self._watch.state}
        own |= {"replay": self._replay.state} if self._replay else {}
        return own | {"sampled_tokens": self._sampled}

    def begin(self, state: Mapping[str, Any], start: int) -> None:
        """Loads what examines, and goes on from such a state."""
        config = self._config
        self._pool.restore(state["pool"])
        self._watch.restore(state["watch"])
        if self._replay:
            self._replay.restore(state["replay"])
        self._sampled = state["sampled_tokens"]
        self._examiner = load_examiner(config) if config.reward.model else None
        scalar = load_scalar(config, self._policy) if config.reward.scalar else None
        self._collect = Collector(config, self._policy, self._reference, self._examiner, scalar)
        if self._examiner is not None and config.reward.refresh_every:
            shown = batches(
                self._source, config.rl.prompts, seed=config.seed, balance=config.data.balance
            )
            own = config, self._workdir, self._examiner, self._judge
            self._refresh = Refresher(*own, shown, start)

    def batch(self, state: TrainState, step: int) -> tuple[TrainBatch, dict[str, float]]:
        """Samples with the policy as it is."""
        key = jax.random.fold_in(state.key, step)
        refill = self._config.rl.refill
        self._seen = refilled(self._collect, state.params, self._pool.draw, key, refill)
        self._pool.learn(*self._seen.rates)
        self._sampled += int(self._seen.figures["sampled_tokens"])
        if not self._replay:
            return self._seen.batch, self._seen.figures
        batch, figures = self._replay(self._seen, step)
        return batch, self._seen.figures | figures

    def after(self, step: int, params: Any, figures: Mapping[str, float], last: bool) -> bool:
        """Writes a page of rollouts now and then, warns, refreshes the examiner."""
        seen: Experience = self._seen
        if step == 1 or step % self._config.rl.sample_every == 0:
            page = self._workdir / "samples" / f"step_{step:06d}.md"
            seen.write(page, step, self._policy.format.schema, self._examiner)
        for warning in self._watch.warnings(figures):
            say(f"step {step}: {warning}")
        return self._refresh is not None and not last and self._refresh(step, params)
