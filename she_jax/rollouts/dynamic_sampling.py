"""Dynamic sampling: informative groups replace groups that carry no learning signal."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from she_jax.rollouts.batch import RolloutBatch
from she_jax.types import Example


def dynamic_sampling(
    collect: Callable[[Any, Sequence[Example], Array], RolloutBatch],
    params: Any,
    draw: Callable[[], Sequence[Example]],
    key: Array,
    rounds: int,
) -> RolloutBatch:
    """Dynamic sampling: samples again until all groups are informative, for a number of rounds.

    Groups that carry no learning signal are replaced by informative ones from further batches of
    prompts. Informative groups of the first batch stay. So do the uninformative groups that are
    left after the last round: with SRPO only a reward model can give them an advantage. Unused
    groups enter the running pass rates and are counted, in ``dynamic_sampling/dropped`` if they
    carry no learning signal and in ``dynamic_sampling/surplus`` if they were not needed. All other
    metrics are of the first batch, whose prompts are not selected, except
    ``dynamic_sampling/zero_variance``, ``sampled_tokens`` and the times. This is DAPO's dynamic
    sampling (arXiv 2503.14476, section 3.2) with a bound.

    Args:
      collect: a ``she_jax.rollouts.collector.Collector``.
      params: of the policy.
      draw: returns the next batch of prompts.
      key: consumed.
      rounds: maximum number of further batches, >= 0.
    """
    rollouts = collect(params, draw(), key)
    used = 0
    while used < rounds and not rollouts.informative.all():
        used += 1
        # Far from the numbers of tokens, which the sampler folds into its own key.
        fresh = collect(params, draw(), jax.random.fold_in(key, 2**31 - used))
        rollouts = _replace_uninformative(rollouts, fresh)
    if not rounds:
        return rollouts
    surplus = sum(informative for *_, informative in rollouts.dropped)
    metrics = {
        "dynamic_sampling/rounds": used,
        "dynamic_sampling/dropped": len(rollouts.dropped) - surplus,
        "dynamic_sampling/surplus": surplus,
        "dynamic_sampling/zero_variance": 1.0 - float(rollouts.informative.mean()),
    }
    return dataclasses.replace(rollouts, metrics=rollouts.metrics | metrics)


def _replace_uninformative(old: RolloutBatch, new: RolloutBatch) -> RolloutBatch:
    """Replaces uninformative groups of ``old`` by informative groups of ``new``."""
    targets, candidates = np.flatnonzero(~old.informative), np.flatnonzero(new.informative)
    count, groups = min(len(targets), len(candidates)), len(old.examples)
    source = np.arange(groups)
    source[targets[:count]] = groups + candidates[:count]
    size = len(old.texts) // groups
    rows = (source[:, None] * size + np.arange(size)).reshape(-1)

    def select_rows(first: Any, second: Any) -> Any:
        """Selects rows of arrays over rollouts; scalars of the batch stay."""
        if not np.ndim(first):
            return first
        module = np if isinstance(first, np.ndarray) else jnp
        return module.concatenate([first, second])[rows]

    examples = [*old.examples, *new.examples]
    rates = np.concatenate([old.pass_rates, new.pass_rates])
    unused = np.setdiff1d(np.arange(len(examples)), source)
    arrays = {
        name: jax.tree.map(select_rows, getattr(old, name), getattr(new, name))
        for name in ("batch", "steps", "outcome", "rewards", "known", "advantages")
    }
    informative = np.concatenate([old.informative, new.informative])
    metrics = {
        name: value + new.metrics[name] if name.startswith(("time/", "sampled")) else value
        for name, value in old.metrics.items()
    }
    return RolloutBatch(
        **arrays,
        metrics=metrics,
        examples=[examples[n] for n in source],
        texts=[[*old.texts, *new.texts][row] for row in rows],
        chains=[[*old.chains, *new.chains][row] for row in rows],
        informative=informative[source],
        dropped=(
            *old.dropped,
            *((examples[n], float(rates[n]), bool(informative[n])) for n in unused),
        ),
    )
