"""What a run keeps an eye on while it trains: collapse of the exploration, and reward hacking."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WINDOW = 10  # updates over which everything here averages
DRIFT = 0.02  # by which both must rise for ``drift`` to speak
FALLEN = 0.3  # of the entropy a stage began with: below that the policy has collapsed
SILENT = 0.8  # share of groups without variance from which on an update teaches next to nothing
PATHS = 1.2  # paths a group below which its rollouts are all alike


class Watch:
    """Reads each update's figures and says what goes wrong, once a window.

    ``state`` goes into the checkpoint, so that a resumed run says the same.
    """

    def __init__(self):
        self._examined: list[list[float]] = []  # examiner's score and disagreement, last 2 windows
        self._recent: list[list[float]] = []  # entropy, zero variance, paths, last window
        self._began: float | None = None  # mean entropy of the first window

    def warnings(self, figures: Mapping[str, float]) -> list[str]:
        """What is wrong by now, in sentences that say what can be done; as a rule nothing.

        Args:
          figures: of an update, ``entropy``, ``zero_variance`` and ``paths`` among them, and with
            an examiner ``examiner`` and ``disagreement``.
        """
        found = []
        if "disagreement" in figures:
            self._examined.append([figures["examiner"], figures["disagreement"]])
            del self._examined[: -2 * WINDOW]
            if warning := drift(self._examined):
                found.append(warning)
                self._examined.clear()
        self._recent.append([figures[name] for name in ("entropy", "zero_variance", "paths")])
        if len(self._recent) == WINDOW:
            entropy = float(np.mean(self._recent, axis=0)[0])
            self._began = entropy if self._began is None else self._began
            found += collapse(self._recent, self._began)
            self._recent.clear()
        return found

    @property
    def state(self) -> dict[str, Any]:
        """All of it; JSON gives it back unchanged."""
        own = {"examined": self._examined, "recent": self._recent, "began": self._began}
        return {k: [list(row) for row in v] if isinstance(v, list) else v for k, v in own.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from such a state."""
        self._examined, self._recent = list(state["examined"]), list(state["recent"])
        self._began = state["began"]


def collapse(recent: Sequence[Sequence[float]], began: float) -> list[str]:
    """How the exploration collapses, if it does.

    Args:
      recent: entropy (nats a token), share of groups that the verifier cannot tell apart, and
        distinct paths a group, of some updates.
      began: the entropy at the beginning.
    """
    entropy, silent, paths = np.mean(recent, axis=0)
    found = []
    if entropy < FALLEN * began:
        found.append(
            f"the policy's entropy fell from {began:.3f} to {entropy:.3f} nats a token: it no "
            "longer explores. Lower rl.learning_rate, or raise rl.kl_weight or rl.temperature"
        )
    if silent > SILENT:
        found.append(
            f"the rollouts of {silent:.0%} of the groups are all alike to the verifier: next to "
            "nothing is left to learn from these prompts. Filter them anew (filter.pairs, a lower "
            "filter.high), aim at harder ones (rl.aim), refill the groups (rl.refill), or imitate "
            "right rollouts in their places (rl.replay)"
        )
    if paths < PATHS:
        found.append(
            f"a group takes {paths:.2f} different paths on average: its rollouts repeat each "
            "other. Raise rl.temperature, or choose prompts of higher path entropy "
            "(filter.min_entropy)"
        )
    return found


def drift(history: Sequence[Sequence[float]]) -> str:
    """What is wrong where the examiner's score rises while its agreement with the verifier falls.

    That is how a policy looks that learns to please the examiner (reward hacking). Compared are the
    means of the last ``WINDOW`` updates and of as many before.

    Args:
      history: ``examiner`` and ``disagreement`` of ``contradictions``, an update each, the last
        ``2 * WINDOW`` of them; with fewer there is nothing to say.

    Returns:
      A sentence, or "" where all is well.
    """
    if len(history) < 2 * WINDOW:
        return ""
    early, late = np.asarray(history).reshape(2, WINDOW, 2).mean(axis=1)
    if (late - early).min() < DRIFT:
        return ""
    return (
        f"over the last {WINDOW} updates the examiner's score rose from {early[0]:.3f} to "
        f"{late[0]:.3f} while its disagreement with the verifier rose from {early[1]:.3f} to "
        f"{late[1]:.3f}: the policy may be learning to please it. Read samples/, refresh the "
        "examiner (reward.refresh_every), or have more steps annotated"
    )
