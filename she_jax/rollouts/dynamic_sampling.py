"""Dynamic sampling: informative groups replace groups that carry no learning signal."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from she_jax.rollouts.batch import Experience
from she_jax.types import Example


def refilled(
    collect: Callable[[Any, Sequence[Example], Array], Experience],
    params: Any,
    draw: Callable[[], Sequence[Example]],
    key: Array,
    rounds: int,
) -> Experience:
    """Dynamic sampling: samples again until all groups are informative, for a number of rounds.

    Groups that carry no learning signal are replaced by informative ones from further batches of
    prompts. Informative groups of the first batch stay. So do the uninformative groups that are
    left after the last round: only a reward model can give them an advantage. Unused groups enter
    the running pass rates and are counted, in ``dropped`` if they carry no learning signal and in
    ``surplus`` if they were not needed. All other metrics are of the first batch, whose prompts are
    not selected, except ``zero_variance/refilled``, ``sampled_tokens`` and the times. This is
    DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) with a bound.

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
    figures = {
        "refills": used,
        "dropped": len(rollouts.dropped) - surplus,
        "surplus": surplus,
        "zero_variance/refilled": 1.0 - float(rollouts.informative.mean()),
    }
    return dataclasses.replace(rollouts, figures=rollouts.figures | figures)


def _replace_uninformative(old: Experience, new: Experience) -> Experience:
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
    figures = {
        name: value + new.figures[name] if name.startswith(("time/", "sampled")) else value
        for name, value in old.figures.items()
    }
    return Experience(
        **arrays,
        figures=figures,
        examples=[examples[n] for n in source],
        texts=[[*old.texts, *new.texts][row] for row in rows],
        chains=[[*old.chains, *new.chains][row] for row in rows],
        informative=informative[source],
        dropped=(
            *old.dropped,
            *((examples[n], float(rates[n]), bool(informative[n])) for n in unused),
        ),
    )
