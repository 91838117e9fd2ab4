"""Monitoring of training: warnings of collapsing exploration and of reward hacking."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WINDOW = 10  # updates to average over
DRIFT = 0.02  # least rise of both the reward model's score and its disagreement that is drift
FALLEN = 0.3  # below this fraction of the stage's initial entropy, the policy has collapsed
SILENT = 0.8  # above this share of groups without variance, an update has almost no signal
PATHS = 1.2  # below this number of distinct paths per group, its rollouts repeat each other


class TrainingMonitor:
    """Monitors the metrics of each update and warns, at most once per window.

    ``state`` is saved in the checkpoint, so that a resumed run gives the same warnings.
    """

    def __init__(self):
        self._history: list[list[float]] = []  # PRM score, disagreement; of the last 2 windows
        self._window: list[list[float]] = []  # entropy, zero variance, paths; of this window
        self._start_entropy: float | None = None  # mean entropy of the first window

    def warnings(self, metrics: Mapping[str, float]) -> list[str]:
        """Returns warnings, as sentences that name a remedy; usually none.

        Args:
          metrics: metrics of an update: ``entropy``, ``zero_variance`` and ``paths``, and with a
            process reward model also ``prm`` and ``disagreement``.
        """
        warnings = []
        if "disagreement" in metrics:
            self._history.append([metrics["prm"], metrics["disagreement"]])
            del self._history[: -2 * WINDOW]
            if warning := drift(self._history):
                warnings.append(warning)
                self._history.clear()
        self._window.append([metrics[name] for name in ("entropy", "zero_variance", "paths")])
        if len(self._window) == WINDOW:
            entropy = float(np.mean(self._window, axis=0)[0])
            self._start_entropy = entropy if self._start_entropy is None else self._start_entropy
            warnings += collapse(self._window, self._start_entropy)
            self._window.clear()
        return warnings

    @property
    def state(self) -> dict[str, Any]:
        """The complete state; survives JSON unchanged."""
        state = {"examined": self._history, "recent": self._window, "began": self._start_entropy}
        return {k: [list(row) for row in v] if isinstance(v, list) else v for k, v in state.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores a state."""
        self._history, self._window = list(state["examined"]), list(state["recent"])
        self._start_entropy = state["began"]


def collapse(recent: Sequence[Sequence[float]], began: float) -> list[str]:
    """Returns warnings of a collapse of exploration.

    Args:
      recent: for each of the last updates: entropy (nats per token), share of groups with equal
        verifier rewards, and distinct paths per group.
      began: the entropy at the start of the stage, in nats per token.
    """
    entropy, zero_variance, paths = np.mean(recent, axis=0)
    warnings = []
    if entropy < FALLEN * began:
        warnings.append(
            f"the policy's entropy fell from {began:.3f} to {entropy:.3f} nats a token: it no "
            "longer explores. Lower rl.learning_rate, or raise rl.kl_coef or rl.temperature"
        )
    if zero_variance > SILENT:
        warnings.append(
            f"in {zero_variance:.0%} of the groups all rollouts have the same verifier rewards: "
            "these prompts carry almost no learning signal. Filter them again (filter.pairs, a "
            "lower filter.high), sample harder ones (rl.difficulty), replace the groups "
            "(rl.dynamic_sampling_rounds), or imitate correct rollouts instead (rl.self_imitation)"
        )
    if paths < PATHS:
        warnings.append(
            f"a group has {paths:.2f} different paths on average: its rollouts repeat each "
            "other. Raise rl.temperature, or choose prompts of higher path entropy "
            "(filter.min_entropy)"
        )
    return warnings


def drift(history: Sequence[Sequence[float]]) -> str:
    """Warns if the reward model's scores rise while its agreement with the verifier falls.

    This is the sign of a policy that learns to exploit the reward model (reward hacking). The means
    of the last ``WINDOW`` updates are compared with those of the ``WINDOW`` updates before.

    Args:
      history: for each of the last ``2 * WINDOW`` updates: ``prm`` and ``disagreement`` of
        ``prm_diagnostics``. With fewer updates there is no warning.

    Returns:
      A sentence, or "" if there is nothing to warn of.
    """
    if len(history) < 2 * WINDOW:
        return ""
    early, late = np.asarray(history).reshape(2, WINDOW, 2).mean(axis=1)
    if (late - early).min() < DRIFT:
        return ""
    return (
        f"over the last {WINDOW} updates the reward model's score rose from {early[0]:.3f} to "
        f"{late[0]:.3f} while its disagreement with the verifier rose from {early[1]:.3f} to "
        f"{late[1]:.3f}: the policy may be learning to exploit it. Read samples/, refresh the "
        "reward model (reward.refresh_every), or have more steps annotated"
    )
