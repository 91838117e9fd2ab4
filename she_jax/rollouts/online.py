"""Learning from the policy's own rollouts: SRPO, and the estimators it is compared with."""

import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np

from she_jax.data.curriculum import PromptPool
from she_jax.data.dataset import ExampleSource, Prepared, open_split
from she_jax.data.loader import batches
from she_jax.rewards.prm.model import load_examiner
from she_jax.rollouts.batch import Experience, refilled
from she_jax.filtering.measure import filter_prompts
from she_jax.training.logging import say
from she_jax.generate.generator import Judge
from she_jax.rewards.prm.refresh import Refresher
from she_jax.rollouts.self_imitation import Replay
from she_jax.rollouts.collector import Collector
from she_jax.rewards.orm.model import load_scalar
from she_jax.training.setup import Policy
from she_jax.training.stop import StopSignal
from she_jax.rollouts.monitor import Watch
from she_jax.training.workdir import MISSED, Config
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


def training_prompts(
    config: Config, workdir: Path, policy: Policy, params: Any, made: Prepared, stop: StopSignal
) -> tuple[Sequence[Example] | ExampleSource, Mapping[str, float]]:
    """The prompts of the stage, and their pass rates by uid as far as they were measured.

    All of the training split; or what a filter keeps of it with the policy as it is now; or what
    the stage before had no right chain of, and where that is not enough, new ones.
    """
    source = open_split(made.path, "train")
    if config.rl.missed:
        count = config.rl.steps * config.rl.prompts
        left = left_over(config)
        return missed_prompts(*left, source, count, config.rl.missed, config.seed), {}
    if not config.filter.pairs:
        return source, {}
    kept = filter_prompts(config, workdir, policy, params, made, stop)
    if kept is None:
        raise SystemExit(0)
    return [source[row] for row in kept.rows], kept.rates


def left_over(config: Config) -> tuple[set[str], set[str]]:
    """Of the run behind ``start``, an SFT on right rollouts: the uids of the pairs that it sampled
    in vain, and of all that were met by then.
    """
    path = Path(config.start).parent.parent / MISSED
    told = json.loads(path.read_text(encoding="utf-8"))
    return set(told["missed"]), set(told["met"])


def missed_prompts(
    missed: Set[str],
    met: Set[str],
    source: Sequence[Example] | ExampleSource,
    count: int,
    share: float,
    seed: int,
) -> list[Example]:
    """Training pairs that were sampled in vain, and such as were never met, drawn by chance.

    The missed ones are what is left to learn: the rest was imitated. A few of them alone, met again
    and again, would be learnt by heart.

    Args:
      missed, met: uids of pairs.
      source: the training split.
      count: prompts that the stage is going to draw.
      share: of these, how many were missed, in (0, 1]. Where there are too few of one kind, more of
        the other make it up.
      seed: of the draw.

    Raises:
      ValueError: if there is neither a missed nor a new one.
    """
    uids = [source[row].uid for row in range(len(source))]
    rng = np.random.default_rng((seed, 3))
    again = rng.permutation([row for row, uid in enumerate(uids) if uid in missed])
    new = rng.permutation([row for row, uid in enumerate(uids) if uid not in met])
    again = again[: max(round(share * count), count - len(new))]
    more = new[: count - len(again)]
    if not len(again) + len(more):
        raise ValueError(
            "the stage before found a right chain for every pair of the split: nothing is left for "
            "rl.missed; set it to 0, or give the data set more training pairs"
        )
    say(f"{len(again):,} prompts that had no right chain before, and {len(more):,} new ones")
    return [source[row] for row in (*again, *more)]


def make_pool(
    config: Config, source: Sequence[Example] | ExampleSource, rates: Mapping[str, float]
) -> PromptPool:
    """The order in which the prompts of the stage come."""
    rl = config.rl
    return PromptPool(
        source,
        rl.prompts,
        seed=config.seed,
        aim=rl.aim,
        balance=config.data.balance,
        rates=rates,
    )
