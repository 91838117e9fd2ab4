"""Credit assignment: step rewards in, token advantages out."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from she_jax.rewards.verifier import FULL_MARKS
from she_jax.rl.advantages import (
    ESTIMATORS,
    STEPWISE,
    informative_groups,
    limited,
    token_advantages,
)
from she_jax.rl.losses import token_weights
from she_jax.rl.steps import step_token_counts
from she_jax.training.workdir import Config
from she_jax.types import StepBatch


def make_creditor(config: Config) -> Callable[..., tuple[Array, Array, Array, Array]]:
    """Advantages by step and by token, token weights, and which groups carry signal."""
    rl = config.rl

    def credit(
        steps: StepBatch,
        rewards: Float[Array, "B S"],
        known: Bool[Array, "B S"],
        outcome: Float[Array, "B"],
        completion_mask: Bool[Array, "B T"],
    ):
        """Credits ``rewards`` and ``outcome`` of steps that stand where ``steps`` says."""
        told = rewards, known, outcome
        sizes = step_token_counts(steps.step_ids, completion_mask, rewards.shape[1])
        own: dict[str, Any] = {}
        if rl.estimator == "srpo":
            # The threshold is for the verifier's word; an examiner's is a probability.
            mixed = config.reward.combine == "mean"
            exact = steps.verifier_known & ~(mixed & steps.model_known)
            exact &= config.reward.combine != "model_only"
            own = rl.srpo.to_dict()
            own["correct_from"] = jnp.where(exact, min(rl.srpo.correct_from, FULL_MARKS), 0.5)
        advantages = ESTIMATORS[rl.estimator](
            *told, group_size=rl.group_size, step_tokens=sizes, tol=rl.tol, **own
        )
        bounds = {"clamp": rl.clamp, "negative": rl.negative}
        by_step = limited(advantages.step + advantages.outcome[:, None], **bounds)
        by_token = token_advantages(advantages, steps.step_ids, completion_mask, **bounds)
        weights = token_weights(completion_mask, steps.step_ids, rl.normalisation)
        # By the verifier's word: a model's scores differ between any two rollouts.
        seen = steps.step_mask & steps.verifier_known & (rl.estimator in STEPWISE)
        informative = informative_groups(
            steps.outcome, steps.verifier, seen, group_size=rl.group_size, tol=rl.tol
        )
        return by_step, by_token, weights, informative

    return credit
