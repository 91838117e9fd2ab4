"""The hybrid reward of a step: the verifier where it is annotated, a reward model elsewhere."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from she_jax.rewards.orm.model import OutcomeRewardModel
from she_jax.rewards.prm.model import ProcessRewardModel
from she_jax.rewards.prm.refresh import RefreshConfig
from she_jax.rewards.verifier import OutcomeRewardFn, StepRewardFn
from she_jax.types import StepBatch

COMBINATIONS = ("precedence", "gate", "verifier_only", "model_only")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Which rewards a run uses.

    Attributes:
      step: a user's step rewards in place of the verifier's, or None.
      outcome: a user's outcome rewards in place of the label's, or None.
      prm: folder of a process reward model, "" for none.
      orm: folder of an outcome reward model, "" for none.
      combine: how step rewards are combined, see ``combine_rewards``.
      votes: critiques a step; 0 reads the verdict directly, 1 takes the most likely critique.
      batch_size: chains that a reward model reads at a time.
      devices: devices reserved for the process reward model; 0 shares the policy's.
      format_weight: outcome reward of a well-formed chain with a wrong label, in [0, 1).
      refresh: how the process reward model keeps learning.

    Raises:
      ValueError: if a value is out of its range, or needs a process reward model.
    """

    step: StepRewardFn | None
    outcome: OutcomeRewardFn | None
    prm: str
    orm: str
    combine: str
    votes: int
    batch_size: int
    devices: int
    format_weight: float
    refresh: RefreshConfig

    def __post_init__(self):
        if self.combine not in COMBINATIONS:
            raise ValueError(f"reward.combine={self.combine!r}: expected one of {COMBINATIONS}")
        if self.votes < 0:
            raise ValueError(f"reward.votes={self.votes}: expected 0 (no critiques) or more")
        if self.batch_size < 1:
            raise ValueError(f"reward.batch_size={self.batch_size}: expected at least 1")
        if not 0 <= self.format_weight < 1:
            raise ValueError(
                f"rl.format_weight={self.format_weight}: expected a reward in [0, 1), below that "
                "of a correct label"
            )
        for name, value in (("refresh_every", self.refresh.every), ("devices", self.devices)):
            if value and not self.prm:
                raise ValueError(
                    f"reward.{name}={value} needs a process reward model: set reward.prm"
                )
        if self.combine == "model_only" and not self.prm:
            raise ValueError(
                "reward.combine='model_only' needs a process reward model: set reward.prm"
            )


@dataclass(frozen=True, kw_only=True)
class RewardSources:
    """Where the rewards of rollouts come from.

    Attributes:
      step: step rewards, where they are known; by default the verifier.
      outcome: outcome rewards.
      by_label: the outcome is unknown for a pair without a label; False for a user's own outcome.
      combine: how ``step`` and ``prm`` are combined, see ``combine_rewards``.
      prm: process reward model, or None.
      orm: outcome reward model, or None.
    """

    step: StepRewardFn
    outcome: OutcomeRewardFn
    by_label: bool = True
    combine: str = "precedence"
    prm: ProcessRewardModel | None = None
    orm: OutcomeRewardModel | None = None


def combine_rewards(
    steps: StepBatch, how: str
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"], Bool[Array, "B S"]]:
    """Combines verifier reward v and process reward model score m into one reward per step.

    - ``precedence``: v if known, else m.
    - ``gate``: v if known, else m, but m only in rollouts whose label is correct (outcome 1). In
      other rollouts the step is unknown.
    - ``verifier_only``, ``model_only``: the other source is ignored.

    A step that the rollout lacks is known only if it was left out (see ``annotation_reward``). An
    unknown reward is 0, and stays out of its group's statistics if the mask is passed to the
    estimator.

    Reconstruction: the abstract of SHE (arXiv 2510.07972) names both parts of the hybrid. How they
    are combined could not be obtained. That a gated step is unknown, not wrong, is a guess.

    Args:
      steps: the rollouts' steps with verifier rewards and model scores.
      how: one of the above.

    Returns:
      Rewards in [0, 1], a mask of the known ones, and a mask of those that are the verifier's.

    Raises:
      ValueError: if ``how`` is unknown.
    """
    if how not in COMBINATIONS:
        raise ValueError(f"combine={how!r}: expected one of {COMBINATIONS}")
    verified = steps.step_mask & steps.verifier_known & (how != "model_only")
    scored = steps.step_mask & steps.model_known & (how != "verifier_only")
    if how == "gate":
        scored = scored & (steps.outcome >= 1)[:, None]
    rewards = jnp.where(verified, steps.verifier, jnp.where(scored, steps.model_score, 0.0))
    return rewards, verified | scored, verified
