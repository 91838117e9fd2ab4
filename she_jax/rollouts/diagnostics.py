"""Diagnostics of a batch of rollouts: exploration, credit, rewards per step."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from she_jax.cot import Chain, CotSchema
from she_jax.rewards.verifier import FULL_MARKS, verify, with_all_truth
from she_jax.rl.steps import step_token_counts
from she_jax.types import Example, Rollout, StepBatch


def exploration(
    chains: Sequence[Chain], rollout: Rollout, steps: StepBatch, schema: CotSchema, groups: int
) -> dict[str, float]:
    """How far the policy still explores.

    Returns:
      ``paths``, the mean number of different paths (tuples of the steps' verdicts) in a group;
      ``entropy/<step>``, the mean of -log p over the tokens sampled in a step, in nats: an estimate
      of the policy's entropy there, at the sampling temperature.
    """
    taken = np.array([schema.path(chain) for chain in chains]).reshape(groups, -1)
    figures = {"paths": float(np.mean([len(set(own)) for own in taken.tolist()]))}
    surprise, ids = -np.asarray(rollout.logps), np.asarray(steps.step_ids)
    for k, name in enumerate(schema.names):
        if (own := ids == k).any():
            figures[f"entropy/{name}"] = float(surprise[own].mean())
    return figures


def assignment(
    advantages: Float[np.ndarray, "B S"], steps: StepBatch, schema: CotSchema
) -> dict[str, float]:
    """Whether credit goes to the steps that earn it, whatever estimator gave it.

    Returns:
      Of the written steps whose verdict the verifier knows: ``credit/<step>``, the share that has
      an advantage, and ``astray/<step>``, the share whose advantage is of the wrong sign, that of a
      right step below 0 or that of a wrong one above.
    """
    sizes = step_token_counts(steps.step_ids, steps.step_ids >= 0, len(schema.names))
    judged = np.asarray(steps.step_mask & steps.verifier_known & (sizes > 0))
    right = np.asarray(steps.verifier) >= FULL_MARKS
    wrong_way = np.where(right, advantages < 0, advantages > 0)
    figures = {}
    for k, name in enumerate(schema.names):
        if (own := judged[:, k]).any():
            figures[f"credit/{name}"] = float((advantages[own, k] != 0).mean())
            figures[f"astray/{name}"] = float(wrong_way[own, k].mean())
    return figures


def _rewards(
    rewards: Float[Array, "B S"],
    known: Bool[Array, "B S"],
    outcome: Float[Array, "B"],
    schema: CotSchema,
) -> dict[str, float]:
    """Mean outcome reward, and the mean of each step's rewards where they are known."""
    counts = np.asarray(known).sum(axis=0)
    means = np.asarray(rewards).sum(axis=0) / np.maximum(counts, 1)  # unknown rewards are 0
    by_step = {
        f"reward/{name}": float(mean)
        for name, mean, count in zip(schema.names, means, counts, strict=True)
        if count
    }
    return {"reward": float(jnp.mean(outcome)), **by_step}


def _truth(
    chains: Sequence[Chain],
    examples: Sequence[Example],
    schema: CotSchema,
    examined: Bool[np.ndarray, "B S"],
) -> dict[str, float]:
    """The share of steps that are truly right among those that were examined.

    Beside the examiner's mean score it tells whether the score can be trusted. A data set that
    knows no more than its annotation says the same as the verifier.
    """
    told = [
        verify(chain, with_all_truth(example), schema)
        for chain, example in zip(chains, examples, strict=True)
    ]
    right = np.stack([rewards for rewards, _ in told]) >= FULL_MARKS
    both = np.stack([known for _, known in told]) & examined
    return {
        f"truth/{name}": float((right & both)[:, k].sum() / count)
        for k, name in enumerate(schema.names)
        if (count := both[:, k].sum())
    }
