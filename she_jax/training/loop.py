"""The training loop."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

from she_jax.training.checkpoint import Checkpoints
from she_jax.types import TrainState


def check_data(host: Mapping[str, Any], data: str) -> None:
    """Checks that a checkpoint goes on with the data it began with.

    Raises:
      ValueError: if they have changed, for the position in them would mean nothing.
    """
    if host["data"] != data:
        raise ValueError(
            f"the pairs changed since the last checkpoint (data set {host['data']} then, "
            f"{data} now): put the old files back, or start anew in another --workdir"
        )


def finite(
    figures: Mapping[str, Any], phase: str, step: int, saved: Checkpoints
) -> dict[str, float]:
    """The figures as numbers.

    Raises:
      ValueError: if the loss or the gradient is no longer a number; nothing is saved after that.
    """
    part = "rl" if phase == "srpo" else "sft"
    numbers = {name: float(value) for name, value in figures.items()}
    if not math.isfinite(numbers["loss"]) or not math.isfinite(numbers["grad_norm"]):
        raise ValueError(
            f"{phase} step {step + 1}: loss {numbers['loss']}, gradient norm "
            f"{numbers['grad_norm']}. Stopped; the last good checkpoint is step "
            f"{saved.latest_step} in {saved.directory}. As a rule a lower "
            f"{part}.learning_rate helps, in another --workdir"
        )
    return numbers


class Lessons(Protocol):
    """What a policy learns from: its own rollouts (``online``), or chains kept (``offline``)."""

    title: str  # of the work, for the screen
    shown: tuple[str, ...]  # figures of an update that the screen shows

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON can: ``sampled_tokens`` so far is always there."""
        ...

    def begin(self, state: Mapping[str, Any], start: int) -> None:
        """Makes ready for update ``start``, from the state a checkpoint kept."""
        ...

    def batch(self, state: TrainState, step: int) -> tuple[Any, dict[str, float]]:
        """What update ``step`` reads, and figures about it."""
        ...

    def after(self, step: int, params: Any, figures: Mapping[str, float], last: bool) -> bool:
        """Takes note of ``step`` updates being done; says whether a checkpoint is due."""
        ...
