"""The prompts of a training stage, and the order in which they come."""

import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from she_jax.data.curriculum import PromptPool
from she_jax.data.dataset import ExampleSource, Prepared, open_split
from she_jax.filtering.measure import filter_prompts
from she_jax.generate.language_model import Policy
from she_jax.training.logging import say
from she_jax.training.stop import StopSignal
from she_jax.training.workdir import MISSED, Config
from she_jax.types import Example


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
