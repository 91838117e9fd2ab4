"""Diagnostics of a batch of rollouts: rewards, exploration, and whether credit is well assigned."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from she_jax.cot import Chain, CotSchema
from she_jax.rewards.verifier import FULL_REWARD, fully_annotated, verify
from she_jax.rl.steps import step_token_counts
from she_jax.types import Example, Rollout, StepBatch


def mean_rewards(
    rewards: Float[Array, "B S"],
    known: Bool[Array, "B S"],
    outcome: Float[Array, "B"],
    schema: CotSchema,
) -> dict[str, float]:
    """``reward``, the mean outcome reward, and ``reward/<step>``, means of the known rewards."""
    counts = np.asarray(known).sum(axis=0)
    means = np.asarray(rewards).sum(axis=0) / np.maximum(counts, 1)  # unknown rewards are 0
    by_step = {
        f"reward/{name}": float(mean)
        for name, mean, count in zip(schema.names, means, counts, strict=True)
        if count
    }
    return {"reward": float(jnp.mean(outcome)), **by_step}


def exploration(
    chains: Sequence[Chain], rollout: Rollout, steps: StepBatch, schema: CotSchema, groups: int
) -> dict[str, float]:
    """How much the policy still explores.

    Returns:
      ``paths``, the mean number of different paths (tuples of the steps' verdicts) in a group;
      ``entropy/<step>``, the mean of -log p over the tokens sampled in a step, in nats: an estimate
      of the policy's entropy there, at the sampling temperature.
    """
    paths = np.array([schema.path(chain) for chain in chains]).reshape(groups, -1)
    metrics = {"paths": float(np.mean([len(set(group)) for group in paths.tolist()]))}
    surprisal, step_ids = -np.asarray(rollout.logps), np.asarray(steps.step_ids)
    for k, name in enumerate(schema.names):
        if (tokens := step_ids == k).any():
            metrics[f"entropy/{name}"] = float(surprisal[tokens].mean())
    return metrics


def credit_diagnostics(
    advantages: Float[np.ndarray, "B S"], steps: StepBatch, schema: CotSchema
) -> dict[str, float]:
    """How often verified steps get an advantage, and of which sign, whatever the estimator.

    Returns:
      Over the written steps whose reward the verifier knows: ``credit/<step>``, the share with an
      advantage other than 0; ``wrong_sign/<step>``, the share with an advantage below 0 for a
      correct step or above 0 for a wrong one.
    """
    sizes = step_token_counts(steps.step_ids, steps.step_ids >= 0, len(schema.names))
    verified = np.asarray(steps.step_mask & steps.verifier_known & (sizes > 0))
    correct = np.asarray(steps.verifier) >= FULL_REWARD
    wrong_sign = np.where(correct, advantages < 0, advantages > 0)
    metrics = {}
    for k, name in enumerate(schema.names):
        if (rows := verified[:, k]).any():
            metrics[f"credit/{name}"] = float((advantages[rows, k] != 0).mean())
            metrics[f"wrong_sign/{name}"] = float(wrong_sign[rows, k].mean())
    return metrics


def true_step_shares(
    chains: Sequence[Chain],
    examples: Sequence[Example],
    schema: CotSchema,
    scored: Bool[np.ndarray, "B S"],
) -> dict[str, float]:
    """``truth/<step>``: the share of truly correct steps among those a reward model scored.

    Beside the reward model's mean score it shows whether the score can be trusted. On a data set
    that knows no more than its annotation it equals the verifier's rewards.
    """
    verified = [
        verify(chain, fully_annotated(example), schema)
        for chain, example in zip(chains, examples, strict=True)
    ]
    correct = np.stack([rewards for rewards, _ in verified]) >= FULL_REWARD
    both = np.stack([known for _, known in verified]) & scored
    return {
        f"truth/{name}": float((correct & both)[:, k].sum() / count)
        for k, name in enumerate(schema.names)
        if (count := both[:, k].sum())
    }
