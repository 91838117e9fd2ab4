"""Means and deviations within groups of rollouts: what every estimator is built from.

Rows of a group are contiguous, so that [B, ...] is [N, G, ...]. A reward of weight 0 takes no part.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from she_jax.rl.checks import FINITE, check_range


def _groups(rows: Array, group_size: int) -> Array:
    """Reshapes [B, ...] to [N, G, ...]."""
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: the group baseline needs at least 2")
    if not rows.shape[0] or rows.shape[0] % group_size:
        raise ValueError(
            f"{rows.shape[0]} rollouts do not divide into groups of {group_size}: "
            "pass whole groups, a group's rows contiguous"
        )
    return rows.reshape(-1, group_size, *rows.shape[1:])


def step_groups(
    step_rewards: Array | np.ndarray, weights: Array | np.ndarray, group_size: int
) -> tuple[Float[Array, "N G S"], Array]:
    """Step rewards, 0 where they have no weight, and their weights."""
    if not step_rewards.shape[1]:
        raise ValueError(
            f"step_rewards has shape {list(step_rewards.shape)}: expected a column for each step; "
            "for outcomes alone pass one column and a mask that is False"
        )
    check_range("step_rewards", step_rewards, FINITE, weights)
    reward = jnp.where(weights, step_rewards, 0.0)
    return _groups(reward, group_size), _groups(jnp.asarray(weights), group_size)


def outcome_as_step(
    outcome: Float[Array | np.ndarray, "B"], group_size: int
) -> tuple[Float[Array, "N G 1"], Bool[Array, "N G 1"]]:
    """The outcome reward in the form of a step that every rollout has, with its mask."""
    check_range("outcome", outcome, FINITE)
    reward = _groups(jnp.asarray(outcome, dtype=jnp.float32), group_size)[:, :, None]
    return reward, jnp.ones(reward.shape, dtype=bool)


def normalized_outcome(
    outcome: Float[Array | np.ndarray, "B"], group_size: int, eps: float, min_std: float
) -> Float[Array, "N G"]:
    """The outcome reward normalized within its group."""
    return normalize(*outcome_as_step(outcome, group_size), eps, min_std)[:, :, 0]


def pooled(
    step_rewards: Float[Array | np.ndarray, "B S"],
    weights: Int[Array | np.ndarray, "B S"] | Bool[Array | np.ndarray, "B S"],
    group_size: int,
    eps: float,
    min_std: float,
) -> Float[Array, "B S"]:
    """Z-scores of step rewards over all steps of all rollouts of a group, weighted."""
    groups = step_groups(step_rewards, weights, group_size)
    reward, pooled_weights = (x.reshape(x.shape[0], -1, 1) for x in groups)
    return normalize(reward, pooled_weights, eps, min_std).reshape(step_rewards.shape)


def normalize(
    reward: Float[Array, "N G S"],
    weights: Int[Array, "N G S"] | Bool[Array, "N G S"],
    eps: float,
    min_std: float,
) -> Float[Array, "N G S"]:
    """Weighted z-scores over axis 1; 0 at entries without weight and where nothing varies."""
    check_range("eps", eps, "[0, inf)")
    centered, sigma = center_and_std(reward, weights, min_std)
    return centered / (sigma + eps)


def center_and_std(
    reward: Float[Array, "N G S"],
    weights: Int[Array, "N G S"] | Bool[Array, "N G S"],
    min_std: float,
) -> tuple[Float[Array, "N G S"], Float[Array, "N 1 S"]]:
    """Weighted deviations from the mean over axis 1, and the std; 0 and 1 where nothing varies."""
    check_range("min_std", min_std, "[0, inf)")
    reward = reward.astype(jnp.float32)
    fractions = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1)
    centered = reward - (fractions * reward).sum(axis=1, keepdims=True)
    sigma = jnp.sqrt((fractions * jnp.square(centered)).sum(axis=1, keepdims=True))
    varies = ((weights > 0).sum(axis=1, keepdims=True) >= 2) & (sigma > min_std)
    return jnp.where((weights > 0) & varies, centered, 0.0), jnp.where(varies, sigma, 1.0)
