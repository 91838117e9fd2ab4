"""The optimizer of every training run."""

from dataclasses import dataclass

import optax


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine schedule.

    Attributes:
      learning_rate: the peak.
      final_share: of the peak, at the end of the cosine.
      warmup: steps of the linear warm-up.
      b1, b2, weight_decay: of AdamW.
      clip_norm: bound on the norm of the whole gradient.

    Raises:
      ValueError: if the learning rate or the bound is not positive: either would train nothing, or
        away from the goal.
    """

    learning_rate: float
    final_share: float
    warmup: int
    b1: float
    b2: float
    weight_decay: float
    clip_norm: float

    def __post_init__(self):
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number")


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer for a run of so many steps, with the gradient clipped by its norm.

    The warm-up begins with 1 / (``warmup`` + 1) of the peak: no update has a learning rate of 0.
    """
    warmup = min(config.warmup, steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=config.learning_rate * config.final_share,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )
