"""Credit assignment: step rewards in, token advantages out. This is the method, SRPO.

For N prompts with G rollouts each (B = N * G rows, a group's rows contiguous), S steps, T tokens:

1. A step has a reward r[i, k] in [0, 1] if it is known: the verifier's where a human annotated it,
   a process reward model's elsewhere (``she_jax.rewards``). Every rollout has an outcome R[i].
2. A step is compared with the same step of its group:
   d[i, k] = (r[i, k] - mean_k) / (std_k + eps).
3. Critical steps count: c[i, k] is 0 where no rollout of the group has step k wrong; elsewhere 1,
   or ``after_error`` where rollout i has a wrong step before k.
4. The advantage of a token of step k is
   w_outcome * (R[i] - mean) / (std + eps) + w_step * c[i, k] * d[i, k],
   clipped; a negative advantage has a weight of its own.
5. The update (``she_jax.rl.update``) is the clipped policy loss on these advantages.

Points 2 to 4 are the estimator ``srpo_advantages``; the others have the same signature.
Reconstruction: SRPO's equations (arXiv 2510.07972) could not be obtained; see ``docs/method.md``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from she_jax.rl.advantages import clip_advantages, grpo_advantages, token_advantages
from she_jax.rl.steps import step_token_counts
from she_jax.types import Advantages


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """An estimator, its own options, and the limits of an advantage (``configs/base.py``, rl)."""

    estimator: Callable[..., Advantages]
    group_size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    min_std: float = 1e-6
    advantage_clip: float = 2.0
    negative_advantage_weight: float = 1.0

    def __post_init__(self):
        clip, weight = self.advantage_clip, self.negative_advantage_weight
        if not (0 <= weight <= 1 and self.min_std >= 0 and clip > 0):
            raise ValueError(
                f"rl.negative_advantage_weight={weight}: expected a weight in [0, 1]; rl.min_std="
                f"{self.min_std}: expected 0 or more; rl.advantage_clip={clip}: expected > 0"
            )


def assign_credit(
    config: CreditConfig,
    rewards: Float[Array, "B S"],
    known: Bool[Array, "B S"],
    verified: Bool[Array, "B S"],
    outcome: Float[Array, "B"],
    step_ids: Int[Array, "B T"],
    completion_mask: Bool[Array, "B T"],
) -> tuple[Float[Array, "B S"], Float[Array, "B T"]]:
    """Advantages of steps [B, S], for metrics and pages, and of tokens [B, T], for the loss; pure.

    Args:
      rewards: of the steps, in [0, 1]; read where ``known``.
      verified: True where the reward is the verifier's. Such a step is right from
        ``options["correct_from"]`` on; one scored by a reward model, from 1/2 on.
      outcome: reward of each rollout, in [0, 1].
      step_ids: the step of each token, -1 outside every step.
      completion_mask: True on sampled tokens.
    """
    options = dict(config.options)
    if "correct_from" in options:
        options["correct_from"] = jnp.where(verified, options["correct_from"], 0.5)
    options |= {"group_size": config.group_size, "min_std": config.min_std}
    tokens = step_token_counts(step_ids, completion_mask, rewards.shape[1])
    advantages = config.estimator(rewards, known, outcome, step_tokens=tokens, **options)
    limits = {"clip": config.advantage_clip, "negative_weight": config.negative_advantage_weight}
    by_step = clip_advantages(advantages.step + advantages.outcome[:, None], **limits)
    return by_step, token_advantages(advantages, step_ids, completion_mask, **limits)


def grpo_credit(config: CreditConfig, outcome: Float[Array, "B"]) -> Float[Array, "B"]:
    """The advantage that GRPO would give every token of each rollout, to compare with; pure.

    Args:
      config: whose groups and limits apply; its estimator and its options do not.
      outcome: reward of each rollout, in [0, 1].
    """
    rows = outcome.shape[0]
    advantages = grpo_advantages(
        jnp.zeros((rows, 1)),
        jnp.zeros((rows, 1), bool),
        outcome,
        group_size=config.group_size,
        min_std=config.min_std,
    )
    limits = {"clip": config.advantage_clip, "negative_weight": config.negative_advantage_weight}
    return clip_advantages(advantages.outcome, **limits)
