"""Advantages: how much better a rollout, or one of its steps, is than its group.

An estimator is a function of (step rewards, step mask, outcome rewards) that returns
``Advantages``; ``token_advantages`` maps them to tokens. Shapes: B = N * G rollouts with the G rows
of a group contiguous, S steps, T tokens. Results are float32, masked, and zero where a group has no
variance. All estimators share these arguments, and some have constants of their own:

    step_rewards: reward of each step, in [0, 1]; any value where ``step_mask`` is False. Estimators
      without a threshold (all but ``srpo_advantages``) take any finite number.
    step_mask: True where the rollout has the step and its reward is known; other steps are
      ignored.
    outcome: reward R of the whole rollout; any finite number, since it is only compared within its
      group. In a recipe it is in [0, 1].
    group_size: G, rollouts per prompt, >= 2.
    step_tokens: number of tokens of each step (see ``she_jax.rl.steps.step_token_counts``), used by
      ``srpo_advantages`` and ``prorag_advantages``; None for an equal number in all steps.
    eps: added to every standard deviation that divides (of the population, with divisor n), >= 0.
    min_std: a standard deviation of at most this counts as zero, and what it would scale is 0;
      >= 0.

They raise ValueError if ``group_size`` is below 2 or does not divide B, and for arguments that
``she_jax.rl.checks`` refuses: lists, other shapes and dtypes, and, outside of ``jit``, rewards and
constants outside of their ranges and step ids outside [-1, S).
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from she_jax.rl.checks import check_range, check_step_ids, checked
from she_jax.rl.groups import (
    center_and_std,
    normalize,
    normalized_outcome,
    outcome_as_step,
    pooled,
    step_groups,
)
from she_jax.types import Advantages

CRITICAL = ("first_error", "all")
SRPO_RANGES = {  # of the constants of ``srpo_advantages``
    "w_outcome": "[0, inf)",
    "w_step": "[0, inf)",
    "after_error": "[0, 1]",
    "correct_from": "(0, 1]",
}


@checked
def srpo_advantages(
    step_rewards: Float[Array | np.ndarray, "B S"],
    step_mask: Bool[Array | np.ndarray, "B S"],
    outcome: Float[Array | np.ndarray, "B"],
    *,
    group_size: int,
    step_tokens: Int[Array | np.ndarray, "B S"] | None = None,
    w_outcome: float | Float[Array, ""] = 1.0,
    w_step: float | Float[Array, ""] = 1.0,
    critical: str = "first_error",
    after_error: float | Float[Array, ""] = 0.5,
    correct_from: float | Float[Array, ""] | Float[Array, "B S"] = 1.0,
    eps: float = 1e-4,
    min_std: float = 1e-6,
) -> Advantages:
    """Stepwise reward policy optimization: outcome and steps, each normalized within the group.

    For rollout i of a group and step k, with mu and sigma over the rollouts that have step k:

        d[i, k] = (r[i, k] - mu[k]) / (sigma[k] + eps)
        outcome part = w_outcome * (R[i] - mean R) / (std R + eps)
        step part    = w_step * c[i, k] * d[i, k]

    d is 0 where fewer than two rollouts have the step or sigma[k] <= min_std. The weights c select
    the critical steps:

    - ``first_error``: 1 for the first wrong step of a rollout and ``after_error`` for every later
      step, which reasons from a wrong premise; a correct step counts only if some rollout of the
      group has it wrong.
    - ``all``: 1 for every step.

    A step without tokens, one that the rollout left out, passes its advantage on to the next step
    that has tokens, the one written in its place. If none follows, the advantage is dropped.

    Reconstruction: SRPO's equations (arXiv 2510.07972) could not be obtained. The normalization per
    step index is SRaR's (arXiv 2605.17291); the critical weights, ``after_error`` and
    ``correct_from`` are our reading of "critical correct and incorrect steps".

    Args, besides those shared by all estimators (``help("she_jax.rl.advantages")``):
      step_rewards: in [0, 1], where ``step_mask`` is True.
      outcome: any finite number; only differences within a group count.
      w_outcome: weight of the outcome part, >= 0.
      w_step: weight of the step part, >= 0.
      critical: how the steps are weighted, as above.
      after_error: weight of the steps after the first wrong one, in [0, 1].
      correct_from: least reward of a correct step, in (0, 1]; a scalar or one per step. At 1 a
        half-correct step counts as wrong; use 0.5 for the scores of a reward model, which are
        never quite 1.

    Raises:
      ValueError: also if ``critical`` is unknown.
    """
    values = w_outcome, w_step, after_error, correct_from
    for (name, interval), value in zip(SRPO_RANGES.items(), values, strict=True):
        check_range(name, value, interval)
    check_range("step_rewards", step_rewards, "[0, 1]", step_mask)
    reward, mask = step_groups(step_rewards, step_mask, group_size)
    outcome_part = normalized_outcome(outcome, group_size, eps, min_std)
    d = normalize(reward, mask, eps, min_std)
    threshold = jnp.broadcast_to(correct_from, step_rewards.shape).reshape(reward.shape)
    wrong = mask & (reward < threshold)
    if critical == "first_error":
        wrong_before = (jnp.cumsum(wrong, axis=2) - wrong) > 0
        c = (wrong | wrong.any(axis=1, keepdims=True)) * jnp.where(wrong_before, after_error, 1.0)
    elif critical == "all":
        c = jnp.ones_like(d)
    else:
        raise ValueError(f"critical={critical!r}: expected one of {CRITICAL}")
    step = (w_step * c * d).reshape(step_rewards.shape)
    if step_tokens is not None:
        step = _move_to_written(step, step_tokens > 0)
    return Advantages(outcome=w_outcome * outcome_part.reshape(-1), step=step)


@checked
def grpo_advantages(
    step_rewards: Float[Array | np.ndarray, "B S"],
    step_mask: Bool[Array | np.ndarray, "B S"],
    outcome: Float[Array | np.ndarray, "B"],
    *,
    group_size: int,
    step_tokens: Int[Array | np.ndarray, "B S"] | None = None,
    eps: float = 1e-4,
    min_std: float = 1e-6,
) -> Advantages:
    """Group relative policy optimization: A[i] = (R[i] - mean R) / (std R + eps).

    DeepSeekMath (arXiv 2402.03300), section 4.1.2, outcome supervision. Of the step arguments
    only the number of steps is used. Args: see ``help("she_jax.rl.advantages")``.
    """
    del step_mask, step_tokens
    normalized = normalized_outcome(outcome, group_size, eps, min_std)
    return _outcome_only(normalized, step_rewards)


@checked
def rloo_advantages(
    step_rewards: Float[Array | np.ndarray, "B S"],
    step_mask: Bool[Array | np.ndarray, "B S"],
    outcome: Float[Array | np.ndarray, "B"],
    *,
    group_size: int,
    step_tokens: Int[Array | np.ndarray, "B S"] | None = None,
    eps: float = 1e-4,
    min_std: float = 1e-6,
) -> Advantages:
    """REINFORCE leave-one-out: the baseline is the mean reward of the rest of the group.

        A[i] = R[i] - sum_{j != i} R[j] / (G - 1) = G / (G - 1) * (R[i] - mean R)

    Ahmadian et al. (arXiv 2402.14740). No standard deviation divides, so ``eps`` is ignored; of
    the step arguments only the number of steps is used. Args: see
    ``help("she_jax.rl.advantages")``.
    """
    del step_mask, step_tokens, eps
    centered, _ = center_and_std(*outcome_as_step(outcome, group_size), min_std)
    return _outcome_only(group_size / (group_size - 1) * centered[:, :, 0], step_rewards)


@checked
def dr_grpo_advantages(
    step_rewards: Float[Array | np.ndarray, "B S"],
    step_mask: Bool[Array | np.ndarray, "B S"],
    outcome: Float[Array | np.ndarray, "B"],
    *,
    group_size: int,
    step_tokens: Int[Array | np.ndarray, "B S"] | None = None,
    eps: float = 1e-4,
    min_std: float = 1e-6,
) -> Advantages:
    """Dr. GRPO (GRPO done right): A[i] = R[i] - mean R.

    Liu et al. (arXiv 2503.20783). Without the division by std R, a prompt weighs in proportion to
    the spread of its rewards. The other half of the method is the denominator of the loss, that of
    the aggregation ``constant`` in ``she_jax.rl.losses``. ``eps`` is ignored; of the step arguments
    only the number of steps is used. Args: see ``help("she_jax.rl.advantages")``.
    """
    del step_mask, step_tokens, eps
    centered, _ = center_and_std(*outcome_as_step(outcome, group_size), min_std)
    return _outcome_only(centered[:, :, 0], step_rewards)


@checked
def process_advantages(
    step_rewards: Float[Array | np.ndarray, "B S"],
    step_mask: Bool[Array | np.ndarray, "B S"],
    outcome: Float[Array | np.ndarray, "B"],
    *,
    group_size: int,
    step_tokens: Int[Array | np.ndarray, "B S"] | None = None,
    eps: float = 1e-4,
    min_std: float = 1e-6,
) -> Advantages:
    """GRPO with process supervision: a token's advantage sums over its step and all later steps.

    With mean and std over all step rewards of all rollouts of the group,

        z[i, k] = (r[i, k] - mean) / (std + eps)
        step part[i, k] = sum_{j >= k} z[i, j]

    DeepSeekMath (arXiv 2402.03300), section 4.1.3; eps is ours. A step without a known reward adds
    nothing, and its tokens still get the sum over later steps. The sums grow with the number of
    steps, so the ``clip`` of ``token_advantages`` may bind.

    Reconstruction: in the paper a reward model scores every step, the last one containing the
    answer, and there is no separate outcome reward. Here the reward of the ``label`` step carries
    the outcome, so the outcome part is 0, and tokens outside every step have advantage 0. Steps are
    summed in the schema's order, even for an ill-formed chain that orders them differently.

    Args: see ``help("she_jax.rl.advantages")``; ``outcome`` is used for its shape only.
    """
    del step_tokens
    z = pooled(step_rewards, step_mask, group_size, eps, min_std)
    rewards_to_go = jnp.cumsum(z[:, ::-1], axis=1)[:, ::-1]
    return Advantages(outcome=jnp.zeros(outcome.shape, dtype=z.dtype), step=rewards_to_go)


@checked
def prorag_advantages(
    step_rewards: Float[Array | np.ndarray, "B S"],
    step_mask: Bool[Array | np.ndarray, "B S"],
    outcome: Float[Array | np.ndarray, "B"],
    *,
    group_size: int,
    step_tokens: Int[Array | np.ndarray, "B S"] | None = None,
    w_step: float | Float[Array, ""] = 0.3,
    eps: float = 1e-4,
    min_std: float = 1e-6,
) -> Advantages:
    """ProRAG's dual granularity: outcomes normalized over rollouts, steps over the group's tokens.

        outcome part = (R[i] - mean R) / (std R + eps)
        step part    = w_step * (r[i, k] - mu) / (sigma + eps)

    mu and sigma are over all tokens of the group whose step has a known reward. Each token counts
    with the reward of its step, so long steps weigh more. Other tokens get the outcome part only.
    Wang et al. (arXiv 2601.21912).

    Reconstruction: eps is added to sigma too; the paper adds it to the outcome's deviation only.

    Args, besides those shared by all estimators (``help("she_jax.rl.advantages")``):
      w_step: weight of the step part, >= 0.
    """
    check_range("w_step", w_step, "[0, inf)")
    outcome_part = normalized_outcome(outcome, group_size, eps, min_std)
    weights = step_mask if step_tokens is None else jnp.where(step_mask, step_tokens, 0)
    steps = pooled(step_rewards, weights, group_size, eps, min_std)
    return Advantages(outcome=outcome_part.reshape(-1), step=w_step * steps)


ESTIMATORS: Mapping[str, Callable[..., Advantages]] = {
    "srpo": srpo_advantages,
    "grpo": grpo_advantages,
    "rloo": rloo_advantages,
    "dr_grpo": dr_grpo_advantages,
    "process": process_advantages,
    "prorag": prorag_advantages,
}
STEPWISE = ("srpo", "process", "prorag")  # the estimators that use step rewards


@checked
def token_advantages(
    advantages: Advantages,
    step_ids: Int[Array | np.ndarray, "B T"],
    completion_mask: Bool[Array | np.ndarray, "B T"],
    *,
    clip: float | Float[Array, ""] = 2.0,
    negative_weight: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B T"]:
    """Maps advantages to tokens: A[i, t] = outcome[i] + step[i, k(t)], by ``clip_advantages``.

    Args:
      advantages: from an estimator.
      step_ids: step of each token, in [-1, S); a token outside every step (-1) gets the outcome
        part only. Inside ``jit``, where values cannot be checked, so does any other id.
      completion_mask: True on sampled tokens; the advantage of any other token is 0.
      clip: as for ``clip_advantages``.
      negative_weight: as for ``clip_advantages``.
    """
    steps = advantages.step.shape[1]
    check_step_ids(step_ids, steps)
    step_advantages = jnp.take_along_axis(advantages.step, step_ids, axis=1, mode="clip")
    in_step = (step_ids >= 0) & (step_ids < steps)
    total = advantages.outcome[:, None] + jnp.where(in_step, step_advantages, 0.0)
    return jnp.where(
        completion_mask, clip_advantages(total, clip=clip, negative_weight=negative_weight), 0.0
    )


@checked
def clip_advantages(
    advantages: Float[Array, "..."],
    *,
    clip: float | Float[Array, ""] = 2.0,
    negative_weight: float | Float[Array, ""] = 1.0,
) -> Float[Array, "..."]:
    """Clips advantages to [-clip, clip], then scales the negative ones.

    The clip at 2 is DyKnow-RAG's (arXiv 2510.11122). Arnal et al. (arXiv 2506.20520) find that
    positive advantages should weigh more than negative ones in off-policy training.

    Reconstruction: ``negative_weight`` is ours; what could be obtained of the paper (arXiv
    2510.07972) does not mention such a weight.

    Args:
      advantages: per step or per token.
      clip: bound on the absolute value of an advantage, > 0; infinity for no bound.
      negative_weight: weight of negative advantages, in [0, 1]; at 0 the policy learns only from
        what is better than its group.
    """
    check_range("clip", clip, "(0, inf]")
    check_range("negative_weight", negative_weight, "[0, 1]")
    bounded = jnp.clip(advantages, -clip, clip)
    return jnp.where(bounded < 0, negative_weight * bounded, bounded)


@checked
def informative_groups(
    outcome: Float[Array | np.ndarray, "B"],
    step_rewards: Float[Array | np.ndarray, "B S"],
    step_mask: Bool[Array | np.ndarray, "B S"],
    *,
    group_size: int,
    min_std: float = 1e-6,
) -> Bool[Array, "N"]:
    """Returns which groups carry a learning signal: those in which the verifier's rewards differ.

    Pass the verifier's own rewards. A shaped reward (with a length bonus, say) differs between any
    two rollouts and would keep every group.

    Args:
      outcome: the verifier's reward of the whole rollout, any finite number.
      step_rewards: the verifier's reward of each step, any finite number where ``step_mask``.
      step_mask: True where the step exists and its reward is known; all False to consider the
        outcome only, as outcome-only estimators do.
      group_size: G, rollouts per prompt, >= 2.
      min_std: a standard deviation of at most this counts as zero.

    Returns:
      True for a group whose outcome, or whose reward of some step, varies among its rollouts.

    Raises:
      ValueError: if ``group_size`` is below 2 or does not divide B.
    """
    outcome_z = normalized_outcome(outcome, group_size, 1.0, min_std)
    step_z = normalize(*step_groups(step_rewards, step_mask, group_size), 1.0, min_std)
    return (outcome_z != 0).any(axis=1) | (step_z != 0).any(axis=(1, 2))


def _move_to_written(
    step: Float[Array, "B S"], written: Bool[Array | np.ndarray, "B S"]
) -> Float[Array, "B S"]:
    """Adds the advantage of a step without tokens to the next step with tokens, if any."""
    carried, columns = jnp.zeros(step.shape[0], step.dtype), []
    for k in range(step.shape[1]):
        total = carried + step[:, k]
        columns.append(jnp.where(written[:, k], total, 0.0))
        carried = jnp.where(written[:, k], 0.0, total)
    return jnp.stack(columns, axis=1)


def _outcome_only(outcome: Float[Array, "N G"], steps: Array | np.ndarray) -> Advantages:
    return Advantages(outcome=outcome.reshape(-1), step=jnp.zeros(steps.shape, dtype=outcome.dtype))
