"""Keys and values of earlier recipes, and what they are called now, for a message of launch.py."""

import re
from typing import Any

KEYS = {
    "start": "init_from",
    "before": "prerequisite",
    "reward.model": "reward.prm",
    "reward.scalar": "reward.orm",
    "examiner": "prm",
    "scalar": "orm",
    "solve": "reference_sft",
    "rl.negative": "rl.negative_advantage_weight",
    "rl.normalisation": "rl.loss_aggregation",
    "rl.kl_weight": "rl.kl_coef",
    "rl.clamp": "rl.advantage_clip",
    "rl.tol": "rl.min_std",
    "rl.aim": "rl.difficulty",
    "rl.missed": "rl.unsolved_share",
    "rl.halvings": "rl.batch_compactions",
    "rl.refill": "rl.dynamic_sampling_rounds",
    "rl.replay": "rl.self_imitation",
}
VALUES = {("method", "online"): "rl", ("data.name", "made"): "prepared"}

_OLD_KEY = re.compile(rf"(?<![^.])({'|'.join(map(re.escape, KEYS))})(?![^.])")


def new_key(key: str) -> str:
    """A key with its old parts renamed: ``stages.a.rl.tol`` is ``stages.a.rl.min_std``.

    Not every recipe has the new key.
    """
    return _OLD_KEY.sub(lambda match: KEYS[match[0]], key)


def new_value(key: str, value: Any) -> str | None:
    """The new name of an old value of a key, None for any other value."""
    for (name, old), new in VALUES.items():
        if value == old and f".{key}".endswith(f".{name}"):
            return new
    return None
