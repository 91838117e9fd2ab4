"""Advantages: how much better a rollout, or one of its steps, did than its group.

Shapes: B = N * G rollouts, a group's G rows contiguous, S steps, T tokens. An estimator is a
function of (step rewards, their mask, outcome rewards) that returns ``Advantages``;
``token_advantages`` lays them over the tokens. Everything is float32, masked, and zero where a
group has no spread. All estimators take the same, beside constants of their own:

    step_rewards: reward of each step, in [0, 1]; may hold anything where ``step_mask`` is False.
    step_mask: True where the rollout has the step and its reward is known; other steps take no
      part.
    outcome: reward R of the whole rollout.
    group_size: G, rollouts a prompt.
    step_tokens: how many tokens each step has (see ``she_jax.rl.steps.step_token_counts``); read by
      ``srpo_advantages`` and ``prorag_advantages``, None says that all have as many.
    eps: added to every standard deviation that divides (the population's, divided by n).
    tol: a standard deviation up to this counts as none, and what it would scale is 0.

They raise ValueError if the group has one rollout or B is no multiple of it.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from she_jax.types import Advantages

CRITICAL = ("first_error", "all", "outcome_consistent")


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
    correct_from: float | Float[Array, ""] | Float[Array, "B S"] = 0.5,
    eps: float = 1e-4,
    tol: float = 1e-6,
) -> Advantages:
    """Stepwise reward policy optimization: outcome and steps against their own group.

    For rollout i of a group and step index k, with mu and sigma over the rollouts that have step k:

        d[i, k] = (r[i, k] - mu[k]) / (sigma[k] + eps)
        outcome part = w_outcome * (R[i] - mean R) / (std R + eps)
        step part    = w_step * c[i, k] * d[i, k]

    d is 0 where fewer than two rollouts have the step or sigma[k] <= tol. The weights c put the
    learning on the critical steps:

    - ``first_error``: the first wrong step of a rollout weighs 1, every later step ``after_error``,
      since it reasons from a wrong premise; a right step counts only where some rollout of the
      group has it wrong.
    - ``all``: every weight is 1.
    - ``outcome_consistent``: 0 where the signs of d and of the outcome's advantage disagree, else
      1.

    A step without tokens, one that a rollout left out, is charged to the next one that has some:
    the step that was written in its place.

    Reconstruction: SRPO's equations (arXiv 2510.07972) could not be obtained. The normalisation per
    step index is SRaR's (arXiv 2605.17291); the critical weights, ``after_error`` and
    ``correct_from`` are our reading of "critical correct and incorrect steps".

    Args, beside those that all estimators have (see the module):
      w_outcome: weight of the outcome part, >= 0.
      w_step: weight of the step part, >= 0.
      critical: how the steps are weighed, as above.
      after_error: weight of the steps after the first wrong one, in [0, 1].
      correct_from: a step is right from this reward on, in (0, 1]; one for all or one a step. A
        verifier that gives credit in part wants 1 here: a half-right step is a wrong one.

    Raises:
      ValueError: if ``critical`` is unknown, too.
    """
    reward = _groups(jnp.where(step_mask, step_rewards, 0.0), group_size)
    mask = _groups(jnp.asarray(step_mask), group_size)
    whole = _outcome_advantages(outcome, group_size, eps, tol)
    d = _normalise(reward, mask, eps, tol)
    right_from = _groups(jnp.broadcast_to(correct_from, step_rewards.shape), group_size)
    wrong = mask & (reward < right_from)
    if critical == "first_error":
        wrong_before = (jnp.cumsum(wrong, axis=2) - wrong) > 0
        c = (wrong | wrong.any(axis=1, keepdims=True)) * jnp.where(wrong_before, after_error, 1.0)
    elif critical == "all":
        c = jnp.ones_like(d)
    elif critical == "outcome_consistent":
        c = (d * whole[:, :, None] >= 0).astype(d.dtype)
    else:
        raise ValueError(f"critical={critical!r}: expected one of {CRITICAL}")
    step = (w_step * c * d).reshape(step_rewards.shape)
    if step_tokens is not None:
        step = _onto_written(step, step_tokens > 0)
    return Advantages(outcome=w_outcome * whole.reshape(-1), step=step)


def grpo_advantages(
    step_rewards: Float[Array | np.ndarray, "B S"],
    step_mask: Bool[Array | np.ndarray, "B S"],
    outcome: Float[Array | np.ndarray, "B"],
    *,
    group_size: int,
    step_tokens: Int[Array | np.ndarray, "B S"] | None = None,
    eps: float = 1e-4,
    tol: float = 1e-6,
) -> Advantages:
    """Group relative policy optimization: A[i] = (R[i] - mean R) / (std R + eps).

    DeepSeekMath (arXiv 2402.03300), section 4.1.2, outcome supervision. Of the steps it reads the
    number only. Args: see the module.
    """
    del step_mask, step_tokens
    whole = _outcome_advantages(outcome, group_size, eps, tol)
    return _outcome_only(whole, step_rewards)


def rloo_advantages(
    step_rewards: Float[Array | np.ndarray, "B S"],
    step_mask: Bool[Array | np.ndarray, "B S"],
    outcome: Float[Array | np.ndarray, "B"],
    *,
    group_size: int,
    step_tokens: Int[Array | np.ndarray, "B S"] | None = None,
    eps: float = 1e-4,
    tol: float = 1e-6,
) -> Advantages:
    """REINFORCE leave-one-out: the baseline of a rollout is the mean of the others of its group.

        A[i] = R[i] - sum_{j != i} R[j] / (G - 1) = G / (G - 1) * (R[i] - mean R)

    Ahmadian et al. (arXiv 2402.14740). Nothing is divided by a deviation, so ``eps``
    is not read; nor are the steps, but for their number. Args: see the module.
    """
    del step_mask, step_tokens, eps
    centred, _ = _spread(*_outcome(outcome, group_size), tol)
    return _outcome_only(group_size / (group_size - 1) * centred[:, :, 0], step_rewards)


def dr_grpo_advantages(
    step_rewards: Float[Array | np.ndarray, "B S"],
    step_mask: Bool[Array | np.ndarray, "B S"],
    outcome: Float[Array | np.ndarray, "B"],
    *,
    group_size: int,
    step_tokens: Int[Array | np.ndarray, "B S"] | None = None,
    eps: float = 1e-4,
    tol: float = 1e-6,
) -> Advantages:
    """GRPO done right: A[i] = R[i] - mean R, so that easy and hard prompts weigh by their spread.

    Liu et al. (arXiv 2503.20783). Its other half is the loss's divisor, the
    normalisation ``constant`` of ``she_jax.rl.losses``. Nothing is divided by a deviation, so
    ``eps`` is not read; nor are the steps, but for their number. Args: see the module.
    """
    del step_mask, step_tokens, eps
    centred, _ = _spread(*_outcome(outcome, group_size), tol)
    return _outcome_only(centred[:, :, 0], step_rewards)


def process_advantages(
    step_rewards: Float[Array | np.ndarray, "B S"],
    step_mask: Bool[Array | np.ndarray, "B S"],
    outcome: Float[Array | np.ndarray, "B"],
    *,
    group_size: int,
    step_tokens: Int[Array | np.ndarray, "B S"] | None = None,
    eps: float = 1e-4,
    tol: float = 1e-6,
) -> Advantages:
    """GRPO with process supervision: a token answers for its own step and all steps after it.

    With mean and std over all step rewards of all rollouts of the group,

        z[i, k] = (r[i, k] - mean) / (std + eps)
        step part[i, k] = sum_{j >= k} z[i, j]

    DeepSeekMath (arXiv 2402.03300), section 4.1.3; eps is ours. A step without a known reward adds
    nothing, and its tokens still answer for the steps after it. The sums grow with the number of
    steps: mind the clamp of ``token_advantages``.

    Reconstruction: there a reward model scores every step, the last one with the answer in it, and
    nothing is added for the outcome. Here the reward of the ``label`` step is what tells the
    outcome, so the outcome part is 0, and tokens outside every step get nothing. Steps follow one
    another as in the schema, also in an ill-formed chain that has them in another order.

    Args: see the module; ``outcome`` is not read.
    """
    del step_tokens
    z = _pooled(step_rewards, step_mask, group_size, eps, tol)
    to_come = jnp.cumsum(z[:, ::-1], axis=1)[:, ::-1]
    return Advantages(outcome=jnp.zeros(outcome.shape, dtype=z.dtype), step=to_come)


def prorag_advantages(
    step_rewards: Float[Array | np.ndarray, "B S"],
    step_mask: Bool[Array | np.ndarray, "B S"],
    outcome: Float[Array | np.ndarray, "B"],
    *,
    group_size: int,
    step_tokens: Int[Array | np.ndarray, "B S"] | None = None,
    w_step: float | Float[Array, ""] = 0.3,
    eps: float = 1e-4,
    tol: float = 1e-6,
) -> Advantages:
    """ProRAG's dual granularity: the outcome against its group, the step against all its tokens.

        outcome part = (R[i] - mean R) / (std R + eps)
        step part    = w_step * (r[i, k] - mu) / (sigma + eps)

    mu and sigma are over all tokens of the group whose step has a known reward, each token bearing
    the reward of its step, so that long steps weigh more. Tokens without one get the outcome part
    only. Wang et al. (arXiv 2601.21912).

    Reconstruction: eps beside sigma, which the paper names for the outcome's deviation alone.

    Args, beside those that all estimators have (see the module):
      w_step: weight of the step part, >= 0.
    """
    whole = _outcome_advantages(outcome, group_size, eps, tol)
    weights = step_mask if step_tokens is None else jnp.where(step_mask, step_tokens, 0)
    steps = _pooled(step_rewards, weights, group_size, eps, tol)
    return Advantages(outcome=whole.reshape(-1), step=w_step * steps)


ESTIMATORS: Mapping[str, Callable[..., Advantages]] = {
    "srpo": srpo_advantages,
    "grpo": grpo_advantages,
    "rloo": rloo_advantages,
    "dr_grpo": dr_grpo_advantages,
    "process": process_advantages,
    "prorag": prorag_advantages,
}
STEPWISE = ("srpo", "process", "prorag")  # those that read the steps' rewards


def token_advantages(
    advantages: Advantages,
    step_ids: Int[Array | np.ndarray, "B T"],
    completion_mask: Bool[Array | np.ndarray, "B T"],
    *,
    clamp: float | Float[Array, ""] = 2.0,
    negative: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B T"]:
    """Lays advantages over the tokens: A[i, t] = outcome[i] + step[i, k(t)], limited.

    See ``limited``.

    Args:
      advantages: from an estimator.
      step_ids: step of each token, in [-1, S); a token outside every step (-1) gets the outcome
        part only.
      completion_mask: True on sampled tokens; every other token gets 0.
      clamp, negative: as for ``limited``.
    """
    own = jnp.take_along_axis(advantages.step, jnp.maximum(step_ids, 0), axis=1)
    total = advantages.outcome[:, None] + jnp.where(step_ids >= 0, own, 0.0)
    return jnp.where(completion_mask, limited(total, clamp=clamp, negative=negative), 0.0)


def limited(
    advantages: Float[Array, "..."],
    *,
    clamp: float | Float[Array, ""] = 2.0,
    negative: float | Float[Array, ""] = 1.0,
) -> Float[Array, "..."]:
    """Advantages within [-clamp, clamp], those below 0 with a weight of their own.

    The clamp of 2 is DyKnow-RAG's (arXiv 2510.11122). That what went right should weigh more than
    what went wrong is found by Arnal et al. (arXiv 2506.20520) for rollouts of another policy.

    Reconstruction: ``negative`` is ours; nothing that could be obtained says that the paper
    (arXiv 2510.07972) does so.

    Args:
      advantages: by step or by token.
      clamp: bound on the size of an advantage, > 0.
      negative: weight of an advantage below 0, in [0, 1]; at 0 what did worse than its group is
        left as it is, and the policy moves towards what did better alone.
    """
    bounded = jnp.clip(advantages, -clamp, clamp)
    return jnp.where(bounded < 0, negative * bounded, bounded)


def informative_groups(
    outcome: Float[Array | np.ndarray, "B"],
    step_rewards: Float[Array | np.ndarray, "B S"],
    step_mask: Bool[Array | np.ndarray, "B S"],
    *,
    group_size: int,
    tol: float = 1e-6,
) -> Bool[Array, "N"]:
    """Says which groups can teach something: those whose rollouts the verifier tells apart.

    Give it the verifier's own rewards. A shaped reward (a length bonus, say) differs between any
    two rollouts and would keep every group.

    Args:
      outcome: the verifier's reward of the whole rollout.
      step_rewards: the verifier's reward of each step.
      step_mask: True where the step exists and its reward is known; all False asks about the
        outcome alone, which is what outcome-only estimators can use.
      group_size: G, rollouts a prompt.
      tol: a standard deviation up to this counts as none.

    Raises:
      ValueError: if the group has one rollout or B is no multiple of it.
    """
    whole = _outcome_advantages(outcome, group_size, 1.0, tol)
    reward = _groups(jnp.where(step_mask, step_rewards, 0.0), group_size)
    steps = _normalise(reward, _groups(jnp.asarray(step_mask), group_size), 1.0, tol)
    return (whole != 0).any(axis=1) | (steps != 0).any(axis=(1, 2))


def _onto_written(
    step: Float[Array, "B S"], written: Bool[Array | np.ndarray, "B S"]
) -> Float[Array, "B S"]:
    """Moves what stands at a step without tokens to the next step with some; lost if none comes."""
    owed, columns = jnp.zeros(step.shape[0], step.dtype), []
    for k in range(step.shape[1]):
        total = owed + step[:, k]
        columns.append(jnp.where(written[:, k], total, 0.0))
        owed = jnp.where(written[:, k], 0.0, total)
    return jnp.stack(columns, axis=1)


def _groups(rows: Array, group_size: int) -> Array:
    """Reshapes [B, ...] to [N, G, ...]."""
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: the group baseline needs at least 2")
    if rows.shape[0] % group_size:
        raise ValueError(
            f"{rows.shape[0]} rollouts do not divide into groups of {group_size}: "
            "pass whole groups, a group's rows contiguous"
        )
    return rows.reshape(-1, group_size, *rows.shape[1:])


def _outcome(
    outcome: Float[Array | np.ndarray, "B"], group_size: int
) -> tuple[Float[Array, "N G 1"], Bool[Array, "N G 1"]]:
    """The outcome as a step that every rollout has."""
    reward = _groups(jnp.asarray(outcome, dtype=jnp.float32), group_size)[:, :, None]
    return reward, jnp.ones(reward.shape, dtype=bool)


def _outcome_advantages(
    outcome: Float[Array | np.ndarray, "B"], group_size: int, eps: float, tol: float
) -> Float[Array, "N G"]:
    return _normalise(*_outcome(outcome, group_size), eps, tol)[:, :, 0]


def _outcome_only(whole: Float[Array, "N G"], steps: Array | np.ndarray) -> Advantages:
    return Advantages(outcome=whole.reshape(-1), step=jnp.zeros(steps.shape, dtype=whole.dtype))


def _pooled(
    step_rewards: Float[Array | np.ndarray, "B S"],
    weights: Int[Array | np.ndarray, "B S"] | Bool[Array | np.ndarray, "B S"],
    group_size: int,
    eps: float,
    tol: float,
) -> Float[Array, "B S"]:
    """Z-scores of the rewards with weight, over all steps of all rollouts of their group."""

    def pool(rows: Array) -> Array:
        return _groups(rows, group_size).reshape(-1, group_size * rows.shape[1], 1)

    reward = pool(jnp.where(weights, step_rewards, 0.0))
    return _normalise(reward, pool(jnp.asarray(weights)), eps, tol).reshape(step_rewards.shape)


def _normalise(
    reward: Float[Array, "N G S"],
    weights: Int[Array, "N G S"] | Bool[Array, "N G S"],
    eps: float,
    tol: float,
) -> Float[Array, "N G S"]:
    """Z-scores over axis 1, of the entries with weight; 0 elsewhere and where nothing varies."""
    centred, sigma = _spread(reward, weights, tol)
    return centred / (sigma + eps)


def _spread(
    reward: Float[Array, "N G S"],
    weights: Int[Array, "N G S"] | Bool[Array, "N G S"],
    tol: float,
) -> tuple[Float[Array, "N G S"], Float[Array, "N 1 S"]]:
    """Entries less their mean over axis 1, and their deviation; 0 and 1 where nothing varies."""
    reward = reward.astype(jnp.float32)
    share = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1)
    centred = reward - (share * reward).sum(axis=1, keepdims=True)
    sigma = jnp.sqrt((share * jnp.square(centred)).sum(axis=1, keepdims=True))
    varies = ((weights > 0).sum(axis=1, keepdims=True) >= 2) & (sigma > tol)
    return jnp.where((weights > 0) & varies, centred, 0.0), jnp.where(varies, sigma, 1.0)
