"""The hybrid reward of a step: the verifier where it is annotated, a reward model elsewhere."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from she_jax.types import StepBatch

COMBINATIONS = ("precedence", "mean", "gate", "verifier_only", "model_only")


def combine_rewards(
    steps: StepBatch, how: str, model_weight: float | Float[Array | np.ndarray, "S"] = 0.5
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """Combines verifier reward v and process reward model score m into one reward per step.

    - ``precedence``: v if known, else m.
    - ``mean``: (1 - w) v + w m if both are known, else whichever is known.
    - ``gate``: v if known, else m, but m only in rollouts whose label is correct (outcome 1). In
      other rollouts the step is unknown.
    - ``verifier_only``, ``model_only``: the other source is ignored.

    A step that the rollout lacks is known only if it was left out (see ``step_batch``). An unknown
    reward is 0, and stays out of its group's statistics if the mask is passed to the estimator.

    Reconstruction: the abstract of SHE (arXiv 2510.07972) names both parts of the hybrid. How they
    are combined could not be obtained. That a gated step is unknown, not wrong, is a guess.

    Args:
      steps: the rollouts' steps with verifier rewards and model scores.
      how: one of the above.
      model_weight: w in [0, 1], for all steps or one per step; used by ``mean`` only.

    Returns:
      Rewards in [0, 1], and a mask of the known ones.

    Raises:
      ValueError: if ``how`` is unknown.
    """
    verified = steps.step_mask & steps.verifier_known
    scored = steps.step_mask & steps.model_known
    if how == "verifier_only":
        weight, known = jnp.zeros(verified.shape), verified
    elif how == "model_only":
        weight, known = jnp.ones(verified.shape), scored
    elif how == "mean":
        shared = jnp.broadcast_to(jnp.asarray(model_weight, jnp.float32), verified.shape[1:])[None]
        weight, known = jnp.where(verified & scored, shared, scored * 1.0), verified | scored
    elif how in ("precedence", "gate"):
        if how == "gate":
            scored = scored & (steps.outcome >= 1)[:, None]
        weight, known = jnp.where(verified, 0.0, 1.0), verified | scored
    else:
        raise ValueError(f"combine={how!r}: expected one of {COMBINATIONS}")
    # Unknown entries may hold anything, NaN included, which a weight of 0 would not remove.
    verifier = jnp.where(verified, steps.verifier, 0.0)
    score = jnp.where(scored, steps.model_score, 0.0)
    return jnp.where(known, (1 - weight) * verifier + weight * score, 0.0), known
