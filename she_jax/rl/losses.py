"""Losses, computed from token log-probabilities.

A loss is a pair (sum, count). The caller adds the pairs of all micro-batches and devices and
divides once, so that the split of a batch does not change the result.
"""

import functools
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from she_jax.rl.checks import FINITE, check_range, check_step_ids, checked
from she_jax.types import TrainBatch

# exp of anything larger is useless as a ratio, and its square overflows.
MAX_LOG_RATIO = 20.0

Config = TypeVar("Config")

AGGREGATIONS = ("token", "sequence", "step", "constant")
ELSEWHERE = {  # what is looked for in ``LossConfig``, and where it is
    "kl_coef": "a field of she_jax.TrainBatch",
    "temperature": "a field of she_jax.TrainBatch",
    "aggregation": "an argument of she_jax.token_weights",
}


def _says_where(config: type[Config]) -> type[Config]:
    """The dataclass, which says where the options are that it does not have."""
    init = config.__init__

    @functools.wraps(init)
    def say_or_init(self: Config, **options: Any) -> None:
        if names := [name for name in options if name in ELSEWHERE]:
            raise ValueError(f"{config.__name__} has no {names[0]}: it is {ELSEWHERE[names[0]]}")
        init(self, **options)

    config.__init__ = say_or_init
    return config


@_says_where
@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Constants of the policy update; the weight of its KL term is ``TrainBatch.kl_coef``.

    Attributes:
      clip_low: the ratio is clipped from below at 1 - clip_low, in (0, 1].
      clip_high: the ratio is clipped from above at 1 + clip_high, > 0. 0.28 with a clip_low of 0.2
        is DAPO's "clip-higher" (arXiv 2503.14476).
      micro_batches: number of parts in which the batch is processed, >= 1.

    Raises:
      ValueError: if a value is out of its range.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    micro_batches: int = 1

    def __post_init__(self):
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low}: expected a value in (0, 1]")
        if not self.clip_high > 0:
            raise ValueError(f"clip_high={self.clip_high}: expected a value above 0")
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches={self.micro_batches}: expected at least 1")


@checked
def token_weights(
    completion_mask: Bool[Array | np.ndarray, "B T"],
    step_ids: Int[Array | np.ndarray, "B T"],
    aggregation: str,
) -> Float32[Array, "B T"]:
    """Token weights w, such that the loss is sum(w * l) / sum(w) over the whole batch.

    With ``constant`` the loss is sum(w * l) / sum(c), see ``loss_denominators``.

    Args:
      completion_mask: True on the tokens to train.
      step_ids: step of each token, -1 outside every step. Any id from 0 on is a step: only
        ``token_advantages`` knows how many there are, and refuses others.
      aggregation: what counts equally. ``token``: every token. ``sequence``: every sequence, whose
        weights sum to 1. ``step``: every step of every sequence, whose weights sum to 1; the tokens
        outside every step form one more. ``constant``: every token, over a constant length.

    Raises:
      ValueError: if ``aggregation`` is unknown, or outside of ``jit`` an id is below -1.
    """
    check_step_ids(step_ids, None)
    mask = jnp.asarray(completion_mask)
    weights = mask.astype(jnp.float32)
    if aggregation in ("token", "constant"):
        return weights
    if aggregation == "sequence":
        return weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
    if aggregation == "step":
        sizes = jax.vmap(_occurrences)(jnp.asarray(step_ids), mask)
        return weights / jnp.maximum(sizes, 1)
    raise ValueError(f"aggregation={aggregation!r}: expected one of {AGGREGATIONS}")


def loss_denominators(rows: int, slots: int, aggregation: str) -> Float32[Array, "B"] | None:
    """What each row adds to the denominator of the loss, if that is not the sum of its weights.

    With ``constant`` it is the maximum completion length, however long the completion is:

        loss = sum_t l_t / (B * slots)

    A token then weighs the same whatever the length of its own completion (``sequence`` spares the
    tokens of a long wrong one) and of the others in its batch (unlike with ``token``). Dr. GRPO,
    Liu et al. (arXiv 2503.20783).

    Args:
      rows: B, rollouts in the batch.
      slots: maximum number of tokens of a completion.
      aggregation: as in ``token_weights``.

    Returns:
      ``denominator`` of a ``TrainBatch``: [B] for ``constant``, otherwise None.

    Raises:
      ValueError: if ``aggregation`` is unknown, or ``slots`` below 1.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r}: expected one of {AGGREGATIONS}")
    if slots < 1:
        raise ValueError(f"slots={slots}: expected the maximum completion length, 1 or more")
    if aggregation == "constant":
        return jnp.full(rows, slots, dtype=jnp.float32)
    return None


@checked
def policy_loss(
    logps: Float[Array, "B T"], batch: TrainBatch, config: LossConfig
) -> tuple[tuple[Float32[Array, ""], Float32[Array, ""]], dict[str, Float32[Array, ""]]]:
    """The clipped policy loss with a KL term, as a sum over tokens.

        rho = exp(logps - old_logps)
        pg  = -min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A)
        k3  = exp(ref_logps - logps) - (ref_logps - logps) - 1
        sum = sum_t w * (pg + kl_coef * k3),  count = sum_t w, or sum_b denominator

    On ``batch.imitation_mask`` tokens rho is 1 with the gradient of logps, and k3 is 0: the
    gradient is that of the cross entropy, weighted by A.

    PPO (arXiv 1707.06347), equation 7, with a clip range that may be asymmetric; k3 as in
    DeepSeekMath (arXiv 2402.03300), equation 4. Log-ratios are clipped to +-20, beyond which exp
    only overflows. A token of weight 0 is ignored, whatever its values.

    Args:
      logps: log-probabilities under the policy at ``batch.temperature``, from
        ``she_jax.rl.logprobs.token_logps``.
      batch: advantages, weights and the log-probabilities to compare with.
      config: the clip range.

    Returns:
      (sum, count), of which the loss is ``sum / jnp.maximum(count, 1)``: a batch without weight has
      the count 0. And metrics as weighted sums, to be divided by the sum of the weights:
      ``pg_loss``, ``kl``, ``ratio``, ``clip_low`` and ``clip_high`` (share of tokens whose gradient
      is clipped) and ``logp_gap`` = |logps - old_logps|. Only ``logp_gap_max`` is a maximum, not a
      sum. Imitated tokens have a ratio of 1, a ``pg_loss`` of -A, and 0 in the rest.

    Raises:
      ValueError: if outside of ``jit`` a field of the batch is NaN or infinite where it counts.
    """
    check_train_batch(batch)
    weights = batch.loss_weights.astype(jnp.float32)
    trained = weights != 0

    def zero_untrained(values: Float[Array, "B T"]) -> Float32[Array, "B T"]:
        return jnp.where(trained, values.astype(jnp.float32), 0.0)

    logps, advantages = zero_untrained(logps), zero_untrained(batch.advantages)

    def comparison_logps(values: Float[Array, "B T"]) -> Float32[Array, "B T"]:
        values = zero_untrained(values)
        if batch.imitation_mask is None:
            return values
        return jnp.where(batch.imitation_mask, jax.lax.stop_gradient(logps), values)

    log_ratio = logps - comparison_logps(batch.old_logps)
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    pg = -jnp.minimum(ratio * advantages, clipped * advantages)
    if batch.ref_logps is None:
        kl = jnp.zeros_like(pg)
    else:
        to_ref = jnp.clip(comparison_logps(batch.ref_logps) - logps, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = jnp.exp(to_ref) - to_ref - 1
    gap = jnp.abs(log_ratio)
    metrics = {
        "pg_loss": pg,
        "kl": kl,
        "ratio": ratio,
        "clip_low": (ratio < 1 - config.clip_low) & (advantages < 0),
        "clip_high": (ratio > 1 + config.clip_high) & (advantages > 0),
        "logp_gap": gap,
    }
    sums = {name: (weights * values).sum() for name, values in metrics.items()}
    total = sums["pg_loss"] + batch.kl_coef * sums["kl"]
    count = (weights if batch.denominator is None else batch.denominator.astype(jnp.float32)).sum()
    return (total, count), sums | {"logp_gap_max": gap.max()}


def check_train_batch(batch: TrainBatch):
    """Refuses NaN, infinity, and constants outside of their ranges, where values are known.

    Raises:
      ValueError: with the field and the place.
    """
    check_range("batch.loss_weights", batch.loss_weights, FINITE)
    check_range("batch.advantages", batch.advantages, FINITE, batch.loss_weights)
    if batch.imitation_mask is None:  # its tokens have none
        check_range("batch.old_logps", batch.old_logps, FINITE, batch.loss_weights)
        if batch.ref_logps is not None:
            check_range("batch.ref_logps", batch.ref_logps, FINITE, batch.loss_weights)
    check_range("batch.temperature", batch.temperature, "(0, inf)")
    check_range("batch.kl_coef", batch.kl_coef, "[0, inf)")


@checked
def sft_loss(
    logps: Float[Array, "B T"], weights: Float[Array | np.ndarray, "B T"]
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Cross entropy of the tokens, as (sum_t w * -logps, sum_t w).

    Args:
      logps: log-probabilities under the model, from ``she_jax.rl.logprobs.token_logps``.
      weights: weight of each token, 0 where it is not trained.
    """
    weights = jnp.asarray(weights, dtype=jnp.float32)
    return -(weights * jnp.where(weights != 0, logps, 0.0)).sum(), weights.sum()


@checked
def dpo_loss(
    chosen: Float[Array, "M"],
    rejected: Float[Array, "M"],
    ref_chosen: Float[Array | np.ndarray, "M"],
    ref_rejected: Float[Array | np.ndarray, "M"],
    *,
    beta: float | Float[Array, ""],
) -> tuple[tuple[Float32[Array, ""], Float32[Array, ""]], dict[str, Float32[Array, ""]]]:
    """The loss of direct preference optimization for M pairs.

        reward(y) = beta * (log pi(y) - log ref(y))
        sum = -sum_m log sigmoid(reward(chosen[m]) - reward(rejected[m])),  count = M

    Rafailov et al. (arXiv 2305.18290), equation 7. The reward is its equation 5 up to a constant of
    the prompt.

    Args:
      chosen: log-probabilities of the preferred completions, as a whole, under the policy.
      rejected: log-probabilities of the other completions of the same prompts.
      ref_chosen: as ``chosen``, under the frozen reference policy.
      ref_rejected: as ``rejected``, under the frozen reference policy.
      beta: strength of the pull toward the reference policy, > 0.

    Returns:
      (sum, count), and metrics as sums to be divided by the count: ``accuracy`` (pairs with a
      margin above 0), ``margin`` (between the rewards), ``chosen`` and ``rejected`` (the rewards).
    """
    chosen_reward, rejected_reward = (
        beta * (jnp.asarray(logps, jnp.float32) - jnp.asarray(ref_logps, jnp.float32))
        for logps, ref_logps in ((chosen, ref_chosen), (rejected, ref_rejected))
    )
    margin = chosen_reward - rejected_reward
    metrics = {
        "accuracy": margin > 0,
        "margin": margin,
        "chosen": chosen_reward,
        "rejected": rejected_reward,
    }
    sums = {name: values.sum(dtype=jnp.float32) for name, values in metrics.items()}
    return (-jax.nn.log_sigmoid(margin).sum(), jnp.float32(chosen.shape[0])), sums


def _occurrences(ids: Int[Array, "T"], mask: Bool[Array, "T"]) -> Int[Array, "T"]:
    """Number of occurrences of each id under the mask. Sorts, so that ids need no bound."""
    ordered = jnp.sort(jnp.where(mask, ids, jnp.iinfo(ids.dtype).max))
    first, end = (jnp.searchsorted(ordered, ids, side=side) for side in ("left", "right"))
    return end - first
